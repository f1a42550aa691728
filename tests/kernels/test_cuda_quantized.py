"""The launchers of quantized networks against the reference in float64: odd sizes, poisoned outputs, equal integers."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import quantized_reference, reference
from tensorrt_llm.kernels.cuda import (
    add_rms_norm_quantize,
    cuda_kernels,
    quantize_per_token,
    quantize_tensor,
    rms_norm_quantize,
    smooth_quant_gated_mlp,
    smooth_quant_gemm,
    weight_only,
    weight_only_gated_mlp,
)
from tensorrt_llm.kernels.cuda.epilogue import add_splits
from tensorrt_llm.kernels.cuda.smooth_quant import prepare_last_smoother, prepare_quantize_per_token
from tensorrt_llm.kernels.cuda.weight_only import (
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    weight_only_gated_mlp_by,
    weight_only_quant_matmul_by,
    weight_only_quant_matmul_in_splits_by,
)
from tensorrt_llm.kernels.tactics import MatmulShape, Tactic, Tactics, bucket_of, heuristic
from tensorrt_llm.quantization import QuantizedWeight, quantize_weight
from tensorrt_llm.quantization.quantize import integers_of, pack_int4

DTYPES = ("float32", "float16", "bfloat16")
# Triton's interpreter computes with numpy, which warns where a GPU just gives infinity or an integer of NaN.
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow"),
]


def roundoff(dtype: str) -> float:
    """The largest relative error of writing a real number as `dtype`; Triton's interpreter cuts bfloat16 off."""
    is_cut = dtype == "bfloat16" and not torch.cuda.is_available()
    return torch.finfo(torch_dtype(dtype)).eps / (1 if is_cut else 2)


def integers(*shape: int, device: torch.device, bits: int = 8) -> torch.Tensor:
    """Every integer of `bits` bits, -2^(bits - 1) too."""
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=device)


# Quantizing activations


@pytest.mark.parametrize("has_smoother", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 100), (2, 1376)])
def test_quantized_rows_equal_the_reference(
    device: torch.device, tokens: int, width: int, dtype: str, has_smoother: bool
) -> None:
    x = (torch.randn(tokens, width, device=device) * 3).to(torch_dtype(dtype))
    smoother = torch.rand(width, device=device) + 0.5 if has_smoother else None
    static = torch.rand(1, device=device) / 50 + 0.005  # some values lie beyond 127 steps
    if smoother is None:
        got = *quantize_per_token(x), quantize_tensor(x, *prepare_last_smoother(static))
    else:
        got = (
            *quantize_per_token(x, *prepare_quantize_per_token(smoother)),
            quantize_tensor(x, *prepare_last_smoother(static, smoother)),
        )
    # On the CPU: there torch divides by a number, where on a GPU it multiplies by its inverse.
    x, static, smoother = (None if operand is None else operand.cpu() for operand in (x, static, smoother))
    wanted = *reference.quantize_per_token(x, smoother), quantized_reference.quantize_tensor(x, static, smoother)
    assert all(torch.equal(left.cpu(), right) for left, right in zip(got, wanted, strict=True))


@pytest.mark.parametrize("has_smoother", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 100), (2, 1376)])
def test_quantized_norms_are_the_norm_quantized(
    device: torch.device, tokens: int, width: int, has_smoother: bool
) -> None:
    x, y = (torch.randn(tokens, width, device=device) * 3 for _ in range(2))
    weight = torch.rand(width, device=device) + 0.5
    smoother = torch.rand(width, device=device) + 0.5 if has_smoother else None
    operands = prepare_last_smoother(weight, smoother, eps=1e-6)
    total, q, scale = add_rms_norm_quantize(x, y, *operands, eps=1e-6)
    alone, alone_scale = rms_norm_quantize(total, *operands, eps=1e-6)
    assert torch.equal(total, x + y) and torch.equal(q, alone) and torch.equal(scale, alone_scale)
    wide = (x + y).double(), weight.double()
    normed = wide[0] / (wide[0].square().mean(1, keepdim=True) + 1e-6).sqrt() * wide[1]
    normed = normed if smoother is None else normed / smoother
    amax = normed.abs().amax(1, keepdim=True)
    # In float32 a sum of `width` squares and a few products and divisions are inexact.
    error = torch.finfo(torch.float32).eps * (8 + width**0.5)
    torch.testing.assert_close(scale.double(), amax / 127, rtol=error, atol=0)
    assert (q.double() - normed / amax * 127).abs().max() <= 0.5 + 127 * error


@pytest.mark.parametrize("largest", [127.0, 3.0, 0.7])
def test_half_steps_are_rounded_as_the_reference_does(device: torch.device, largest: float) -> None:
    """x * steps is a float32 on or beside a half step; rounding its exact value would give other integers."""
    halves = (torch.arange(-126, 126) + 0.5) * (largest / 127)
    x = torch.cat((torch.tensor([largest]), halves))[None]
    assert torch.equal(quantize_per_token(x.to(device))[0].cpu(), reference.quantize_per_token(x)[0])


def test_a_row_of_zeros_is_zeros_and_one_with_nan_shows_it(device: torch.device) -> None:
    x = torch.zeros(2, 5, device=device)
    x[1, 3] = float("nan")
    q, scale = quantize_per_token(x)
    assert q[0].tolist() == [0] * 5 and scale[0].item() == 0 and scale[1].isnan()


# W8A8


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 33, 70])
@pytest.mark.parametrize(("rows", "depth"), [(33, 260), (70, 515)])
def test_integer_sums_are_exact(device: torch.device, tokens: int, rows: int, depth: int) -> None:
    x, weight = integers(tokens, depth, device=device), integers(rows, depth, device=device)
    ones = torch.ones(tokens, 1, device=device), torch.ones(rows, device=device)
    got = smooth_quant_gemm(x, ones[0], weight, ones[1], dtype="float32")
    # 515 products of up to 2^14 are below 2^24, so float32 holds the sums.
    assert torch.equal(got, quantized_reference.integer_product(x, weight).float())


def test_the_largest_integers_do_not_overflow(device: torch.device) -> None:
    depth = 1 << 15
    x, weight = (torch.full((rows, depth), -128, dtype=torch.int8, device=device) for rows in (5, 3))
    one = torch.ones(1, device=device)
    for tokens in (1, 5):
        got = smooth_quant_gemm(x[:tokens], one, weight, one.expand(3).contiguous(), dtype="float32")
        assert torch.equal(got, torch.full((tokens, 3), 128.0 * 128 * depth, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("per_token", [True, False])
def test_smooth_quant_gemm_is_rounded_once(device: torch.device, tokens: int, dtype: str, per_token: bool) -> None:
    rows, depth = 37, 136
    x, weight = integers(tokens, depth, device=device), integers(rows, depth, device=device)
    x_scale = torch.rand((tokens, 1) if per_token else (1,), device=device) / 64
    weight_scale = torch.rand(rows, device=device) / 64
    bias = torch.randn(rows, device=device).to(torch_dtype(dtype))
    arguments = (x, x_scale, weight, weight_scale, bias)
    wanted = quantized_reference.smooth_quant_gemm(*arguments, dtype="float32")
    got = smooth_quant_gemm(*arguments, dtype=dtype)
    assert got.dtype == torch_dtype(dtype)
    # Two products and a sum in float32, where the sum may cancel digits of its terms; then one rounding.
    tolerance = roundoff(dtype) + 4 * roundoff("float32")
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=1e-4 * tolerance + 64 * roundoff("float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 18, 66])
@pytest.mark.parametrize("per_token", [True, False])
def test_smooth_quant_gated_mlp_is_rounded_once(device: torch.device, tokens: int, dtype: str, per_token: bool) -> None:
    rows, depth = 35, 136
    x, fc, gate = (integers(count, depth, device=device) for count in (tokens, rows, rows))
    x_scale = torch.rand((tokens, 1) if per_token else (1,), device=device) / 64
    weights = fc, torch.rand(rows, device=device) / 512, gate, torch.rand(rows, device=device) / 512
    wanted = quantized_reference.smooth_quant_gated_mlp(x, x_scale, *weights, dtype="float32")
    # A static scale is a weight as well, and comes to `prepare` with the others.
    static = () if per_token else (x_scale,)
    prepare = cuda_kernels()["smooth_quant_gated_mlp"].prepare
    assert prepare is not None
    prepared = prepare(*static, *weights, dtype=dtype)
    got = smooth_quant_gated_mlp(x, *(x_scale,)[len(static) :], *prepared, dtype=dtype)
    tolerance = roundoff(dtype) + 32 * roundoff("float32")  # exp, sum, quotient, products: a few units each
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=1e-6)


def test_a_row_of_integers_does_not_depend_on_its_batch(device: torch.device) -> None:
    x, weight = integers(70, 132, device=device), integers(9, 132, device=device)
    x_scale, weight_scale = torch.rand(70, 1, device=device), torch.rand(9, device=device)
    together = smooth_quant_gemm(x, x_scale, weight, weight_scale, dtype="float16")
    for rows in (slice(0, 1), slice(1, 4), slice(1, 18)):
        alone = smooth_quant_gemm(x[rows], x_scale[rows], weight, weight_scale, dtype="float16")
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("is_gated", [True, False])
def test_int32_sums_of_splits_are_added_exactly_and_then_scaled(
    device: torch.device, is_gated: bool, per_token: bool
) -> None:
    tokens, rows = 5, 70
    partial = torch.randint(-(2**29), 2**29, (3, tokens, rows), dtype=torch.int32, device=device)
    x_scale = torch.rand((tokens, 1) if per_token else (1,), device=device) / 2**20
    weight_scale, bias = torch.rand(rows, device=device) / 2**10, torch.randn(rows, device=device)
    sums = partial.sum(0).double() * (x_scale * weight_scale).double() + bias.double()
    wanted = torch.nn.functional.silu(sums[:, ::2]) * sums[:, 1::2] if is_gated else sums
    got = torch.empty(wanted.shape, device=device)
    add_splits(partial, bias, got, is_gated=is_gated, x_scale=x_scale, weight_scale=weight_scale)
    tolerance = 32 * roundoff("float32")
    torch.testing.assert_close(got, wanted.float(), rtol=tolerance, atol=tolerance)


# Weight-only


def random_weight(
    rows: int, depth: int, bits: int, group_size: int, has_zero: bool, device: torch.device
) -> QuantizedWeight:
    """Weights of size 1 / sqrt(depth), so that products with unit inputs are of unit size. Scales have both signs."""
    q = integers(rows, depth, device=device, bits=bits)
    groups = depth // group_size if group_size else 1
    step = 4 / 2**bits / depth**0.5
    scale = step * (0.5 + torch.rand(rows, groups, device=device)) * (torch.rand(rows, groups) - 0.3).sign().to(device)
    zero = torch.randint(-(2 ** (bits - 2)), 2 ** (bits - 2), scale.shape, dtype=torch.int16, device=device)
    return QuantizedWeight(bits, pack_int4(q) if bits == 4 else q, scale, zero if has_zero else None)


def operands(weight: QuantizedWeight) -> tuple[torch.Tensor, ...]:
    return (weight.weight, weight.scale) + (() if weight.zero is None else (weight.zero,))


def tactics_of_a_ring(
    weight: QuantizedWeight,
    depth: int,
    ring: tuple[int, int, int, int],
    op: str = "weight_only_quant_matmul",
    rows: int = 0,
) -> Tactics:
    """Rows of a tile, stages, warps and tiles of a program, for one token."""
    groups, has_zero = weight.scale.shape[1], weight.zero is not None
    shape = MatmulShape(op, rows or len(weight.scale), depth, torch.float16, weight.bits, groups, has_zero)
    row_tile, num_stages, num_warps, num_tiles = ring
    tactic = Tactic("ring", row_tile=row_tile, num_stages=num_stages, num_warps=num_warps, num_tiles=num_tiles)
    return Tactics({(shape, 1): tactic})


def run_weight_only(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    dtype: str,
    tactics: Tactics | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, what the reference gives in float64), both as float32."""
    given = operands(weight) + (() if bias is None else (bias,))
    attributes = dict(bits=weight.bits, has_zero=weight.zero is not None, dtype=dtype)
    prepared = prepare_weight_only_quant_matmul(*given, **attributes)
    got = weight_only_quant_matmul_by(tactics or Tactics(), x, *prepared, **attributes)
    wanted = quantized_reference.weight_only_quant_matmul(x.double(), *given, **attributes | {"dtype": "float32"})
    assert got.dtype == torch_dtype(dtype)
    return got.float(), wanted


def ones_error(weight: QuantizedWeight, x: torch.Tensor) -> float:
    """What the stream of one token loses: a pair of products is rounded beside a one, of which it is a small part."""
    integers_in_one = 2**15 if weight.bits == 8 else 2**11
    largest_pair = 2 * float(weight.scale.abs().max() * x.float().abs().max()) * integers_in_one
    return roundoff("float32") * largest_pair * x.shape[1] ** 0.5


FORMATS = [  # bits, group size, depth
    (4, 0, 130),
    (4, 16, 144),
    (4, 48, 96),
    (4, 64, 448),
    (4, 128, 640),
    (4, 512, 2560),  # rows of ten blocks are divided among programs
    (8, 0, 131),
    (8, 16, 48),
    (8, 32, 160),
    (8, 96, 288),
    (8, 256, 1280),
]


@pytest.mark.parametrize(("tokens", "has_zero"), [(1, True), (17, False), (17, True)])
@pytest.mark.parametrize(("bits", "group_size", "depth"), FORMATS)
def test_weight_only_matmul_keeps_exact_weights(
    device: torch.device, bits: int, group_size: int, depth: int, tokens: int, has_zero: bool
) -> None:
    weight = random_weight(9 if tokens == 1 else 70, depth, bits, group_size, has_zero, device)
    x = torch.randn(tokens, depth, device=device).half()
    got, wanted = run_weight_only(x, weight, None, "float32")
    # Only float32 sums are inexact: `depth` products of size 1 / sqrt(depth), and a few operations on the way.
    tolerance = roundoff("float32") * (16 + depth) + (ones_error(weight, x) if tokens == 1 else 0.0)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "depth"), [(1, 320), (2, 320), (3, 2304), (5, 320), (33, 320)])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(dtype, out) for dtype in DTYPES for out in dict.fromkeys((dtype, "float32"))]
)
def test_weight_only_matmul_in_every_dtype(
    device: torch.device, dtype: str, out_dtype: str, tokens: int, depth: int
) -> None:
    weight = random_weight(9, depth, 4, 64, False, device)
    x, bias = torch.randn(tokens, depth, device=device), torch.randn(9, device=device)
    x, bias = x.to(torch_dtype(dtype)), bias.to(torch_dtype(dtype))
    got, wanted = run_weight_only(x, weight, bias, out_dtype)
    tolerance = roundoff(out_dtype) + roundoff("float32") * (16 + depth)
    if tokens == 1 and dtype != "float32":
        tolerance += ones_error(weight, x)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "num_splits"), [(0, 3), (17, 1), (17, 3), (33, 2), (33, 100)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 0)])
def test_sums_of_splits_are_left_to_a_reader_that_adds_them(
    device: torch.device, bits: int, group_size: int, has_bias: bool, tokens: int, num_splits: int
) -> None:
    weight, depth = random_weight(70, 1088, bits, group_size, False, device), 1088
    bias = torch.randn(70, device=device).half() if has_bias else None
    given = operands(weight) + (() if bias is None else (bias,))
    attributes = dict(bits=bits, has_zero=False, dtype="float32")
    prepared = prepare_weight_only_quant_matmul(*given, **attributes)
    x = torch.randn(tokens, depth, device=device).half()
    shape = MatmulShape("weight_only_quant_matmul", 70, depth, torch.float16, bits, weight.scale.shape[1])
    tactics = Tactics({(shape, bucket_of(max(tokens, 1))): Tactic("tiles", 64, 64, 0, 3, 4, num_splits)})
    whole = weight_only_quant_matmul_by(tactics, x, *prepared, **attributes)
    split = weight_only_quant_matmul_in_splits_by(tactics, x, *prepared, **attributes)
    if has_bias or tokens == 0 or num_splits == 1:
        assert torch.equal(split, whole)
    else:
        blocks = -(-depth // (64 * 16 // bits))
        assert split.shape == (min(num_splits, blocks), tokens, 70) and split.dtype == torch.float32
        sums = split[0].clone()
        for part in split[1:]:
            sums += part
        assert torch.equal(sums, whole), "added in order, to the bit"


@pytest.mark.parametrize(("dtype", "tokens"), [("float16", 257), ("bfloat16", 257), ("float32", 5)])
@pytest.mark.parametrize(("bits", "group_size", "depth"), [(4, 16, 144), (4, 128, 640), (8, 0, 131)])
def test_a_weight_is_widened_in_pieces_for_many_tokens(
    device: torch.device, bits: int, group_size: int, depth: int, dtype: str, tokens: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(weight_only, "_DENSE_ELEMENTS", 40 * depth)
    weight = random_weight(70, depth, bits, group_size, True, device)
    bias = torch.randn(70, device=device).to(torch_dtype(dtype))
    x = torch.randn(tokens, depth, device=device).to(torch_dtype(dtype))
    shape = MatmulShape("weight_only_quant_matmul", 70, depth, x.dtype, bits, weight.scale.shape[1], has_zero=True)
    tactics = Tactics({(shape, bucket_of(tokens)): Tactic("widened")})
    got, wanted = run_weight_only(x, weight, bias, dtype, tactics)
    # Each weight and the result are rounded; the sum of a row's magnitudes is about sqrt(depth).
    tolerance = roundoff(dtype) * (2 + depth**0.5) + roundoff("float32") * depth
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tokens"), [("float32", 1), ("float16", 1), ("float16", 3), ("bfloat16", 18), ("float16", 257)]
)
@pytest.mark.parametrize("has_zero", [False, True])
def test_weight_only_gated_mlp_equals_its_two_matmuls(
    device: torch.device, dtype: str, tokens: int, has_zero: bool
) -> None:
    depth, rows = 2304 if tokens == 3 else 192, 35 if tokens == 18 else 5
    fc, gate = (random_weight(rows, depth, 4, 64, has_zero, device) for _ in range(2))
    x = torch.randn(tokens, depth, device=device).to(torch_dtype(dtype))
    attributes = dict(bits=4, has_zero=has_zero, dtype=dtype)
    given = operands(fc) + operands(gate)
    wanted = quantized_reference.weight_only_gated_mlp(x.float(), *given, **attributes | {"dtype": "float32"})
    got = weight_only_gated_mlp(x, *prepare_weight_only_gated_mlp(*given, **attributes), **attributes)
    # Rounded once, or, with widened weights, the weights and both products too, of values up to about 4.
    roundings = 16 + depth**0.5 if tokens == 257 else 1
    tolerance = roundoff(dtype) * roundings + roundoff("float32") * (64 + 4 * depth)
    if tokens == 1 and dtype != "float32":
        tolerance += 8 * max(ones_error(fc, x), ones_error(gate, x))  # times factors of up to about 4, two of them
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_batch(device: torch.device, bits: int) -> None:
    """Bit for bit, among batches that are multiplied the same way."""
    weight = random_weight(9, 2304, bits, 128, True, device)
    x = torch.randn(40, 2304, device=device).half()
    rows = run_weight_only(x, weight, None, "float16")[0]
    for start, stop in ((0, 2), (5, 10), (3, 20), (7, 40)):
        assert torch.equal(run_weight_only(x[start:stop], weight, None, "float16")[0], rows[start:stop])


@pytest.mark.gpu  # the interpreter has no Gluon
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "depth"),
    [(4, 128, 4098, 4096), (4, 0, 4100, 1000), (4, 64, 33, 8192), (8, 0, 4223, 4096), (8, 128, 7, 896)],
)
def test_a_resident_weight_is_multiplied_exactly(
    device: torch.device, bits: int, group_size: int, rows: int, depth: int, has_zero: bool
) -> None:
    weight = random_weight(rows, depth, bits, group_size, has_zero, device)
    shape = MatmulShape("weight_only_quant_matmul", rows, depth, torch.float16, bits, weight.scale.shape[1], has_zero)
    assert heuristic(shape, 1).way == "resident"
    x, bias = torch.randn(1, depth, device=device).half(), torch.randn(rows, device=device).half()
    got, wanted = run_weight_only(x, weight, bias, "float32")
    # Of integers with their offset a sum is up to twice as large as of those without; no product is rounded.
    tolerance = 2 * roundoff("float32") * (16 + depth**0.5)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("ring", [(16, 6, 8, 3), (16, 3, 4, 1), (8, 2, 4, 5), (32, 3, 8, 2)])
@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "depth"),
    [
        (4, 128, 4096, 4096),
        (4, 128, 48, 11008),  # 43 blocks of columns are not eight pieces of six
        (4, 64, 16, 448),  # fewer blocks than pieces, the last one not whole
        (4, 192, 80, 1920),
        (4, 512, 336, 2560),
        (4, 0, 1232, 1002),
        (8, 128, 400, 896),
        (8, 0, 4224, 4096),
    ],
)
def test_weights_of_a_ring_are_multiplied_exactly(
    device: torch.device,
    bits: int,
    group_size: int,
    rows: int,
    depth: int,
    ring: tuple[int, int, int, int],
    has_zero: bool,
) -> None:
    weight = random_weight(rows, depth, bits, group_size, has_zero, device)
    x, bias = torch.randn(1, depth, device=device).half(), torch.randn(rows, device=device).half()
    got, wanted = run_weight_only(x, weight, bias, "float32", tactics_of_a_ring(weight, depth, ring))
    tolerance = 2 * roundoff("float32") * (16 + depth**0.5)  # as above
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("ring", [(16, 6, 8, 3), (16, 3, 4, 1), (8, 2, 4, 5)])
@pytest.mark.parametrize(("rows", "depth", "group_size"), [(11008, 4096, 128), (24, 2304, 64), (40, 1000, 0)])
def test_a_gated_mlp_through_a_ring_equals_its_two_matmuls(
    device: torch.device, rows: int, depth: int, group_size: int, ring: tuple[int, int, int, int], has_zero: bool
) -> None:
    fc, gate = (random_weight(rows, depth, 4, group_size, has_zero, device) for _ in range(2))
    x = torch.randn(1, depth, device=device).half()
    attributes = dict(bits=4, has_zero=has_zero, dtype="float32")
    given = operands(fc) + operands(gate)
    wanted = quantized_reference.weight_only_gated_mlp(x.double(), *given, **attributes)
    tactics = tactics_of_a_ring(fc, depth, ring, "weight_only_gated_mlp", 2 * rows)
    prepared = prepare_weight_only_gated_mlp(*given, **attributes)
    got = [weight_only_gated_mlp_by(tactics, x, *prepared, **attributes) for _ in range(3)]
    # Two sums as above, times factors of up to about 4, and an exponential.
    tolerance = 8 * 2 * roundoff("float32") * (32 + depth**0.5)
    torch.testing.assert_close(got[0], wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2]), "the same bits in every run"


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """Elsewhere, products on warpgroups are those of tiles."""
    if not weight_only.has_warpgroups(device):
        pytest.skip("warpgroups multiply on compute capability 9.0 only")
    return device


# Tokens and rows of a tile, splits of its depth.
WARPGROUP_TILES = [(128, 128, 1), (128, 192, 3), (256, 128, 2)]


def tactics_of_warpgroups(
    weight: QuantizedWeight,
    x: torch.Tensor,
    tile: tuple[int, int, int],
    op: str = "weight_only_quant_matmul",
    rows: int = 0,
) -> Tactics:
    (tokens, depth), (token_tile, row_tile, num_splits) = x.shape, tile
    groups, has_zero = weight.scale.shape[1], weight.zero is not None
    shape = MatmulShape(op, rows or len(weight.scale), depth, x.dtype, weight.bits, groups, has_zero)
    tactic = Tactic("wgmma", token_tile, row_tile, num_splits=num_splits)
    return Tactics({(shape, bucket_of(tokens)): tactic})


def in_float16(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with scales that float16 holds, as warpgroups take those of groups."""
    return QuantizedWeight(weight.bits, weight.weight, weight.scale.half().float(), weight.zero)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tile", WARPGROUP_TILES)
@pytest.mark.parametrize(
    ("bits", "rows", "depth", "tokens"),
    [(8, 416, 4096, 300), (8, 70, 1000, 65), (8, 129, 2304, 512), (4, 300, 1304, 256), (4, 1000, 11008, 100)],
)
def test_a_weight_with_a_scale_for_each_row_is_multiplied_exactly_on_warpgroups(
    hopper: torch.device, bits: int, rows: int, depth: int, tokens: int, tile: tuple[int, int, int], dtype: str
) -> None:
    weight = random_weight(rows, depth, bits, 0, dtype == "float16", hopper)
    weight = weight if dtype == "float16" else QuantizedWeight(bits, weight.weight, weight.scale, None)
    x = torch.randn(tokens, depth, device=hopper).to(torch_dtype(dtype))
    bias = torch.randn(rows, device=hopper).to(torch_dtype(dtype))
    got, wanted = run_weight_only(x, weight, bias, "float32", tactics_of_warpgroups(weight, x, tile))
    tolerance = roundoff("float32") * (16 + depth)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("tile", WARPGROUP_TILES)
@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "depth", "tokens"),
    [
        (4, 128, 416, 4096, 217),
        (4, 128, 130, 11008, 100),
        (4, 64, 70, 448, 65),
        (4, 192, 200, 1920, 129),  # groups of three planes, where a block has four
        (4, 512, 336, 2560, 300),
        (8, 128, 300, 896, 512),
        (8, 256, 70, 1280, 256),
    ],
)
def test_a_weight_with_scales_of_groups_is_rounded_once_on_warpgroups(
    hopper: torch.device,
    bits: int,
    group_size: int,
    rows: int,
    depth: int,
    tokens: int,
    tile: tuple[int, int, int],
    has_zero: bool,
) -> None:
    weight = in_float16(random_weight(rows, depth, bits, group_size, has_zero, hopper))
    x, bias = torch.randn(tokens, depth, device=hopper).half(), torch.randn(rows, device=hopper).half()
    got, _ = run_weight_only(x, weight, bias, "float32", tactics_of_warpgroups(weight, x, tile))
    group = torch.arange(depth, device=hopper) // group_size
    q = integers_of(weight.weight, bits).double()
    zeros = 0 if weight.zero is None else weight.zero.double()[:, group]
    widened = ((q - zeros) * weight.scale.double()[:, group]).half()
    wanted = (x.double() @ widened.double().T + bias.double()).float()
    tolerance = roundoff("float32") * (16 + depth)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 128)])
@pytest.mark.parametrize("tile", WARPGROUP_TILES)
def test_a_gated_mlp_on_warpgroups_equals_its_two_matmuls_in_every_run(
    hopper: torch.device, bits: int, group_size: int, tile: tuple[int, int, int]
) -> None:
    rows, depth, tokens = 1100, 4096, 217
    fc, gate = (in_float16(random_weight(rows, depth, bits, group_size, False, hopper)) for _ in range(2))
    x = torch.randn(tokens, depth, device=hopper).half()
    attributes = dict(bits=bits, has_zero=False, dtype="float32")
    given = operands(fc) + operands(gate)
    wanted = quantized_reference.weight_only_gated_mlp(x.double(), *given, **attributes)
    tactics = tactics_of_warpgroups(fc, x, tile, "weight_only_gated_mlp", 2 * rows)
    prepared = prepare_weight_only_gated_mlp(*given, **attributes)
    got = [weight_only_gated_mlp_by(tactics, x, *prepared, **attributes) for _ in range(5)]
    # Rounded weights of size 1 / sqrt(depth), times factors of up to about 4.
    tolerance = 8 * (roundoff("float16") * (group_size > 0) + roundoff("float32") * (32 + depth))
    torch.testing.assert_close(got[0], wanted, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(got[0], other) for other in got[1:])


@pytest.mark.gpu
def test_x_that_copies_of_tiles_cannot_take_is_multiplied_in_others(hopper: torch.device) -> None:
    weight = random_weight(70, 1000, 8, 0, False, hopper)
    x = torch.randn(65 * 1000 + 1, device=hopper).half()[1:].view(65, 1000)
    got, wanted = run_weight_only(x, weight, None, "float32", tactics_of_warpgroups(weight, x, (128, 128, 1)))
    tolerance = roundoff("float32") * (16 + 1000)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 5])
def test_sums_beyond_float16_are_finite(device: torch.device, tokens: int) -> None:
    weight = quantize_weight(torch.ones(3, 512, device=device), 8, 128)
    x = torch.full((tokens, 512), 6e4, device=device).half()
    got, wanted = run_weight_only(x, weight, None, "float32")
    # Of one token each pair of products, 2 * 127 of 2^15, is rounded beside a one.
    torch.testing.assert_close(got, wanted, rtol=1e-4 if tokens == 1 else 1e-5, atol=0)


@pytest.mark.gpu
def test_integer_sums_in_tiles_of_128_tokens(device: torch.device) -> None:
    """They are taken where they fill a GPU."""
    tokens, rows, depth = 200, 8320, 640
    x, weight = integers(tokens, depth, device=device), integers(rows, depth, device=device)
    ones = torch.ones(tokens, 1, device=device), torch.ones(rows, device=device)
    got = smooth_quant_gemm(x, ones[0], weight, ones[1], dtype="float32")
    assert torch.equal(got, quantized_reference.integer_product(x, weight).float())


def test_scales_are_held_in_float16_only_where_that_is_exact(device: torch.device) -> None:
    weight = random_weight(5, 64, 8, 32, False, device)
    short = QuantizedWeight(8, weight.weight, weight.scale.half().float())
    for given, dtype in ((weight, torch.float32), (short, torch.float16)):
        scale = prepare_weight_only_quant_matmul(*operands(given), bits=8, has_zero=False, dtype="float16")[1]
        assert scale is not None and scale.dtype == dtype


def test_groups_that_no_kernel_takes_are_named(device: torch.device) -> None:
    weight = random_weight(5, 48, 8, 24, False, device)
    with pytest.raises(ValueError, match="groups of 24 columns"):
        prepare_weight_only_quant_matmul(*operands(weight), bits=8, has_zero=False, dtype="float16")
