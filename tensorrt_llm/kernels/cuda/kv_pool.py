"""Where a token's keys and values lie in the paged pool: shared by the kernels that write and read it.

The pool of a layer is [num_blocks, 2, num_kv_heads, tokens_per_block, head_size]: index 1 picks keys (0) or values (1).
Position p of a sequence lies in block `block_table[p // tokens_per_block]`, slot `p % tokens_per_block`.
A pool may hold more than 2^31 elements, so every offset that a block id takes part in is 64 bits wide.
This file does not know who owns a block: that is the allocator's business.

The integers of a step are views of one buffer, at any address, and their counts change from step to step: the kernels
declare them unspecialised, or each new step would compile its kernels anew.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl


@triton.jit
def token_offsets(table_ptr, positions, mask, block_stride, token_stride, TOKENS_PER_BLOCK: tl.constexpr):
    """Pool offsets (int64, in elements) of `positions` of one sequence; masked positions get block 0."""
    blocks = tl.load(table_ptr + positions // TOKENS_PER_BLOCK, mask=mask, other=0).to(tl.int64)
    return blocks * block_stride + (positions % TOKENS_PER_BLOCK) * token_stride


def pool_strides(past_key_value: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides in elements from block to block, from keys to values, from head to head, from token to token."""
    block_stride, value_stride, head_stride, token_stride, dim_stride = past_key_value.stride()
    assert dim_stride == 1, f"the head dimension of the KV pool must be contiguous, its stride is {dim_stride}"
    return block_stride, value_stride, head_stride, token_stride


def padded_head_size(head_size: int) -> int:
    """Triton's tiles are powers of two, and a dot needs a depth of 16 or more."""
    return max(16, triton.next_power_of_2(head_size))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that queries, keys and values of `dtype` are multiplied in."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32  # the interpreter keeps bfloat16 as raw 16-bit integers and would multiply those
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
