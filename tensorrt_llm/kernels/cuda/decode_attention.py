"""Paged attention of sequences that bring one query token each, with the context split over programs.

    out[h] = sum_n softmax_n(q[h] . K[n] * scale) V[n]      n over the sequence's cached tokens

q and out are [tokens, heads, head_size]; the decodes' rows begin at `first_token`, their sequences at
`first_sequence`; K and V are read from the pool through the block table (kv_pool.py has the layout).

A program takes one sequence, one KV head and one split of SPLIT_TOKENS tokens. Splits have one size, not one count, so
a sequence's bits do not depend on the longest sequence of the step; they depend on whether it is one of few or of many,
unless is_batch_invariant. With one split the result is final; otherwise each split leaves its normalised result and its
log-sum-exp, and they are weighed in order: by whichever program of a head is the last to arrive, or, where a program
has many heads, by a second kernel. Only the counting of arrivals is atomic: who comes last changes no bit. Softmax is
in float32 and in powers of two: log2(e) is folded into the scale.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The values of a kernel are Triton's, for which Python has no types: its tuples grow.

import math

import torch
import triton
import triton.language as tl

from ..step import StepShape
from .integer_planes import integer_plane
from .kv_pool import VALUE_SCALE_LIFT, dot_dtype, load_scales, padded_width, pool_strides, token_offsets
from .overlap import has_dependent_launch, overlapping, start_next, wait_for_previous

# A running maximum starts below every score, yet finite: -inf minus -inf would be NaN in an all-masked row.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _weigh_splits(
    partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr
):  # fmt: skip
    """sum_s 2^lse[s] partial[s] / sum_s 2^lse[s] over the rows from first_row on, taken in order."""
    CHUNK: tl.constexpr = 16
    dims = tl.arange(0, DIM_TILE)
    top = tl.full([], _LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([DIM_TILE], tl.float32)
    for first in range(0, used_splits, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        used = splits < used_splits
        lse = tl.load(lse_ptr + first_row + splits, mask=used, other=float("-inf"))
        mask = used[:, None] & (dims < HEAD_SIZE)[None, :]
        partial = tl.load(partial_ptr + (first_row + splits)[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        decay, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        total = total * decay + tl.sum(weight, axis=0)
        result = result * decay + tl.sum(partial * weight[:, None], axis=0)
        top = new_top
    return result / total


@triton.jit(
    do_not_specialize=["first_sequence", "first_token", "num_splits", "table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "sequence_length_ptr"],
)
def _decode_one_head(
    q_ptr, pool_ptr, scales_ptr, block_tables_ptr, sequence_length_ptr, out_ptr, partial_ptr, lse_ptr, arrivals_ptr,
    first_sequence, first_token, num_splits, table_stride, block_stride, value_stride, head_stride, token_stride, scale,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, NUM_STAGES: tl.constexpr,
    IS_INT8: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query head per KV head: no dot, as 15 of 16 rows of a tensor core tile would be padding.

    Every token lane keeps its own running maximum, sum and result; they meet once, after the loop. `arrivals` has a
    zero for each sequence and head, and has it again when all programs are done.
    """
    start_next(OVERLAP)
    index, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = first_sequence + index
    length = tl.load(sequence_length_ptr + sequence)
    start = split * SPLIT_TOKENS
    if start >= length:
        return
    stop = tl.minimum(start + SPLIT_TOKENS, length)

    dims = tl.arange(0, DIM_TILE)
    dim_mask = dims < HEAD_SIZE
    query_row = ((first_token + index).to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    q = tl.load(q_ptr + query_row + dims, mask=dim_mask, other=0.0).to(tl.float32) * scale
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    keys_ptr = pool_ptr + head.to(tl.int64) * head_stride
    if IS_INT8:
        scales_ptr += head.to(tl.int64) * (head_stride // HEAD_SIZE)
    top = tl.full([TILE_TOKENS], _LOWEST, tl.float32)
    total = tl.zeros([TILE_TOKENS], tl.float32)
    result = tl.zeros([TILE_TOKENS, DIM_TILE], tl.float32)
    for first in tl.range(start, stop, TILE_TOKENS, num_stages=NUM_STAGES):
        positions = first + tl.arange(0, TILE_TOKENS)
        cached = positions < stop
        offsets = token_offsets(table_ptr, positions, cached, block_stride, token_stride, TOKENS_PER_BLOCK)
        pointers = keys_ptr + offsets[:, None] + dims[None, :]
        mask = cached[:, None] & dim_mask[None, :]
        keys = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(pointers + value_stride, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(keys * q[None, :], axis=1)
        if IS_INT8:
            key_scale, value_scale = load_scales(scales_ptr, offsets, cached, value_stride, HEAD_SIZE)
            score *= key_scale
        score = tl.where(cached, score, float("-inf"))
        new_top = tl.maximum(top, score)
        decay, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total = total * decay + weight
        if IS_INT8:
            weight *= value_scale
        result = result * decay[:, None] + weight[:, None] * values
        top = new_top

    best = tl.max(top, axis=0)
    share = tl.exp2(top - best)
    sum_of_weights = tl.sum(total * share, axis=0)
    row = tl.sum(result * share[:, None], axis=0) / sum_of_weights
    used_splits = tl.cdiv(length, SPLIT_TOKENS)
    if used_splits == 1:
        tl.store(out_ptr + query_row + dims, row, mask=dim_mask)
        return
    vector = index * NUM_HEADS + head
    first_row = vector.to(tl.int64) * num_splits
    tl.store(partial_ptr + (first_row + split) * HEAD_SIZE + dims, row, mask=dim_mask)
    tl.store(lse_ptr + first_row + split, best + tl.log2(sum_of_weights))
    tl.debug_barrier()  # one thread counts for all: what the others have stored comes before
    if tl.atomic_add(arrivals_ptr + vector, 1, sem="acq_rel") == used_splits - 1:
        tl.store(arrivals_ptr + vector, 0)
        whole = _weigh_splits(partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE, DIM_TILE)
        tl.store(out_ptr + query_row + dims, whole, mask=dim_mask)


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
    top = tl.full([GROUP_TILE], _LOWEST, tl.float32)
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
    whole = _weigh_splits(partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE, DIM_TILE)
    row = ((first_token + index).to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    dims = tl.arange(0, DIM_TILE)
    tl.store(out_ptr + row + dims, whole, mask=dims < HEAD_SIZE)
# Pairs of a sequence and a KV head that make programs enough for an H200, with its 132 SMs, by themselves.
MANY_VECTORS = 768


class Arrivals:
    """Zeros on a device, where the programs of a launch count each other, and leave zeros behind.

    For launches that come one after the other. A captured graph keeps the address, so no zeros are ever let go.
    """

    def __init__(self) -> None:
        self._zeros: dict[tuple[torch.device, int], torch.Tensor] = {}

    def of(self, count: int, device: torch.device) -> torch.Tensor:
        """At least `count` of them, int32."""
        size = max(1024, triton.next_power_of_2(count))
        if (device, size) not in self._zeros:
            self._zeros[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._zeros[device, size]


def _split_tokens(num_vectors: int, group: int, is_batch_invariant: bool) -> int:
    """Tokens of a split, for `num_vectors` pairs of a sequence and a KV head, each with `group` query heads.

    256 tokens of a 128-wide float16 head are 128 KB, about 4 us of one SM's share of the memory. Fewer sequences than
    fill the GPU with such programs take smaller ones: one of 192 tokens takes 7.5 us in splits of 64, one of 1100
    12.3; in splits of 256, with tiles of 32 tokens, they took 8.3 and 14.2 (H200, 32 heads).
    """
    if group > 1:
        return 128  # grouped heads have fewer programs per token
    return 256 if is_batch_invariant or num_vectors >= MANY_VECTORS else 64


def decode_attention(
    q: torch.Tensor,
    past_key_value: torch.Tensor,
    sequence_length: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None,
    out: torch.Tensor,
    *,
    step: StepShape,
    q_scaling: float,
    arrivals: Arrivals,
    is_batch_invariant: bool = False,
) -> None:
    """Fill out[num_context_tokens:], the attention of the sequences from num_contexts on."""
    num_heads, head_size = q.shape[1:]
    num_kv_heads = past_key_value.shape[2]
    group = num_heads // num_kv_heads
    decodes = step.batch_size - step.num_contexts
    split_tokens = _split_tokens(decodes * num_kv_heads, group, is_batch_invariant)
    num_splits = triton.cdiv(step.max_sequence_length, split_tokens)
    is_only_split = num_splits == 1
    is_int8 = key_value_scales is not None
    if is_only_split:
        partial = lse = out  # never read or written
    else:
        partial = torch.empty((decodes, num_heads, num_splits, head_size), dtype=torch.float32, device=q.device)
        lse = torch.empty((decodes, num_heads, num_splits), dtype=torch.float32, device=q.device)
    pool = past_key_value.view(torch.int16) if is_int8 and group > 1 else past_key_value
    tensors = (q, pool, key_value_scales, block_tables, sequence_length, out, partial, lse)
    numbers = (
        step.num_contexts, step.num_context_tokens, num_splits, block_tables.stride(0), *pool_strides(pool),
        math.log2(math.e) / (q_scaling * math.sqrt(head_size)),
    )  # fmt: skip
    sizes = dict(
        NUM_HEADS=num_heads, HEAD_SIZE=head_size, DIM_TILE=padded_width(pool.shape[4]), IS_INT8=is_int8,
        TOKENS_PER_BLOCK=past_key_value.shape[3], SPLIT_TOKENS=split_tokens, OVERLAP=has_dependent_launch(q.device),
    )  # fmt: skip
    grid = (decodes, num_kv_heads, num_splits)
    if group == 1:
        # Many small programs: K and V tiles of 4 KB each in float16, two of them in flight, eight programs on an SM.
        # 64 sequences of 288 tokens take 84 us, in tiles of 32 on 4 warps 98; over int8 68 and 79 (H200).
        _decode_one_head[grid](
            *tensors, arrivals.of(decodes * num_heads, q.device), *numbers, **sizes, TILE_TOKENS=16, NUM_STAGES=3,
            num_warps=2,
        )  # fmt: skip
        return
    # Float32 products run without tensor cores and need smaller tiles to stay within the registers. Int8 tiles are
    # half as many bytes: 64 sequences of 1024 tokens took 49 us in two stages, 56 us in three (H200, 4 KV heads).
    is_exact = q.dtype == torch.float32
    tile_tokens, num_stages, num_warps = (32, 2, 8) if is_exact else (64, 3, 4)
    if is_int8:
        num_stages -= 1
    _decode_grouped_heads[grid](
        *tensors, *numbers, **sizes, IS_ONLY_SPLIT=is_only_split, GROUP=group,
        GROUP_TILE=max(16, triton.next_power_of_2(group)), TILE_TOKENS=tile_tokens, NUM_STAGES=num_stages,
        DOT_DTYPE=dot_dtype(q.dtype), num_warps=num_warps,
    )  # fmt: skip
    if not is_only_split:
        _combine_splits[(decodes, num_heads)](
            partial, lse, sequence_length, out, step.num_contexts, step.num_context_tokens, num_splits,
            NUM_HEADS=num_heads, HEAD_SIZE=head_size, DIM_TILE=padded_width(head_size), SPLIT_TOKENS=split_tokens,
            num_warps=4, **overlapping(q.device),
        )  # fmt: skip
