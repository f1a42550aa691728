"""RoPE on q and k, and the write of k and v into the paged pool: what attention needs done before it can read.

    angle(position, i) = position * base'^(-2i / d),  base' = base * alpha^(d / (d - 2)),  d = rotary_dim
    alpha(sequence)    = 2 * m - 1 with m the smallest power of two for which context_length <= m * ntk_length
    x[i], x[i + d/2]   = x[i] cos - x[i + d/2] sin, x[i + d/2] cos + x[i] sin     (dims from d on stay)
    q                  times max(1, ln(position + 1) / ln(logn_length)) as well

qkv is [tokens, (num_heads + 2 num_kv_heads) head_size], q first, then k, then v. The rotated q comes back as
[tokens, num_heads, head_size] in qkv's dtype; k and v go to the pool at their position (kv_pool.py has its layout),
into an int8 pool as integers that are made from the float32 values, and a scale.

Alpha is found by comparing integers, as a rounded logarithm is a step off at its powers of two. What a position turns a
dim by is a table in float64, a row for each alpha, and the angle is reduced to one turn in float64: in float32 a
position of 32768 times a frequency is already off by 2e-3.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..step import StepShape
from ..tactics.tactic import cdiv
from .int8_rows import quantize_rows
from .kv_pool import padded_width, pool_strides, token_offsets
from .overlap import overlapping, start_next, wait_for_previous


@triton.jit
def _sequence_of(token, query_starts_ptr, batch_size, CHUNK: tl.constexpr):
    """The sequence that owns `token`: how many of query_starts[1:] lie at or before it."""
    sequence = tl.zeros([], tl.int32)
    for first in range(0, batch_size, CHUNK):
        index = first + tl.arange(0, CHUNK)
        starts = tl.load(query_starts_ptr + 1 + index, mask=index < batch_size, other=2147483647)
        sequence += tl.sum((starts <= token).to(tl.int32))
    return sequence


@triton.jit
def _cos_sin(turns):
    """Cosine and sine of `turns` (float64) whole turns, in float32, within 1e-7.

    The remainder after whole quarter turns lies within pi/4 of zero, where short Taylor series do; libdevice's sine
    would bring a slow path for huge arguments that spills to local memory.
    """
    turns -= tl.floor(turns)
    quarter = tl.floor(turns * 4.0 + 0.5)
    x = ((turns - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    y = x * x
    sine = x * (1.0 + y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880)))))
    cosine = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 - y * (1.0 / 3628800)))))
    swapped = (quarter == 1.0) | (quarter == 3.0)
    cosine, sine = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    cosine = tl.where((quarter == 1.0) | (quarter == 2.0), -cosine, cosine)
    sine = tl.where((quarter == 2.0) | (quarter == 3.0), -sine, sine)
    return cosine, sine


@triton.jit
def rotary_partner(dims, ROTARY_DIM: tl.constexpr):
    """The dim that each one turns with: i with i + d/2; dims from d on do not turn."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    return tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTARY_DIM, dims - HALF, dims))


@triton.jit
def rotation(
    position, context_lengths_ptr, sequence, turns_ptr, dims, ROTARY_DIM: tl.constexpr, NTK_LENGTH: tl.constexpr
):  # fmt: skip
    """(cosine, sine) of every dim: x cosine + x[rotary_partner] sine is x turned."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if NTK_LENGTH > 0:
        context_length = tl.load(context_lengths_ptr + sequence)
        doublings = tl.full([], NTK_LENGTH, tl.int64) << tl.arange(0, 32)
        turns_ptr += tl.sum((context_length > doublings).to(tl.int32)) * HALF
    cosine, sine = _cos_sin(position.to(tl.float64) * tl.load(turns_ptr + dims % HALF))
    cosine = tl.where(dims < ROTARY_DIM, cosine, 1.0)
    sine = tl.where(dims < HALF, -sine, tl.where(dims < ROTARY_DIM, sine, 0.0))
    return cosine, sine


@triton.jit
def logn_factor(position, LOGN_LENGTH: tl.constexpr):
    """What a query is multiplied by."""
    factor = tl.log2((position + 1).to(tl.float32)) / tl.log2(tl.full([], LOGN_LENGTH, tl.float32))
    return tl.where(position + 1 > LOGN_LENGTH, factor, 1.0)


@triton.jit(
    do_not_specialize=["batch_size", "table_stride"],
    do_not_specialize_on_alignment=[
        "position_ids_ptr", "query_starts_ptr", "context_lengths_ptr", "block_tables_ptr",
    ],
)  # fmt: skip
def _rope_kv(
    qkv_ptr, q_ptr, pool_ptr, scales_ptr, turns_ptr,
    position_ids_ptr, query_starts_ptr, context_lengths_ptr, block_tables_ptr,
    batch_size, table_stride, block_stride, value_stride, head_stride, token_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    ROTARY_DIM: tl.constexpr, NTK_LENGTH: tl.constexpr, LOGN_LENGTH: tl.constexpr,
    ONE_TOKEN_EACH: tl.constexpr, IS_INT8: tl.constexpr, HEAD_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    token = tl.program_id(0)
    heads = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    dims = tl.arange(0, DIM_TILE)
    sequence = token
    if not ONE_TOKEN_EACH:
        sequence = _sequence_of(token, query_starts_ptr, batch_size, 128)
    position = tl.load(position_ids_ptr + token)

    cosine, sine = rotation(position, context_lengths_ptr, sequence, turns_ptr, dims, ROTARY_DIM, NTK_LENGTH)
    partner = rotary_partner(dims, ROTARY_DIM)

    wait_for_previous(OVERLAP)  # the inputs of a step, read until here, are older than all its kernels
    # [HEAD_TILE, DIM_TILE]
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dims < HEAD_SIZE)[None, :]
    row = token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE) + heads * HEAD_SIZE
    x = tl.load(qkv_ptr + row[:, None] + dims[None, :], mask=mask, other=0.0)
    turned = mask & (is_value == 0)[:, None]
    x_partner = tl.load(qkv_ptr + row[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    rotated = x.to(tl.float32) * cosine[None, :] + x_partner * sine[None, :]
    if LOGN_LENGTH > 0:
        rotated *= tl.where(is_query, logn_factor(position, LOGN_LENGTH), 1.0)[:, None]
    result = tl.where(is_value[:, None], x, rotated.to(x.dtype))

    query_row = token.to(tl.int64) * (NUM_HEADS * HEAD_SIZE) + heads * HEAD_SIZE
    tl.store(q_ptr + query_row[:, None] + dims[None, :], result, mask=mask & is_query[:, None])
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    slot = token_offsets(table_ptr, position, position >= 0, block_stride, token_stride, TOKENS_PER_BLOCK)
    kv_head = tl.where(is_value, heads - NUM_HEADS - NUM_KV_HEADS, heads - NUM_HEADS)
    pool_row = slot + tl.where(is_value, value_stride, 0) + kv_head.to(tl.int64) * head_stride
    if IS_INT8:
        result, scale = quantize_rows(tl.where(is_value[:, None], x.to(tl.float32), rotated))
        is_new = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (is_query == 0)
        tl.store(scales_ptr + pool_row[:, None] // HEAD_SIZE, scale, mask=is_new[:, None])
    tl.store(pool_ptr + pool_row[:, None] + dims[None, :], result, mask=mask & (is_query == 0)[:, None])


class RopeRules(NamedTuple):
    """How positions turn and scale vectors, with 0 for a rule that is off: attributes of the op."""

    rotary_base: float
    rotary_dim: int
    ntk_length: int
    logn_length: int

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        return dict(ROTARY_DIM=self.rotary_dim, NTK_LENGTH=self.ntk_length, LOGN_LENGTH=self.logn_length)

    def turns(self, device: torch.device) -> torch.Tensor:
        """float64 [33, rotary_dim / 2]: turns for each position, in row k for alpha = 2^(k + 1) - 1."""
        alpha = 2.0 ** torch.arange(1, 34, dtype=torch.float64) - 1
        base = self.rotary_base * alpha ** (self.rotary_dim / (self.rotary_dim - 2))
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        return (base[:, None] ** -exponents / (2 * math.pi)).to(device)


def rope_kv(
    qkv: torch.Tensor,
    past_key_value: torch.Tensor,
    position_ids: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None,
    *,
    step: StepShape,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rules: RopeRules,
    turns: torch.Tensor,
) -> torch.Tensor:
    """Write keys and values of qkv, the step's first tokens, to the pool.

    Returns their queries [tokens, heads, head_size], ready to score.
    """
    assert qkv.is_contiguous() and qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_size
    tokens = qkv.shape[0]
    q = torch.empty((tokens, num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    # Few tokens: 8 heads a program spread one token over many SMs. Many: 32 heads share one computation of angles.
    head_tile = 8 if tokens <= 64 else 32
    grid = (tokens, cdiv(num_heads + 2 * num_kv_heads, head_tile))
    block_stride, value_stride, head_stride, token_stride = pool_strides(past_key_value)
    _rope_kv[grid](
        qkv, q, past_key_value, key_value_scales, turns, position_ids, query_starts, context_lengths, block_tables,
        step.batch_size, block_tables.stride(0), block_stride, value_stride, head_stride, token_stride,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, TOKENS_PER_BLOCK=past_key_value.shape[3],
        **rules.constants,
        ONE_TOKEN_EACH=step.max_query_length == 1 and tokens == step.batch_size,
        IS_INT8=key_value_scales is not None, HEAD_TILE=head_tile, DIM_TILE=padded_width(head_size), num_warps=4,
        **overlapping(qkv.device),
    )  # fmt: skip
    return q
