"""Quantized matmuls on the CPU, all through torch._int_mm: exact integer sums, on VNNI where the processor has it.

Weight-only: a float activation becomes three int8 digits to the base 256 of a 24-bit fixed-point number,

    x[t, k] = step[t] * (65536 h + 256 m + l),   step[t] = amax(x[t]) / (127 * 65536)

so an integer matmul of three rows per token has float32's precision, and neither the batch nor the order of a sum can
change a bit. 2048 x 5504 at one row takes 0.6 ms this way, 1.15 ms in float16, 14 ms when the int8 weight is widened
to float32 first, and 5.1 ms in torch's own _weight_int8pack_mm (two Zen 4 cores, torch 2.13).
"""

import torch
from torch.nn.functional import silu

from ...dtype import torch_dtype
from ...quantization.quantize import integers_of
from ..quantized_reference import split_optional

_FULL_SCALE = 127 * 65536


def prepare_weight_only_quant_matmul(
    weight: torch.Tensor, scale: torch.Tensor, *zero_and_bias: torch.Tensor, bits: int, has_zero: bool, dtype: str
) -> tuple[torch.Tensor | None, ...]:
    """int8 [groups, k / groups, n], a view whose columns lie side by side; scale and zero float32 [groups, n]; bias."""
    zero, bias = split_optional(zero_and_bias, has_zero)
    by_group = integers_of(weight, bits).unflatten(1, (scale.shape[1], -1)).transpose(0, 1).contiguous()
    return (
        by_group.transpose(1, 2),
        scale.T.contiguous(),
        None if zero is None else zero.T.float().contiguous(),
        None if bias is None else bias.float(),
    )


def weight_only_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """x [T, k] and what `prepare_weight_only_quant_matmul` made of weight, scale, zero and bias -> [T, n]."""
    if weight.shape[0] > 1 and x.shape[0] > _LARGEST_INTEGER_BATCH:
        return _dequantized_matmul(x, weight, scale, zero, bias).to(torch_dtype(dtype))
    digits, step = _digits(x)
    tokens, columns = x.shape
    group_size = columns // weight.shape[0]
    y = torch.zeros(tokens, weight.shape[2])
    for group, part in enumerate(digits.split(group_size, dim=1)):
        sums = _join(_integer_product(part, weight[group]), tokens)
        if zero is not None:
            sums -= _join(part.sum(1, dtype=torch.int32)[:, None], tokens) * zero[group]
        y += sums * scale[group]
    y *= step
    return (y if bias is None else y + bias).to(torch_dtype(dtype))


# Beyond it the sums of digits of every group, three int32 for each of T x n, cost more than the multiplication: 2048 x
# 5504 int4 in groups of 128 takes 36 ms either way at 64 rows, 1217 against 199 ms at 512 (one Zen 4 core, torch 2.13).
_LARGEST_INTEGER_BATCH = 64


def _dequantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same in float32 for many tokens: each group is dequantized once for all of them."""
    groups, group_size, rows = weight.shape
    y = torch.zeros(x.shape[0], rows) if bias is None else bias.expand(x.shape[0], rows).clone()
    for group, part in enumerate(x.float().split(group_size, dim=1)):
        integers = weight[group].float()
        y.addmm_(part, (integers if zero is None else integers - zero[group]).mul_(scale[group]))
    return y


def prepare_weight_only_gated_mlp(
    *weights: torch.Tensor, bits: int, has_zero: bool, dtype: str
) -> tuple[torch.Tensor | None, ...]:
    """fc and gate below each other, as one weight of 2 n rows."""
    half = len(weights) // 2
    both = (torch.cat(pair) for pair in zip(weights[:half], weights[half:], strict=True))
    return prepare_weight_only_quant_matmul(*both, bits=bits, has_zero=has_zero, dtype=dtype)


def weight_only_gated_mlp(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T), rounded once."""
    both = weight_only_quant_matmul(x, weight, scale, zero, bias, bits=bits, has_zero=has_zero, dtype="float32")
    activated, linear = both.chunk(2, dim=1)
    return (silu(activated) * linear).to(torch_dtype(dtype))


def smooth_quant_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
) -> torch.Tensor:
    """As the reference; the integer sums are those of torch._int_mm."""
    y = _integer_product(x, weight.T).float() * (x_scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(torch_dtype(dtype))


def prepare_smooth_quant_gated_mlp(*weights: torch.Tensor, dtype: str) -> tuple[torch.Tensor, ...]:
    """A static x_scale, if there is one, stays; fc and gate and their scales come below each other."""
    *x_scale, fc, fc_scale, gate, gate_scale = weights
    return (*x_scale, torch.cat((fc, gate)), torch.cat((fc_scale, gate_scale)))


def smooth_quant_gated_mlp(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *, dtype: str
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) of int8 operands, rounded once."""
    activated, linear = smooth_quant_gemm(x, x_scale, weight, weight_scale, dtype="float32").chunk(2, dim=1)
    return (silu(activated) * linear).to(torch_dtype(dtype))


# One row goes to a kernel of its own that reads the weight once: 0.27 ms for 2048 x 5504 on one core, where two rows
# together take 2.2 ms and sixteen 3.0 (one Zen 4 core, torch 2.13).
_ROWS_ONE_BY_ONE = 8


def _integer_product(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int8 [m, k] times int8 [k, n], the second a view of rows [n, k]: int32 [m, n]."""
    if x.shape[0] > _ROWS_ONE_BY_ONE:
        return torch._int_mm(x, columns)
    return torch.cat([torch._int_mm(row, columns) for row in x.split(1)])


def _digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [3 T, k], the high digits of all tokens first, and the step of each token, float32 [T, 1]."""
    wide = x.float()
    step = wide.abs().amax(1, keepdim=True) / _FULL_SCALE
    # What is not finite stays so in `step`, and thus in the result.
    fixed = (wide / step).nan_to_num(0, 0, 0).round().to(torch.int32)
    low = ((fixed + 128) & 255) - 128
    rest = (fixed - low) >> 8
    middle = ((rest + 128) & 255) - 128
    high = (rest - middle) >> 8
    return torch.cat((high, middle, low)).to(torch.int8), step


def _join(sums: torch.Tensor, tokens: int) -> torch.Tensor:
    """int32 [3 T, n] sums over digits -> float32 [T, n]."""
    high, middle, low = sums.float().view(3, tokens, sums.shape[1])
    return high.mul_(65536).add_(middle, alpha=256).add_(low)
