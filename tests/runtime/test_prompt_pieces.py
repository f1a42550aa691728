"""A prompt in pieces: behind the last attention, those in front of the last piece have no row to compute."""

import pytest
from engines_of_modes import CONFIG, MODES, random_engine

from tensorrt_llm import Limits
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime import SamplingConfig, Session
from tensorrt_llm.runtime.batch import Batch, Row
from tensorrt_llm.runtime.request import Request

LIMITS = Limits(max_batch_size=4, max_input_len=48, max_output_len=16, max_num_tokens=128, tokens_per_block=16)
MODES_AND_STATIC = MODES | {"smooth static": QuantMode.use_smooth_quant()}


@pytest.fixture(params=["cpu", "cpu without C", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu without C":
        monkeypatch.setattr("tensorrt_llm.kernels.cpu.native_kernels", dict)
    return str(request.param.split()[0])


@pytest.mark.parametrize("mode", MODES_AND_STATIC)
def test_pieces_without_logits_leave_the_last_one_what_it_needs(mode: str, device: str) -> None:
    engine = random_engine(MODES_AND_STATIC[mode], CONFIG, LIMITS)
    request = Request(0, list(range(40)), SamplingConfig().for_sequence(0, 1))
    request.blocks = [1, 2, 3]
    whole, in_pieces = (Session(engine, device, kv_cache_tokens=64, use_cuda_graphs=False) for _ in range(2))
    wanted = whole.run(Batch((Row(request, 0, 40, 1),))).clone()
    for start, length in ((0, 1), (1, 17)):
        assert in_pieces.run(Batch((Row(request, start, length, 0),))).shape == (0, CONFIG.vocab_size)
    got = in_pieces.run(Batch((Row(request, 18, 22, 1),)))
    # Float16 rounds what four products and an attention of each layer give; int8 activations may take another step.
    tolerance = 0.05 if "smooth" in mode else 0.01
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert wanted.std() > 0.1, "the prompt decides something"
