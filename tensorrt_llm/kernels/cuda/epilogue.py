"""How a matmul kernel ends: bias, perhaps the gate of a gated MLP, one rounding, the store.

    out[t, n] = s[t, n] + bias[n]                     s = x weight^T in float32
    out[t, n] = silu(s[t, 2 n]) * s[t, 2 n + 1]       gated: rows of fc and of gate take turns in the weight

A program owns a tile of ROW_TILE rows of the weight, so both halves of a gated product meet in it. Where the depth was
divided among programs, another kernel adds their sums first. Of int8 by int8 sums are int32 until both scales are put
on them. Knows neither how the weight is stored nor how the sums were made.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tactics.tactic import cdiv, next_power_of_2
from .overlap import overlapping, start_next, wait_for_previous


def interleaved(fc: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Rows of fc and of gate by turns."""
    return torch.stack((fc, gate), dim=1).flatten(0, 1)


@gluon.jit
def gated(pairs):
    """silu(fc) * gate of sums [..., 2] of fc and gate, for kernels in Gluon, which has its own tensors."""
    fc, gate = gl.split(pairs)
    return fc / (1.0 + gl.exp(-fc)) * gate


@triton.jit
def tile_rows(tile, num_rows, ROW_TILE: tl.constexpr):
    """The rows of tile `tile`; beyond the end the last one is taken again, and not stored."""
    return tl.minimum(tile * ROW_TILE + tl.arange(0, ROW_TILE), num_rows - 1)


@triton.jit
def store_outputs(
    sums, tile, token_ids, tokens, num_rows, bias_ptr, out_ptr,
    TOKEN_TILE: tl.constexpr, ROW_TILE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """Finish and write sums [TOKEN_TILE, ROW_TILE], float32, of the rows of `tile`."""
    if HAS_BIAS:
        sums += tl.load(bias_ptr + tile_rows(tile, num_rows, ROW_TILE)).to(tl.float32)[None, :]
    if IS_GATED:
        fc, gate = tl.split(tl.reshape(sums, [TOKEN_TILE, ROW_TILE // 2, 2]))
        outputs = fc / (1.0 + tl.exp(-fc)) * gate
        width = num_rows // 2
        columns = tile * (ROW_TILE // 2) + tl.arange(0, ROW_TILE // 2)
    else:
        outputs = sums
        width = num_rows
        columns = tile * ROW_TILE + tl.arange(0, ROW_TILE)
    mask = (token_ids < tokens)[:, None] & (columns < width)[None, :]
    tl.store(out_ptr + token_ids.to(tl.int64)[:, None] * width + columns[None, :], outputs, mask=mask)


@triton.jit
def scaled(sums, rows, token_ids, tokens, x_scale_ptr, x_scale_stride, weight_scale_ptr):
    """int32 sums [TOKEN_TILE, ROW_TILE] to float32, times both scales."""
    x_scale = tl.load(x_scale_ptr + token_ids * x_scale_stride, mask=token_ids < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + rows)
    return sums.to(tl.float32) * (x_scale[:, None] * weight_scale[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _add_splits(
    partial_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, num_rows, num_splits, x_scale_stride,
    ROW_TILE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums over partial [splits, tokens, rows] in order, then the end of a matmul."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    tile = tl.program_id(0)
    token_ids = tl.program_id(1) + tl.arange(0, 1)
    columns = tile * ROW_TILE + tl.arange(0, ROW_TILE)[None, :]
    sums = tl.zeros([1, ROW_TILE], tl.int32 if HAS_SCALES else tl.float32)
    for split in range(num_splits):
        offsets = ((split * tokens).to(tl.int64) + token_ids[:, None]) * num_rows + columns
        sums += tl.load(partial_ptr + offsets, mask=columns < num_rows, other=0.0).to(sums.dtype)
    if HAS_SCALES:
        rows = tile_rows(tile, num_rows, ROW_TILE)
        sums = scaled(sums, rows, token_ids, tokens, x_scale_ptr, x_scale_stride, weight_scale_ptr)
    store_outputs(sums, tile, token_ids, tokens, num_rows, bias_ptr, out_ptr, 1, ROW_TILE, HAS_BIAS, IS_GATED)


def add_splits(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    is_gated: bool,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> None:
    """Fill out from the sums [splits, tokens, rows] of a product: floats, or int32 with both scales."""
    num_splits, tokens, num_rows = partial.shape
    row_tile = min(1024, max(2, next_power_of_2(num_rows)))
    _add_splits[(cdiv(num_rows, row_tile), tokens)](
        partial, x_scale, weight_scale, bias, out, tokens, num_rows, num_splits, stride_of(x_scale),
        ROW_TILE=row_tile, HAS_SCALES=x_scale is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated, num_warps=4,
        **overlapping(out.device),
    )  # fmt: skip


def stride_of(x_scale: torch.Tensor | None) -> int:
    """From the scale of a token, in x_scale [tokens, 1], to the next one's; one [1] is of all."""
    return 1 if x_scale is not None and x_scale.ndim == 2 else 0
