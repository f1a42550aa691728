"""Ranks that share a model compute what one rank computes: networks and weight splits fit together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from compiling.compile_model import compile_model
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Limits, Mapping
from tensorrt_llm.kernels import StepShape, reference_kernels
from tensorrt_llm.models import QWenConfig, QWenForCausalLM

LIMITS = Limits(max_batch_size=2, max_input_len=16, max_output_len=8, max_num_tokens=16, tokens_per_block=4)
# Two prompts of 7 and 3 tokens in blocks of 4.
STEP = StepShape(10, 2, 2, 10, 7, 7)
VOCAB = 97  # odd, so that lm_head is padded


def engines_of(checkpoint: Path, tp_size: int) -> list[Engine]:
    config = QWenConfig.from_hf_dir(checkpoint)
    engines = []
    for rank in range(tp_size):
        mapping = Mapping(world_size=tp_size, rank=rank, tp_size=tp_size)
        model = QWenForCausalLM(config, "float32", mapping)
        load_from_hf_qwen(model, checkpoint, config, mapping)
        engines.append(compile_model(model, LIMITS))
    return engines


def step_inputs(engine: Engine) -> dict[str, torch.Tensor]:
    config = engine.config
    pool = (4, 2, config.num_kv_heads_per_rank, LIMITS.tokens_per_block, config.head_size)
    ids = torch.randint(VOCAB, (10,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    positions = [*range(7), *range(3)]
    numbers = {
        "position_ids": positions,
        "query_starts": [0, 7, 10],
        "sequence_length": [7, 3],
        "context_lengths": [7, 3],
        "block_tables": [[1, 2], [3, 0]],
        "last_token_ids": list(range(10)),
    }
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    pools = {f"past_key_value_{layer}": torch.zeros(pool) for layer in range(config.num_layers)}
    return {"input_ids": ids} | tensors | pools


def logits_of(engines: list[Engine]) -> torch.Tensor:
    """All ranks' plans, node by node side by side; where they talk to each other, so do they here."""
    kernels = reference_kernels()
    ranks: list[dict[str, Any]] = [step_inputs(engine) | dict(engine.weights.items()) for engine in engines]
    for nodes in zip(*(engine.plan.nodes for engine in engines), strict=True):
        op, attrs = nodes[0].op, nodes[0].attrs
        operands = [[values[name] for name in node.inputs] for values, node in zip(ranks, nodes, strict=True)]
        if op == "allreduce":
            made = [torch.stack([given[0] for given in operands]).sum(0)] * len(ranks)
        elif op == "allgather":
            made = [torch.cat([given[0] for given in operands], dim=int(attrs["gather_dim"]))] * len(ranks)
        else:
            step = {"step": STEP} if kernels[op].needs_step else {}
            made = [kernels[op].run(*given, **attrs, **step) for given in operands]
        for values, node, results in zip(ranks, nodes, made, strict=True):
            results = results if isinstance(results, tuple) else (results,)
            values.update({spec.name: result for spec, result in zip(node.outputs, results, strict=True)})
    logits = [values[engine.plan.outputs["logits"]] for values, engine in zip(ranks, engines, strict=True)]
    assert all(torch.equal(logits[0], other) for other in logits)
    return logits[0][:, :VOCAB]


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("num_kv_heads", [None, 1, 2, 4])
def test_several_ranks_give_the_logits_of_one(num_kv_heads: int | None, tp_size: int, tmp_path: Path) -> None:
    if num_kv_heads is None:
        checkpoint = write_qwen1_checkpoint(tmp_path, heads=4, vocab=VOCAB)
    else:
        checkpoint = write_qwen2_checkpoint(tmp_path, heads=4, num_kv_heads=num_kv_heads, vocab=VOCAB, tie=True)
    expected = logits_of(engines_of(checkpoint, 1))
    # Sums are taken in another order: some roundings of float32 over 48 terms and two layers.
    assert (logits_of(engines_of(checkpoint, tp_size)) - expected).abs().max() <= 1e-5 * expected.abs().max()
