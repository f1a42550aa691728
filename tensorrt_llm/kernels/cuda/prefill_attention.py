"""Fused paged attention of prompts: many query tokens per sequence, any mix of lengths, with a cached prefix or not.

    out[t, h] = sum_n softmax_n(q[t, h] . K[n] * scale) V[n]      n over the tokens up to t's own position

q and out are [tokens, heads, head_size]; the rows of sequence b are query_starts[b] .. query_starts[b + 1], and its
K and V, new tokens included, are read from the pool through the block table (kv_pool.py has the layout).

A program takes QUERY_TILE queries of one head and walks over the keys once, with running maximum and sum; scores
never reach memory. Keys that all its queries see come first and need no mask, the diagonal comes last:

    keys     0 ........... full_stop ...... stop
    query 0  #######################|#
    query 1  #######################|##
    query 2  #######################|###
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import math

import torch
import triton
import triton.language as tl

from ..step import StepShape
from ..tactics.tactic import cdiv
from .kv_pool import VALUE_SCALE_LIFT, dot_dtype, load_scales, padded_width, pool_strides, tile_offsets, token_offsets


@triton.jit
def _attend(
    q, top, total, result, start, stop, query_positions, keys_ptr, scales_ptr, table_ptr,
    block_stride, value_stride, token_stride, scale,
    HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr, KEY_TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, IS_INT8: tl.constexpr, IS_DIAGONAL: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Take the keys start .. stop into the running softmax; off the diagonal they are whole tiles that all see.

    Scores are scaled in the exponent, by an explicit FMA: left to the compiler, the mask of the diagonal would decide
    how a score is rounded, and a prompt's bits would depend on the pieces in which it is computed.
    """
    dims = tl.arange(0, DIM_TILE)
    for first in tl.range(start, stop, KEY_TILE, num_stages=NUM_STAGES):
        positions = first + tl.arange(0, KEY_TILE)
        cached = positions < stop
        if TOKENS_PER_BLOCK % KEY_TILE == 0:
            offsets = tile_offsets(table_ptr, first, block_stride, token_stride, KEY_TILE, TOKENS_PER_BLOCK)
        else:
            offsets = token_offsets(table_ptr, positions, cached, block_stride, token_stride, TOKENS_PER_BLOCK)
        pointers = keys_ptr + offsets[:, None] + dims[None, :]
        mask = cached[:, None] & (dims < HEAD_SIZE)[None, :]
        keys = tl.load(pointers, mask=mask, other=0.0).to(DOT_DTYPE)
        values = tl.load(pointers + value_stride, mask=mask, other=0.0).to(DOT_DTYPE)
        score = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if IS_INT8:
            key_scale, value_scale = load_scales(scales_ptr, offsets, cached, value_stride, HEAD_SIZE)
            score *= key_scale[None, :]
        if IS_DIAGONAL:
            seen = cached[None, :] & (positions[None, :] <= query_positions[:, None])
            score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        decay = tl.exp2((top - new_top) * scale)
        weight = tl.exp2(tl.fma(score, tl.full([], scale, tl.float32), (-new_top * scale)[:, None]))
        total = total * decay + tl.sum(weight, axis=1)
        if IS_INT8:
            weight *= (value_scale * VALUE_SCALE_LIFT)[None, :]
        result = result * decay[:, None]
        result = tl.dot(weight.to(DOT_DTYPE), values, result, input_precision="ieee")
        top = new_top
    return top, total, result


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "query_starts_ptr", "sequence_length_ptr"],
)
def _prefill(
    q_ptr, pool_ptr, scales_ptr, block_tables_ptr, query_starts_ptr, sequence_length_ptr, out_ptr,
    table_stride, block_stride, value_stride, head_stride, token_stride, scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    IS_INT8: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(2)
    query_start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - query_start
    # The last tile has most keys, so that of all heads starts first: what is left at the end are short ones.
    tile = tl.cdiv(num_queries, QUERY_TILE) - 1 - tl.program_id(1)
    if tile < 0:
        return
    length = tl.load(sequence_length_ptr + sequence)
    first_position = length - num_queries + tile * QUERY_TILE
    stop = tl.minimum(first_position + QUERY_TILE, length)
    full_stop = (first_position + 1) // KEY_TILE * KEY_TILE

    dims = tl.arange(0, DIM_TILE)
    queries = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    mask = (queries < num_queries)[:, None] & (dims < HEAD_SIZE)[None, :]
    rows = ((query_start + queries).to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    q = tl.load(q_ptr + rows[:, None] + dims[None, :], mask=mask, other=0.0).to(DOT_DTYPE)
    query_positions = first_position + tl.arange(0, QUERY_TILE)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    keys_ptr = pool_ptr + (head // GROUP).to(tl.int64) * head_stride
    if IS_INT8:
        scales_ptr += (head // GROUP).to(tl.int64) * (head_stride // HEAD_SIZE)
    # Key 0 is seen by every query and comes in the first tile, so no row meets -inf minus -inf.
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    result = tl.zeros([QUERY_TILE, DIM_TILE], tl.float32)
    top, total, result = _attend(
        q, top, total, result, 0, full_stop, query_positions, keys_ptr, scales_ptr, table_ptr,
        block_stride, value_stride, token_stride, scale,
        HEAD_SIZE, DIM_TILE, TOKENS_PER_BLOCK, KEY_TILE, DOT_DTYPE, IS_INT8, False, NUM_STAGES,
    )  # fmt: skip
    top, total, result = _attend(
        q, top, total, result, full_stop, stop, query_positions, keys_ptr, scales_ptr, table_ptr,
        block_stride, value_stride, token_stride, scale,
        HEAD_SIZE, DIM_TILE, TOKENS_PER_BLOCK, KEY_TILE, DOT_DTYPE, IS_INT8, True, NUM_STAGES,
    )  # fmt: skip
    result = result / total[:, None]
    if IS_INT8:
        result *= 1.0 / VALUE_SCALE_LIFT
    tl.store(out_ptr + rows[:, None] + dims[None, :], result, mask=mask)


def prefill_attention(
    q: torch.Tensor,
    past_key_value: torch.Tensor,
    query_starts: torch.Tensor,
    sequence_length: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None,
    out: torch.Tensor,
    *,
    step: StepShape,
    q_scaling: float,
) -> None:
    """Fill out[:num_context_tokens], the attention of the first num_contexts sequences."""
    num_heads, head_size = q.shape[1:]
    dim_tile = padded_width(head_size)
    if q.dtype == torch.float32:
        # Exact float32 products run without tensor cores and keep whole rows in registers: larger tiles spill.
        query_tile, key_tile, num_stages = 32, 16, 1
    else:
        # A warp group of 64 query rows keeps its [64, 128] float32 result in 64 registers a lane, and two programs
        # share an SM: loads of one overlap products of the other, and short prompts have programs for all SMs. With 128
        # rows on 8 warps in three stages a prompt of 1024 tokens takes 1.3 times as long, 16 of 512 too (H200). On
        # warpgroups with a producer, as in wgmma_plain.py, it takes 27.6 us, and so 28.7, 16 of 512 147 and 151, but
        # four of 200 17.1 and 15.5. With all tiles of a head side by side it took 38.6. Heads above 128 halve the tile
        # to fit.
        query_tile, key_tile, num_stages = 64, 64 if dim_tile <= 128 else 32, 2
    grid = (num_heads, cdiv(step.max_query_length, query_tile), step.num_contexts)
    _prefill[grid](
        q, past_key_value, key_value_scales, block_tables, query_starts, sequence_length, out,
        block_tables.stride(0), *pool_strides(past_key_value),
        math.log2(math.e) / (q_scaling * math.sqrt(head_size)),
        NUM_HEADS=num_heads, GROUP=num_heads // past_key_value.shape[2],
        HEAD_SIZE=head_size, DIM_TILE=dim_tile, TOKENS_PER_BLOCK=past_key_value.shape[3],
        QUERY_TILE=query_tile, KEY_TILE=key_tile, DOT_DTYPE=dot_dtype(q.dtype), IS_INT8=key_value_scales is not None,
        NUM_STAGES=num_stages, num_warps=8 if q.dtype == torch.float32 else 4,
    )  # fmt: skip
