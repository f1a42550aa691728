"""Matmuls with a weight of 8 or 4 bits: x W^T + bias, and silu(x F^T) * (x G^T).

    W[n, k] = (q[n, k] - zero[n, k // group]) * scale[n, k // group]       one group of a whole row is "per channel"

Layout, made by `prepare_*`: int16 words [n, blocks * PLANE] of PLANES = 16 / bits integers q + 2^(bits - 1), where

    word c of block b holds in bits j * bits and up the integer of k = (b * PLANES + j) * PLANE + c

so lanes that take neighbouring words find neighbouring x for each of the PLANES planes, and an unpacked plane keeps the
shape of the words. A plane lies in one group: PLANE is 64, or less where groups need it. k is padded to whole blocks.
Scales and zeros are [groups, n]. Rows of fc and gate take turns (epilogue.py).

Three ways to multiply are here: rows of weight streamed through float32 FMAs, where a trick that saves conversions
leaves 16 bits of a product (`_times_integers`); tensor cores on integers, which float16 and bfloat16 both hold exactly,
with the scale put on the float32 sum of a group; and, always in float32, cuBLAS on a weight widened in memory. That
third one rounds the weight, to x's dtype: to 11 bits in float16, 8 in bfloat16, as x itself was rounded when it came.
On Hopper others take their place, by the number of tokens (kernels/tactics):

    1        ring_stream.py, and resident_stream.py for a weight of few rows
    2 to 32  ring_tiles.py
    65 on    wgmma_tiles.py, which rounds a weight with scales of groups as the third way does, and no other weight

A row of x has the same bits in any batch that is multiplied the same way.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The values of a kernel are Triton's, for which Python has no types: its tuples grow.

import logging
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...dtype import dtype_name, torch_dtype
from ...quantization.quantize import integers_of
from ..quantized_reference import split_optional
from ..tactics import MatmulShape, Tactic, Tactics
from ..tactics.tactic import cdiv, plane_size, whole_splits
from ..tactics.weight_only import stream, tiles, without_warpgroups
from . import resident_stream, ring_stream, ring_tiles, wgmma_tiles
from .epilogue import add_splits, interleaved, store_outputs, tile_rows
from .integer_planes import HAS_PTX, integer_plane
from .kv_pool import dot_dtype
from .linear import library_matmul
from .overlap import has_dependent_launch, overlapping, start_next, wait_for_previous
from .splits import Arrivals, arrivals_of
from .warpgroups import has_warpgroups

logger = logging.getLogger(__name__)

# The bits of one in float32. An integer among the last 23 of them adds its share of one. The kernel takes this as an
# argument: an instruction has room for one constant, and that is the mask or the choice of bytes.
_ONE = 0x3F800000


@triton.jit
def _times_integers(words, one, even, odd, minus_ones, PLANE_INDEX: tl.constexpr, BITS: tl.constexpr):
    """Integers of plane PLANE_INDEX times x, in 1 / UNIT: even for the low halves of words, odd for the high.

    No conversions: an unsigned integer u in bits 8, 12 or 16 of a one makes 1 + u / 2^15, 1 + u / 2^11 or 1 + u / 2^7.
    What ones and offsets add to the two products is taken off at once, so that what is rounded beside a one is no more
    than a pair of products: they keep 16 of their 24 bits, five more than x has in float16.
    """
    if BITS == 8:
        low, high = _one_with_byte(words, one, PLANE_INDEX), _one_with_byte(words, one, PLANE_INDEX + 2)
    else:
        if PLANE_INDEX == 0:
            low, high = words << 16, words
        elif PLANE_INDEX == 3:
            low, high = words, words >> 16
        else:
            low, high = words << 8, words >> 8
        MASK: tl.constexpr = 0xF << (16 - PLANE_INDEX % 2 * 4)
        low, high = (low & MASK) | one, (high & MASK) | one
    return low.to(tl.float32, bitcast=True) * even + minus_ones + high.to(tl.float32, bitcast=True) * odd


@triton.constexpr_function
def _byte_ptx(index):
    """Byte `index` of the first operand between bytes 0, 2 and 3 of the second."""
    return f"prmt.b32 $0, $1, $2, 0x76{index}4;"


@triton.jit
def _one_with_byte(words, one, INDEX: tl.constexpr):
    """The bits of 1 + u / 2^15, u byte INDEX of int32 words: one instruction puts four bytes together."""
    if HAS_PTX:
        bits = tl.inline_asm_elementwise(_byte_ptx(INDEX), "=r,r,r", [words, one], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = ((words >> 8 * INDEX) & 0xFF) << 8 | one
    return bits


@triton.jit
def _lifted(x, PLANE_INDEX: tl.constexpr, BITS: tl.constexpr):
    """x as `_times_integers` wants it: four bits in bit 12 count for a sixteenth of those in bit 16."""
    return x * 16.0 if BITS == 4 and PLANE_INDEX % 2 else x


@triton.jit
def _load_pairs(x_ptr, offsets, mask, DTYPE: tl.constexpr):
    """x[2 * offsets] and x[2 * offsets + 1] in float32, of x in DTYPE that comes as int32 words of two."""
    pairs = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy="evict_last")
    if DTYPE == tl.bfloat16:
        even = (pairs << 16).to(tl.float32, bitcast=True)
        odd = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        even = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _quarters(tile, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[BLOCKS, ROWS, COLUMNS] -> four of a quarter of the columns each. A lane's 16 bytes are one word of each."""
    halves = tl.split(tl.reshape(tile, [BLOCKS, ROWS, COLUMNS // 4, 2, 2]))
    first, third = tl.split(halves[0])
    second, fourth = tl.split(halves[1])
    return first, second, third, fourth


@triton.jit(do_not_specialize=["one"])
def _stream_rows(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, num_rows, num_groups, one,
    DEPTH: tl.constexpr, NUM_BLOCKS: tl.constexpr, ROW_TILE: tl.constexpr, BLOCK_TILE: tl.constexpr,
    X_DTYPE: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, PLANES_PER_SCALE: tl.constexpr,
    PLANES_PER_GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: a lane takes eight words of each row, two in an int32, and keeps one sum for each row.

    Tiles are [blocks, rows, pairs of words]: that order of dims is the one in which Triton deals them out to lanes
    alike for all operands. Nothing then moves between lanes before the last sums. The first piece of every row is in
    flight before the wait for x.
    """
    start_next(OVERLAP)
    PLANES: tl.constexpr = 16 // BITS
    PAIRS: tl.constexpr = PLANE // 2
    UNIT: tl.constexpr = 2.0**15 if BITS == 8 else 2.0**7  # what an integer adds to a one is 1 / UNIT of it
    tile = tl.program_id(0)
    rows = tile_rows(tile, num_rows, ROW_TILE)[None, :, None]
    lanes = tl.arange(0, PAIRS)[None, None, :]
    blocks = tl.arange(0, BLOCK_TILE)[:, None, None]
    word_ptrs = words_ptr + rows.to(tl.int64) * (NUM_BLOCKS * PAIRS) + blocks * PAIRS + lanes
    words = tl.load(word_ptrs, mask=blocks < NUM_BLOCKS, other=0, eviction_policy="evict_first")
    wait_for_previous(OVERLAP)
    sums = tl.zeros([BLOCK_TILE, ROW_TILE, PAIRS // 4], tl.float32)
    for first in tl.static_range(0, NUM_BLOCKS, BLOCK_TILE):
        if first > 0:
            in_row = blocks + first < NUM_BLOCKS
            words = tl.load(word_ptrs + first * PAIRS, mask=in_row, other=0, eviction_policy="evict_first")
        quarters = _quarters(words, BLOCK_TILE, ROW_TILE, PAIRS)
        for part in tl.static_range(PLANES // PLANES_PER_SCALE):
            group = blocks * 0
            if PLANES_PER_GROUP > 0:
                group = ((blocks + first) * PLANES + part * PLANES_PER_SCALE) // PLANES_PER_GROUP
            scale_offsets = group * num_rows + rows
            group_mask = group < num_groups
            x_sums = tl.zeros([BLOCK_TILE, 1, PAIRS // 4], tl.float32)
            group_sums = tl.zeros([BLOCK_TILE, ROW_TILE, PAIRS // 4], tl.float32)
            for plane in tl.static_range(part * PLANES_PER_SCALE, (part + 1) * PLANES_PER_SCALE):
                pairs = ((blocks + first) * PLANES + plane) * PAIRS + lanes
                even, odd = _load_pairs(x_ptr, pairs, pairs < DEPTH // 2, X_DTYPE)
                even = _quarters(even, BLOCK_TILE, 1, PAIRS)
                odd = _quarters(odd, BLOCK_TILE, 1, PAIRS)
                for quarter in tl.static_range(4):
                    both = even[quarter] + odd[quarter]
                    x_sums += both
                    minus_ones = -_lifted(both, plane, BITS) - both * (2.0 ** (BITS - 1) / UNIT)
                    group_sums += _times_integers(
                        quarters[quarter], one, _lifted(even[quarter], plane, BITS),
                        _lifted(odd[quarter], plane, BITS), minus_ones, plane, BITS,
                    )  # fmt: skip
            group_sums *= UNIT
            if HAS_ZERO:
                zero = tl.load(zero_ptr + scale_offsets, mask=group_mask, other=0).to(tl.float32)
                group_sums -= zero * x_sums
            sums += group_sums * tl.load(scale_ptr + scale_offsets, mask=group_mask, other=0.0).to(tl.float32)
    y = tl.sum(tl.sum(sums, axis=2), axis=0)[None, :]
    store_outputs(y, tile, tl.arange(0, 1), 1, num_rows, bias_ptr, out_ptr, 1, ROW_TILE, HAS_BIAS, IS_GATED)


@triton.jit(do_not_specialize=["tokens"])
def _multiply_tiles(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    tokens, num_rows, depth, num_blocks, num_groups, blocks_per_split,
    TOKEN_TILE: tl.constexpr, ROW_TILE: tl.constexpr, NUM_STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BITS: tl.constexpr, PLANE: tl.constexpr, PLANES_PER_SCALE: tl.constexpr, PLANES_PER_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """More tokens: tensor cores, a block at a time and a dot for each of its planes.

    The weight is the left operand: tensor cores take that one from the registers in which it is unpacked. IS_WHOLE says
    that depth is a number of whole blocks; with IS_SPLIT the blocks of a row are divided among programs, and out is the
    float32 sums of each split.
    """
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    PLANES: tl.constexpr = 16 // BITS
    tile, split = tl.program_id(1), tl.program_id(2)
    rows = tile_rows(tile, num_rows, ROW_TILE)
    token_ids = tl.program_id(0) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    lanes = tl.arange(0, PLANE)
    word_ptrs = words_ptr + (rows.to(tl.int64) * (num_blocks * PLANE))[:, None] + lanes[None, :]
    x_rows_ptr = x_ptr + (token_ids.to(tl.int64) * depth)[:, None]
    token_mask = (token_ids < tokens)[:, None]
    sums = tl.zeros([ROW_TILE, TOKEN_TILE], tl.float32)
    first_block = split * blocks_per_split
    for block in tl.range(first_block, tl.minimum(first_block + blocks_per_split, num_blocks), num_stages=NUM_STAGES):
        words = tl.load(word_ptrs + block * PLANE)
        for part in tl.static_range(PLANES // PLANES_PER_SCALE):
            group = 0
            group_sums = sums
            if PLANES_PER_GROUP > 0:
                # The last block may reach beyond the last group, where x is zero and any scale will do.
                group = tl.minimum((block * PLANES + part * PLANES_PER_SCALE) // PLANES_PER_GROUP, num_groups - 1)
                group_sums = tl.zeros([ROW_TILE, TOKEN_TILE], tl.float32)
            for member in tl.static_range(PLANES_PER_SCALE):
                k = (block * PLANES + part * PLANES_PER_SCALE + member) * PLANE + lanes
                if IS_WHOLE:
                    x = tl.load(x_rows_ptr + k[None, :], mask=token_mask)
                else:
                    x = tl.load(x_rows_ptr + k[None, :], mask=token_mask & (k < depth)[None, :], other=0.0)
                q = integer_plane(words, part * PLANES_PER_SCALE + member, BITS, DOT_DTYPE)
                if HAS_ZERO:
                    zero = tl.load(zero_ptr + group * num_rows + rows).to(tl.float32)
                    q -= zero.to(DOT_DTYPE)[:, None]
                group_sums = tl.dot(q, tl.trans(x.to(DOT_DTYPE)), group_sums, input_precision="ieee")
            if PLANES_PER_GROUP > 0:
                sums += group_sums * tl.load(scale_ptr + group * num_rows + rows).to(tl.float32)[:, None]
            else:
                sums = group_sums
    if PLANES_PER_GROUP == 0:
        sums *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]
    if IS_SPLIT:
        partial_rows = split.to(tl.int64) * tokens + token_ids
        columns = tile * ROW_TILE + tl.arange(0, ROW_TILE)
        out_ptrs = out_ptr + (partial_rows * num_rows)[:, None] + columns[None, :]
        tl.store(out_ptrs, tl.trans(sums), mask=token_mask & (columns < num_rows)[None, :])
    else:
        store_outputs(
            tl.trans(sums), tile, token_ids, tokens, num_rows, bias_ptr, out_ptr,
            TOKEN_TILE, ROW_TILE, HAS_BIAS, IS_GATED,
        )  # fmt: skip


@triton.jit
def _widen(
    words_ptr, scale_ptr, zero_ptr, dense_ptr, first_row, num_dense_rows, num_rows, depth, num_blocks, num_groups,
    ROW_TILE: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, PLANES_PER_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """A block of ROW_TILE rows, counted from first_row, to the dense weight [num_dense_rows, depth]."""
    PLANES: tl.constexpr = 16 // BITS
    block = tl.program_id(0)
    dense_rows = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    row_mask = dense_rows < num_dense_rows
    rows = first_row + dense_rows
    lanes = tl.arange(0, PLANE)
    word_ptrs = words_ptr + (rows.to(tl.int64) * (num_blocks * PLANE))[:, None] + (block * PLANE + lanes)[None, :]
    words = tl.load(word_ptrs, mask=row_mask[:, None], other=0)
    for plane in tl.static_range(PLANES):
        group = 0
        if PLANES_PER_GROUP > 0:
            group = tl.minimum((block * PLANES + plane) // PLANES_PER_GROUP, num_groups - 1)
        q = integer_plane(words, plane, BITS, tl.float32)
        if HAS_ZERO:
            q -= tl.load(zero_ptr + group * num_rows + rows, mask=row_mask, other=0).to(tl.float32)[:, None]
        scale = tl.load(scale_ptr + group * num_rows + rows, mask=row_mask, other=0.0).to(tl.float32)
        k = (block * PLANES + plane) * PLANE + lanes
        dense_ptrs = dense_ptr + (dense_rows.to(tl.int64) * depth)[:, None] + k[None, :]
        tl.store(dense_ptrs, q * scale[:, None], mask=row_mask[:, None] & (k < depth)[None, :])


def prepare_weight_only_quant_matmul(
    weight: torch.Tensor, scale: torch.Tensor, *zero_and_bias: torch.Tensor, bits: int, has_zero: bool, dtype: str
) -> tuple[torch.Tensor | None, ...]:
    """Words, scale (in float16 where that holds all of them exactly), zero and bias."""
    zero, bias = split_optional(zero_and_bias, has_zero)
    if zero is not None and zero.abs().max() > 256:
        raise ValueError("weight-only matmul: zero points beyond 256, which bfloat16 does not hold exactly")
    words = _pack(weight, scale.shape[1], bits)
    half = scale.half()
    scale = half if torch.equal(half.float(), scale) else scale
    return words, scale.T.contiguous(), None if zero is None else zero.T.contiguous(), bias


def prepare_weight_only_gated_mlp(
    *weights: torch.Tensor, bits: int, has_zero: bool, dtype: str
) -> tuple[torch.Tensor | None, ...]:
    """Words, scale and zero of fc and gate, row by row in one weight."""
    half = len(weights) // 2
    both = (interleaved(*pair) for pair in zip(weights[:half], weights[half:], strict=True))
    return prepare_weight_only_quant_matmul(*both, bits=bits, has_zero=has_zero, dtype=dtype)[:3]


def _pack(weight: torch.Tensor, num_groups: int, bits: int) -> torch.Tensor:
    """int16 [n, blocks * PLANE] of a stored weight, in the layout at the top of this file."""
    integers = integers_of(weight, bits)
    rows, depth = integers.shape
    if num_groups > 1 and depth // num_groups % 16:
        raise ValueError(
            f"weight-only matmul: groups of {depth // num_groups} columns; the CUDA kernels take multiples of 16, "
            f"or one group for a whole row"
        )
    plane, planes = plane_size(depth, num_groups), 16 // bits
    unsigned = (integers ^ -128 if bits == 8 else integers + 8).view(torch.uint8)
    by_plane = F.pad(unsigned, (0, -depth % (planes * plane))).view(rows, -1, planes, plane)
    octets = by_plane if bits == 8 else by_plane[:, :, 0::2] | by_plane[:, :, 1::2] << 4
    # [rows, blocks, 2, plane] -> [rows, blocks, plane, 2], two bytes a word
    return octets.transpose(2, 3).contiguous().view(torch.int16).view(rows, -1)


def _weight_only_quant_matmul_by(
    leaves_splits: bool,
    tactics: Tactics,
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """x [T, k] times the weight of `prepare_weight_only_quant_matmul`, plus bias, in `dtype`.

    With `leaves_splits` float32 sums of each split [splits, T, n], where programs share the depth and there is no bias.
    """
    weight = _Weight(words, scale, zero, bits, x.shape[1])
    tactic = _choose(tactics, "weight_only_quant_matmul", x, weight)
    return _multiply(
        x, weight, bias, dtype, tactic, is_gated=False, leaves_splits=leaves_splits, arrivals=arrivals_of(tactics)
    )


def weight_only_gated_mlp_by(
    tactics: Tactics,
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weight of `prepare_weight_only_gated_mlp`."""
    weight = _Weight(words, scale, zero, bits, x.shape[1])
    tactic = _choose(tactics, "weight_only_gated_mlp", x, weight)
    return _multiply(x, weight, None, dtype, tactic, is_gated=True, arrivals=arrivals_of(tactics))


weight_only_quant_matmul_by = partial(_weight_only_quant_matmul_by, False)
weight_only_quant_matmul_in_splits_by = partial(_weight_only_quant_matmul_by, True)
weight_only_quant_matmul = partial(weight_only_quant_matmul_by, Tactics())
weight_only_gated_mlp = partial(weight_only_gated_mlp_by, Tactics())


def multiply_in_tiles(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    dtype: str,
    is_gated: bool,
) -> torch.Tensor:
    """Either op for any number of tokens, in the same tiles: a row's bits do not depend on how many there are."""
    # No row is divided. Float32 takes twice the shared memory.
    tactic = Tactic("tiles", 64, 64, 0, num_stages=2 if x.dtype == torch.float32 else 3, num_warps=4, num_splits=1)
    return _multiply(x, _Weight(words, scale, zero, bits, x.shape[1]), bias, dtype, tactic, is_gated=is_gated)


@dataclass(frozen=True)
class _Weight:
    """A prepared weight and what its layout means for the kernels."""

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    depth: int

    @property
    def num_rows(self) -> int:
        return self.scale.shape[1]

    @property
    def num_groups(self) -> int:
        return self.scale.shape[0]

    @property
    def plane(self) -> int:
        return plane_size(self.depth, self.num_groups)

    @property
    def block(self) -> int:
        """Columns of a block."""
        return 16 // self.bits * self.plane

    @property
    def num_blocks(self) -> int:
        return self.words.shape[1] // self.plane

    @property
    def planes_per_group(self) -> int:
        return self.depth // self.num_groups // self.plane if self.num_groups > 1 else 0

    @property
    def layout(self) -> dict[str, int]:
        return dict(
            BITS=self.bits, PLANE=self.plane, PLANES_PER_GROUP=self.planes_per_group, HAS_ZERO=self.zero is not None
        )


def _choose(tactics: Tactics, op: str, x: torch.Tensor, weight: _Weight) -> Tactic:
    tokens, depth = x.shape
    num_groups, rows = weight.scale.shape
    facts = op, rows, depth, x.dtype, weight.bits, num_groups, weight.zero is not None
    tactic = tactics.choose(*facts, tokens)
    if tactic.way in ("resident", "ring") and not has_dependent_launch(x.device):
        return stream(MatmulShape(*facts))
    if tactic.way == "ring_tiles" and not ring_tiles.takes(x, weight.words):
        return tiles(MatmulShape(*facts), tokens)
    if tactic.way == "wgmma" and not _takes_warpgroups(x, weight):
        return without_warpgroups(MatmulShape(*facts), tokens)
    return tactic


def _takes_warpgroups(x: torch.Tensor, weight: _Weight) -> bool:
    """Whether the GPU has the instructions, x lies where its copies begin, and no scale is rounded before a product."""
    if not has_warpgroups(x.device):
        return False
    if weight.num_groups > 1 and weight.scale.dtype != torch.float16:
        _report_without_warpgroups("scales of groups are not all numbers of float16")
        return False
    if x.data_ptr() % 16:
        _report_without_warpgroups("activations do not begin at a multiple of 16 bytes")
        return False
    return True


@cache
def _report_without_warpgroups(why: str) -> None:
    """Say each reason once."""
    logger.warning("weight-only matmuls of more than 64 tokens take a slower way: %s", why)


def _multiply(
    x: torch.Tensor,
    weight: _Weight,
    bias: torch.Tensor | None,
    dtype: str,
    tactic: Tactic,
    *,
    is_gated: bool,
    leaves_splits: bool = False,
    arrivals: Arrivals | None = None,
) -> torch.Tensor:
    assert x.is_contiguous() and weight.words.is_contiguous(), "weight-only matmul: rows must be contiguous"
    if tactic.way == "widened":
        return _multiply_widened(x, weight, bias, dtype, is_gated)
    if tactic.way in ("stream", "resident", "ring"):
        return _launch_stream(x, weight, bias, dtype, is_gated, tactic)
    if tactic.way == "ring_tiles":
        assert arrivals is not None
        out = _empty_output(x.shape[0], weight, dtype, is_gated, x.device)
        ring_tiles.multiply(
            x, None, weight.words, weight.scale, bias, out, bits=weight.bits,
            planes_per_scale=_planes_per_scale(weight), planes_per_group=weight.planes_per_group, is_gated=is_gated,
            tactic=tactic, arrivals=arrivals,
        )  # fmt: skip
        return out
    num_splits = whole_splits(weight.num_blocks, tactic.num_splits) if len(x) else 1
    if num_splits > 1:
        sums = torch.empty((num_splits, len(x), weight.num_rows), dtype=torch.float32, device=x.device)
        _launch_many(x, weight, None, sums, False, tactic, num_splits)
        if leaves_splits and bias is None:
            return sums
    out = _empty_output(len(x), weight, dtype, is_gated, x.device)
    if num_splits > 1:
        add_splits(sums, bias, out, is_gated=is_gated)
    elif len(x):
        _launch_many(x, weight, bias, out, is_gated, tactic, 1)
    return out


def _empty_output(tokens: int, weight: _Weight, dtype: str, is_gated: bool, device: torch.device) -> torch.Tensor:
    width = weight.num_rows // 2 if is_gated else weight.num_rows
    return torch.empty((tokens, width), dtype=torch_dtype(dtype), device=device)


def _launch_stream(
    x: torch.Tensor, weight: _Weight, bias: torch.Tensor | None, dtype: str, is_gated: bool, tactic: Tactic
) -> torch.Tensor:
    assert x.shape[0] == 1, f"weight-only matmul: a stream of {x.shape[0]} tokens"
    out = _empty_output(1, weight, dtype, is_gated, x.device)
    if tactic.way in ("resident", "ring"):
        operands = x, weight.words, weight.scale, weight.zero, bias, out
        layout: dict[str, Any] = dict(
            bits=weight.bits, planes_per_scale=_planes_per_scale(weight), planes_per_group=weight.planes_per_group
        )
        if tactic.way == "resident":
            resident_stream.multiply(*operands, **layout, is_gated=is_gated)
        else:
            ring_stream.multiply(
                *operands, **layout, is_gated=is_gated, row_tile=tactic.row_tile, num_tiles=tactic.num_tiles,
                num_stages=tactic.num_stages, num_warps=tactic.num_warps,
            )  # fmt: skip
        return out
    row_tile = tactic.row_tile
    _stream_rows[(cdiv(weight.num_rows, row_tile),)](
        x.view(torch.int32), weight.words.view(torch.int32), weight.scale,
        weight.zero, bias, out, weight.num_rows, weight.num_groups, _ONE,
        DEPTH=weight.depth, NUM_BLOCKS=weight.num_blocks, ROW_TILE=row_tile,
        BLOCK_TILE=tactic.depth_tile // weight.block,
        X_DTYPE=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        PLANES_PER_SCALE=_planes_per_scale(weight), **weight.layout, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        num_warps=tactic.num_warps, **overlapping(x.device),
    )  # fmt: skip
    return out


def _launch_many(
    x: torch.Tensor,
    weight: _Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    is_gated: bool,
    tactic: Tactic,
    num_splits: int,
) -> None:
    """Fill out, or with more than one split their sums, on warpgroups or in tiles."""
    tokens, depth = x.shape
    if tactic.way == "wgmma":
        wgmma_tiles.multiply(
            x, weight.words, weight.scale, weight.zero, bias, out, bits=weight.bits,
            planes_per_group=weight.planes_per_group, is_gated=is_gated, token_tile=tactic.token_tile,
            row_tile=tactic.row_tile, num_splits=num_splits,
        )  # fmt: skip
        return
    token_tile, row_tile = tactic.token_tile, tactic.row_tile
    # Token tiles come first in the grid, so programs that run together share rows of the weight.
    _multiply_tiles[(cdiv(tokens, token_tile), cdiv(weight.num_rows, row_tile), num_splits)](
        x, weight.words, weight.scale, weight.zero, bias, out,
        tokens, weight.num_rows, depth, weight.num_blocks, weight.num_groups,
        cdiv(weight.num_blocks, num_splits),
        TOKEN_TILE=token_tile, ROW_TILE=row_tile, NUM_STAGES=tactic.num_stages, DOT_DTYPE=dot_dtype(x.dtype),
        PLANES_PER_SCALE=_planes_per_scale(weight), **weight.layout, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        IS_WHOLE=depth % weight.block == 0, IS_SPLIT=num_splits > 1, num_warps=tactic.num_warps,
        **overlapping(x.device, is_early=tokens <= 64 and (weight.bits == 4 or tokens > 8)),
    )  # fmt: skip


def _planes_per_scale(weight: _Weight) -> int:
    """Planes of a block that share a scale; all, gcd(planes, 0), when a whole row does."""
    return math.gcd(16 // weight.bits, weight.planes_per_group)


# A dense weight is made at most this many elements at a time: 256 MB of workspace in 16 bits, all of a 7B's layers.
_DENSE_ELEMENTS = 1 << 27


def _multiply_widened(
    x: torch.Tensor, weight: _Weight, bias: torch.Tensor | None, dtype: str, is_gated: bool
) -> torch.Tensor:
    """x times the weight in x's dtype, through cuBLAS.

    As in gated_mlp.py, the products of a gated MLP are rounded to x's dtype before its last kernel.
    """
    rows_at_once = min(weight.num_rows, max(1, _DENSE_ELEMENTS // weight.depth))
    dense = torch.empty((rows_at_once, weight.depth), dtype=x.dtype, device=x.device)
    product_dtype = dtype_name(x.dtype) if is_gated else dtype
    pieces = []
    for start in range(0, weight.num_rows, rows_at_once):
        part = slice(start, min(start + rows_at_once, weight.num_rows))
        rows = part.stop - part.start
        _widen[(weight.num_blocks, cdiv(rows, 32))](
            weight.words, weight.scale, weight.zero, dense, start, rows, weight.num_rows, weight.depth,
            weight.num_blocks, weight.num_groups, ROW_TILE=32, **weight.layout, num_warps=4,
        )  # fmt: skip
        part_bias = None if bias is None else bias[part].to(x.dtype)
        pieces.append(library_matmul(x, dense[:rows], part_bias, dtype=product_dtype))
    product = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    if not is_gated:
        return product
    out = _empty_output(x.shape[0], weight, dtype, is_gated, x.device)
    add_splits(product[None], None, out, is_gated=is_gated)
    return out
