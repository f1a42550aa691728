"""Matmuls with a weight of floats, for the few tokens of a decode step: x W^T + bias, and silu(x F^T) * (x G^T).

    x [tokens, k], W [n, k] -> [tokens, n];  rows of F and of G take turns in one weight (epilogue.py)

All are bound by the reading of the weight. One token: rows are streamed through float32 FMAs, the first of them while
the kernel before still runs (overlap.py). A few: tensor cores, with the weight as the left operand, whose side of a
tile has 64 rows or so, so that few tokens are little padding; up to 16 in ring_tiles.py, which begins early as well.
More than 64 tokens are multiplied by cuBLAS, or on warpgroups of Hopper (wgmma_plain.py). Which, and in which tiles:
kernels/tactics.
Sums are in float32 and in a fixed order: a row of x has the same bits in any batch that is multiplied the same way.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl

from ...dtype import torch_dtype
from ..tactics import LIBRARY, MatmulShape, Tactic, Tactics
from ..tactics.dense import tiles
from ..tactics.tactic import cdiv
from . import ring_tiles, wgmma_plain
from .epilogue import store_outputs, tile_rows
from .kv_pool import dot_dtype
from .overlap import overlapping, start_next, wait_for_previous
from .splits import Arrivals


@triton.jit
def _stream_rows(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows,
    DEPTH: tl.constexpr, ROW_TILE: tl.constexpr, DEPTH_TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token. The first piece of every row is in flight before the wait for x."""
    start_next(OVERLAP)
    tile = tl.program_id(0)
    rows = tile_rows(tile, num_rows, ROW_TILE)
    lanes = tl.arange(0, DEPTH_TILE)
    weight_ptrs = weight_ptr + (rows.to(tl.int64) * DEPTH)[:, None] + lanes[None, :]
    weight = tl.load(weight_ptrs, mask=(lanes < DEPTH)[None, :], other=0.0, eviction_policy="evict_first")
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + lanes, mask=lanes < DEPTH, other=0.0, eviction_policy="evict_last")
    sums = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for first in tl.static_range(DEPTH_TILE, DEPTH, DEPTH_TILE):
        mask = lanes < DEPTH - first
        weight = tl.load(weight_ptrs + first, mask=mask[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + first + lanes, mask=mask, other=0.0, eviction_policy="evict_last")
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(sums, axis=1)[None, :]
    store_outputs(y, tile, tl.arange(0, 1), 1, num_rows, bias_ptr, out_ptr, 1, ROW_TILE, HAS_BIAS, IS_GATED)


@triton.jit(do_not_specialize=["tokens"])
def _multiply_tiles(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, num_rows,
    DEPTH: tl.constexpr, TOKEN_TILE: tl.constexpr, ROW_TILE: tl.constexpr, DEPTH_TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """More tokens, by tensor cores."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    tile = tl.program_id(1)
    rows = tile_rows(tile, num_rows, ROW_TILE)
    weight_rows_ptr = weight_ptr + (rows.to(tl.int64) * DEPTH)[:, None]
    token_ids = tl.program_id(0) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    lanes = tl.arange(0, DEPTH_TILE)[None, :]
    weight_ptrs = weight_rows_ptr + lanes
    x_ptrs = x_ptr + (token_ids.to(tl.int64) * DEPTH)[:, None] + lanes
    token_mask = (token_ids < tokens)[:, None]
    sums = tl.zeros([ROW_TILE, TOKEN_TILE], tl.float32)
    for first in tl.range(0, DEPTH, DEPTH_TILE, num_stages=NUM_STAGES):
        if DEPTH % DEPTH_TILE == 0:
            weight = tl.load(weight_ptrs + first)
            x = tl.load(x_ptrs + first, mask=token_mask, other=0.0)
        else:
            mask = lanes < DEPTH - first
            weight = tl.load(weight_ptrs + first, mask=mask, other=0.0)
            x = tl.load(x_ptrs + first, mask=mask & token_mask, other=0.0)
        sums = tl.dot(weight.to(DOT_DTYPE), tl.trans(x.to(DOT_DTYPE)), sums, input_precision="ieee")
    store_outputs(
        tl.trans(sums), tile, token_ids, tokens, num_rows, bias_ptr, out_ptr, TOKEN_TILE, ROW_TILE, HAS_BIAS, IS_GATED
    )


def choose(tactics: Tactics, op: str, x: torch.Tensor, weight: torch.Tensor) -> Tactic:
    """How `op` is computed with these operands; cuBLAS takes those that `multiply` cannot."""
    if x.dtype != weight.dtype or not weight.is_contiguous():
        return LIBRARY
    tokens, depth = x.shape
    facts = op, weight.shape[0], depth, x.dtype, 0, 1, False
    tactic = tactics.choose(*facts, tokens)
    if tactic.way == "ring_tiles" and not ring_tiles.takes(x, weight):
        return tiles(MatmulShape(*facts), tokens)
    if tactic.way == "wgmma" and not wgmma_plain.takes(x, weight):
        return LIBRARY
    return tactic


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
    tactic: Tactic,
    *,
    is_gated: bool,
    arrivals: Arrivals | None = None,
) -> torch.Tensor:
    """x weight^T + bias, or the gated product, in `dtype`, by a stream (of one token), in tiles, or on warpgroups.

    No kernel of the step may have written the weight: all but plain tiles read it before the kernels in front are done.
    In tiles, a row's bits depend on the tactic, not on how many tokens there are. Ring tiles need `arrivals`.
    """
    assert x.is_contiguous() and weight.is_contiguous(), "dense matmul: rows must be contiguous"
    (tokens, depth), num_rows = x.shape, weight.shape[0]
    width = num_rows // 2 if is_gated else num_rows
    out = torch.empty((tokens, width), dtype=torch_dtype(dtype), device=x.device)
    if tokens == 0:
        return out
    row_tile, token_tile = tactic.row_tile, tactic.token_tile
    flags = dict(HAS_BIAS=bias is not None, IS_GATED=is_gated)
    if tactic.way == "stream":
        assert tokens == 1, f"dense matmul: a stream of {tokens} tokens"
        _stream_rows[(cdiv(num_rows, row_tile),)](
            x, weight, bias, out, num_rows, DEPTH=depth, ROW_TILE=row_tile, DEPTH_TILE=tactic.depth_tile, **flags,
            num_warps=tactic.num_warps, **overlapping(x.device),
        )  # fmt: skip
        return out
    if tactic.way == "ring_tiles":
        assert arrivals is not None
        ring_tiles.multiply(x, None, weight, None, bias, out, is_gated=is_gated, tactic=tactic, arrivals=arrivals)
        return out
    if tactic.way == "wgmma":
        wgmma_plain.multiply(x, None, weight, None, bias, out, is_gated=is_gated, tactic=tactic)
        return out
    # Token tiles come first in the grid, so programs that run together share rows of the weight.
    _multiply_tiles[(cdiv(tokens, token_tile), cdiv(num_rows, row_tile))](
        x, weight, bias, out, tokens, num_rows, DEPTH=depth, TOKEN_TILE=token_tile, ROW_TILE=row_tile,
        DEPTH_TILE=tactic.depth_tile, NUM_STAGES=tactic.num_stages, DOT_DTYPE=dot_dtype(x.dtype), **flags,
        num_warps=tactic.num_warps, **overlapping(x.device, is_early=token_tile == 32),
    )  # fmt: skip
    return out
