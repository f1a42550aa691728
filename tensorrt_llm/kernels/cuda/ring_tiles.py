"""A few tokens times a weight, in tiles of tensor cores that read the weight before the kernel in front is done.

    sums[n, t] = sum_k W[n, k] x[t, k]       in float32, or in int32 and so exactly for int8 by int8

Such a product lasts as long as the reading of its weight, and between two of them the memory would be idle: while the
last programs of one end, while a norm or attention runs, and while the first loads of the next are on their way. Here
the weight comes through a ring of NUM_STAGES stages in shared memory, which every program fills before it waits for the
kernel in front, so as much of the weight as all rings hold is there when x is.

A program takes ROW_TILE rows and one of num_splits parts of their depth. The sums of the parts lie in memory, and
whichever program of a tile is the last to arrive adds them in order (as in decode_one_head.py): only the counting of
arrivals is atomic. The weight is the left operand: that side of a tile has the rows, so few tokens are little padding.

    floats     W in x's dtype                                         rows of 16-byte pieces
    integers   W int8, x int8; the scales of both on the sums         likewise
    words      W int8 or int4 in the layout of weight_only.py, x float16; scales of rows, or of groups of their columns

Written in Gluon, which Triton's interpreter does not have.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..tactics import Tactic
from ..tactics.tactic import cdiv
from .epilogue import gated
from .integer_planes import two_words_ptx
from .overlap import has_dependent_launch
from .resident_stream import PLANE
from .ring_stream import allocate_rings
from .splits import Arrivals


@gluon.constexpr_function
def _lanes_of_16_bytes(columns, itemsize, num_warps):
    """A tile whose rows have `columns` items: 16 bytes a lane, rows of neighbouring lanes."""
    width = 16 // itemsize
    lanes = min(32, columns // width)
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def _ring_layout(itemsize):
    """16-byte pieces of eight rows in different banks."""
    return gl.SwizzledSharedLayout(16 // itemsize, 1, 8, [1, 0])


@gluon.constexpr_function
def _itemsize(dtype):
    return dtype.primitive_bitwidth // 8


@gluon.jit
def _copy_tile(
    stage, ptr, first_row, last_row, first_column, PITCH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] from first_row and first_column on of a matrix with rows of PITCH; the last row again at its end.

    Zeros beyond the end of a row.
    """
    layout: gl.constexpr = _lanes_of_16_bytes(COLUMNS, _itemsize(ptr.dtype.element_ty), num_warps)
    rows = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), last_row)
    columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    ptrs = ptr + (rows.to(gl.int64) * PITCH)[:, None] + columns[None, :]
    if PITCH % COLUMNS == 0:
        async_copy.async_copy_global_to_shared(stage, ptrs, cache_modifier=".cg")
    else:
        mask = gl.full([ROWS, COLUMNS], True, gl.int1, layout) & (columns < PITCH)[None, :]
        async_copy.async_copy_global_to_shared(stage, ptrs, mask=mask, cache_modifier=".cg")


@gluon.jit
def _integer_plane(words, INDEX: gl.constexpr, BITS: gl.constexpr):
    """The q of plane INDEX of int16 words in float16, exact, as integer_planes.py has it."""
    plane = gl.inline_asm_elementwise(
        two_words_ptx(INDEX, BITS, True), "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2
    )
    return plane.to(gl.float16, bitcast=True)


@gluon.jit
def _copy_scales(
    rings, ptr, slot, tile, step, num_rows, num_groups, PLANES_PER_STAGE: gl.constexpr,
    PLANES_PER_SCALE: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, ROW_TILE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Scales [ROW_TILE] of each part of a stage that has one; 4 bytes a lane. num_rows is a multiple of 16."""
    width: gl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([width], [32], [num_warps], [0])
    rows = tile * ROW_TILE + gl.arange(0, ROW_TILE, layout)
    for part in gl.static_range(len(rings)):
        # Beyond the last group x is zero, and any scale will do.
        plane = step * PLANES_PER_STAGE + part * PLANES_PER_SCALE
        group = gl.minimum(plane // PLANES_PER_GROUP, num_groups - 1)
        async_copy.async_copy_global_to_shared(
            rings[part].index(slot), ptr + group * num_rows + rows, mask=rows < num_rows
        )


@gluon.jit
def _multiply_stage(
    weight_stage, x_stage, scale_rings, slot, sums, BITS: gl.constexpr, DEPTH_TILE: gl.constexpr,
    PLANES_PER_SCALE: gl.constexpr, PLANES_PER_GROUP: gl.constexpr, left: gl.constexpr, right: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """sums plus the products of a stage."""
    if BITS == 0:
        sums = mma_v2(weight_stage.load(left), x_stage.permute([1, 0]).load(right), sums)
    else:
        PLANES: gl.constexpr = 16 // BITS
        PARTS: gl.constexpr = PLANES // PLANES_PER_SCALE
        for block in gl.static_range(DEPTH_TILE // PLANE):
            words = weight_stage.slice(block * PLANE, PLANE, dim=1).load(left)
            for part in gl.static_range(PARTS):
                part_sums = sums
                if PLANES_PER_GROUP > 0:
                    part_sums = gl.zeros(sums.shape, gl.float32, mma)
                for plane in gl.static_range(part * PLANES_PER_SCALE, (part + 1) * PLANES_PER_SCALE):
                    x_plane = x_stage.slice((block * PLANES + plane) * PLANE, PLANE, dim=1)
                    x = x_plane.permute([1, 0]).load(right)
                    part_sums = mma_v2(_integer_plane(words, plane, BITS), x, part_sums)
                if PLANES_PER_GROUP > 0:
                    scale = scale_rings[block * PARTS + part].index(slot).load(gl.SliceLayout(1, mma))
                    sums += part_sums * scale.to(gl.float32)[:, None]
                else:
                    sums = part_sums
    return sums


@gluon.jit
def _copy_weight(
    weight_ring, scale_rings, weight_ptr, scale_ptr, slot, tile, step, num_rows, num_groups,
    PITCH: gl.constexpr, BITS: gl.constexpr, PLANES_PER_SCALE: gl.constexpr, PLANES_PER_GROUP: gl.constexpr,
    ROW_TILE: gl.constexpr, DEPTH_TILE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Start copying step `step` of a tile's weight, and its scales, to stage `slot`."""
    _copy_tile(
        weight_ring.index(slot), weight_ptr, tile * ROW_TILE, num_rows - 1, step * DEPTH_TILE, PITCH, ROW_TILE,
        DEPTH_TILE, num_warps,
    )  # fmt: skip
    if PLANES_PER_GROUP > 0:
        _copy_scales(
            scale_rings, scale_ptr, slot, tile, step, num_rows, num_groups, DEPTH_TILE // PLANE * (16 // BITS),
            PLANES_PER_SCALE, PLANES_PER_GROUP, ROW_TILE, num_warps,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens"])
def _ring_tiles(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, partial_ptr, arrivals_ptr,
    tokens, num_rows, num_groups, x_scale_stride,
    PITCH: gl.constexpr, X_PITCH: gl.constexpr, BITS: gl.constexpr, PLANES_PER_SCALE: gl.constexpr,
    PLANES_PER_GROUP: gl.constexpr, TOKEN_TILE: gl.constexpr, ROW_TILE: gl.constexpr, DEPTH_TILE: gl.constexpr,
    NUM_STAGES: gl.constexpr, NUM_SPLITS: gl.constexpr,
    HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    IS_INTEGER: gl.constexpr = x_ptr.dtype.element_ty == gl.int8
    X_DEPTH_TILE: gl.constexpr = DEPTH_TILE * (16 // BITS) if BITS > 0 else DEPTH_TILE
    NUM_STEPS: gl.constexpr = (PITCH + DEPTH_TILE - 1) // DEPTH_TILE
    STEPS_PER_SPLIT: gl.constexpr = (NUM_STEPS + NUM_SPLITS - 1) // NUM_SPLITS
    LEAST_STEPS: gl.constexpr = NUM_STEPS - (NUM_SPLITS - 1) * STEPS_PER_SPLIT  # those of the last split
    sum_dtype: gl.constexpr = gl.int32 if IS_INTEGER else gl.float32
    K_WIDTH: gl.constexpr = 4 if IS_INTEGER else 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, K_WIDTH)
    weight_dtype: gl.constexpr = weight_ptr.dtype.element_ty
    x_dtype: gl.constexpr = x_ptr.dtype.element_ty
    weight_ring = gl.allocate_shared_memory(
        weight_dtype, [NUM_STAGES, ROW_TILE, DEPTH_TILE], _ring_layout(_itemsize(weight_dtype))
    )
    x_ring = gl.allocate_shared_memory(
        x_dtype, [NUM_STAGES, TOKEN_TILE, X_DEPTH_TILE], _ring_layout(_itemsize(x_dtype))
    )
    scale_rings = ()
    if PLANES_PER_GROUP > 0:
        scale_rings = allocate_rings(
            weight_scale_ptr.dtype.element_ty, X_DEPTH_TILE // (PLANES_PER_SCALE * PLANE), NUM_STAGES, ROW_TILE
        )

    tile, split = gl.program_id(0), gl.program_id(1)
    first_step = split * STEPS_PER_SPLIT
    num_steps = gl.minimum(STEPS_PER_SPLIT, NUM_STEPS - first_step)
    for step in gl.static_range(NUM_STAGES - 1):
        if step < LEAST_STEPS or step < num_steps:
            _copy_weight(
                weight_ring, scale_rings, weight_ptr, weight_scale_ptr, step, tile, first_step + step, num_rows,
                num_groups, PITCH, BITS, PLANES_PER_SCALE, PLANES_PER_GROUP, ROW_TILE, DEPTH_TILE, num_warps,
            )  # fmt: skip
        async_copy.commit_group()
    gdc_wait()
    for step in gl.static_range(NUM_STAGES - 1):
        if step < LEAST_STEPS or step < num_steps:
            _copy_tile(
                x_ring.index(step), x_ptr, 0, tokens - 1, (first_step + step) * X_DEPTH_TILE,
                X_PITCH, TOKEN_TILE, X_DEPTH_TILE, num_warps,
            )  # fmt: skip
        async_copy.commit_group()

    sums = gl.zeros([ROW_TILE, TOKEN_TILE], sum_dtype, mma)
    slot, ahead_slot = 0, NUM_STAGES - 1
    for step in range(num_steps):
        # Of the copies that were begun, all but the last NUM_STAGES - 2 are over: the weight's and x's of this step.
        async_copy.wait_group(NUM_STAGES - 2)
        ahead = step + NUM_STAGES - 1
        if ahead < num_steps:
            _copy_weight(
                weight_ring, scale_rings, weight_ptr, weight_scale_ptr, ahead_slot, tile, first_step + ahead, num_rows,
                num_groups, PITCH, BITS, PLANES_PER_SCALE, PLANES_PER_GROUP, ROW_TILE, DEPTH_TILE, num_warps,
            )  # fmt: skip
            _copy_tile(
                x_ring.index(ahead_slot), x_ptr, 0, tokens - 1, (first_step + ahead) * X_DEPTH_TILE,
                X_PITCH, TOKEN_TILE, X_DEPTH_TILE, num_warps,
            )  # fmt: skip
        async_copy.commit_group()
        sums = _multiply_stage(
            weight_ring.index(slot), x_ring.index(slot), scale_rings, slot, sums, BITS, DEPTH_TILE, PLANES_PER_SCALE,
            PLANES_PER_GROUP, left, right, mma,
        )  # fmt: skip
        slot = gl.where(slot == NUM_STAGES - 1, 0, slot + 1)
        ahead_slot = gl.where(ahead_slot == NUM_STAGES - 1, 0, ahead_slot + 1)

    if NUM_SPLITS > 1:
        row = gl.arange(0, ROW_TILE, gl.SliceLayout(1, mma))
        token = gl.arange(0, TOKEN_TILE, gl.SliceLayout(0, mma))
        places = row[:, None] * TOKEN_TILE + token[None, :]
        tile_ptr = partial_ptr + tile.to(gl.int64) * (NUM_SPLITS * ROW_TILE * TOKEN_TILE)
        gl.store(tile_ptr + split * (ROW_TILE * TOKEN_TILE) + places, sums)
        gl.thread_barrier()  # one thread counts for all: what the others have stored comes before
        if gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") < NUM_SPLITS - 1:
            return
        gl.store(arrivals_ptr + tile, 0)
        sums = gl.zeros([ROW_TILE, TOKEN_TILE], sum_dtype, mma)
        for part in gl.static_range(NUM_SPLITS):
            sums += gl.load(tile_ptr + part * (ROW_TILE * TOKEN_TILE) + places)
    _finish(
        sums, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tile, tokens, num_rows, x_scale_stride,
        TOKEN_TILE, ROW_TILE, PLANES_PER_GROUP == 0, HAS_BIAS, IS_GATED, num_warps,
    )  # fmt: skip


@gluon.jit
def _finish(
    sums, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tile, tokens, num_rows, x_scale_stride,
    TOKEN_TILE: gl.constexpr, ROW_TILE: gl.constexpr, IS_SCALED: gl.constexpr, HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The end of a matmul, as epilogue.py has it, of sums [ROW_TILE, TOKEN_TILE]."""
    lanes: gl.constexpr = min(32, ROW_TILE // 2)
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [32 // lanes, lanes], [num_warps, 1], [1, 0])
    y = gl.convert_layout(gl.permute(sums.to(gl.float32), [1, 0]), layout)
    rows = tile * ROW_TILE + gl.arange(0, ROW_TILE, gl.SliceLayout(0, layout))
    token_ids = gl.arange(0, TOKEN_TILE, gl.SliceLayout(1, layout))
    if IS_SCALED and weight_scale_ptr is not None:
        scale = gl.load(weight_scale_ptr + rows, mask=rows < num_rows, other=0.0).to(gl.float32)[None, :]
        if x_scale_ptr is not None:
            scale *= gl.load(x_scale_ptr + token_ids * x_scale_stride, mask=token_ids < tokens, other=0.0)[:, None]
        y *= scale
    if HAS_BIAS:
        y += gl.load(bias_ptr + rows, mask=rows < num_rows, other=0.0).to(gl.float32)[None, :]
    if IS_GATED:
        outputs = gated(gl.reshape(y, [TOKEN_TILE, ROW_TILE // 2, 2]))
        half: gl.constexpr = outputs.type.layout
        columns = tile * (ROW_TILE // 2) + gl.arange(0, ROW_TILE // 2, gl.SliceLayout(0, half))
        out_tokens = gl.arange(0, TOKEN_TILE, gl.SliceLayout(1, half))
        width = num_rows // 2
        ptrs = out_ptr + (out_tokens * width)[:, None] + columns[None, :]
        gl.store(ptrs, outputs, mask=(out_tokens < tokens)[:, None] & (columns < width)[None, :])
    else:
        ptrs = out_ptr + (token_ids * num_rows)[:, None] + rows[None, :]
        gl.store(ptrs, y, mask=(token_ids < tokens)[:, None] & (rows < num_rows)[None, :])


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU can start kernels early, and both begin where 16 bytes can be copied at a time."""
    return has_dependent_launch(x.device) and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    bits: int = 0,
    planes_per_scale: int = 0,
    planes_per_group: int = 0,
    is_gated: bool,
    tactic: Tactic,
    arrivals: Arrivals,
) -> None:
    """Fill out [tokens, n] with x [tokens, k] times weight, as the top of this file has it; Hopper or later.

    `bits` is that of words, else 0, with planes counted as in weight_only.py. x_scale is float32 [tokens, 1] or [1],
    weight_scale [n], or [groups, n] of words. Rows of x and of the weight are of whole pieces of 16 bytes, and where
    there are groups the rows are a multiple of 16; `takes` says whether they lie so. No kernel of the step may have
    written the weight. `arrivals` are of launches that come one after the other.
    """
    tokens, num_rows = x.shape[0], weight.shape[0]
    num_tiles = cdiv(num_rows, tactic.row_tile)
    partial, arrived = out, out  # never read or written as what they are called
    if tactic.num_splits > 1:
        dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
        size = num_tiles * tactic.num_splits * tactic.row_tile * tactic.token_tile
        partial, arrived = torch.empty(size, dtype=dtype, device=x.device), arrivals.of(num_tiles, x.device)
    _ring_tiles[(num_tiles, tactic.num_splits)](
        x, x_scale, weight, weight_scale, bias, out, partial, arrived, tokens, num_rows,
        1 if weight_scale is None else weight_scale.shape[0], 0 if x_scale is None or x_scale.ndim == 1 else 1,
        PITCH=weight.shape[1], X_PITCH=x.shape[1], BITS=bits, PLANES_PER_SCALE=planes_per_scale,
        PLANES_PER_GROUP=planes_per_group, TOKEN_TILE=tactic.token_tile, ROW_TILE=tactic.row_tile,
        DEPTH_TILE=tactic.depth_tile * bits // 16 if bits else tactic.depth_tile, NUM_STAGES=tactic.num_stages,
        NUM_SPLITS=tactic.num_splits, HAS_BIAS=bias is not None, IS_GATED=is_gated, num_warps=tactic.num_warps,
        launch_pdl=True,
    )  # fmt: skip
