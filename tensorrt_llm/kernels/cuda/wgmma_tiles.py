"""Draft."""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

PLANE = gl.constexpr(64)
_PIECE = gl.constexpr(64)  # tokens whose sums pass through shared memory together at the end


@gluon.constexpr_function
def _unpacking(index, bits, is_half):
    """Instructions that leave in `bits` float integers with an offset; the factor to bring them to size."""
    if not is_half:
        if bits == 8:
            return None
        shift, mask, ones, factor = 4 * index, "000f", "4300", "3f80"
    elif bits == 8:
        shift, mask, ones, factor = 8 * index, "00ff", "6400", "3c00"
    elif index % 2:
        shift, mask, ones, factor = 4 * index - 4, "00f0", "6400", "2c00"
    else:
        shift, mask, ones, factor = 4 * index, "000f", "6400", "3c00"
    return shift, mask, ones, factor


@gluon.constexpr_function
def _plane_ptx(index, bits, is_half, has_scale):
    if not is_half and bits == 8:
        return f"""{{
            .reg .b32 bits, low, top;
            shr.b32 bits, $1, {8 * index};
            lop3.b32 low, bits, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 top, bits, 0x00800080, 0x43804380, 0x6a;
            sub.rn.bf16x2 $0, low, top;
        }}"""
    shift, mask, ones, factor = _unpacking(index, bits, is_half)
    kind = "f16x2" if is_half else "bf16x2"
    scaled = f"mul.rn.{kind} $0, $0, $3;" if has_scale else ""
    return f"""{{
        .reg .b32 bits, ones, factor;
        mov.b32 ones, 0x{ones}{ones};
        mov.b32 factor, 0x{factor}{factor};
        shr.b32 bits, $1, {shift};
        lop3.b32 bits, bits, 0x{mask}{mask}, ones, 0xea;
        fma.rn.{kind} $0, bits, factor, $2;
        {scaled}
    }}"""


@gluon.constexpr_function
def _addend(index, bits, is_half):
    """What `_plane_ptx` adds to an integer without a zero point."""
    if not is_half:
        return -136.0
    if bits == 8:
        return -1152.0
    return -72.0 if index % 2 else -1032.0


@gluon.jit
def _plane(words, zeros, scales, INDEX: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr,
           HAS_ZERO: gl.constexpr, HAS_SCALE: gl.constexpr):
    IS_HALF: gl.constexpr = DTYPE == gl.float16
    if not IS_HALF and BITS == 8:
        bits = gl.inline_asm_elementwise(
            _plane_ptx(INDEX, BITS, IS_HALF, False), "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)
    else:
        addend = gl.full(words.shape, _addend(INDEX, BITS, IS_HALF), DTYPE, words.type.layout)
        if HAS_ZERO:
            addend = (_addend(INDEX, BITS, IS_HALF) - zeros)[:, None].broadcast_to(words.shape)
        addend = addend.to(gl.int16, bitcast=True)
        if HAS_SCALE:
            wide = scales.to(gl.int16, bitcast=True)[:, None].broadcast_to(words.shape)
            bits = gl.inline_asm_elementwise(
                _plane_ptx(INDEX, BITS, IS_HALF, True), "=&r,r,r,r", [words, addend, wide], dtype=gl.int16,
                is_pure=True, pack=2)
        else:
            bits = gl.inline_asm_elementwise(
                _plane_ptx(INDEX, BITS, IS_HALF, False), "=r,r,r", [words, addend], dtype=gl.int16, is_pure=True,
                pack=2)
    return bits.to(DTYPE, bitcast=True)


@gluon.jit
def _copy_words(
    words_desc, ring, full, slot, first_row, block, ROWS: gl.constexpr, CONSUMERS: gl.constexpr
):
    mbarrier.expect(full.index(slot), CONSUMERS * ROWS * PLANE * 2)
    for consumer in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(
            words_desc, [first_row + consumer * ROWS, block * PLANE], full.index(slot),
            ring.index(slot * CONSUMERS + consumer))


@gluon.jit
def _copy(
    x_desc, words_desc, rings, barriers, place, BITS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
    TOKEN_TILE: gl.constexpr, X_STAGES: gl.constexpr, WORD_STAGES: gl.constexpr,
):
    x_ring, word_ring = rings
    x_full, x_empty, words_full, words_empty, _ = barriers
    first_token, first_row, first_block, num_blocks, _ = place
    PLANES: gl.constexpr = 16 // BITS
    gdc_launch_dependents()
    for i in gl.static_range(WORD_STAGES):
        if i < num_blocks:
            _copy_words(words_desc, word_ring, words_full, i, first_row, first_block + i, ROWS, CONSUMERS)
    gdc_wait()
    for i in range(num_blocks):
        block = first_block + i
        if i >= WORD_STAGES:
            word_slot = i % WORD_STAGES
            mbarrier.wait(words_empty.index(word_slot), (i // WORD_STAGES) & 1 ^ 1)
            _copy_words(words_desc, word_ring, words_full, word_slot, first_row, block, ROWS, CONSUMERS)
        for plane in gl.static_range(PLANES):
            step = i * PLANES + plane
            slot = step % X_STAGES
            mbarrier.wait(x_empty.index(slot), (step // X_STAGES) & 1 ^ 1)
            mbarrier.expect(x_full.index(slot), TOKEN_TILE * PLANE * 2)
            tma.async_copy_global_to_shared(
                x_desc, [first_token, (block * PLANES + plane) * PLANE], x_full.index(slot), x_ring.index(slot))


@gluon.constexpr_function
def _may_begin_group(plane, planes, planes_per_group):
    """Whether plane `plane` of some block is the first of a group."""
    return plane % math.gcd(planes, planes_per_group) == 0


@gluon.jit
def _group_numbers(ptr, group, num_groups, num_rows, rows, DTYPE: gl.constexpr):
    group = gl.minimum(group, num_groups - 1)
    return gl.load(ptr + group * num_rows + rows).to(DTYPE)


@gluon.jit
def _multiply(
    rings, barriers, operands, place,
    INDEX: gl.constexpr, BITS: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr, IS_SPLIT: gl.constexpr,
    ROWS: gl.constexpr, CONSUMERS: gl.constexpr, TOKEN_TILE: gl.constexpr,
    X_STAGES: gl.constexpr, WORD_STAGES: gl.constexpr,
):
    x_ring, word_ring = rings
    x_full, x_empty, words_full, words_empty, all_done = barriers
    scale_ptr, zero_ptr, bias_ptr, out_ptr, partial_ptr, tokens, num_rows, num_groups = operands
    first_token, first_row, first_block, num_blocks, split = place
    PLANES: gl.constexpr = 16 // BITS
    DTYPE: gl.constexpr = x_ring.dtype
    HAS_GROUPS: gl.constexpr = PLANES_PER_GROUP > 0
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKEN_TILE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    own_first = first_row + INDEX * ROWS
    rows = gl.minimum(own_first + gl.arange(0, ROWS, gl.SliceLayout(1, left)), num_rows - 1)
    scales, zeros, next_scales, next_zeros = rows, rows, rows, rows
    if HAS_ZERO and not HAS_GROUPS:
        zeros = gl.load(zero_ptr + rows).to(DTYPE)
    sum_rows = gl.minimum(own_first + gl.arange(0, ROWS, gl.SliceLayout(1, mma)), num_rows - 1)
    row_scales, biases = sum_rows, sum_rows
    if not HAS_GROUPS:
        row_scales = gl.load(scale_ptr + sum_rows).to(gl.float32)
    if HAS_BIAS and not IS_SPLIT:
        biases = gl.load(bias_ptr + sum_rows).to(gl.float32)
    acc = gl.zeros([ROWS, TOKEN_TILE], gl.float32, mma)
    mbarrier.wait(words_full.index(0), 0)
    words = word_ring.index(INDEX).load(left)
    mbarrier.arrive(words_empty.index(0))
    if HAS_GROUPS:
        group = first_block * PLANES // PLANES_PER_GROUP
        scales = _group_numbers(scale_ptr, group, num_groups, num_rows, rows, DTYPE)
        next_scales = _group_numbers(scale_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
        if HAS_ZERO:
            zeros = _group_numbers(zero_ptr, group, num_groups, num_rows, rows, DTYPE)
            next_zeros = _group_numbers(zero_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
    a = _plane(words, zeros, scales, 0, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
    previous = a
    for i in range(num_blocks):
        for plane in gl.static_range(PLANES):
            step = i * PLANES + plane
            slot = step % X_STAGES
            if HAS_GROUPS and _may_begin_group(plane + 1, PLANES, PLANES_PER_GROUP):
                group = (first_block * PLANES + step + 1) // PLANES_PER_GROUP
                if PLANES % PLANES_PER_GROUP == 0:  # a group ends here: the next one's were asked for a group ago
                    scales, zeros = next_scales, next_zeros
                    next_scales = _group_numbers(scale_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
                    if HAS_ZERO:
                        next_zeros = _group_numbers(zero_ptr, group + 1, num_groups, num_rows, rows, DTYPE)
                else:
                    scales = _group_numbers(scale_ptr, group, num_groups, num_rows, rows, DTYPE)
                    if HAS_ZERO:
                        zeros = _group_numbers(zero_ptr, group, num_groups, num_rows, rows, DTYPE)
            mbarrier.wait(x_full.index(slot), (step // X_STAGES) & 1)
            acc = warpgroup_mma(a, x_ring.index(slot).permute([1, 0]), acc, is_async=True)
            if plane > 0:
                acc, previous = warpgroup_mma_wait(1, deps=[acc, previous])
                mbarrier.arrive(x_empty.index((step + X_STAGES - 1) % X_STAGES))
            previous = a
            if plane + 1 < PLANES:
                a = _plane(words, zeros, scales, plane + 1, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
            else:
                word_slot = (i + 1) % WORD_STAGES
                has_next = i + 1 < num_blocks
                mbarrier.wait(words_full.index(word_slot), ((i + 1) // WORD_STAGES) & 1, pred=has_next)
                words = word_ring.index(word_slot * CONSUMERS + INDEX).load(left)
                mbarrier.arrive(words_empty.index(word_slot), pred=has_next)
                a = _plane(words, zeros, scales, 0, BITS, DTYPE, HAS_ZERO, HAS_GROUPS)
            if plane + 1 == PLANES:
                acc, previous = warpgroup_mma_wait(0, deps=[acc, previous])
                mbarrier.arrive(x_empty.index(slot))

    mbarrier.arrive(all_done)
    if not HAS_GROUPS:
        acc *= row_scales[:, None]
    if HAS_BIAS and not IS_SPLIT:
        acc += biases[:, None]
    mbarrier.wait(all_done, 0)
    gdc_wait()
    stage_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [4, 1], [1, 0])
    stage = x_ring._reinterpret(gl.float32, [CONSUMERS, _PIECE, ROWS], stage_layout).index(INDEX)
    pieces = _pieces(acc, TOKEN_TILE // _PIECE)
    for piece in gl.static_range(TOKEN_TILE // _PIECE):
        stage.store(gl.permute(pieces[piece], [1, 0]))
        _store_outputs(
            stage.load(by_row), operands, first_token + piece * _PIECE, own_first, split, IS_GATED,
            IS_SPLIT)


@gluon.jit
def _store_outputs(
    sums, operands, first_token, first_row, split, IS_GATED: gl.constexpr, IS_SPLIT: gl.constexpr,
):
    _, _, _, out_ptr, partial_ptr, tokens, num_rows, _ = operands
    layout: gl.constexpr = sums.type.layout
    TOKENS: gl.constexpr = sums.shape[0]
    ROWS: gl.constexpr = sums.shape[1]
    token_ids = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
    columns = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    if IS_GATED and not IS_SPLIT:
        fc, gate = gl.split(gl.reshape(sums, [TOKENS, ROWS // 2, 2]))
        outputs = fc / (1.0 + gl.exp(-fc)) * gate
        half: gl.constexpr = outputs.type.layout
        half_token_ids = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, half))
        half_columns = first_row // 2 + gl.arange(0, ROWS // 2, gl.SliceLayout(0, half))
        _store(out_ptr, outputs, half_token_ids, tokens, half_columns, num_rows // 2)
    elif IS_SPLIT:
        _store(partial_ptr + split.to(gl.int64) * tokens * num_rows, sums, token_ids, tokens, columns, num_rows)
    else:
        _store(out_ptr, sums, token_ids, tokens, columns, num_rows)


@gluon.jit
def _store(ptr, values, token_ids, tokens, columns, width):
    mask = (token_ids < tokens)[:, None] & (columns < width)[None, :]
    gl.store(ptr + (token_ids.to(gl.int64) * width)[:, None] + columns[None, :], values, mask=mask)


@gluon.jit
def _pieces(sums, COUNT: gl.constexpr):
    """Sums of COUNT pieces of the tokens, in order."""
    if COUNT == 1:
        pieces = (sums,)
    else:
        halves = gl.permute(gl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), [0, 2, 1])
        first, second = gl.split(halves)
        pieces = _pieces(first, COUNT // 2) + _pieces(second, COUNT // 2)
    return pieces


@gluon.jit(do_not_specialize=["tokens"])
def _wgmma_tiles(
    x_desc, words_desc, scale_ptr, zero_ptr, bias_ptr, out_ptr, partial_ptr,
    tokens, num_rows, num_blocks, num_groups, blocks_per_split,
    BITS: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr, IS_SPLIT: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
    TOKEN_TILE: gl.constexpr, X_STAGES: gl.constexpr, WORD_STAGES: gl.constexpr, num_warps: gl.constexpr,
):
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

    first_token = gl.program_id(0) * TOKEN_TILE
    first_row = gl.program_id(1) * (CONSUMERS * ROWS)
    split = gl.program_id(2)
    first_block = split * blocks_per_split
    own_blocks = gl.minimum(blocks_per_split, num_blocks - first_block)
    if not HAS_ZERO:
        zero_ptr = scale_ptr  # tuples have no room for None
    if not HAS_BIAS:
        bias_ptr = scale_ptr
    rings = (x_ring, word_ring)
    barriers = (x_full, x_empty, words_full, words_empty, all_done)
    operands = (scale_ptr, zero_ptr, bias_ptr, out_ptr, partial_ptr, tokens, num_rows, num_groups)
    place = (first_token, first_row, first_block, own_blocks, split)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    FOURTH: gl.constexpr = 3
    if CONSUMERS == 1:
        gl.warp_specialize([(_multiply, (rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_copy, (x_desc, words_desc, rings, barriers, place, BITS, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES))], [1], [24])
    elif CONSUMERS == 2:
        gl.warp_specialize([(_multiply, (rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, SECOND, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_copy, (x_desc, words_desc, rings, barriers, place, BITS, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES))], [4, 1], [240, 24])
    elif CONSUMERS == 3:
        gl.warp_specialize([(_multiply, (rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, SECOND, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, THIRD, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_copy, (x_desc, words_desc, rings, barriers, place, BITS, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES))], [4, 4, 1], [160, 160, 24])
    else:
        gl.warp_specialize([(_multiply, (rings, barriers, operands, place, FIRST, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, SECOND, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, THIRD, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_multiply, (rings, barriers, operands, place, FOURTH, BITS, PLANES_PER_GROUP, HAS_ZERO, HAS_BIAS, IS_GATED, IS_SPLIT, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES)), (_copy, (x_desc, words_desc, rings, barriers, place, BITS, ROWS, CONSUMERS, TOKEN_TILE, X_STAGES, WORD_STAGES))], [4, 4, 4, 1], [112, 112, 112, 24])


def multiply(
    x, words, scale, zero, bias, out, partial_sums, *,
    bits, planes_per_group, is_gated, token_tile, row_tile, num_warps, num_stages, word_stages, num_splits,
):
    tokens, depth = x.shape
    num_groups, num_rows = scale.shape
    consumers = num_warps // 4
    rows = row_tile // consumers
    num_blocks = words.shape[1] // PLANE.value
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_desc = TensorDescriptor.from_tensor(x, [token_tile, 64], layout)
    words_desc = TensorDescriptor.from_tensor(words, [rows, 64], layout)
    grid = triton.cdiv(tokens, token_tile), triton.cdiv(num_rows, row_tile), num_splits
    _wgmma_tiles[grid](
        x_desc, words_desc, scale, zero, bias, out, partial_sums,
        tokens, num_rows, num_blocks, num_groups, triton.cdiv(num_blocks, num_splits),
        BITS=bits, PLANES_PER_GROUP=planes_per_group, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None,
        IS_GATED=is_gated, IS_SPLIT=num_splits > 1, ROWS=rows, CONSUMERS=consumers, TOKEN_TILE=token_tile,
        X_STAGES=num_stages, WORD_STAGES=word_stages, num_warps=4, maxnreg={1: 248, 2: 168, 3: 128, 4: 96}[consumers], launch_pdl=True,
    )
