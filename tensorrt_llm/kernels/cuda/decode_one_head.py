"""Decode attention where every query head has its own keys and values: RoPE, the KV write and attention in one kernel.

    out[h] = sum_n softmax_n(q[h] . K[n] * scale) V[n]      n over the sequence's cached tokens and its new one

qkv is [tokens, 3 heads, head_size] as the projection left it, out [tokens, heads, head_size]; the decodes' rows begin
at `first_token`, their sequences at `first_sequence`. K and V of earlier tokens come from the pool, through the block
table (kv_pool.py has the layout). The new token's are turned (rope_kv.py has the formula) and written there by the
program that has the last split, which takes them from its registers: no program reads what another writes.

A program takes one sequence, one head and one split of SPLIT_TOKENS tokens. Splits have one size in a step, which
depends on the number of sequences and on the longest one, unless is_batch_invariant. With one split the result is
final; otherwise each split leaves its normalised result and its log-sum-exp, and whichever program of a head is the
last to arrive weighs them in order (splits.py). Only the counting of arrivals is atomic: who comes last changes no bit.
Softmax is in float32 and in powers of two: log2(e) is folded into the scale.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
# The arguments of a kernel are Triton's values, for which Python has no types.

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..step import StepShape
from ..tactics.tactic import cdiv
from .int8_rows import quantize_rows
from .kv_pool import load_scales, padded_width, pool_strides, token_offsets
from .overlap import has_dependent_launch, start_next, wait_for_previous
from .rope_kv import RopeRules, logn_factor, rotary_partner, rotation
from .splits import LOWEST, Arrivals, room_for_splits, weigh_splits


@triton.jit
def _load_tile(
    keys_ptr, scales_ptr, offsets, cached, value_stride,
    HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """(keys, values, the scales of both) of the tokens at pool offsets `offsets`; zeros where nothing is cached."""
    dims = tl.arange(0, DIM_TILE)
    pointers = keys_ptr + offsets[:, None] + dims[None, :]
    mask = cached[:, None] & (dims < HEAD_SIZE)[None, :]
    keys = tl.load(pointers, mask=mask, other=0.0)
    values = tl.load(pointers + value_stride, mask=mask, other=0.0)
    key_scale, value_scale = cached, cached
    if IS_INT8:
        key_scale, value_scale = load_scales(scales_ptr, offsets, cached, value_stride, HEAD_SIZE)
    return keys, values, key_scale, value_scale


@triton.jit
def _attend(
    q, top, total, result, cached, keys, values, key_scale, value_scale, IS_INT8: tl.constexpr
):  # fmt: skip
    """Take a tile into the running softmax: every lane of tokens has its own maximum, sum and result."""
    score = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
    if IS_INT8:
        score *= key_scale
    score = tl.where(cached, score, float("-inf"))
    new_top = tl.maximum(top, score)
    decay, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
    total = total * decay + weight
    if IS_INT8:
        weight *= value_scale
    result = result * decay[:, None] + weight[:, None] * values.to(tl.float32)
    return new_top, total, result


@triton.jit
def _load_new(
    row_ptr, dims, mask, partner, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr
):  # fmt: skip
    """(q, q of the partners, key, key of the partners, value) of the new token, float32."""
    key_ptr, value_ptr = row_ptr + NUM_HEADS * HEAD_SIZE, row_ptr + 2 * NUM_HEADS * HEAD_SIZE
    q = tl.load(row_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    q_partner = tl.load(row_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    key_partner = tl.load(key_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    return q, q_partner, key, key_partner, value


@triton.jit(
    do_not_specialize=["first_sequence", "first_token", "num_splits", "table_stride"],
    do_not_specialize_on_alignment=[
        "position_ids_ptr", "context_lengths_ptr", "block_tables_ptr", "sequence_length_ptr",
    ],
)  # fmt: skip
def _decode_one_head(
    qkv_ptr, pool_ptr, scales_ptr, turns_ptr,
    position_ids_ptr, context_lengths_ptr, sequence_length_ptr, block_tables_ptr,
    out_ptr, partial_ptr, lse_ptr, arrivals_ptr,
    first_sequence, first_token, num_splits, table_stride, block_stride, value_stride, head_stride, token_stride, scale,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    ROTARY_DIM: tl.constexpr, NTK_LENGTH: tl.constexpr, LOGN_LENGTH: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, NUM_STAGES: tl.constexpr,
    IS_INT8: tl.constexpr, IS_EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """No dot: 15 of 16 rows of a tensor core tile would be padding.

    `arrivals` has a zero for each sequence and head, and has it again when all programs are done.
    """
    start_next(OVERLAP)
    NUM_HELD: tl.constexpr = SPLIT_TOKENS // TILE_TOKENS if NUM_STAGES == 0 else 0  # tiles
    head, index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token = first_sequence + index, (first_token + index).to(tl.int64)
    start = split * SPLIT_TOKENS
    dims = tl.arange(0, DIM_TILE)
    dim_mask = dims < HEAD_SIZE
    partner = rotary_partner(dims, ROTARY_DIM)

    # What waits for nothing is asked for first, and all at once: alone, a program's time is the sum of its waits. Only
    # the new token is younger than the kernel before: earlier ones are in the pool since earlier steps.
    length = tl.load(sequence_length_ptr + sequence)
    position = tl.load(position_ids_ptr + token)
    row_ptr = qkv_ptr + (token * (3 * NUM_HEADS) + head) * HEAD_SIZE
    if not IS_EARLY:
        q, q_partner, key, key_partner, value = _load_new(row_ptr, dims, dim_mask, partner, NUM_HEADS, HEAD_SIZE)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    places = ()
    for tile in tl.static_range(NUM_HELD):
        positions = start + tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        is_in_table = positions < table_stride * TOKENS_PER_BLOCK
        offsets = token_offsets(table_ptr, positions, is_in_table, block_stride, token_stride, TOKENS_PER_BLOCK)
        places += ((positions, offsets),)
    # The first split of every sequence goes on to the wait: a kernel of which no program waits would be over before the
    # one in front of it, and the next would wait for nothing.
    if start >= length:
        return
    stop = tl.minimum(start + SPLIT_TOKENS, length - 1)  # the newest token is not in the pool yet
    keys_ptr = pool_ptr + head.to(tl.int64) * head_stride
    if IS_INT8:
        scales_ptr += head.to(tl.int64) * (head_stride // HEAD_SIZE)
    held = ()
    for tile in tl.static_range(NUM_HELD):
        positions, offsets = places[tile]
        loaded = _load_tile(
            keys_ptr, scales_ptr, offsets, positions < stop, value_stride, HEAD_SIZE, DIM_TILE, IS_INT8
        )  # fmt: skip
        held += ((positions < stop, loaded),)
    slot = token_offsets(table_ptr, position, position >= 0, block_stride, token_stride, TOKENS_PER_BLOCK)

    cosine, sine = rotation(position, context_lengths_ptr, sequence, turns_ptr, dims, ROTARY_DIM, NTK_LENGTH)
    if IS_EARLY:
        wait_for_previous(True)
        q, q_partner, key, key_partner, value = _load_new(row_ptr, dims, dim_mask, partner, NUM_HEADS, HEAD_SIZE)
    q = (q * cosine + q_partner * sine) * scale
    if LOGN_LENGTH > 0:
        q *= logn_factor(position, LOGN_LENGTH)
    top = tl.full([TILE_TOKENS], LOWEST, tl.float32)
    total = tl.zeros([TILE_TOKENS], tl.float32)
    result = tl.zeros([TILE_TOKENS, DIM_TILE], tl.float32)
    for tile in tl.static_range(NUM_HELD):
        cached, loaded = held[tile]
        keys, values, key_scale, value_scale = loaded
        top, total, result = _attend(q, top, total, result, cached, keys, values, key_scale, value_scale, IS_INT8)
    if NUM_STAGES > 0:
        for first in tl.range(start, stop, TILE_TOKENS, num_stages=NUM_STAGES):
            positions = first + tl.arange(0, TILE_TOKENS)
            cached = positions < stop
            offsets = token_offsets(table_ptr, positions, cached, block_stride, token_stride, TOKENS_PER_BLOCK)
            keys, values, key_scale, value_scale = _load_tile(
                keys_ptr, scales_ptr, offsets, cached, value_stride, HEAD_SIZE, DIM_TILE, IS_INT8
            )  # fmt: skip
            top, total, result = _attend(q, top, total, result, cached, keys, values, key_scale, value_scale, IS_INT8)
    if start + SPLIT_TOKENS >= length:
        turned = (key * cosine + key_partner * sine)[None, :]
        if IS_INT8:
            new_key, new_key_scale = quantize_rows(turned)
            new_value, new_value_scale = quantize_rows(value[None, :])
            scale_ptrs = scales_ptr + slot // HEAD_SIZE + tl.zeros([1, 1], tl.int32)
            tl.store(scale_ptrs, new_key_scale)
            tl.store(scale_ptrs + value_stride // HEAD_SIZE, new_value_scale)
            new_key_scale, new_value_scale = tl.sum(new_key_scale, axis=1), tl.sum(new_value_scale, axis=1)
        else:
            new_key, new_value = turned.to(pool_ptr.dtype.element_ty), value[None, :].to(pool_ptr.dtype.element_ty)
            new_key_scale, new_value_scale = 1.0, 1.0
        tl.store(keys_ptr + slot + dims[None, :], new_key, mask=dim_mask[None, :])
        tl.store(keys_ptr + slot + value_stride + dims[None, :], new_value, mask=dim_mask[None, :])
        is_first_lane = tl.arange(0, TILE_TOKENS) == 0
        top, total, result = _attend(
            q, top, total, result, is_first_lane, new_key, new_value, new_key_scale, new_value_scale, IS_INT8
        )  # fmt: skip

    best = tl.max(top, axis=0)
    share = tl.exp2(top - best)
    sum_of_weights = tl.sum(total * share, axis=0)
    row = tl.sum(result * share[:, None], axis=0) / sum_of_weights
    used_splits = tl.cdiv(length, SPLIT_TOKENS)
    out_ptrs = out_ptr + (token * NUM_HEADS + head) * HEAD_SIZE + dims
    if used_splits == 1:
        tl.store(out_ptrs, row, mask=dim_mask)
        return
    vector = index * NUM_HEADS + head
    first_row = vector.to(tl.int64) * num_splits
    tl.store(partial_ptr + (first_row + split) * HEAD_SIZE + dims, row, mask=dim_mask)
    tl.store(lse_ptr + first_row + split, best + tl.log2(sum_of_weights))
    tl.debug_barrier()  # one thread counts for all: what the others have stored comes before
    if tl.atomic_add(arrivals_ptr + vector, 1, sem="acq_rel") == used_splits - 1:
        tl.store(arrivals_ptr + vector, 0)
        whole = weigh_splits(partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE, DIM_TILE, 32)
        tl.store(out_ptrs, whole, mask=dim_mask)


class _Cut(NamedTuple):
    """How a context is cut into programs."""

    split_tokens: int
    tile_tokens: int
    num_stages: int  # of the ring through which tiles come; 0: a program holds its split, all of it is loaded at once
    num_warps: int
    is_early: bool = False  # overlap.py has what that means


# Programs of one sequence's heads run together, the longest sequence first. Where that fills all SMs, a sequence needs
# no splits: what is left at the end are short ones, and no program starts for nothing. 243 sequences of 447 tokens on
# average take 584 us (3.05 TB/s), in splits of 512 622; with programs in order of heads the best were 610, and 167 for
# 64 of 425, which take 153 (H100, lengths as they come in serving). Four programs share an SM.
_MANY = _Cut(2048, 32, 3, 4)
# Small tiles of an int8 cache keep more programs on an SM, if there are that many: 327 us instead of 355 for the 243
# sequences; 64 take 99 in the larger ones, 114 in these.
_THRONG_INT8 = _Cut(2048, 16, 3, 2)
# Of less than 512 tokens a sequence is over soon in any tiles: 32 of 192 tokens take 40 us, in the larger ones 43.
_MANY_SHORT = _Cut(512, 16, 3, 2)
# Fewer programs than keep an SM busy: eight sequences of 192 tokens take 13.8 us, in splits of 64 16.0; of 620 36.7 and
# 38.9.
_SOME = _Cut(256, 16, 3, 2)
# One sequence or a few: what counts is the time of one program, so a split is what it can hold. Of a 7B model's layer
# the first saves 1.3 us for a sequence of 170 tokens, beside a tile of 64, and costs 3.5 for one of 1070: many splits
# take long to be weighed. Alone, tiles of 32 take 4.4 us for 192 tokens, these 4.9; in the model they cost up to 1.7 %
# of a step (H100).
_FEW_SHORT = _Cut(16, 16, 0, 2, is_early=True)
# Of 1090 tokens 736 programs, which run at once, eight on an SM. A step of a 7B model in INT8 takes 2467 us for such a
# sequence, 2522 in splits of 64 by four warps, four on an SM; 3204 and 3374 for four (H200). Held in one tile of 64 or
# in four of 16, those are the same; splits of 80 or 96 by four warps take 2491 and 2472, of 32 by two 2534.
_FEW_LONG = _Cut(48, 16, 0, 2, is_early=True)
_FEW_LONG_INT8 = _Cut(64, 64, 0, 4)  # its scales leave too few registers for what is held until the wait
_SHORT_TOKENS = 512
# Pairs of a sequence and a head from which on a cut is best, for 132 SMs.
THRONG_VECTORS, MANY_VECTORS, SOME_VECTORS = 4096, 512, 192


def _cut(num_vectors: int, max_length: int, is_int8: bool, is_batch_invariant: bool) -> _Cut:
    if is_batch_invariant:
        return _SOME
    is_short = max_length <= _SHORT_TOKENS
    if num_vectors >= MANY_VECTORS:
        if is_short:
            return _MANY_SHORT
        return _THRONG_INT8 if is_int8 and num_vectors >= THRONG_VECTORS else _MANY
    if num_vectors >= SOME_VECTORS:
        return _SOME
    if is_short:
        return _FEW_SHORT
    return _FEW_LONG_INT8 if is_int8 else _FEW_LONG


def decode_one_head(
    qkv: torch.Tensor,
    past_key_value: torch.Tensor,
    position_ids: torch.Tensor,
    context_lengths: torch.Tensor,
    sequence_length: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None,
    out: torch.Tensor,
    *,
    step: StepShape,
    q_scaling: float,
    rules: RopeRules,
    turns: torch.Tensor,
    arrivals: Arrivals,
    is_batch_invariant: bool,
) -> None:
    """Fill out[num_context_tokens:], the attention of the sequences from num_contexts on; the pool gains K and V."""
    num_heads, head_size = out.shape[1:]
    assert qkv.is_contiguous() and qkv.shape[1] == 3 * num_heads * head_size
    decodes = step.batch_size - step.num_contexts
    is_int8 = key_value_scales is not None
    cut = _cut(decodes * num_heads, step.max_sequence_length, is_int8, is_batch_invariant)
    num_splits = cdiv(step.max_sequence_length, cut.split_tokens)
    partial, lse = room_for_splits(out, decodes, num_splits)
    can_overlap = has_dependent_launch(qkv.device)
    is_early = can_overlap and cut.is_early
    _decode_one_head[(num_heads, decodes, num_splits)](
        qkv, past_key_value, key_value_scales, turns, position_ids, context_lengths, sequence_length, block_tables,
        out, partial, lse, arrivals.of(decodes * num_heads, qkv.device),
        step.num_contexts, step.num_context_tokens, num_splits, block_tables.stride(0), *pool_strides(past_key_value),
        math.log2(math.e) / (q_scaling * math.sqrt(head_size)),
        NUM_HEADS=num_heads, HEAD_SIZE=head_size, DIM_TILE=padded_width(head_size),
        TOKENS_PER_BLOCK=past_key_value.shape[3], **rules.constants,
        SPLIT_TOKENS=cut.split_tokens, TILE_TOKENS=cut.tile_tokens, NUM_STAGES=cut.num_stages,
        IS_INT8=is_int8, IS_EARLY=is_early, OVERLAP=can_overlap, launch_pdl=is_early,
        num_warps=cut.num_warps,
        # Of two warps each, eight programs share an SM, of four warps four. Float32 is for exactness, and would spill.
        maxnreg=None if qkv.dtype == torch.float32 else 128,
    )  # fmt: skip
