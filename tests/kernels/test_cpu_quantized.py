"""The CPU kernels of quantized networks against the reference: integers exactly, floats within float32's rounding."""

import pytest
import torch
from cpu_tables import run
from test_cpu_kernels import DTYPES, normal, roundoff

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import quantized_reference, reference
from tensorrt_llm.kernels.cpu import integer
from tensorrt_llm.quantization.quantize import dequantize, quantize_weight

pytestmark = pytest.mark.usefixtures("cpu_table")
# Tokens, columns of x, rows of the weight, group size (0: per channel). 70 tokens are beyond the integer batches.
SHAPES = [(1, 64, 3, 0), (2, 96, 65, 32), (5, 130, 31, 0), (33, 48, 7, 16), (70, 128, 33, 64), (70, 66, 5, 0)]


def quantized_operands(
    rows: int, columns: int, bits: int, group_size: int, has_zero: bool, has_bias: bool, dtype: str
) -> tuple[torch.Tensor, ...]:
    quantized = quantize_weight(torch.randn(rows, columns), bits, group_size)
    operands = [quantized.weight, quantized.scale]
    if has_zero:
        operands.append(torch.randint(-8, 9, quantized.scale.shape, dtype=torch.int16))
    if has_bias:
        operands.append(normal(rows, dtype=dtype))
    return tuple(operands)


def error_of_two_digits(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Six standard deviations of a sum whose every x is off by up to half a step, evenly and of random sign."""
    step = x.float().abs().max() / (127 * 256)
    return float(6 * weight.norm(dim=1).max() * step / 12**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(("tokens", "columns", "rows", "group_size"), SHAPES)
def test_weight_only_matmul_is_rounded_once(
    tokens: int, columns: int, rows: int, group_size: int, has_zero: bool, bits: int, dtype: str, cpu_table: str
) -> None:
    x = normal(tokens, columns, dtype=dtype)
    x[:, 0] *= 50  # an outlier, as activations have
    weights = quantized_operands(rows, columns, bits, group_size, has_zero, has_bias=not has_zero, dtype=dtype)
    attributes = {"bits": bits, "has_zero": has_zero}
    found = run("weight_only_quant_matmul", x, weights=weights, **attributes, dtype=dtype)
    wide = tuple(operand.double() if operand.is_floating_point() else operand for operand in weights)
    wanted = quantized_reference.weight_only_quant_matmul(x.double(), *wide, **attributes, dtype="float32")
    assert found.dtype == torch_dtype(dtype)
    # Fixed point is off by 2^-24 of the row's largest magnitude, 200, in each of `columns` terms of weights up to 8.
    error_of_sums = 8 * columns * 200 * roundoff("float32")
    if cpu_table == "native" and bits == 4 and dtype != "float32":
        error_of_sums += error_of_two_digits(x, dequantize(*wide[:2], wide[2] if has_zero else None, bits=4))
    torch.testing.assert_close(found.float(), wanted, rtol=1.01 * roundoff(dtype), atol=error_of_sums)


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_gated_mlp_is_rounded_once(bits: int, cpu_table: str) -> None:
    x = normal(5, 64, dtype="float16")
    weights = tuple(
        operand
        for _ in range(2)
        for operand in quantized_operands(33, 64, bits, 32, has_zero=True, has_bias=False, dtype="float16")
    )
    attributes = {"bits": bits, "has_zero": True}
    found = run("weight_only_gated_mlp", x, weights=weights, **attributes, dtype="float16")
    wanted = quantized_reference.weight_only_gated_mlp(x.double(), *weights, **attributes, dtype="float32")
    tolerance = 2e-3
    if cpu_table == "native" and bits == 4:
        fc, gate = (dequantize(*weights[first : first + 3], bits=4) for first in (0, 3))
        largest = max((x.float() @ branch.T).abs().max().item() for branch in (fc, gate))
        # Each branch is off, and multiplied by the other; silu's slope is below 1.1.
        tolerance += 2.1 * largest * max(error_of_two_digits(x, branch) for branch in (fc, gate))
    torch.testing.assert_close(found.float(), wanted, rtol=1.01 * roundoff("float16"), atol=tolerance)


@pytest.mark.parametrize("group_size", [0, 32])
def test_a_row_does_not_depend_on_its_batch(group_size: int) -> None:
    weights = quantized_operands(31, 64, 4, group_size, has_zero=False, has_bias=False, dtype="float32")
    x = torch.randn(20, 64)
    attributes = {"bits": 4, "has_zero": False, "dtype": "float32"}
    together = run("weight_only_quant_matmul", x, weights=weights, **attributes)
    alone = torch.cat([run("weight_only_quant_matmul", row[None], weights=weights, **attributes) for row in x])
    assert torch.equal(together, alone)


def test_digits_are_exact_to_24_bits_and_fit_int8() -> None:
    x = torch.randn(7, 513) * torch.logspace(-20, 20, 7)[:, None]
    x[3, :2] = torch.tensor([0.0, -0.0])
    digits, step = integer._digits(x)
    high, middle, low = digits.double().split(7)
    error = ((high * 65536 + middle * 256 + low) * step.double() - x.double()).abs()
    assert digits.dtype == torch.int8 and (error <= 0.51 * step.double() + 2**-23 * x.double().abs()).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = bad
    weights = quantized_operands(8, 64, 8, 0, has_zero=False, has_bias=False, dtype="float32")
    y = run("weight_only_quant_matmul", x, weights=weights, bits=8, has_zero=False, dtype="float32")
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "columns", "rows"), [(1, 7, 3), (1, 513, 65), (9, 64, 64), (33, 129, 31), (8, 1, 1)]
)
def test_integer_products_are_exact(tokens: int, columns: int, rows: int) -> None:
    x = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    assert torch.equal(integer._integer_product(x, weight.T), quantized_reference.integer_product(x, weight))


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_smooth_quant_gemm_is_the_reference(is_static: bool, has_bias: bool) -> None:
    x, x_scale = reference.quantize_per_token(torch.randn(9, 65))
    x_scale = torch.rand(1) if is_static else x_scale
    weight = torch.randint(-127, 128, (33, 65), dtype=torch.int8)
    operands = (x, x_scale, weight, torch.rand(33), *((normal(33, dtype="float16"),) if has_bias else ()))
    found = run("smooth_quant_gemm", *operands, dtype="float16")
    assert torch.equal(found, quantized_reference.smooth_quant_gemm(*operands, dtype="float16"))


@pytest.mark.parametrize("is_static", [False, True])
def test_smooth_quant_gated_mlp_is_the_reference(is_static: bool) -> None:
    x, x_scale = reference.quantize_per_token(torch.randn(9, 64))
    fc, gate = (torch.randint(-127, 128, (17, 64), dtype=torch.int8) for _ in range(2))
    weights = (fc, torch.rand(17) * 1e-2, gate, torch.rand(17) * 1e-2)
    values = (x,) if is_static else (x, x_scale)
    if is_static:
        weights = (torch.rand(1), *weights)
    found = run("smooth_quant_gated_mlp", *values, weights=weights, dtype="float32")
    wanted = quantized_reference.smooth_quant_gated_mlp(*values, *weights, dtype="float32")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_quantizing_a_token_rounds_half_to_even_and_zeros_stay_zero() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    q, scale = reference.quantize_per_token(x)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]] and scale.tolist() == [[1.0], [0.0]]


def test_a_static_scale_cuts_what_is_too_large() -> None:
    q = quantized_reference.quantize_tensor(torch.tensor([[1000.0, -1000.0, 3.0]]), torch.tensor([0.5]))
    assert q.tolist() == [[127, -127, 6]]


def test_a_smoother_divides_before_rounding() -> None:
    x, smoother = torch.randn(4, 8), torch.rand(8) + 0.5
    for found, wanted in zip(
        reference.quantize_per_token(x, smoother), reference.quantize_per_token(x * (1 / smoother)), strict=True
    ):
        assert torch.equal(found, wanted)
