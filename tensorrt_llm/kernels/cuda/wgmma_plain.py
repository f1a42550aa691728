"""Many tokens times a weight that tensor cores take as it is, on Hopper: of x's floats, or W8A8.

    floats   out[t, n] = sum_k x[t, k] w[n, k] + bias[n]                              float32 sums
    W8A8     out[t, n] = sum_k x[t, k] w[n, k] * (x_scale[t] * w_scale[n]) + bias[n]  int32 sums, exact

As in wgmma_tiles.py, one warp, the producer, copies to a ring in shared memory, and two or three warpgroups, the
consumers, multiply. A stage of the ring is 128 bytes of each row and of each token of the program's tile:

    weight  [ROWS, 128 bytes] for each consumer
    x       [TOKEN_TILE, 128 bytes], which all consumers read

Both operands of a product are read where they lie. A consumer lets go of a stage when the product of the next one is
under way.

The depth of a tile may be divided among programs, whose sums, float32 or int32, `epilogue.add_splits` adds up. Those of
floats may also be left to the norm behind the product (norm.py).

Written in Gluon, which Triton's interpreter does not have, for compute capability 9.0, the only one with these
instructions.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..tactics.tactic import SHARED_BYTES, Tactic, cdiv, whole_splits
from .epilogue import add_splits, stride_of
from .warpgroups import LAUNCH_REGISTERS, PIECE, ROWS, by_row, has_warpgroups, pieces_of, staging_of, store_outputs

STAGE_BYTES = gl.constexpr(128)  # of a row or token in a stage


@gluon.jit
def _copy_weight(weight_desc, ring, full, slot, first_row, column, CONSUMERS: gl.constexpr, TOKEN_TILE: gl.constexpr):
    """Announce all bytes of a stage, and copy the weight's."""
    mbarrier.expect(full.index(slot), (CONSUMERS * ROWS + TOKEN_TILE) * STAGE_BYTES)
    for consumer in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(
            weight_desc, [first_row + consumer * ROWS, column], full.index(slot),
            ring.index(slot * CONSUMERS + consumer),
        )  # fmt: skip


@gluon.jit
def _produce(
    x_desc, weight_desc, rings, barriers, place, COLUMNS: gl.constexpr, CONSUMERS: gl.constexpr,
    TOKEN_TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy all that a tile takes; what no kernel of a step writes, the weight, before the wait for the previous one."""
    x_ring, weight_ring = rings
    full, empty, _ = barriers
    first_token, first_row, first_block, num_blocks, _ = place
    gdc_launch_dependents()
    for index in gl.static_range(STAGES):
        if index < num_blocks:
            column = (first_block + index) * COLUMNS
            _copy_weight(weight_desc, weight_ring, full, index, first_row, column, CONSUMERS, TOKEN_TILE)
    gdc_wait()
    for index in range(num_blocks):
        slot = index % STAGES
        column = (first_block + index) * COLUMNS
        if index >= STAGES:
            mbarrier.wait(empty.index(slot), (index // STAGES) & 1 ^ 1)
            _copy_weight(weight_desc, weight_ring, full, slot, first_row, column, CONSUMERS, TOKEN_TILE)
        tma.async_copy_global_to_shared(x_desc, [first_token, column], full.index(slot), x_ring.index(slot))


@gluon.constexpr_function
def _tokens_of_instruction(token_tile, consumers, is_integer):
    """The whole tile, but for integers, of which Triton has no product of 256 tokens, and where registers are few."""
    return min(token_tile, 128) if is_integer or consumers == 3 else token_tile


@gluon.jit
def _consume(
    rings, barriers, operands, place, INDEX: gl.constexpr, HAS_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    IS_GATED: gl.constexpr, CONSUMERS: gl.constexpr, TOKEN_TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows of consumer INDEX, from the ring to the output."""
    x_ring, weight_ring = rings
    full, empty, all_done = barriers
    x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, num_rows, x_scale_stride = operands
    first_token, tile_row, _, num_blocks, split = place
    IS_INTEGER: gl.constexpr = x_ring.dtype == gl.int8
    SUM_DTYPE: gl.constexpr = gl.int32 if IS_INTEGER else gl.float32
    OUT_DTYPE: gl.constexpr = gl.float32 if HAS_SCALES else SUM_DTYPE
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1],
        instr_shape=[16, _tokens_of_instruction(TOKEN_TILE, CONSUMERS, IS_INTEGER), 32 if IS_INTEGER else 16],
    )  # fmt: skip

    first_row = tile_row + INDEX * ROWS
    rows = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, mma)), num_rows - 1)
    row_scales, biases = rows, rows
    if HAS_SCALES:
        row_scales = gl.load(weight_scale_ptr + rows)
    if HAS_BIAS:
        biases = gl.load(bias_ptr + rows).to(gl.float32)
    sums = gl.zeros([ROWS, TOKEN_TILE], SUM_DTYPE, mma)
    for index in range(num_blocks):
        slot = index % STAGES
        mbarrier.wait(full.index(slot), (index // STAGES) & 1)
        weight, x = weight_ring.index(slot * CONSUMERS + INDEX), x_ring.index(slot)
        sums = warpgroup_mma(weight, x.permute([1, 0]), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index((index + STAGES - 1) % STAGES), pred=index > 0)
    sums = warpgroup_mma_wait(0, deps=[sums])

    mbarrier.arrive(all_done)
    mbarrier.wait(all_done, 0)  # nobody reads x any more, whose ring the sums now pass through
    gdc_wait()
    staging = staging_of(x_ring, INDEX, CONSUMERS, OUT_DTYPE)
    out_ptr += split.to(gl.int64) * tokens * num_rows
    NUM_PIECES: gl.constexpr = TOKEN_TILE // PIECE
    layout: gl.constexpr = by_row(IS_GATED)
    pieces = pieces_of(sums, NUM_PIECES)
    for piece in gl.static_range(NUM_PIECES):
        first = first_token + piece * PIECE
        outputs = pieces[piece].to(OUT_DTYPE)
        if HAS_SCALES:
            token_ids = first + gl.arange(0, PIECE, gl.SliceLayout(0, outputs.type.layout))
            x_scales = gl.load(x_scale_ptr + token_ids * x_scale_stride, mask=token_ids < tokens, other=0.0)
            outputs *= x_scales[None, :] * _beside(row_scales, outputs)
        if HAS_BIAS:
            outputs += _beside(biases, outputs)
        staging.store(gl.permute(outputs, [1, 0]))
        store_outputs(staging.load(layout), out_ptr, first, first_row, tokens, num_rows, IS_GATED)


@gluon.jit
def _beside(values, sums):
    """[rows, 1] of values [rows], which lie in the lanes that have these rows of sums."""
    return gl.convert_layout(values, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)[:, None]


@gluon.jit(do_not_specialize=["tokens", "num_blocks", "blocks_per_split"])
def _wgmma_plain(
    x_desc, weight_desc, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, num_rows, num_blocks,
    blocks_per_split, x_scale_stride,
    HAS_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, IS_GATED: gl.constexpr, CONSUMERS: gl.constexpr,
    TOKEN_TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = x_desc.block_shape[1]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKEN_TILE, COLUMNS], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, ROWS, COLUMNS], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    all_done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    mbarrier.init(all_done, count=CONSUMERS)

    if not HAS_SCALES:
        x_scale_ptr, weight_scale_ptr = out_ptr, out_ptr  # a tuple of operands has no room for None
    if not HAS_BIAS:
        bias_ptr = out_ptr
    split = gl.program_id(2)
    first_block = split * blocks_per_split
    own_blocks = gl.minimum(blocks_per_split, num_blocks - first_block)
    rings = (x_ring, weight_ring)
    barriers = (full, empty, all_done)
    operands = (x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, num_rows, x_scale_stride)
    place = (gl.program_id(0) * TOKEN_TILE, gl.program_id(1) * (CONSUMERS * ROWS), first_block, own_blocks, split)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    rings, barriers, operands, place, FIRST, HAS_SCALES, HAS_BIAS, IS_GATED, CONSUMERS, TOKEN_TILE,
                    STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, SECOND, HAS_SCALES, HAS_BIAS, IS_GATED, CONSUMERS, TOKEN_TILE,
                    STAGES,
                )),
                (_produce, (x_desc, weight_desc, rings, barriers, place, COLUMNS, CONSUMERS, TOKEN_TILE, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    rings, barriers, operands, place, FIRST, HAS_SCALES, HAS_BIAS, IS_GATED, CONSUMERS, TOKEN_TILE,
                    STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, SECOND, HAS_SCALES, HAS_BIAS, IS_GATED, CONSUMERS, TOKEN_TILE,
                    STAGES,
                )),
                (_consume, (
                    rings, barriers, operands, place, THIRD, HAS_SCALES, HAS_BIAS, IS_GATED, CONSUMERS, TOKEN_TILE,
                    STAGES,
                )),
                (_produce, (x_desc, weight_desc, rings, barriers, place, COLUMNS, CONSUMERS, TOKEN_TILE, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU has the instructions, and rows of both operands begin where copies of tiles can."""
    return has_warpgroups(x.device) and all(
        operand.data_ptr() % 16 == 0 and operand.shape[1] * operand.element_size() % 16 == 0 for operand in (x, weight)
    )


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    is_gated: bool,
    tactic: Tactic,
) -> None:
    """Fill out [T, n], or [T, n / 2] if gated: x [T, k] times weight [n, k] of one dtype, float16, bfloat16 or int8.

    Scales are for int8, x's in float32 [T, 1] or [1], the weight's [n]. Operands are such that `takes` says so. Tiles
    are of 128 or 256 tokens by 128 or 192 rows.
    """
    if splits_of(x, tactic) == 1:
        _launch(x, x_scale, weight, weight_scale, bias, out, is_gated, tactic, 1)
    else:
        sums = sums_of_splits(x, weight, tactic)
        add_splits(sums, bias, out, is_gated=is_gated, x_scale=x_scale, weight_scale=weight_scale)


def sums_of_splits(x: torch.Tensor, weight: torch.Tensor, tactic: Tactic) -> torch.Tensor:
    """x [T, k] times the transpose of weight [n, k], [splits, T, n]: float32, or int32 of int8."""
    sum_dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
    num_splits = splits_of(x, tactic)
    sums = torch.empty((num_splits, x.shape[0], weight.shape[0]), dtype=sum_dtype, device=x.device)
    _launch(x, None, weight, None, None, sums, False, tactic, num_splits)
    return sums


def splits_of(x: torch.Tensor, tactic: Tactic) -> int:
    """Programs that share the depth of a tile, none of them without a block."""
    return whole_splits(_blocks_of(x), tactic.num_splits)


def _blocks_of(x: torch.Tensor) -> int:
    """Stages of a whole row."""
    return cdiv(x.shape[1] * x.element_size(), STAGE_BYTES.value)


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    is_gated: bool,
    tactic: Tactic,
    num_splits: int,
) -> None:
    """Fill out, or, of more than one split, their sums."""
    num_blocks = _blocks_of(x)
    tokens, num_rows, token_tile, row_tile = x.shape[0], weight.shape[0], tactic.token_tile, tactic.row_tile
    columns, consumers = STAGE_BYTES.value // x.element_size(), row_tile // ROWS.value
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=2)
    # Token tiles come first in the grid, so programs that run together share rows of the weight.
    _wgmma_plain[(cdiv(tokens, token_tile), cdiv(num_rows, row_tile), num_splits)](
        TensorDescriptor.from_tensor(x, [token_tile, columns], layout),
        TensorDescriptor.from_tensor(weight, [ROWS.value, columns], layout),
        x_scale, weight_scale, bias, out, tokens, num_rows, num_blocks, cdiv(num_blocks, num_splits),
        stride_of(x_scale), HAS_SCALES=x_scale is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated,
        CONSUMERS=consumers, TOKEN_TILE=token_tile,
        STAGES=(SHARED_BYTES - 1024) // ((token_tile + row_tile) * STAGE_BYTES.value), num_warps=4,
        maxnreg=LAUNCH_REGISTERS[consumers], launch_pdl=True,
    )  # fmt: skip
