"""Where a token's keys and values lie in the paged pool: shared by the kernels that write and read it.

The pool of a layer is [num_blocks, 2, num_kv_heads, tokens_per_block, head_size]: index 1 picks keys (0) or values (1).
Position p of a sequence lies in block `block_table[p // tokens_per_block]`, slot `p % tokens_per_block`.
A pool may hold more than 2^31 elements, so every offset that a block id takes part in is 64 bits wide.

An int8 pool goes with key_value_scales, float32 [num_blocks, 2, num_kv_heads, tokens_per_block]: a vector is its
integers times its scale, and lies at head_size times the scale's offset. Readers never widen a vector by its scale: a
key's multiplies the score, a value's the probability.
This file does not know who owns a block: that is the allocator's business.

The integers of a step are views of one buffer, at any address, and their counts change from step to step: the kernels
declare them unspecialised, or each new step would compile its kernels anew.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl

from ..tactics.tactic import next_power_of_2

# A value's scale is 1/127 of its largest magnitude, and times a small probability it would leave float16's normal
# numbers. Lifted by 2^6 on its way through a dot it keeps its bits, and stays below 65504 for all values that do.
VALUE_SCALE_LIFT = tl.constexpr(64.0)


@triton.jit
def token_offsets(table_ptr, positions, mask, block_stride, token_stride, TOKENS_PER_BLOCK: tl.constexpr):
    """Pool offsets (int64, in elements) of `positions` of one sequence; masked positions get block 0."""
    blocks = tl.load(table_ptr + positions // TOKENS_PER_BLOCK, mask=mask, other=0).to(tl.int64)
    return blocks * block_stride + (positions % TOKENS_PER_BLOCK) * token_stride


@triton.jit
def tile_offsets(table_ptr, first, block_stride, token_stride, TILE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr):
    """token_offsets of the TILE positions from `first` on, which lie in one block: one read of the table for all."""
    tl.static_assert(TOKENS_PER_BLOCK % TILE == 0)
    block = tl.load(table_ptr + first // TOKENS_PER_BLOCK).to(tl.int64)
    return block * block_stride + (first % TOKENS_PER_BLOCK) * token_stride + tl.arange(0, TILE) * token_stride


@triton.jit
def load_scales(scales_ptr, offsets, mask, value_stride, WIDTH: tl.constexpr):
    """Scales of the keys at pool offsets `offsets`, where vectors are WIDTH apart, and of the values beside them.

    The sums are over one element: without them every thread of a tensor core tile loads all scales that it needs for
    itself (236 copies to shared memory in prefill, against 26), where one thread for each can.
    """
    pointers = (scales_ptr + offsets // WIDTH)[:, None]
    key_scale = tl.load(pointers, mask=mask[:, None], other=0.0)
    value_scale = tl.load(pointers + value_stride // WIDTH, mask=mask[:, None], other=0.0)
    return tl.sum(key_scale, axis=1), tl.sum(value_scale, axis=1)


def check_scales(past_key_value: torch.Tensor, key_value_scales: torch.Tensor | None) -> None:
    """An int8 pool, and no other, has scales, and they lie as its vectors do."""
    assert (past_key_value.dtype == torch.int8) == (key_value_scales is not None), "an int8 pool has scales"
    if key_value_scales is not None:
        expected = tuple(stride // past_key_value.shape[-1] for stride in past_key_value.stride()[:-1])
        assert key_value_scales.stride() == expected, f"scales have strides {key_value_scales.stride()}, not {expected}"


def pool_strides(past_key_value: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides in elements from block to block, from keys to values, from head to head, from token to token."""
    block_stride, value_stride, head_stride, token_stride, dim_stride = past_key_value.stride()
    assert dim_stride == 1, f"the head dimension of the KV pool must be contiguous, its stride is {dim_stride}"
    return block_stride, value_stride, head_stride, token_stride


def padded_width(width: int) -> int:
    """Triton's tiles are powers of two, and a dot needs a depth of 16 or more."""
    return max(16, next_power_of_2(width))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that operands of `dtype` are multiplied in."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32  # the interpreter keeps bfloat16 as raw 16-bit integers and would multiply those
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
