"""Products of a few tokens whose weight comes through rings, against the reference in float64: needs a GPU.

Triton's interpreter has no Gluon; what is compiled for Hopper is read in test_cuda_sass.py, the choice is tested in
test_tactics.py.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import quantized_reference, reference
from tensorrt_llm.kernels.cuda.dense import multiply
from tensorrt_llm.kernels.cuda.epilogue import interleaved
from tensorrt_llm.kernels.cuda.linear import matmul, matmul_by
from tensorrt_llm.kernels.cuda.smooth_quant import prepare_smooth_quant_gated_mlp, smooth_quant_gemm_by
from tensorrt_llm.kernels.cuda.smooth_quant import smooth_quant_gated_mlp_by as integer_gated_mlp_by
from tensorrt_llm.kernels.cuda.splits import Arrivals
from tensorrt_llm.kernels.cuda.weight_only import (
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    weight_only_gated_mlp_by,
    weight_only_quant_matmul_by,
)
from tensorrt_llm.kernels.tactics import MatmulShape, Tactic, Tactics, bucket_of, heuristic
from tensorrt_llm.quantization.quantize import pack_int4

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]
TOKENS = (2, 8, 13, 32, 50)
# Rows of a tile, stages, warps, programs of a tile; rows and columns of the weight.
NUMBERS = ((64, 4, 4, 2), (32, 5, 2, 3), (64, 3, 4, 1), (128, 2, 8, 2))
SHAPES = ((192, 512), (208, 1408), (4096, 11008), (96, 1296))


def ring_tiles(tokens: int, columns: int, numbers: tuple[int, int, int, int]) -> Tactic:
    row_tile, num_stages, num_warps, num_splits = numbers
    token_tile = max(8, 1 << (tokens - 1).bit_length())
    return Tactic("ring_tiles", token_tile, row_tile, columns, num_stages, num_warps, num_splits)


def tactics_for(shape: MatmulShape, tokens: int, tactic: Tactic) -> Tactics:
    return Tactics({(shape, bucket_of(tokens)): tactic})


def assert_sums(got: torch.Tensor, wanted: torch.Tensor, dtype: str, depth: int) -> None:
    """Sums of `depth` products whose squares add up to about one, and one rounding.

    Tensor cores cut off what lies below the last bit of a float32 sum, always towards zero, once for each 16 products.
    """
    tolerance = torch.finfo(torch_dtype(dtype)).eps + torch.finfo(torch.float32).eps * (16 + depth / 16)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize(("rows", "depth"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_floats(
    device: torch.device, dtype: str, out_dtype: str, rows: int, depth: int, numbers: Any, tokens: int
) -> None:
    x = torch.randn(tokens, depth, device=device).to(torch_dtype(dtype))
    weight = (torch.randn(rows, depth, device=device) / depth**0.5).to(torch_dtype(dtype))
    bias = torch.randn(rows, device=device).to(torch_dtype(dtype))
    tactic = ring_tiles(tokens, 128, numbers)
    wanted = reference.matmul(x.double(), weight.double(), bias.double(), dtype="float32")
    arrivals = Arrivals()
    got = [multiply(x, weight, bias, out_dtype, tactic, is_gated=False, arrivals=arrivals) for _ in range(3)]
    assert_sums(got[0], wanted, out_dtype, depth)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2]), "the same bits in every run"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_gated_mlp_of_floats(device: torch.device, numbers: Any, tokens: int) -> None:
    width, depth = 104, 1408
    x = torch.randn(tokens, depth, device=device).half()
    fc, gate = ((torch.randn(width, depth, device=device) / depth**0.5).half() for _ in range(2))
    wanted = reference.gated_mlp(x.double(), fc.double(), gate.double(), dtype="float32")
    got = multiply(
        x, interleaved(fc, gate), None, "float16", ring_tiles(tokens, 128, numbers), is_gated=True, arrivals=Arrivals()
    )
    # Factors of up to about 4, and an exponential.
    torch.testing.assert_close(got.float(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize(("rows", "depth"), SHAPES)
@pytest.mark.parametrize("per_token", [True, False])
def test_integers_are_summed_exactly(
    device: torch.device, rows: int, depth: int, numbers: Any, tokens: int, per_token: bool
) -> None:
    x, weight = (torch.randint(-128, 128, (n, depth), dtype=torch.int8, device=device) for n in (tokens, rows))
    # Powers of two, so that scaling rounds nothing but the sum, which float32 may not hold.
    x_scale = torch.full((tokens, 1) if per_token else (1,), 2.0**-8, device=device)
    weight_scale = torch.full((rows,), 2.0**-9, device=device)
    shape = MatmulShape("smooth_quant_gemm", rows, depth, torch.int8, 8)
    tactics = tactics_for(shape, tokens, ring_tiles(tokens, 256, numbers))
    got = smooth_quant_gemm_by(tactics, x, x_scale, weight, weight_scale, dtype="float32")
    assert torch.equal(got, quantized_reference.integer_product(x, weight).float() * 2.0**-17)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_gated_mlp_of_integers(device: torch.device, numbers: Any, tokens: int) -> None:
    width, depth = 104, 1408
    x, fc, gate = (
        torch.randint(-128, 128, (n, depth), dtype=torch.int8, device=device) for n in (tokens, width, width)
    )
    x_scale = torch.rand(tokens, 1, device=device) / 64
    weights = fc, torch.rand(width, device=device) / 512, gate, torch.rand(width, device=device) / 512
    wanted = quantized_reference.smooth_quant_gated_mlp(x, x_scale, *weights, dtype="float32")
    shape = MatmulShape("smooth_quant_gated_mlp", 2 * width, depth, torch.int8, 8)
    tactics = tactics_for(shape, tokens, ring_tiles(tokens, 256, numbers))
    prepared = prepare_smooth_quant_gated_mlp(*weights, dtype="float32")
    got = integer_gated_mlp_by(tactics, x, x_scale, *prepared, dtype="float32")
    # exp, sum, quotient, products: a few units each
    torch.testing.assert_close(got, wanted, rtol=32 * torch.finfo(torch.float32).eps, atol=1e-6)


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int  # 0: a row
    rows: int
    depth: int


FORMATS = (
    Format(8, 0, 200, 1408),
    Format(8, 0, 4096, 11008),
    Format(8, 128, 208, 1408),
    Format(4, 0, 100, 1304),
    Format(4, 128, 4096, 11008),  # 43 stages
    Format(4, 128, 208, 1408),  # the last stage is half a stage
    Format(4, 64, 96, 1344),
    Format(4, 512, 336, 2560),
)


def random_operands(form: Format, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored weight of size 1 / sqrt(depth), and its scales."""
    limit = 2 ** (form.bits - 1)
    q = torch.randint(-limit, limit, (form.rows, form.depth), dtype=torch.int8, device=device)
    groups = form.depth // form.group_size if form.group_size else 1
    scale = 2 / limit / form.depth**0.5 * (0.5 + torch.rand(form.rows, groups, device=device))
    return (pack_int4(q) if form.bits == 4 else q), scale


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_words(device: torch.device, form: Format, numbers: Any, tokens: int) -> None:
    weight, scale = random_operands(form, device)
    x, bias = torch.randn(tokens, form.depth, device=device).half(), torch.randn(form.rows, device=device).half()
    attributes = dict(bits=form.bits, has_zero=False, dtype="float32")
    wanted = quantized_reference.weight_only_quant_matmul(x.double(), weight, scale, bias, **attributes)
    op, groups = "weight_only_quant_matmul", scale.shape[1]
    shape = MatmulShape(op, form.rows, form.depth, torch.float16, form.bits, groups)
    tactics = tactics_for(shape, tokens, ring_tiles(tokens, 256, numbers))
    prepared = prepare_weight_only_quant_matmul(weight, scale, bias, **attributes)
    got = [weight_only_quant_matmul_by(tactics, x, *prepared, **attributes) for _ in range(3)]
    assert_sums(got[0], wanted, "float32", form.depth)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2]), "the same bits in every run"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("form", [Format(8, 0, 104, 1408), Format(4, 128, 104, 1408)], ids=str)
def test_a_gated_mlp_of_words(device: torch.device, form: Format, numbers: Any, tokens: int) -> None:
    fc, gate = random_operands(form, device), random_operands(form, device)
    x = torch.randn(tokens, form.depth, device=device).half()
    attributes = dict(bits=form.bits, has_zero=False, dtype="float32")
    wanted = quantized_reference.weight_only_gated_mlp(x.double(), *fc, *gate, **attributes)
    shape = MatmulShape("weight_only_gated_mlp", 2 * form.rows, form.depth, torch.float16, form.bits, fc[1].shape[1])
    tactics = tactics_for(shape, tokens, ring_tiles(tokens, 256, numbers))
    prepared = prepare_weight_only_gated_mlp(*fc, *gate, **attributes)
    got = weight_only_gated_mlp_by(tactics, x, *prepared, **attributes)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_integers_have_the_same_bits_in_every_way(device: torch.device, has_bias: bool) -> None:
    """Batch-invariant engines rest on it: sums are exact, and what follows them is the same arithmetic."""
    rows, depth = 208, 1408
    x, weight = (torch.randint(-128, 128, (n, depth), dtype=torch.int8, device=device) for n in (64, rows))
    x_scale, weight_scale = torch.rand(64, 1, device=device) / 64, torch.rand(rows, device=device) / 512
    bias = torch.randn(rows, device=device).half() if has_bias else None
    shape = MatmulShape("smooth_quant_gemm", rows, depth, torch.int8, 8)
    ways = {tokens: heuristic(shape, tokens).way for tokens in (1, 8, 64)}
    assert len(set(ways.values())) == 3, ways
    together, *parts = (
        smooth_quant_gemm_by(Tactics(), x[:tokens], x_scale[:tokens], weight, weight_scale, bias, dtype="float16")
        for tokens in (64, 32, 16, 8, 2, 1)
    )
    assert all(torch.equal(part, together[: len(part)]) for part in parts)


def test_what_cannot_be_copied_16_bytes_at_a_time_is_multiplied_in_other_tiles(device: torch.device) -> None:
    rows, depth = 72, 1000
    x = torch.randn(5 * depth + 1, device=device).half()[1:].view(5, depth)
    weight = (torch.randn(rows * depth + 1, device=device) / depth**0.5).half()[1:].view(rows, depth)
    for given in ((x, weight.clone()), (x.clone(), weight)):
        assert_sums(
            matmul(*given, dtype="float32"),
            reference.matmul(*map(torch.Tensor.double, given), dtype="float32"),
            "float32",
            depth,
        )


def test_a_captured_product_can_be_replayed(device: torch.device) -> None:
    """The counts of programs are zeros again behind every launch."""
    tactic, arrivals = ring_tiles(8, 128, (32, 4, 2, 4)), Arrivals()
    x, weight = torch.randn(8, 4096, device=device).half(), (torch.randn(256, 4096, device=device) / 64).half()

    def run() -> torch.Tensor:
        return multiply(x, weight, None, "float32", tactic, is_gated=False, arrivals=arrivals)

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(3):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, wanted)


def test_two_sessions_on_two_streams_do_not_count_each_other(device: torch.device) -> None:
    """Programs of a tile are counted for each session, also where both multiply by one weight."""
    shape, tactic = MatmulShape("matmul", 256, 4096, torch.float16), ring_tiles(8, 128, (32, 4, 2, 4))
    sessions = [Tactics({(shape, 8): tactic}) for _ in range(2)]
    xs = [torch.randn(8, 4096, device=device).half() for _ in sessions]
    weight = (torch.randn(256, 4096, device=device) / 64).half()
    alone = [matmul_by(tactics, x, weight, dtype="float32") for tactics, x in zip(sessions, xs, strict=True)]
    streams = [torch.cuda.Stream(device) for _ in sessions]
    torch.cuda.synchronize(device)
    for _ in range(50):
        together = []
        for tactics, x, stream in zip(sessions, xs, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(matmul_by(tactics, x, weight, dtype="float32"))
        torch.cuda.synchronize(device)
        assert all(torch.equal(one, both) for one, both in zip(alone, together, strict=True))
