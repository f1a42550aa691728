"""RMSNorm, fused with the residual add before it and with the quantization per token after it.

    rms_norm(x)        = x * rsqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, y) = s, rms_norm(s)   with s = x + y, kept in float32
    y of splits        = y[0] + y[1] + ...  the float32 sums of parts of a product's depth, added in order
    ..._quantize       = ..., q, scale    of the norm * inverse, as in int8_rows.py

x, y and the results are [tokens, hidden], rows contiguous, y perhaps [splits, tokens, hidden]; weight and inverse, that
of a smoother, are [hidden]. Each row belongs to one program, all math is in float32, and each result is rounded once. A
row's bits do not depend on the other rows.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl

from ...dtype import torch_dtype
from ..tactics.tactic import next_power_of_2
from .int8_rows import quantize_rows
from .overlap import overlapping, start_next, wait_for_previous


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm(
    x_ptr, y_ptr, weight_ptr, inverse_ptr, sum_ptr, out_ptr, scale_ptr, tokens,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, NUM_ADDENDS: tl.constexpr,
    HAS_SMOOTHER: tl.constexpr, IS_QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < HIDDEN
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SMOOTHER:
        inverse = tl.load(inverse_ptr + columns, mask=mask, other=1.0)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    if NUM_ADDENDS > 0:
        y = tl.load(y_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        for split in tl.static_range(1, NUM_ADDENDS):
            first_row = tokens.to(tl.int64) * (split * HIDDEN)
            y += tl.load(y_ptr + first_row + row + columns, mask=mask, other=0.0).to(tl.float32)
        x += y
        tl.store(sum_ptr + row + columns, x, mask=mask)
    out = x * tl.rsqrt(tl.sum(x * x) / HIDDEN + EPS) * weight
    if IS_QUANTIZED:
        if HAS_SMOOTHER:
            out *= inverse
        out, scale = quantize_rows(out)
        tl.store(scale_ptr + tl.program_id(0) + tl.zeros([1, 1], tl.int32), scale)
    tl.store(out_ptr + row + columns, out, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str) -> torch.Tensor:
    """x / rms(x) * weight, row by row, in `dtype`."""
    out = torch.empty(x.shape, dtype=torch_dtype(dtype), device=x.device)
    _launch(x, None, weight, None, None, out, None, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y in float32, rms_norm of that sum in `dtype`)."""
    total = _empty_sum(x, y)
    out = torch.empty(x.shape, dtype=torch_dtype(dtype), device=x.device)
    _launch(x, y, weight, None, total, out, None, eps)
    return total, out


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [tokens, hidden] of the norm * inverse, and float32 [tokens, 1], a scale for each row."""
    out, scale = _empty_integers(x)
    _launch(x, None, weight, inverse, None, out, scale, eps)
    return out, scale


def add_rms_norm_quantize(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + y in float32, rms_norm_quantize of that sum)."""
    total = _empty_sum(x, y)
    out, scale = _empty_integers(x)
    _launch(x, y, weight, inverse, total, out, scale, eps)
    return total, out, scale


def _empty_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert x.shape == y.shape[-2:], f"add_rms_norm: x is {tuple(x.shape)} but y is {tuple(y.shape)}"
    assert x.dtype == torch.float32, f"add_rms_norm: the residual must be float32, it is {x.dtype}"
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _empty_integers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale


def _launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    inverse: torch.Tensor | None,
    total: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
) -> None:
    rows, hidden = x.shape
    assert x.is_contiguous() and (y is None or y.is_contiguous()), "rms_norm: rows must be contiguous"
    if rows == 0:
        return
    block = next_power_of_2(hidden)
    # One row is one program, and at decode there are few rows: latency counts. 8 values a lane are two 128-bit
    # loads of the float32 residual, all in flight at once; 4096 columns take 16 warps.
    num_warps = min(max(block // 256, 1), 16)
    _rms_norm[(rows,)](
        x, y, weight, inverse, total, out, scale, rows, HIDDEN=hidden, BLOCK=block, EPS=eps,
        NUM_ADDENDS=0 if y is None else y.shape[0] if y.ndim == 3 else 1, HAS_SMOOTHER=inverse is not None,
        IS_QUANTIZED=scale is not None, num_warps=num_warps, **overlapping(x.device),
    )  # fmt: skip
