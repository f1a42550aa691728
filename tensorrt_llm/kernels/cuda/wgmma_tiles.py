"""Many tokens times a weight of 8 or 4 bits: tensor cores of Hopper, fed by warps that do nothing but copy.

A program owns a tile of ROWS rows of the weight for each of its two or three consumers, and TOKEN_TILE tokens. One more
warp, the producer, copies to two rings in shared memory:

    words   [ROWS, 64] for each consumer: a block of the weight's layout (weight_only.py)
    x       [TOKEN_TILE, 64] for each plane of a block, which all consumers read

A consumer is a warpgroup. It takes its words as the left operand of a product wants them, unpacks a plane in registers
while the product of the plane before is under way, and multiplies it by x where that lies: a weight is unpacked once
for all tokens of a tile. Consumers know each other only by the barriers of the rings, so that one unpacks or waits
while another one multiplies.

Integers are multiplied exactly, and the scale of a whole row put on its float32 sum. A scale for each group of columns
is multiplied into the unpacked weight, which that rounds to float16, once: to the bits of a widened weight. Sums of a
group beside the others would leave registers for half of the tokens.

Which tile is best is a matter of how many programs there are for each SM, which holds one: kernels/tactics.

The depth of a tile may be divided among programs, whose float32 sums are left to `epilogue.add_splits` or to the norm
behind the product (norm.py).

Written in Gluon, which Triton's interpreter does not have, for compute capability 9.0, the only one with these
instructions.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..tactics.tactic import SHARED_BYTES, cdiv
from .resident_stream import PLANE
from .warpgroups import LAUNCH_REGISTERS, PIECE, ROWS, by_row, pieces_of, staging_of, store_outputs


@gluon.constexpr_function
def _plane_ptx(index, bits, is_half, has_scale):
    """Bits of plane `index` in the last bits of a float, times `factor`, plus $2 (integer_planes.py); times $3.

    Bfloat16 has no room for the top bit of a byte, which chooses between 2^7 and 2^8 to subtract instead of $2.
    """
    if bits == 8 and not is_half:
        return f"""{{
            .reg .b32 bits, low, top;
            shr.b32 bits, $1, {8 * index};
            lop3.b32 low, bits, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 top, bits, 0x00800080, 0x43804380, 0x6a;
            sub.rn.bf16x2 $0, low, top;
        }}"""
    kind = "f16x2" if is_half else "bf16x2"
    ones, factor = ("6400", "3c00") if is_half else ("4300", "3f80")
    shift, mask = bits * index, "00ff" if bits == 8 else "000f"
    if _stays_high(index, bits, is_half):
        shift, mask, factor = shift - 4, "00f0", "2c00"  # 1 / 16
    return f"""{{
        .reg .b32 bits, ones, factor;
        mov.b32 ones, 0x{ones}{ones};
        mov.b32 factor, 0x{factor}{factor};
        shr.b32 bits, $1, {shift};
        lop3.b32 bits, bits, 0x{mask}{mask}, ones, 0xea;
        fma.rn.{kind} $0, bits, factor, $2;
        {f"mul.rn.{kind} $0, $0, $3;" if has_scale else ""}
    }}"""


@gluon.constexpr_function
def _stays_high(index, bits, is_half):
    """Whether four bits stay in the upper half of a byte, where they count sixteenfold: float16 has room for that."""
    return bits == 4 and is_half and index % 2 == 1


@gluon.constexpr_function
def _addend(index, bits, is_half):
    """What takes off the float around an integer, and the integer's offset."""
    around = 2**7 if not is_half else 2**6 if _stays_high(index, bits, is_half) else 2**10
    return -float(around + (1 << (bits - 1)))


@gluon.jit
def _plane(
    words, zeros, scales, INDEX: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr, HAS_ZERO: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """(q - zero) * scale of plane INDEX, in DTYPE and the shape of words; with zeros and scales [rows], if any."""
    IS_HALF: gl.constexpr = DTYPE == gl.float16
    addend = gl.full(words.shape, _addend(INDEX, BITS, IS_HALF), DTYPE, words.type.layout)
    if HAS_ZERO:
        addend -= zeros[:, None]
    addend = addend.to(gl.int16, bitcast=True)
    if HAS_SCALE:
        wide_scales = scales.to(gl.int16, bitcast=True)[:, None].broadcast_to(words.shape)
        bits = gl.inline_asm_elementwise(
            _plane_ptx(INDEX, BITS, IS_HALF, True), "=&r,r,r,r", [words, addend, wide_scales], dtype=gl.int16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        bits = gl.inline_asm_elementwise(
            _plane_ptx(INDEX, BITS, IS_HALF, False), "=r,r,r", [words, addend], dtype=gl.int16, is_pure=True, pack=2
        )
    return bits.to(DTYPE, bitcast=True)


@gluon.jit
def _copy_words(words_desc, ring, full, slot, first_row, block, CONSUMERS: gl.constexpr):
    mbarrier.expect(full.index(slot), CONSUMERS * ROWS * PLANE * 2)
    for consumer in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(
            words_desc, [first_row + consumer * ROWS, block * PLANE], full.index(slot),
            ring.index(slot * CONSUMERS + consumer),
        )  # fmt: skip


@gluon.jit
def _produce(
    x_desc, words_desc, rings, barriers, place, BITS: gl.constexpr, CONSUMERS: gl.constexpr, TOKEN_TILE: gl.constexpr,
    X_STAGES: gl.constexpr, WORD_STAGES: gl.constexpr,
):  # fmt: skip
    """Copy all that a tile takes; words, which no kernel of a step writes, before the wait for the previous kernel."""
    x_ring, word_ring = rings
    x_full, x_empty, words_full, words_empty, _ = barriers
    first_token, first_row, first_block, num_blocks, _ = place
    PLANES: gl.constexpr = 16 // BITS
    gdc_launch_dependents()
    for index in gl.static_range(WORD_STAGES):
        if index < num_blocks:
            _copy_words(words_desc, word_ring, words_full, index, first_row, first_block + index, CONSUMERS)
    gdc_wait()
    for index in range(num_blocks):
        block = first_block + index
        if index >= WORD_STAGES:
            word_slot = index % WORD_STAGES
            mbarrier.wait(words_empty.index(word_slot), (index // WORD_STAGES) & 1 ^ 1)
            _copy_words(words_desc, word_ring, words_full, word_slot, first_row, block, CONSUMERS)
        for plane in gl.static_range(PLANES):
            step = index * PLANES + plane
            slot = step % X_STAGES
            mbarrier.wait(x_empty.index(slot), (step // X_STAGES) & 1 ^ 1)
            mbarrier.expect(x_full.index(slot), TOKEN_TILE * PLANE * 2)
            tma.async_copy_global_to_shared(
                x_desc, [first_token, (block * PLANES + plane) * PLANE], x_full.index(slot), x_ring.index(slot)
            )


@gluon.jit
def _of_group(ptr, group, num_groups, num_rows, rows, DTYPE: gl.constexpr):
    """Scales or zero points of `rows`. Beyond the last group x is zero, and any will do."""
    return gl.load(ptr + gl.minimum(group, num_groups - 1) * num_rows + rows).to(DTYPE)


@gluon.constexpr_function
def _may_begin_group(plane, planes, planes_per_group):
    """Whether plane `plane` of a block is the first of a group in some block."""
    return planes_per_group > 0 and plane % math.gcd(planes, planes_per_group) == 0


@gluon.jit
def _consume(
    rings, barriers, operands, place, INDEX: gl.constexpr, BITS: gl.constexpr, PLANES_PER_GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr, CONSUMERS: gl.constexpr,
    TOKEN_TILE: gl.constexpr, X_STAGES: gl.constexpr, WORD_STAGES: gl.constexpr,
):  # fmt: skip
    """The rows of consumer INDEX, from the rings to the output."""
    x_ring, word_ring = rings
    x_full, x_empty, words_full, words_empty, all_done = barriers
    scale_ptr, zero_ptr, bias_ptr, out_ptr, tokens, num_rows, num_groups = operands
    first_token, tile_row, first_block, num_blocks, split = place
    PLANES: gl.constexpr = 16 // BITS
    DTYPE: gl.constexpr = x_ring.dtype
    HAS_GROUPS: gl.constexpr = PLANES_PER_GROUP > 0
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKEN_TILE, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    first_row = tile_row + INDEX * ROWS
    rows = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, left)), num_rows - 1)
    sum_rows = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, mma)), num_rows - 1)
    scales, zeros, next_scales, next_zeros, row_scales, biases = rows, rows, rows, rows, sum_rows, sum_rows
    if HAS_GROUPS:
        group = first_block * PLANES // PLANES_PER_GROUP
        scales = _of_group(scale_ptr, group, num_groups, num_rows, rows, DTYPE)
        next_scales = _of_group(scale_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
        if HAS_ZERO:
            zeros = _of_group(zero_ptr, group, num_groups, num_rows, rows, DTYPE)
            next_zeros = _of_group(zero_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
    else:
        row_scales = gl.load(scale_ptr + sum_rows).to(gl.float32)
        if HAS_ZERO:
            zeros = gl.load(zero_ptr + rows).to(DTYPE)
    if HAS_BIAS:
        biases = gl.load(bias_ptr + sum_rows).to(gl.float32)

    sums = gl.zeros([ROWS, TOKEN_TILE], gl.float32, mma)
    mbarrier.wait(words_full.index(0), 0)
    words = word_ring.index(INDEX).load(left)
    mbarrier.arrive(words_empty.index(0))
    weight = _plane(words, zeros, scales, 0, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
    multiplied = weight
    for index in range(num_blocks):
        for plane in gl.static_range(PLANES):
            step = index * PLANES + plane
            slot = step % X_STAGES
            mbarrier.wait(x_full.index(slot), (step // X_STAGES) & 1)
            sums = warpgroup_mma(weight, x_ring.index(slot).permute([1, 0]), sums, is_async=True)
            # Two products may be under way, but none beyond the end of a block: across the border of a loop the
            # compiler cannot keep their operands where they are, and makes all products wait for each other.
            if plane > 0:
                sums, multiplied = warpgroup_mma_wait(1, deps=[sums, multiplied])
                mbarrier.arrive(x_empty.index((step - 1) % X_STAGES))
            multiplied = weight

            if _may_begin_group(plane + 1, PLANES, PLANES_PER_GROUP):
                group = (first_block * PLANES + step + 1) // PLANES_PER_GROUP
                if PLANES % PLANES_PER_GROUP == 0:  # a group ends here, and the next one's were asked for at its start
                    scales, zeros = next_scales, next_zeros
                    next_scales = _of_group(scale_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
                    if HAS_ZERO:
                        next_zeros = _of_group(zero_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
                else:
                    scales = _of_group(scale_ptr, group, num_groups, num_rows, rows, DTYPE)
                    if HAS_ZERO:
                        zeros = _of_group(zero_ptr, group, num_groups, num_rows, rows, DTYPE)
            if plane + 1 < PLANES:
                weight = _plane(words, zeros, scales, plane + 1, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
            else:
                has_next = index + 1 < num_blocks
                word_slot = (index + 1) % WORD_STAGES
                mbarrier.wait(words_full.index(word_slot), ((index + 1) // WORD_STAGES) & 1, pred=has_next)
                words = word_ring.index(word_slot * CONSUMERS + INDEX).load(left)
                mbarrier.arrive(words_empty.index(word_slot), pred=has_next)
                weight = _plane(words, zeros, scales, 0, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
                sums, multiplied = warpgroup_mma_wait(0, deps=[sums, multiplied])
                mbarrier.arrive(x_empty.index(slot))

    mbarrier.arrive(all_done)
    if not HAS_GROUPS:
        sums *= row_scales[:, None]
    if HAS_BIAS:
        sums += biases[:, None]
    mbarrier.wait(all_done, 0)  # nobody reads x any more, whose ring the sums now pass through
    gdc_wait()
    staging = staging_of(x_ring, INDEX, CONSUMERS, gl.float32)
    out_ptr += split.to(gl.int64) * tokens * num_rows
    NUM_PIECES: gl.constexpr = TOKEN_TILE // PIECE
    layout: gl.constexpr = by_row(IS_GATED)
    pieces = pieces_of(sums, NUM_PIECES)
    for piece in gl.static_range(NUM_PIECES):
        staging.store(gl.permute(pieces[piece], [1, 0]))
        store_outputs(staging.load(layout), out_ptr, first_token + piece * PIECE, first_row, tokens, num_rows, IS_GATED)


@gluon.jit(do_not_specialize=["tokens"])
def _wgmma_tiles(
    x_desc, words_desc, scale_ptr, zero_ptr, bias_ptr, out_ptr, tokens, num_rows, num_blocks, num_groups,
    blocks_per_split,
    BITS: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr, CONSUMERS: gl.constexpr, TOKEN_TILE: gl.constexpr, X_STAGES: gl.constexpr,
    WORD_STAGES: gl.constexpr,
):  # fmt: skip
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, TOKEN_TILE, PLANE], x_desc.layout)
    word_ring = gl.allocate_shared_memory(gl.int16, [WORD_STAGES * CONSUMERS, ROWS, PLANE], words_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    words_full = gl.allocate_shared_memory(gl.int64, [WORD_STAGES, 1], mbarrier.MBarrierLayout())
    words_empty = gl.allocate_shared_memory(gl.int64, [WORD_STAGES, 1], mbarrier.MBarrierLayout())
    all_done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(x_empty.index(slot), count=CONSUMERS)
    for slot in gl.static_range(WORD_STAGES):
        mbarrier.init(words_full.index(slot), count=1)
        mbarrier.init(words_empty.index(slot), count=CONSUMERS)
    mbarrier.init(all_done, count=CONSUMERS)

    if not HAS_ZERO:
        zero_ptr = scale_ptr  # a tuple of operands has no room for None
    if not HAS_BIAS:
        bias_ptr = scale_ptr
    split = gl.program_id(2)
    first_block = split * blocks_per_split
    own_blocks = gl.minimum(blocks_per_split, num_blocks - first_block)
    rings = (x_ring, word_ring)
    barriers = (x_full, x_empty, words_full, words_empty, all_done)
    operands = (scale_ptr, zero_ptr, bias_ptr, out_ptr, tokens, num_rows, num_groups)
    place = (gl.program_id(0) * TOKEN_TILE, gl.program_id(1) * (CONSUMERS * ROWS), first_block, own_blocks, split)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED,
                    CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, SECOND, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED,
                    CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
                (_produce, (
                    x_desc, words_desc, rings, barriers, place, BITS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED,
                    CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, SECOND, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED,
                    CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, THIRD, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED,
                    CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
                (_produce, (
                    x_desc, words_desc, rings, barriers, place, BITS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


def _stages(row_tile: int, token_tile: int) -> tuple[int, int]:
    """Slots of the rings of x and of words: eight planes and four blocks, or what fits beside the barriers."""
    x_bytes, word_bytes = token_tile * PLANE.value * 2, row_tile * PLANE.value * 2
    space = SHARED_BYTES - 1024
    word_stages = 4 if space - 4 * word_bytes >= 6 * x_bytes else 3
    return min(8, (space - word_stages * word_bytes) // x_bytes), word_stages


def multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    bits: int,
    planes_per_group: int,
    is_gated: bool,
    token_tile: int,
    row_tile: int,
    num_splits: int,
) -> None:
    """Fill out [T, n], or [T, n / 2] if gated: x [T, k] times a prepared weight whose planes are of 64 integers.

    Of more than one split, out is [num_splits, T, n] in float32, and what comes after the sums is left to another
    kernel. No split is without a block. x is float16, with scales of groups in float16 too; or bfloat16, with one scale
    for a row and no zero point. k is a multiple of 8 and x begins at a multiple of 16 bytes, as copies of tiles want
    it. Tiles are of 128 or 192 rows by 128 tokens, or of 128 by 256.
    """
    tokens = x.shape[0]
    num_groups, num_rows = scale.shape
    num_blocks = words.shape[1] // PLANE.value
    consumers = row_tile // ROWS.value
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_stages, word_stages = _stages(row_tile, token_tile)
    # Token tiles come first in the grid, so programs that run together share rows of the weight.
    _wgmma_tiles[(cdiv(tokens, token_tile), cdiv(num_rows, row_tile), num_splits)](
        TensorDescriptor.from_tensor(x, [token_tile, PLANE.value], layout),
        TensorDescriptor.from_tensor(words, [ROWS.value, PLANE.value], layout),
        scale, zero, bias, out, tokens, num_rows, num_blocks, num_groups, cdiv(num_blocks, num_splits),
        BITS=bits, PLANES_PER_GROUP=planes_per_group, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None,
        IS_GATED=is_gated, CONSUMERS=consumers, TOKEN_TILE=token_tile, X_STAGES=x_stages, WORD_STAGES=word_stages,
        num_warps=4, maxnreg=LAUNCH_REGISTERS[consumers], launch_pdl=True,
    )  # fmt: skip
