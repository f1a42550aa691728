"""How a matmul kernel ends: bias, perhaps the gate of a gated MLP, one rounding, the store.

    out[t, n] = s[t, n] + bias[n]                     s = x weight^T in float32
    out[t, n] = silu(s[t, 2 n]) * s[t, 2 n + 1]       gated: rows of fc and of gate take turns in the weight

A program owns a tile of ROW_TILE rows of the weight, so both halves of a gated product meet in it. Knows neither how
the weight is stored nor how the sums were made.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
