"""One token times a weight of 8 or 4 bits in float16, where the GPU holds all of the weight in its registers at once.

For weights of few rows: every program has its part of the weight before it waits for x, and then needs a microsecond.
Such a product is bound by that, and not by the reading of the weight. The weight's layout is weight_only.py's.

Tensor cores multiply. An unsigned integer u below 2^10 in the last bits of a float16 is the subnormal number u / 2^24,
exactly, and a subnormal is a number like others to them: unpacking a plane is one AND, for two words at a time, and a
shift for half of the planes. Four bits that stay in the upper half of a byte count sixteenfold. What the offset of the
integers, and a zero point, add to a sum is taken off by the sum of x, which a second product makes with a matrix of
ones.

One token leaves seven of the eight columns of a tensor core tile free. So the columns are eight pieces of x, the rows
are eight pieces each of ROW_TILE rows of the weight, and of the [8 * ROW_TILE, 8] products those count that stand for
one piece:

                         x0  x1  x2 ..
    rows 0..15, piece 0  #   .   .
    rows 0..15, piece 1  .   #   .
    rows 0..15, piece 2  .   .   #

A lane's 16 bytes of weight are its operand of the tile: nothing passes through shared memory but the last sums. The
kernel is written in Gluon, Triton's dialect with explicit layouts, as that depends on which lane holds what. Triton's
interpreter has no Gluon.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..tactics.tactic import cdiv
from .epilogue import gated

PIECES = gl.constexpr(8)  # columns of a tile
ROW_TILE = gl.constexpr(16)  # its rows, for one warp
PLANE = gl.constexpr(64)


@gluon.constexpr_function
def _plane_ptx(index, bits):
    """The plane's bits of two words, in their place within a byte."""
    if bits == 8:
        return f"prmt.b32 $0, $1, 0, 0x4{index + 2}4{index};"  # a byte, zero, a byte, zero
    mask = 0x00F000F0 if index % 2 else 0x000F000F
    return f"{{ .reg .b32 bits; shr.b32 bits, $1, {index // 2 * 8}; and.b32 $0, bits, 0x{mask:08x}; }}"


@gluon.jit
def subnormals(words, INDEX: gl.constexpr, BITS: gl.constexpr):
    """Plane INDEX of int16 words: (q + 2^(BITS - 1)) / 2^24 in float16, sixteenfold for odd planes of 4 bits."""
    plane = gl.inline_asm_elementwise(_plane_ptx(INDEX, BITS), "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)
    return plane.to(gl.float16, bitcast=True)


@gluon.jit
def _products(even, odd, x_sums, BITS: gl.constexpr):
    """Sums of q x, from those of subnormals in even and in odd planes and from those of x."""
    OFFSET: gl.constexpr = 1 << (BITS - 1)
    products = even * 16777216.0 - x_sums * OFFSET
    if BITS == 4:
        products += odd * 1048576.0
    return products


@gluon.jit
def _resident_rows(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, num_rows, num_groups,
    DEPTH: gl.constexpr, NUM_BLOCKS: gl.constexpr, BITS: gl.constexpr, PLANES_PER_SCALE: gl.constexpr,
    PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    PLANES: gl.constexpr = 16 // BITS
    BLOCKS: gl.constexpr = (NUM_BLOCKS + PIECES - 1) // PIECES  # of a piece
    PARTS: gl.constexpr = PLANES // PLANES_PER_SCALE
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)

    tile = gl.program_id(0)
    part_rows = gl.arange(0, PIECES * ROW_TILE, gl.SliceLayout(1, left))
    rows = gl.minimum(tile * ROW_TILE + part_rows % ROW_TILE, num_rows - 1)
    first_block = part_rows // ROW_TILE * BLOCKS
    columns = gl.arange(0, PLANE, gl.SliceLayout(0, left))
    word_ptrs = words_ptr + (rows.to(gl.int64) * (NUM_BLOCKS * PLANE))[:, None] + columns[None, :]
    words = ()
    for index in gl.static_range(BLOCKS):
        block = first_block + index
        mask = (block < NUM_BLOCKS)[:, None]
        words += (gl.load(word_ptrs + (block * PLANE)[:, None], mask=mask, other=0, eviction_policy="evict_first"),)
    sum_rows = gl.arange(0, PIECES * ROW_TILE, gl.SliceLayout(1, mma))
    scale_rows = gl.minimum(tile * ROW_TILE + sum_rows % ROW_TILE, num_rows - 1)
    sum_block = sum_rows // ROW_TILE * BLOCKS
    scales, zeros = (), ()
    if PLANES_PER_GROUP > 0:
        for index in gl.static_range(BLOCKS * PARTS):
            group = (sum_block * PARTS + index) * PLANES_PER_SCALE // PLANES_PER_GROUP
            offsets = group * num_rows + scale_rows
            scales += (gl.load(scale_ptr + offsets, mask=group < num_groups, other=0.0).to(gl.float32),)
            if HAS_ZERO:
                zeros += (gl.load(zero_ptr + offsets, mask=group < num_groups, other=0).to(gl.float32),)
    gdc_wait()

    x_columns = gl.arange(0, PLANE, gl.SliceLayout(1, right))
    pieces = gl.arange(0, PIECES, gl.SliceLayout(0, right))
    ones = gl.full([PIECES * ROW_TILE, PLANE], 1.0, gl.float16, left)
    sums = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
    even = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
    odd = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
    x_sums = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
    for index in gl.static_range(BLOCKS):
        for part in gl.static_range(PARTS):
            if PLANES_PER_GROUP > 0:
                even = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
                odd = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
                x_sums = gl.zeros([PIECES * ROW_TILE, PIECES], gl.float32, mma)
            for plane in gl.static_range(part * PLANES_PER_SCALE, (part + 1) * PLANES_PER_SCALE):
                k = ((pieces * BLOCKS + index) * (PLANES * PLANE))[None, :] + (plane * PLANE + x_columns)[:, None]
                x = gl.load(x_ptr + k, mask=k < DEPTH, other=0.0)
                q = subnormals(words[index], plane, BITS)
                if BITS == 4 and plane % 2 == 1:
                    odd = mma_v2(q, x, odd)
                else:
                    even = mma_v2(q, x, even)
                x_sums = mma_v2(ones, x, x_sums)
            if PLANES_PER_GROUP > 0:
                products = _products(even, odd, x_sums, BITS)
                if HAS_ZERO:
                    products -= x_sums * zeros[index * PARTS + part][:, None]
                sums += products * scales[index * PARTS + part][:, None]
    if PLANES_PER_GROUP == 0:
        products = _products(even, odd, x_sums, BITS)
        if HAS_ZERO:
            products -= x_sums * gl.load(zero_ptr + scale_rows).to(gl.float32)[:, None]
        sums = products * gl.load(scale_ptr + scale_rows).to(gl.float32)[:, None]

    piece_of_row = sum_rows // ROW_TILE
    own = piece_of_row[:, None] == gl.arange(0, PIECES, gl.SliceLayout(0, mma))[None, :]
    by_piece = gl.reshape(gl.sum(gl.where(own, sums, 0.0), axis=1), [PIECES, ROW_TILE])
    _store(gl.sum(by_piece, axis=0), tile, num_rows, bias_ptr, out_ptr, HAS_BIAS, IS_GATED, num_warps)


@gluon.jit
def _store(
    sums, tile, num_rows, bias_ptr, out_ptr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """The end of a matmul, as epilogue.py has it, of ROW_TILE sums."""
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [num_warps], [0])
    sums = gl.convert_layout(sums, flat)
    rows = tile * ROW_TILE + gl.arange(0, ROW_TILE, flat)
    if HAS_BIAS:
        sums += gl.load(bias_ptr + rows, mask=rows < num_rows, other=0.0).to(gl.float32)
    if IS_GATED:
        outputs = gated(gl.reshape(sums, [ROW_TILE // 2, 2]))
        half: gl.constexpr = outputs.type.layout
        columns = tile * (ROW_TILE // 2) + gl.arange(0, ROW_TILE // 2, half)
        gl.store(out_ptr + columns, outputs, mask=columns < num_rows // 2)
    else:
        gl.store(out_ptr + rows, sums, mask=rows < num_rows)


_NUM_WARPS = 8


def multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    bits: int,
    planes_per_scale: int,
    planes_per_group: int,
    is_gated: bool,
) -> None:
    """Fill out [1, n]: x float16 [1, k] times a prepared weight whose planes are of 64 integers; Hopper or later.

    Planes of a block that share a scale, and planes of a group (0: the whole row), are as weight_only.py counts them.
    """
    num_groups, num_rows = scale.shape
    _resident_rows[(cdiv(num_rows, ROW_TILE.value),)](
        x, words, scale, zero, bias, out, num_rows, num_groups,
        DEPTH=x.shape[1], NUM_BLOCKS=words.shape[1] // PLANE.value, BITS=bits, PLANES_PER_SCALE=planes_per_scale,
        PLANES_PER_GROUP=planes_per_group, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        num_warps=_NUM_WARPS, launch_pdl=True,
    )  # fmt: skip
