"""Decode steps in padded buckets give what plain steps give, and on a GPU replayed graphs do."""

import numpy as np
import pytest
import torch
from models_for_tests import make_config, make_engine, random_prompts

from tensorrt_llm import Limits
from tensorrt_llm.kernels import StepShape
from tensorrt_llm.runtime import Request, SamplingConfig, Session
from tensorrt_llm.runtime.batch import Batch, Row
from tensorrt_llm.runtime.decode_graphs import bucket_for
from tensorrt_llm.runtime.step_inputs import StepInputs, pack_decodes, views

LIMITS = Limits(max_batch_size=6, max_input_len=64, max_output_len=36, max_num_tokens=256, tokens_per_block=4)
LENGTHS = (3, 4, 17, 40, 9)  # at a block's end, behind it, in between


def make_requests() -> list[Request]:
    """Prompts with blocks for one token more, numbered from 1."""
    requests, next_block = [], 1
    for index, prompt in enumerate(random_prompts(LENGTHS, vocab_size=11)):
        request = Request(index, prompt, SamplingConfig().for_sequence(0, 1))
        count = len(prompt) // LIMITS.tokens_per_block + 1
        request.blocks = list(range(next_block, next_block + count))
        next_block += count
        requests.append(request)
    return requests


def prefill(session: Session, requests: list[Request]) -> None:
    session.run(Batch(tuple(Row(request, 0, request.context_length, 1) for request in requests)))
    for request in requests:
        request.token_ids.append(request.id % 11)


def decodes(requests: list[Request]) -> Batch:
    return Batch(tuple(Row(request, len(request.token_ids) - 1, 1, 1) for request in requests))


@pytest.mark.parametrize(("batch_size", "max_blocks"), [(5, 16), (6, 25), (8, 16)])
def test_padding_changes_no_row(batch_size: int, max_blocks: int) -> None:
    session = Session(make_engine(make_config(num_hidden_layers=2), limits=LIMITS), "cpu")
    requests = make_requests()
    prefill(session, requests)
    expected = session.run(decodes(requests))
    integers, arrays = pack_decodes(decodes(requests), batch_size, max_blocks)
    shape = StepShape(batch_size, batch_size, 0, 0, 1, max_blocks * LIMITS.tokens_per_block)
    padded = session._run_step(StepInputs(views(torch.from_numpy(integers), arrays), shape))
    # Float32 sums of 8 to 12 terms, in an order that the number of rows may change.
    torch.testing.assert_close(padded[: len(requests)], expected, rtol=1e-5, atol=1e-5)


def test_padding_rows_write_to_the_scratch_block_alone() -> None:
    session = Session(make_engine(limits=LIMITS), "cpu")
    requests = make_requests()
    prefill(session, requests)
    before = {name: pool.clone() for name, pool in session._pools.items()}
    integers, arrays = pack_decodes(decodes(requests), 8, 16)
    session._run_step(StepInputs(views(torch.from_numpy(integers), arrays), StepShape(8, 8, 0, 0, 1, 64)))
    written = {request.blocks[(len(request.token_ids) - 1) // LIMITS.tokens_per_block] for request in requests} | {0}
    for name, pool in session._pools.items():
        changed = (pool != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= written


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [(1, 3, (1, 1)), (3, 4, (4, 4)), (5, 17, (6, 16)), (6, 99, (6, 25)), (2, 64, (2, 25))],
)
def test_a_bucket_is_the_smallest_that_holds_the_batch(rows: int, longest: int, expected: tuple[int, int]) -> None:
    request = Request(0, [1] * (longest + 1), SamplingConfig().for_sequence(0, 1))
    assert bucket_for(Batch((Row(request, longest, 1, 1),) * rows), LIMITS) == expected


def test_the_arrays_of_a_bucket_have_the_same_shapes_for_every_batch() -> None:
    requests = make_requests()
    shapes = [
        {name: array.shape for name, array in pack_decodes(decodes(chosen), 8, 25)[1].items()}
        for chosen in (requests, requests[:1])
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_replayed_graphs_give_the_logits_of_plain_steps(dtype: str) -> None:
    engine = make_engine(make_config(hidden_size=64, head_size=32, num_hidden_layers=2), dtype, LIMITS)
    logits = []
    for use_cuda_graphs in (False, True):
        session = Session(engine, "cuda", use_cuda_graphs=use_cuda_graphs)
        requests = make_requests()
        prefill(session, requests)
        steps = []
        for step in range(3):  # the first captures, the others replay
            steps.append(session.run(decodes(requests)).cpu().numpy().copy())
            for request in requests:
                request.token_ids.append((request.id + step) % 11)
                if len(request.token_ids) > len(request.blocks) * LIMITS.tokens_per_block:
                    request.blocks.append(max(max(other.blocks) for other in requests) + 1)
        logits.append(np.stack(steps))
    # cuBLAS may choose another kernel for the padded batch: some units in the last place of the dtype.
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(logits[0], logits[1], rtol=tolerance, atol=tolerance)
