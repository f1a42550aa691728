"""W8A8: activations to int8, and matmuls of int8 by int8 with exact int32 sums (SmoothQuant).

    quantize_per_token(x, i)   q = round(x * i * 127 / amax), scale amax / 127, amax of each row of x * i
    quantize_tensor(x, a, i)   q = round(x * i / a), cut to -127..127
    smooth_quant_gemm          y[t, n] = sum_k x[t, k] w[n, k] * (x_scale[t] * w_scale[n]) + bias[n]
    smooth_quant_gated_mlp     silu(x fc^T) * (x gate^T), each product as above

x and weights are [rows, k] with k contiguous; x_scale is [tokens, 1] or [1]; i is the inverse of a smoother, made once.
Integers are summed without rounding, so a result depends on nothing but its row of x and of the weight, in whichever
way it is made: streamed, in ring tiles (ring_tiles.py), on warpgroups (wgmma_plain.py) or in other tiles. Scales, bias
and gate are float32, rounded once.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

from functools import partial

import torch
import triton
import triton.language as tl

from ...dtype import torch_dtype
from ..tactics import MatmulShape, Tactic, Tactics
from ..tactics.smooth_quant import tiles
from ..tactics.tactic import cdiv, next_power_of_2
from . import ring_tiles, wgmma_plain
from .epilogue import interleaved, scaled, store_outputs, stride_of, tile_rows
from .int8_rows import quantize_rows, round_to_int8
from .integer_planes import HAS_PTX
from .overlap import overlapping, start_next, wait_for_previous
from .splits import arrivals_of


@triton.jit
def _quantize(
    x_ptr, inverse_ptr, scale_ptr, q_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_SMOOTHER: tl.constexpr, IS_STATIC: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row. A static scale is read; otherwise the row's own is written."""
    start_next(OVERLAP)
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < WIDTH
    if HAS_SMOOTHER:
        inverse = tl.load(inverse_ptr + columns, mask=mask, other=1.0)
    wait_for_previous(OVERLAP)
    row = token.to(tl.int64) * WIDTH + columns
    x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
    if HAS_SMOOTHER:
        x *= inverse
    if IS_STATIC:
        steps_per_unit = tl.div_rn(1.0, tl.load(scale_ptr))
        q = round_to_int8(x * steps_per_unit)
    else:
        q, scale = quantize_rows(x)
        tl.store(scale_ptr + token + tl.zeros([1, 1], tl.int32), scale)
    tl.store(q_ptr + row, q, mask=mask)


@triton.jit
def _dot_bytes(sums, left, right):
    """sums plus the products of the four signed bytes of each int32 word of left and right."""
    if HAS_PTX:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [left, right, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for index in tl.static_range(4):
            sums += ((left << (24 - 8 * index)) >> 24) * ((right << (24 - 8 * index)) >> 24)
    return sums


@triton.jit
def _stream_rows(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, num_rows,
    WORDS: tl.constexpr, ROW_TILE: tl.constexpr, WORD_TILE: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: rows of the weight go by once, four int8 of one int32 word at a time.

    The first piece of every row is in flight before the wait for x.
    """
    start_next(OVERLAP)
    tile = tl.program_id(0)
    rows = tile_rows(tile, num_rows, ROW_TILE)
    lanes = tl.arange(0, WORD_TILE)
    weight_ptrs = weight_ptr + (rows.to(tl.int64) * WORDS)[:, None] + lanes[None, :]
    weight = tl.load(weight_ptrs, mask=(lanes < WORDS)[None, :], other=0, eviction_policy="evict_first")
    wait_for_previous(OVERLAP)
    sums = tl.zeros([ROW_TILE, WORD_TILE], tl.int32)
    for first in tl.static_range(0, WORDS, WORD_TILE):
        mask = (lanes < WORDS - first)[None, :]
        if first > 0:
            weight = tl.load(weight_ptrs + first, mask=mask, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptr + first + lanes[None, :], mask=mask, other=0, eviction_policy="evict_last")
        sums = _dot_bytes(sums, weight, tl.broadcast_to(x, [ROW_TILE, WORD_TILE]))
    token_ids = tl.arange(0, 1)
    y = scaled(tl.sum(sums, axis=1)[None, :], rows, token_ids, 1, x_scale_ptr, 0, weight_scale_ptr)
    store_outputs(y, tile, token_ids, 1, num_rows, bias_ptr, out_ptr, 1, ROW_TILE, HAS_BIAS, IS_GATED)


@triton.jit(do_not_specialize=["tokens"])
def _multiply_tiles(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, num_rows, depth, x_scale_stride,
    TOKEN_TILE: tl.constexpr, ROW_TILE: tl.constexpr, DEPTH_TILE: tl.constexpr, NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """More tokens: tensor cores. The weight is the left operand, as that side of a tile has at least 64 rows."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    tile = tl.program_id(1)
    rows = tile_rows(tile, num_rows, ROW_TILE)
    token_ids = tl.program_id(0) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    lanes = tl.arange(0, DEPTH_TILE)[None, :]
    weight_ptrs = weight_ptr + (rows.to(tl.int64) * depth)[:, None] + lanes
    x_ptrs = x_ptr + (token_ids.to(tl.int64) * depth)[:, None] + lanes
    token_mask = (token_ids < tokens)[:, None]
    sums = tl.zeros([ROW_TILE, TOKEN_TILE], tl.int32)
    for first in tl.range(0, depth, DEPTH_TILE, num_stages=NUM_STAGES):
        mask = lanes < depth - first
        weight = tl.load(weight_ptrs + first, mask=mask, other=0)
        x = tl.load(x_ptrs + first, mask=mask & token_mask, other=0)
        sums = tl.dot(weight, tl.trans(x), sums, out_dtype=tl.int32)
    y = scaled(tl.trans(sums), rows, token_ids, tokens, x_scale_ptr, x_scale_stride, weight_scale_ptr)
    store_outputs(y, tile, token_ids, tokens, num_rows, bias_ptr, out_ptr, TOKEN_TILE, ROW_TILE, HAS_BIAS, IS_GATED)


def prepare_quantize_per_token(smoother: torch.Tensor) -> tuple[torch.Tensor]:
    return (1 / smoother,)


def prepare_last_smoother(
    first: torch.Tensor, smoother: torch.Tensor | None = None, *, eps: float | None = None
) -> tuple[torch.Tensor, ...]:
    """Of quantize_tensor and of norms that quantize: a scale or a norm's weight, and the inverse of a smoother."""
    return (first,) if smoother is None else (first, 1 / smoother)


def quantize_per_token(x: torch.Tensor, inverse: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [T, k] and float32 [T, 1], equal to the reference's to the bit."""
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    return _launch_quantize(x, inverse, scale, is_static=False), scale


def quantize_tensor(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor | None = None) -> torch.Tensor:
    """int8 [T, k] with the scale float32 [1] that calibration gave."""
    return _launch_quantize(x, inverse, scale, is_static=True)


def _launch_quantize(
    x: torch.Tensor, inverse: torch.Tensor | None, scale: torch.Tensor, *, is_static: bool
) -> torch.Tensor:
    tokens, width = x.shape
    assert x.is_contiguous(), "quantize: rows must be contiguous"
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if tokens:
        block = next_power_of_2(width)
        # As in norm.py: one row is one program, and its latency counts. 11008 columns take 32 warps.
        _quantize[(tokens,)](
            x, inverse, scale, q, WIDTH=width, BLOCK=block, HAS_SMOOTHER=inverse is not None, IS_STATIC=is_static,
            num_warps=min(max(block // 256, 1), 32), **overlapping(x.device),
        )  # fmt: skip
    return q


def smooth_quant_gemm_by(
    tactics: Tactics,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
) -> torch.Tensor:
    """int8 x [T, k] times the transpose of int8 weight [n, k], scaled, in `dtype`."""
    return _launch_matmul(tactics, "smooth_quant_gemm", x, x_scale, weight, weight_scale, bias, dtype, is_gated=False)


def prepare_smooth_quant_gated_mlp(*weights: torch.Tensor, dtype: str) -> tuple[torch.Tensor, ...]:
    """fc and gate row by row in one weight, and so their scales; an x_scale before them is a static one, and stays."""
    *x_scale, fc, fc_scale, gate, gate_scale = weights
    return (*x_scale, interleaved(fc, gate), interleaved(fc_scale, gate_scale))


def smooth_quant_gated_mlp_by(
    tactics: Tactics,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    dtype: str,
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weights of `prepare_smooth_quant_gated_mlp`."""
    op = "smooth_quant_gated_mlp"
    return _launch_matmul(tactics, op, x, x_scale, weight, weight_scale, None, dtype, is_gated=True)


smooth_quant_gemm = partial(smooth_quant_gemm_by, Tactics())
smooth_quant_gated_mlp = partial(smooth_quant_gated_mlp_by, Tactics())


def _choose(tactics: Tactics, op: str, x: torch.Tensor, weight: torch.Tensor) -> Tactic:
    tokens, depth = x.shape
    facts = op, weight.shape[0], depth, x.dtype, 8, 1, False
    tactic = tactics.choose(*facts, tokens)
    if tactic.way == "ring_tiles" and not ring_tiles.takes(x, weight):
        return tiles(MatmulShape(*facts), tokens)
    if tactic.way == "wgmma" and not wgmma_plain.takes(x, weight):
        return tiles(MatmulShape(*facts), tokens)
    return tactic


def _launch_matmul(
    tactics: Tactics,
    op: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
    *,
    is_gated: bool,
) -> torch.Tensor:
    tactic = _choose(tactics, op, x, weight)
    tokens, depth = x.shape
    num_rows = weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous(), "smooth_quant: rows must be contiguous"
    width = num_rows // 2 if is_gated else num_rows
    out = torch.empty((tokens, width), dtype=torch_dtype(dtype), device=x.device)
    if tokens == 0:
        return out
    flags = dict(HAS_BIAS=bias is not None, IS_GATED=is_gated)
    token_tile, row_tile = tactic.token_tile, tactic.row_tile
    if tactic.way == "stream":
        assert tokens == 1, f"smooth_quant: a stream of {tokens} tokens"
        _stream_rows[(cdiv(num_rows, row_tile),)](
            x.view(torch.int32), x_scale, weight.view(torch.int32), weight_scale, bias, out, num_rows,
            WORDS=depth // 4, ROW_TILE=row_tile, WORD_TILE=tactic.depth_tile // 4, **flags,
            num_warps=tactic.num_warps, **overlapping(x.device),
        )  # fmt: skip
        return out
    if tactic.way == "ring_tiles":
        ring_tiles.multiply(
            x, x_scale, weight, weight_scale, bias, out, is_gated=is_gated, tactic=tactic, arrivals=arrivals_of(tactics)
        )
        return out
    if tactic.way == "wgmma":
        wgmma_plain.multiply(x, x_scale, weight, weight_scale, bias, out, is_gated=is_gated, tactic=tactic)
        return out
    # Token tiles come first in the grid, so programs that run together share rows of the weight.
    _multiply_tiles[(cdiv(tokens, token_tile), cdiv(num_rows, row_tile))](
        x, x_scale, weight, weight_scale, bias, out, tokens, num_rows, depth, stride_of(x_scale),
        TOKEN_TILE=token_tile, ROW_TILE=row_tile, DEPTH_TILE=tactic.depth_tile, NUM_STAGES=tactic.num_stages, **flags,
        num_warps=tactic.num_warps, **overlapping(x.device, is_early=tokens <= 64),
    )  # fmt: skip
    return out
