"""What the ops of quantized networks mean, in plain torch: the second half of reference.py.

Integer products are exact: they are summed in int32 whatever the device.
"""

import torch

from ..dtype import torch_dtype
from ..quantization.quantize import dequantize
from .reference import add, compute_dtype, quantize_per_token, rms_norm, smoothed

Weights = tuple[torch.Tensor, ...]


def split_optional(operands: Weights, has_zero: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(zero, bias) of a weight-only matmul, from the operands after its scale."""
    zero = operands[0] if has_zero else None
    rest = operands[int(has_zero) :]
    return zero, rest[0] if rest else None


def weight_only_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *zero_and_bias: torch.Tensor,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """x [T, k] times the transpose of the dequantized weight [n, k], plus bias [n]; one rounding at the end."""
    zero, bias = split_optional(zero_and_bias, has_zero)
    product = _wide_product(x, weight, scale, zero, bits)
    if bias is not None:
        product = product + bias.to(product.dtype)
    return product.to(torch_dtype(dtype))


def weight_only_gated_mlp(
    x: torch.Tensor, *weights: torch.Tensor, bits: int, has_zero: bool, dtype: str
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T); weights are weight, scale and perhaps zero of fc, then those of gate."""
    half = len(weights) // 2
    fc, gate = (
        _wide_product(x, branch[0], branch[1], branch[2] if has_zero else None, bits)
        for branch in (weights[:half], weights[half:])
    )
    return (torch.nn.functional.silu(fc) * gate).to(torch_dtype(dtype))


def _wide_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    wide = compute_dtype(x)
    return x.to(wide) @ dequantize(weight, scale.to(wide), zero, bits=bits).T


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, smoother: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_per_token of a norm that nobody rounds in between: int8 [T, hidden], float32 [T, 1]."""
    return quantize_per_token(rms_norm(x, weight, eps=eps, dtype="float32"), smoother)


def add_rms_norm_quantize(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, smoother: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + y in the residual's dtype, rms_norm_quantize of that sum)."""
    residual = add(x, y)
    return residual, *rms_norm_quantize(residual, weight, smoother, eps=eps)


def quantize_tensor(x: torch.Tensor, scale: torch.Tensor, smoother: torch.Tensor | None = None) -> torch.Tensor:
    """q = round(x / smoother / scale), cut to -127..127; scale float32 [1]."""
    return (smoothed(x, smoother) * (1 / scale)).round().clamp(-127, 127).to(torch.int8)


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [T, k] times the transpose of int8 [n, k], exact, int32 [T, n]."""
    # A product is at most 2^14, so float64 holds sums of 2^39 of them exactly.
    return (x.double() @ weight.double().T).to(torch.int32)


def smooth_quant_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
) -> torch.Tensor:
    """int8 x [T, k] and weight [n, k] with scales [T, 1] or [1], and [n]."""
    y = integer_product(x, weight).float() * (x_scale * weight_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(torch_dtype(dtype))


def smooth_quant_gated_mlp(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    fc: torch.Tensor,
    fc_scale: torch.Tensor,
    gate: torch.Tensor,
    gate_scale: torch.Tensor,
    *,
    dtype: str,
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) of int8 operands, rounded once."""
    activated = torch.nn.functional.silu(smooth_quant_gemm(x, x_scale, fc, fc_scale, dtype="float32"))
    return (activated * smooth_quant_gemm(x, x_scale, gate, gate_scale, dtype="float32")).to(torch_dtype(dtype))


def scale_columns(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, k] times scale [k], in x's dtype."""
    wide = compute_dtype(x)
    return (x.to(wide) * scale.to(wide)).to(x.dtype)


def permute_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [T, k] with columns in `order` [k]."""
    return x[:, order.long()]
