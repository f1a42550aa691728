"""One token times a weight of 8 or 4 bits in float16: tensor cores, and weights that come through a ring of copies.

For weights of many rows, whose product lasts as long as the reading of the weight. What is in flight is a ring of
NUM_STAGES stages in shared memory: it costs no registers, goes on across the borders of tiles, and is full before the
wait for x, while the kernel before still runs. A program takes NUM_TILES tiles of rows one after another; their sums
wait in shared memory and are finished together at the end. The weight's layout is weight_only.py's; subnormal numbers,
and eight pieces of a row as the eight columns of a tensor core tile, are resident_stream.py's.

A piece is BLOCKS = ceil(blocks of a row / 8) blocks, and a stage has one block of every piece of ROW_TILE rows:

    stage 0: blocks 0, BLOCKS, 2 * BLOCKS ..    stage 1: 1, BLOCKS + 1, 2 * BLOCKS + 1 ..    then those of the next tile

with their scales and zero points. x is in shared memory in the same order, with the sum of each group beside it: the
offset of the integers, and a zero point, add that sum times themselves to the products of a group.

Written in Gluon, which Triton's interpreter does not have.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..tactics.tactic import cdiv, next_power_of_2
from .epilogue import gated
from .resident_stream import PIECES, PLANE, subnormals

_UNIT = gl.constexpr(1.0 / 16777216)  # what an integer counts as a subnormal number


@gluon.constexpr_function
def _blocks_of_a_piece(num_blocks):
    return (num_blocks + PIECES.value - 1) // PIECES.value


@gluon.constexpr_function
def _x_layout(columns, num_warps):
    """[PIECES, columns], rows of neighbouring lanes of one warp."""
    width = max(1, min(8, PIECES.value * columns // (32 * num_warps)))
    lanes = min(32, columns // width)
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.jit
def _piece_of(part_row, ROW_TILE: gl.constexpr):
    """The piece that a row of a stage is of: even pieces in the upper half of a tensor core tile, odd in the lower."""
    return part_row // (2 * ROW_TILE) * 2 + part_row // 8 % 2


@gluon.jit
def _row_of(part_row, ROW_TILE: gl.constexpr):
    """Which of ROW_TILE rows a row of a stage is of."""
    return part_row // 16 % (ROW_TILE // 8) * 8 + part_row % 8


@gluon.jit
def _copy_words(
    ring, words_ptr, tile, index, num_rows, NUM_BLOCKS: gl.constexpr, BLOCKS: gl.constexpr, ROW_TILE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Words [PIECES * ROW_TILE, PLANE] of block `index` of every piece; none beyond the last block, where x is zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    part_rows = gl.arange(0, PIECES * ROW_TILE, gl.SliceLayout(1, layout))
    columns = gl.arange(0, PLANE, gl.SliceLayout(0, layout))
    row, first_block = _row_of(part_rows, ROW_TILE), _piece_of(part_rows, ROW_TILE) * BLOCKS
    tile_ptr = words_ptr + tile.to(gl.int64) * (ROW_TILE * NUM_BLOCKS * PLANE) + index * PLANE
    word_ptrs = tile_ptr + (row * (NUM_BLOCKS * PLANE) + first_block * PLANE)[:, None] + columns[None, :]
    mask = gl.full([PIECES * ROW_TILE], True, gl.int1, gl.SliceLayout(1, layout))
    if ROW_TILE > 16:  # num_rows is a multiple of 16
        mask = mask & (tile * ROW_TILE + row < num_rows)
    if NUM_BLOCKS % PIECES != 0:
        mask = mask & (first_block + index < NUM_BLOCKS)
    async_copy.async_copy_global_to_shared(ring, word_ptrs, mask=mask[:, None], cache_modifier=".cg")


@gluon.jit
def _copy_scales(
    rings, ptr, slot, tile, index, num_rows, num_groups, BLOCKS: gl.constexpr, PARTS: gl.constexpr,
    PLANES_PER_SCALE: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, IS_WHOLE: gl.constexpr, ROW_TILE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Scales or zero points [PIECES * ROW_TILE] of each part of the same block of every piece; 4 bytes a lane."""
    width: gl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([width], [32], [num_warps], [0])
    part_rows = gl.arange(0, PIECES * ROW_TILE, layout)
    rows = tile * ROW_TILE + _row_of(part_rows, ROW_TILE)
    mask = gl.full([PIECES * ROW_TILE], True, gl.int1, layout)
    if ROW_TILE > 16:  # num_rows is a multiple of 16
        mask = rows < num_rows
    block = _piece_of(part_rows, ROW_TILE) * BLOCKS + index
    for part in gl.static_range(PARTS):
        group = (block * PARTS + part) * PLANES_PER_SCALE // PLANES_PER_GROUP
        if not IS_WHOLE:  # beyond the last group x is zero, and any scale will do
            group = gl.minimum(group, num_groups - 1)
        scale_ptrs = ptr + group * num_rows + rows
        async_copy.async_copy_global_to_shared(rings[part].index(slot), scale_ptrs, mask=mask)


@gluon.jit
def _copy_stage(
    words_ptr, scale_ptr, zero_ptr, word_ring, scale_rings, zero_rings, slot, tile, index, num_rows, num_groups,
    DEPTH: gl.constexpr, NUM_BLOCKS: gl.constexpr, BLOCKS: gl.constexpr, PARTS: gl.constexpr,
    PLANES_PER_SCALE: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, ROW_TILE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Start copying what stage `slot` takes: block `index` of every piece of tile `tile`."""
    IS_WHOLE: gl.constexpr = PIECES * BLOCKS * PARTS * PLANES_PER_SCALE * PLANE == DEPTH
    _copy_words(word_ring.index(slot), words_ptr, tile, index, num_rows, NUM_BLOCKS, BLOCKS, ROW_TILE, num_warps)
    if PLANES_PER_GROUP > 0:
        _copy_scales(
            scale_rings, scale_ptr, slot, tile, index, num_rows, num_groups, BLOCKS, PARTS, PLANES_PER_SCALE,
            PLANES_PER_GROUP, IS_WHOLE, ROW_TILE, num_warps,
        )  # fmt: skip
        if HAS_ZERO:
            _copy_scales(
                zero_rings, zero_ptr, slot, tile, index, num_rows, num_groups, BLOCKS, PARTS, PLANES_PER_SCALE,
                PLANES_PER_GROUP, IS_WHOLE, ROW_TILE, num_warps,
            )  # fmt: skip


@gluon.jit
def allocate_rings(dtype: gl.constexpr, count: gl.constexpr, NUM_STAGES: gl.constexpr, ROWS: gl.constexpr):
    """Rings for the scales of each part: several, as writes to one and the same would wait for each other."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rings = ()
    for _ in gl.static_range(count):
        rings += (gl.allocate_shared_memory(dtype, [NUM_STAGES, ROWS], layout),)
    return rings


@gluon.jit
def _ring_rows(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, num_rows, num_groups,
    DEPTH: gl.constexpr, NUM_BLOCKS: gl.constexpr, BITS: gl.constexpr, PLANES_PER_SCALE: gl.constexpr,
    PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr,
    ROW_TILE: gl.constexpr, NUM_TILES: gl.constexpr, SUM_TILES: gl.constexpr, NUM_STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    BLOCKS: gl.constexpr = _blocks_of_a_piece(NUM_BLOCKS)
    PARTS: gl.constexpr = 16 // BITS // PLANES_PER_SCALE  # of a block, with a scale each
    ROWS: gl.constexpr = PIECES * ROW_TILE
    HAS_GROUPS: gl.constexpr = PLANES_PER_GROUP > 0
    OFFSET: gl.constexpr = 1 << (BITS - 1)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    # Eight lanes together read 64 bytes of each of two rows, which so lie in different banks.
    halves: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    word_ring = gl.allocate_shared_memory(gl.int16, [NUM_STAGES, ROWS, PLANE], halves)
    scale_rings = allocate_rings(scale_ptr.dtype.element_ty, PARTS if HAS_GROUPS else 0, NUM_STAGES, ROWS)
    zero_rings = allocate_rings(gl.int16, PARTS if HAS_GROUPS and HAS_ZERO else 0, NUM_STAGES, ROWS)
    x_parts = gl.allocate_shared_memory(gl.float16, [BLOCKS * PARTS, PIECES, PLANES_PER_SCALE * PLANE], halves)
    x_sums = gl.allocate_shared_memory(gl.float32, [BLOCKS * PARTS, PIECES], flat)
    row_sums = gl.allocate_shared_memory(gl.float32, [SUM_TILES, ROWS], flat)

    first_tile = gl.program_id(0) * NUM_TILES
    num_tiles = gl.minimum(NUM_TILES, (num_rows + ROW_TILE - 1) // ROW_TILE - first_tile)
    for step in gl.static_range(NUM_STAGES - 1):
        if step < num_tiles * BLOCKS:
            _copy_stage(
                words_ptr, scale_ptr, zero_ptr, word_ring, scale_rings, zero_rings, step, first_tile + step // BLOCKS,
                step % BLOCKS, num_rows, num_groups, DEPTH, NUM_BLOCKS, BLOCKS, PARTS, PLANES_PER_SCALE,
                PLANES_PER_GROUP, HAS_ZERO, ROW_TILE, num_warps,
            )  # fmt: skip
        async_copy.commit_group()
    gdc_wait()
    x_sum = _keep_x(x_ptr, x_parts, x_sums, DEPTH, BLOCKS * PARTS, PARTS, BLOCKS, PLANES_PER_SCALE, num_warps)

    slot, ahead_slot = 0, NUM_STAGES - 1
    ahead_tile, ahead_index = first_tile + (NUM_STAGES - 1) // BLOCKS, (NUM_STAGES - 1) % BLOCKS
    end_tile = first_tile + num_tiles
    own = _own_columns(mma, ROW_TILE)
    for tile in range(num_tiles):
        sums = gl.zeros([ROWS, PIECES], gl.float32, mma)
        for index in range(BLOCKS):
            async_copy.wait_group(NUM_STAGES - 2)
            if ahead_tile < end_tile:
                _copy_stage(
                    words_ptr, scale_ptr, zero_ptr, word_ring, scale_rings, zero_rings, ahead_slot, ahead_tile,
                    ahead_index, num_rows, num_groups, DEPTH, NUM_BLOCKS, BLOCKS, PARTS, PLANES_PER_SCALE,
                    PLANES_PER_GROUP, HAS_ZERO, ROW_TILE, num_warps,
                )  # fmt: skip
            async_copy.commit_group()
            ahead_index += 1
            ahead_tile += ahead_index // BLOCKS
            ahead_index = gl.where(ahead_index == BLOCKS, 0, ahead_index)
            ahead_slot = gl.where(ahead_slot == NUM_STAGES - 1, 0, ahead_slot + 1)

            words = word_ring.index(slot).load(_lanes_of_16_bytes(ROWS, num_warps))
            words = gl.convert_layout(_k_order(words), left, assert_trivial=True)
            for part in gl.static_range(PARTS):
                even = gl.zeros([ROWS, PIECES], gl.float32, mma)
                odd = gl.zeros([ROWS, PIECES], gl.float32, mma)
                for member in gl.static_range(PLANES_PER_SCALE):
                    x_plane = x_parts.index(index * PARTS + part).slice(member * PLANE, PLANE, dim=1)
                    x = x_plane.load(_lanes_of_16_bytes(PIECES, num_warps))
                    x = gl.convert_layout(gl.permute(_k_order(x), [1, 0]), right, assert_trivial=True)
                    q = subnormals(words, part * PLANES_PER_SCALE + member, BITS)
                    if BITS == 4 and (part * PLANES_PER_SCALE + member) % 2 == 1:
                        odd = mma_v2(q, x, odd)
                    else:
                        even = mma_v2(q, x, even)
                offsets = x_sums.index(index * PARTS + part).load(gl.SliceLayout(0, mma))[None, :]
                if HAS_GROUPS and HAS_ZERO:
                    zeros = zero_rings[part].index(slot).load(gl.SliceLayout(1, mma)).to(gl.float32)
                    products = even - offsets * (zeros + OFFSET)[:, None]
                else:
                    products = even - offsets * OFFSET
                if BITS == 4:
                    products += odd * 0.0625  # four bits in the upper half of a byte count sixteenfold
                if HAS_GROUPS:
                    scales = scale_rings[part].index(slot).load(gl.SliceLayout(1, mma)).to(gl.float32)
                    sums += products * scales[:, None]
                else:
                    sums += products
            slot = gl.where(slot == NUM_STAGES - 1, 0, slot + 1)
        row_sums.index(tile).store(gl.sum(gl.where(own, sums, 0.0), axis=1))
    _finish(
        row_sums, x_sum, first_tile, num_rows, scale_ptr, zero_ptr, bias_ptr, out_ptr,
        HAS_GROUPS, HAS_ZERO, HAS_BIAS, IS_GATED, ROW_TILE, NUM_TILES, SUM_TILES, num_warps,
    )  # fmt: skip


@gluon.constexpr_function
def _lanes_of_16_bytes(rows, num_warps):
    """[rows, PLANE] of 16 bits: four lanes take a row, 16 bytes of each of its halves; 8 rows are of all warps."""
    registers, lanes = [[0, 1], [0, 2], [0, 4], [0, 32]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 0] for _ in range(num_warps.bit_length() - 1)]
    if rows > 8:
        registers.append([8, 0])
        warps = [[16 << bit, 0] for bit in range(len(warps))]
        registers += [[row, 0] for row in (16 * num_warps << bit for bit in range(8)) if row < rows]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, 64])


@gluon.jit
def _k_order(operand):
    """The order in which tensor cores take what a lane holds, two neighbouring registers at a time."""
    ROWS: gl.constexpr = operand.shape[0]
    halves = gl.reshape(operand, [ROWS, 2, 4, 4, 2])  # halves of a row, lanes, pairs of 16 bytes, of two
    return gl.reshape(gl.permute(halves, [0, 1, 3, 2, 4]), [ROWS, PLANE])


@gluon.jit
def _own_columns(mma: gl.constexpr, ROW_TILE: gl.constexpr):
    """Which of [PIECES * ROW_TILE, PIECES] products are of a piece of the weight and the same piece of x."""
    piece_of_row = _piece_of(gl.arange(0, PIECES * ROW_TILE, gl.SliceLayout(1, mma)), ROW_TILE)
    return piece_of_row[:, None] == gl.arange(0, PIECES, gl.SliceLayout(0, mma))[None, :]


@gluon.jit
def _keep_x(
    x_ptr, x_parts, x_sums, DEPTH: gl.constexpr, NUM_PARTS: gl.constexpr, PARTS: gl.constexpr, BLOCKS: gl.constexpr,
    PLANES_PER_SCALE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """x to shared memory, and the sum of each part of a block, in units of 2^24; returns the sums of all, by piece."""
    WIDTH: gl.constexpr = PLANES_PER_SCALE * PLANE
    layout: gl.constexpr = _x_layout(WIDTH, num_warps)
    first = gl.arange(0, PIECES, gl.SliceLayout(1, layout)) * (BLOCKS * PARTS * WIDTH)
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    parts = ()
    for part in gl.static_range(NUM_PARTS):
        k = first[:, None] + (part * WIDTH + columns)[None, :]
        parts += (gl.load(x_ptr + k, mask=k < DEPTH, other=0.0),)
    x_sum = gl.zeros([PIECES], gl.float32, gl.SliceLayout(1, layout))
    for part in gl.static_range(NUM_PARTS):
        x_parts.index(part).store(parts[part])
        part_sum = gl.sum(parts[part].to(gl.float32), axis=1) * _UNIT
        x_sums.index(part).store(part_sum)
        x_sum += part_sum
    return x_sum


@gluon.jit
def _finish(
    row_sums, x_sum, first_tile, num_rows, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    HAS_GROUPS: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr,
    ROW_TILE: gl.constexpr, NUM_TILES: gl.constexpr, SUM_TILES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The end of a matmul, as epilogue.py has it, of all tiles of a program at once."""
    # [tiles, pairs of pieces, eighths of a tile, pieces of a pair, rows], see _piece_of and _row_of.
    EIGHTHS: gl.constexpr = ROW_TILE // 8
    shape: gl.constexpr = [SUM_TILES, PIECES // 2, EIGHTHS, 2, 8]
    stored: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    by_piece: gl.constexpr = gl.BlockedLayout(
        [1, 4, 1, 2, 2], [8 // EIGHTHS, 1, EIGHTHS, 1, 4], [num_warps, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    sums = row_sums._reinterpret(gl.float32, shape, stored).load(by_piece)
    sums = gl.reshape(gl.sum(gl.sum(sums, axis=3), axis=1), [SUM_TILES, ROW_TILE])
    flat: gl.constexpr = sums.type.layout
    tiles = gl.arange(0, SUM_TILES, gl.SliceLayout(1, flat))
    rows = (first_tile + tiles)[:, None] * ROW_TILE + gl.arange(0, ROW_TILE, gl.SliceLayout(0, flat))[None, :]
    mask = (tiles < NUM_TILES)[:, None] & (rows < num_rows)
    if not HAS_GROUPS:
        if HAS_ZERO:
            sums -= gl.load(zero_ptr + rows, mask=mask, other=0).to(gl.float32) * gl.sum(x_sum, axis=0)
        sums *= gl.load(scale_ptr + rows, mask=mask, other=0.0).to(gl.float32)
    sums *= 1.0 / _UNIT
    if HAS_BIAS:
        sums += gl.load(bias_ptr + rows, mask=mask, other=0.0).to(gl.float32)
    if IS_GATED:
        outputs = gated(gl.reshape(sums, [SUM_TILES, ROW_TILE // 2, 2]))
        half: gl.constexpr = outputs.type.layout
        half_tiles = gl.arange(0, SUM_TILES, gl.SliceLayout(1, half))
        columns = (first_tile + half_tiles)[:, None] * (ROW_TILE // 2)
        columns += gl.arange(0, ROW_TILE // 2, gl.SliceLayout(0, half))[None, :]
        gl.store(out_ptr + columns, outputs, mask=(half_tiles < NUM_TILES)[:, None] & (columns < num_rows // 2))
    else:
        gl.store(out_ptr + rows, sums, mask=mask)


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
    row_tile: int,
    num_tiles: int,
    num_stages: int,
    num_warps: int,
) -> None:
    """Fill out [1, n]: x float16 [1, k] times a prepared weight whose planes are of 64 integers; Hopper or later.

    The number of rows is a multiple of 16, so that neighbouring scales can be copied 4 bytes at a time. Planes are
    counted as in resident_stream.py. A program takes num_tiles tiles of row_tile rows, of which each warp has two or
    more.
    """
    num_groups, num_rows = scale.shape
    _ring_rows[(cdiv(num_rows, row_tile * num_tiles),)](
        x, words, scale, zero, bias, out, num_rows, num_groups,
        DEPTH=x.shape[1], NUM_BLOCKS=words.shape[1] // PLANE.value, BITS=bits, PLANES_PER_SCALE=planes_per_scale,
        PLANES_PER_GROUP=planes_per_group, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        ROW_TILE=row_tile, NUM_TILES=num_tiles, SUM_TILES=next_power_of_2(num_tiles), NUM_STAGES=num_stages,
        num_warps=num_warps, launch_pdl=True,
    )  # fmt: skip
