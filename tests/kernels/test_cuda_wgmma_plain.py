"""Products on warpgroups of floats and of int8 by int8, against the reference in float64: needs a Hopper GPU.

Triton's interpreter has no Gluon; what is compiled for Hopper is read in test_cuda_sass.py, the choice is tested in
test_tactics.py.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import quantized_reference, reference
from tensorrt_llm.kernels.cuda.dense import choose, multiply
from tensorrt_llm.kernels.cuda.epilogue import interleaved
from tensorrt_llm.kernels.cuda.linear import matmul_by, matmul_in_splits_by
from tensorrt_llm.kernels.cuda.smooth_quant import (
    prepare_smooth_quant_gated_mlp,
    smooth_quant_gated_mlp_by,
    smooth_quant_gemm_by,
)
from tensorrt_llm.kernels.cuda.warpgroups import has_warpgroups
from tensorrt_llm.kernels.tactics import LIBRARY, MatmulShape, Tactic, Tactics, bucket_of
from tensorrt_llm.kernels.tactics.smooth_quant import tiles

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]
TOKENS = (65, 100, 217, 256, 300, 1000)
# Tokens and rows of a tile, splits of its depth.
TILES = [(128, 128, 1), (128, 192, 1), (256, 128, 2), (256, 192, 1), (256, 192, 6)]
# Rows and columns: of whole tiles, of neither whole tiles nor whole stages, and of rows that begin anywhere.
FLOATS = [(384, 512), (1008, 11000), (129, 2312)]
INTEGERS = [(384, 512), (1008, 11024), (129, 2320)]


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """Elsewhere, products on warpgroups are those of tiles, or cuBLAS's."""
    if not has_warpgroups(device):
        pytest.skip("warpgroups multiply on compute capability 9.0 only")
    return device


def warpgroups(tile: tuple[int, int, int]) -> Tactic:
    token_tile, row_tile, num_splits = tile
    return Tactic("wgmma", token_tile, row_tile, num_splits=num_splits)


def tactics_for(op: str, weight: torch.Tensor, tokens: int, tile: tuple[int, int, int]) -> Tactics:
    rows, depth = weight.shape
    return Tactics({(MatmulShape(op, rows, depth, torch.int8, 8), bucket_of(tokens)): warpgroups(tile)})


def integers(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "depth"), FLOATS)
@pytest.mark.parametrize(("dtype", "out_dtype"), [("float16", "float16"), ("bfloat16", "float32")])
def test_floats(
    hopper: torch.device, dtype: str, out_dtype: str, rows: int, depth: int, tile: tuple[int, int, int], tokens: int
) -> None:
    x = torch.randn(tokens, depth, device=hopper).to(torch_dtype(dtype))
    weight = (torch.randn(rows, depth, device=hopper) / depth**0.5).to(torch_dtype(dtype))
    bias = torch.randn(rows, device=hopper).to(torch_dtype(dtype)) if out_dtype == dtype else None
    wanted = reference.matmul(x.double(), weight.double(), None if bias is None else bias.double(), dtype="float32")
    got = [multiply(x, weight, bias, out_dtype, warpgroups(tile), is_gated=False) for _ in range(2)]
    # Sums of `depth` products whose squares add up to about one, and one rounding; tensor cores cut bits off.
    tolerance = torch.finfo(torch_dtype(out_dtype)).eps + torch.finfo(torch.float32).eps * (16 + depth)
    torch.testing.assert_close(got[0].float(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[0], got[1]), "the same bits in every run"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gated_mlp_of_floats(hopper: torch.device, dtype: str, tile: tuple[int, int, int], tokens: int) -> None:
    width, depth = 1101, 1416
    x = torch.randn(tokens, depth, device=hopper).to(torch_dtype(dtype))
    fc, gate = ((torch.randn(width, depth, device=hopper) / depth**0.5).to(torch_dtype(dtype)) for _ in range(2))
    wanted = reference.gated_mlp(x.double(), fc.double(), gate.double(), dtype="float32")
    packed = interleaved(fc, gate)
    got = [multiply(x, packed, None, dtype, warpgroups(tile), is_gated=True) for _ in range(2)]
    # Factors of up to about 4, and an exponential.
    tolerance = 2 * torch.finfo(torch_dtype(dtype)).eps
    torch.testing.assert_close(got[0].float(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[0], got[1]), "the same bits in every run"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "depth"), INTEGERS)
@pytest.mark.parametrize("per_token", [True, False])
def test_integers_are_summed_exactly(
    hopper: torch.device, per_token: bool, rows: int, depth: int, tile: tuple[int, int, int], tokens: int
) -> None:
    x, weight = (integers(count, depth, device=hopper) for count in (tokens, rows))
    # Powers of two, so that scaling rounds nothing but the sum, which float32 may not hold.
    x_scale = torch.full((1,), 2.0**-8, device=hopper)
    if per_token:
        x_scale = 2.0 ** torch.randint(-9, -6, (tokens, 1), device=hopper).float()
    weight_scale = 2.0 ** torch.randint(-9, -6, (rows,), device=hopper).float()
    tactics = tactics_for("smooth_quant_gemm", weight, tokens, tile)
    got = smooth_quant_gemm_by(tactics, x, x_scale, weight, weight_scale, dtype="float32")
    assert torch.equal(got, quantized_reference.integer_product(x, weight).float() * x_scale * weight_scale)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("per_token", [True, False])
def test_integers_have_the_bits_of_the_other_tiles(
    hopper: torch.device, per_token: bool, dtype: str, tile: tuple[int, int, int], tokens: int
) -> None:
    """So a row of integers does not depend on how many others it is multiplied with."""
    x, weight = (integers(count, 1040, device=hopper) for count in (tokens, 333))
    x_scale = torch.rand((tokens, 1) if per_token else (1,), device=hopper) / 64
    operands = x, x_scale, weight, torch.rand(333, device=hopper) / 64, torch.randn(333, device=hopper)
    shape = MatmulShape("smooth_quant_gemm", 333, 1040, torch.int8, 8)
    others = Tactics({(shape, bucket_of(tokens)): tiles(shape, tokens)})
    got = smooth_quant_gemm_by(tactics_for("smooth_quant_gemm", weight, tokens, tile), *operands, dtype=dtype)
    assert torch.equal(got, smooth_quant_gemm_by(others, *operands, dtype=dtype))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("per_token", [True, False])
def test_a_gated_mlp_of_integers(
    hopper: torch.device, per_token: bool, tile: tuple[int, int, int], tokens: int
) -> None:
    width, depth = 1101, 1424
    x, fc, gate = (integers(count, depth, device=hopper) for count in (tokens, width, width))
    x_scale = torch.rand((tokens, 1) if per_token else (1,), device=hopper) / 64
    weights = fc, torch.rand(width, device=hopper) / 512, gate, torch.rand(width, device=hopper) / 512
    wanted = quantized_reference.smooth_quant_gated_mlp(x, x_scale, *weights, dtype="float32")
    weight, weight_scale = prepare_smooth_quant_gated_mlp(*weights, dtype="float32")
    tactics = tactics_for("smooth_quant_gated_mlp", weight, tokens, tile)
    got = [smooth_quant_gated_mlp_by(tactics, x, x_scale, weight, weight_scale, dtype="float32") for _ in range(2)]
    # exp, sum, quotient, products: a few units each
    torch.testing.assert_close(got[0], wanted, rtol=32 * torch.finfo(torch.float32).eps, atol=1e-6)
    assert torch.equal(got[0], got[1]), "the same bits in every run"


def test_the_largest_integers_do_not_overflow(hopper: torch.device) -> None:
    depth = 1 << 15
    x, weight = (torch.full((rows, depth), -128, dtype=torch.int8, device=hopper) for rows in (65, 128))
    one, ones = torch.ones(1, device=hopper), torch.ones(128, device=hopper)
    for tile in TILES:
        tactics = tactics_for("smooth_quant_gemm", weight, 65, tile)
        got = smooth_quant_gemm_by(tactics, x, one, weight, ones, dtype="float32")
        assert torch.equal(got, torch.full((65, 128), 128.0 * 128 * depth, device=hopper))


def test_operands_that_copies_of_tiles_cannot_take_go_other_ways(hopper: torch.device) -> None:
    shape = MatmulShape("matmul", 70, 1000, torch.float16)
    tactics = Tactics({(shape, 128): warpgroups((128, 128, 1))})
    weight, x = torch.randn(70, 1000, device=hopper).half(), torch.randn(65 * 1000 + 1, device=hopper).half()
    assert choose(tactics, "matmul", x[:-1].view(65, 1000), weight).way == "wgmma"
    assert choose(tactics, "matmul", x[1:].view(65, 1000), weight) == LIBRARY
    x, weight = integers(65, 1000, device=hopper), integers(70, 1000, device=hopper)
    ones = torch.ones(65, 1, device=hopper), torch.ones(70, device=hopper)
    tactics = tactics_for("smooth_quant_gemm", weight, 65, (128, 128, 1))
    got = smooth_quant_gemm_by(tactics, x, ones[0], weight, ones[1], dtype="float32")
    assert torch.equal(got, quantized_reference.integer_product(x, weight).float())


@pytest.mark.parametrize("tile", TILES)
def test_splits_are_left_to_a_reader_that_adds_them(hopper: torch.device, tile: tuple[int, int, int]) -> None:
    x, weight = torch.randn(217, 2312, device=hopper).half(), torch.randn(200, 2312, device=hopper).half() / 48
    tactics = Tactics({(MatmulShape("matmul", 200, 2312, torch.float16), bucket_of(217)): warpgroups(tile)})
    whole = matmul_by(tactics, x, weight, dtype="float32")
    split = matmul_in_splits_by(tactics, x, weight, dtype="float32")
    assert split.shape == ((tile[2], 217, 200) if tile[2] > 1 else (217, 200))
    sums = split.view(-1, 217, 200)
    for part in sums[1:]:
        sums[0] += part
    assert torch.equal(sums[0], whole), "added in order, to the bit"


@pytest.mark.parametrize("tile", TILES)
def test_a_captured_product_replays_on_new_inputs(hopper: torch.device, tile: tuple[int, int, int]) -> None:
    """Behind a kernel that writes x, as in a step: what starts early must wait for it."""
    source = torch.randn(217, 1024, device=hopper).half()
    weight = (torch.randn(4096, 1024, device=hopper) / 32).half()
    call = lambda: multiply(source * 2, weight, None, "float16", warpgroups(tile), is_gated=False)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for _ in range(3):
        source.copy_(torch.randn_like(source))
        graph.replay()
        assert torch.equal(got, call())
