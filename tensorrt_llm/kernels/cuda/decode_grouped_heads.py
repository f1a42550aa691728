"""Decode attention where several query heads share keys and values: one query token of each sequence.

    out[h] = sum_n softmax_n(q[h] . K[n] * scale) V[n]      n over the sequence's cached tokens

q and out are [tokens, heads, head_size]; the decodes' rows begin at `first_token`, their sequences at
`first_sequence`; K and V are read from the pool through the block table (kv_pool.py has the layout).

A program takes one sequence, one KV head and one split of SPLIT_TOKENS tokens. Splits have one size, not one count, so
a sequence's bits do not depend on its step. With one split the result is final; otherwise each split leaves its
normalised result and its log-sum-exp, and a second kernel weighs them in order (splits.py). Softmax is in float32 and
in powers of two: log2(e) is folded into the scale.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The values of a kernel are Triton's, for which Python has no types: its tuples grow.

import math

import torch
import triton
import triton.language as tl

from ..step import StepShape
from ..tactics.tactic import cdiv, next_power_of_2
from .integer_planes import integer_plane
from .kv_pool import VALUE_SCALE_LIFT, dot_dtype, load_scales, padded_width, pool_strides, token_offsets
from .overlap import has_dependent_launch, overlapping, start_next, wait_for_previous
from .splits import LOWEST, room_for_splits, weigh_splits

# Tokens of a split. Fewer programs per token than with a program for each query head.
_SPLIT_TOKENS = 128


@triton.jit
def _operand(words, PLANE: tl.constexpr, IS_INT8: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """Plane PLANE of keys or values as they were loaded."""
    if IS_INT8:
        operand = integer_plane(words ^ -0x7F80, PLANE, 8, DOT_DTYPE)  # 0x8080 turns the sign bits over
    else:
        operand = words.to(DOT_DTYPE)
    return operand


@triton.jit(
    do_not_specialize=["first_sequence", "first_token", "num_splits", "table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "sequence_length_ptr"],
)
def _decode_grouped_heads(
    q_ptr, pool_ptr, scales_ptr, block_tables_ptr, sequence_length_ptr, out_ptr, partial_ptr, lse_ptr,
    first_sequence, first_token, num_splits, table_stride, block_stride, value_stride, head_stride, token_stride, scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, IS_ONLY_SPLIT: tl.constexpr, NUM_STAGES: tl.constexpr,
    IS_INT8: tl.constexpr, DOT_DTYPE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """GROUP query heads share a KV head: they are the rows of one tensor core tile, padded to GROUP_TILE.

    An int8 pool comes as int16 words of two dims, the even one in the low byte, which unpack faster than bytes convert:
    a vector is WIDTH words of 2 planes, as it is WIDTH numbers of 1 plane in a float pool. A dot over dims is one for
    each plane, and each plane has results of its own.
    """
    PLANES: tl.constexpr = 2 if IS_INT8 else 1
    WIDTH: tl.constexpr = HEAD_SIZE // PLANES
    start_next(OVERLAP)
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = first_sequence + index
    length = tl.load(sequence_length_ptr + sequence)
    start = split * SPLIT_TOKENS
    if start >= length:
        return
    stop = tl.minimum(start + SPLIT_TOKENS, length)

    dims = tl.arange(0, DIM_TILE)
    members = tl.arange(0, GROUP_TILE)
    heads = kv_head * GROUP + members
    row_mask = (members < GROUP)[:, None] & (dims < WIDTH)[None, :]
    query_rows = ((first_token + index).to(tl.int64) * NUM_HEADS + heads) * HEAD_SIZE
    q, results = (), ()
    for plane in tl.static_range(PLANES):
        q_ptrs = q_ptr + query_rows[:, None] + (dims * PLANES + plane)[None, :]
        q += (tl.load(q_ptrs, mask=row_mask, other=0.0).to(DOT_DTYPE),)
        results += (tl.zeros([GROUP_TILE, DIM_TILE], tl.float32),)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    keys_ptr = pool_ptr + kv_head.to(tl.int64) * head_stride
    if IS_INT8:
        scales_ptr += kv_head.to(tl.int64) * (head_stride // WIDTH)
    top = tl.full([GROUP_TILE], LOWEST, tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    for first in tl.range(start, stop, TILE_TOKENS, num_stages=NUM_STAGES):
        positions = first + tl.arange(0, TILE_TOKENS)
        cached = positions < stop
        offsets = token_offsets(table_ptr, positions, cached, block_stride, token_stride, TOKENS_PER_BLOCK)
        pointers = keys_ptr + offsets[:, None] + dims[None, :]
        mask = cached[:, None] & (dims < WIDTH)[None, :]
        keys = tl.load(pointers, mask=mask, other=0)
        values = tl.load(pointers + value_stride, mask=mask, other=0)
        score = tl.zeros([GROUP_TILE, TILE_TOKENS], tl.float32)
        for plane in tl.static_range(PLANES):
            key_plane = _operand(keys, plane, IS_INT8, DOT_DTYPE)
            score = tl.dot(q[plane], tl.trans(key_plane), score, input_precision="ieee")
        score *= scale
        if IS_INT8:
            key_scale, value_scale = load_scales(scales_ptr, offsets, cached, value_stride, WIDTH)
            score *= key_scale[None, :]
        score = tl.where(cached[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        decay, weight = tl.exp2(top - new_top), tl.exp2(score - new_top[:, None])
        total = total * decay + tl.sum(weight, axis=1)
        if IS_INT8:
            weight *= (value_scale * VALUE_SCALE_LIFT)[None, :]
        added = ()
        for plane in tl.static_range(PLANES):
            value_plane = _operand(values, plane, IS_INT8, DOT_DTYPE)
            decayed = results[plane] * decay[:, None]
            added += (tl.dot(weight.to(DOT_DTYPE), value_plane, decayed, input_precision="ieee"),)
        results = added
        top = new_top

    for plane in tl.static_range(PLANES):
        rows = results[plane] / total[:, None]
        if IS_INT8:
            rows *= 1.0 / VALUE_SCALE_LIFT
        columns = (dims * PLANES + plane)[None, :]
        if IS_ONLY_SPLIT:
            tl.store(out_ptr + query_rows[:, None] + columns, rows, mask=row_mask)
        else:
            partial_rows = (index.to(tl.int64) * NUM_HEADS + heads) * num_splits + split
            tl.store(partial_ptr + partial_rows[:, None] * HEAD_SIZE + columns, rows, mask=row_mask)
    if not IS_ONLY_SPLIT:
        lse_rows = (index.to(tl.int64) * NUM_HEADS + heads) * num_splits + split
        tl.store(lse_ptr + lse_rows, top + tl.log2(total), mask=members < GROUP)


@triton.jit(
    do_not_specialize=["first_sequence", "first_token", "num_splits"],
    do_not_specialize_on_alignment=["sequence_length_ptr"],
)
def _combine_splits(
    partial_ptr, lse_ptr, sequence_length_ptr, out_ptr, first_sequence, first_token, num_splits,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The splits of one sequence and head."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    index, head = tl.program_id(0), tl.program_id(1)
    used_splits = tl.cdiv(tl.load(sequence_length_ptr + first_sequence + index), SPLIT_TOKENS)
    first_row = (index.to(tl.int64) * NUM_HEADS + head) * num_splits
    whole = weigh_splits(partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE, DIM_TILE, 16)
    row = ((first_token + index).to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    dims = tl.arange(0, DIM_TILE)
    tl.store(out_ptr + row + dims, whole, mask=dims < HEAD_SIZE)


def decode_grouped_heads(
    q: torch.Tensor,
    past_key_value: torch.Tensor,
    sequence_length: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None,
    out: torch.Tensor,
    *,
    step: StepShape,
    q_scaling: float,
) -> None:
    """Fill out[num_context_tokens:], the attention of the sequences from num_contexts on."""
    num_heads, head_size = q.shape[1:]
    num_kv_heads = past_key_value.shape[2]
    group = num_heads // num_kv_heads
    decodes = step.batch_size - step.num_contexts
    num_splits = cdiv(step.max_sequence_length, _SPLIT_TOKENS)
    is_only_split = num_splits == 1
    is_int8 = key_value_scales is not None
    partial, lse = room_for_splits(out, decodes, num_splits)
    pool = past_key_value.view(torch.int16) if is_int8 else past_key_value
    # Float32 products run without tensor cores and need smaller tiles to stay within the registers. Int8 tiles are
    # half as many bytes: 64 sequences of 1024 tokens took 49 us in two stages, 56 us in three (H200, 4 KV heads).
    is_exact = q.dtype == torch.float32
    tile_tokens, num_stages, num_warps = (32, 2, 8) if is_exact else (64, 3, 4)
    if is_int8:
        num_stages -= 1
    _decode_grouped_heads[(decodes, num_kv_heads, num_splits)](
        q, pool, key_value_scales, block_tables, sequence_length, out, partial, lse,
        step.num_contexts, step.num_context_tokens, num_splits, block_tables.stride(0), *pool_strides(pool),
        math.log2(math.e) / (q_scaling * math.sqrt(head_size)),
        NUM_HEADS=num_heads, GROUP=group, GROUP_TILE=max(16, next_power_of_2(group)), HEAD_SIZE=head_size,
        DIM_TILE=padded_width(pool.shape[4]), TOKENS_PER_BLOCK=past_key_value.shape[3], SPLIT_TOKENS=_SPLIT_TOKENS,
        TILE_TOKENS=tile_tokens, IS_ONLY_SPLIT=is_only_split, NUM_STAGES=num_stages, IS_INT8=is_int8,
        DOT_DTYPE=dot_dtype(q.dtype), OVERLAP=has_dependent_launch(q.device), num_warps=num_warps,
    )  # fmt: skip
    if not is_only_split:
        _combine_splits[(decodes, num_heads)](
            partial, lse, sequence_length, out, step.num_contexts, step.num_context_tokens, num_splits,
            NUM_HEADS=num_heads, HEAD_SIZE=head_size, DIM_TILE=padded_width(head_size), SPLIT_TOKENS=_SPLIT_TOKENS,
            num_warps=4, **overlapping(q.device),
        )  # fmt: skip
