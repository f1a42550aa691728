"""Paged attention on the CPU: RoPE and the KV write for all tokens at once, then torch's fused attention per sequence.

A sequence is read at its own length and nothing else, so a result does not depend on its batch. Attention is computed
in float32, as torch's is slow in 16 bits: one query over 180 tokens of 4 heads of 64 takes 157 us in float16, 78 in
bfloat16, 28 to 31 when widened first (one Zen 4 core, torch 2.13).
"""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..reference import logn_scale, ntk_alpha, quantize_kv, rope_angles, rotate
from ..step import StepShape


def gpt_attention(
    qkv: torch.Tensor,
    past_key_value: torch.Tensor,
    position_ids: torch.Tensor,
    query_starts: torch.Tensor,
    sequence_length: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None = None,
    *,
    step: StepShape,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_scaling: float = 1.0,
    rotary_base: float,
    rotary_dim: int,
    ntk_length: int,
    logn_length: int,
) -> torch.Tensor:
    """As reference.gpt_attention, without a score matrix."""
    query_lengths = query_starts.diff()
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_size)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = _angles(position_ids, query_lengths, context_lengths, rotary_base, rotary_dim, ntk_length)
    query = rotate(q.float(), angles)
    if logn_length:
        query = query * logn_scale(position_ids, logn_length, torch.float32)[:, None, None]

    block_size = past_key_value.shape[3]
    sequence = torch.repeat_interleave(torch.arange(step.batch_size), query_lengths)
    block = block_tables[sequence, position_ids // block_size].long()
    offset = (position_ids % block_size).long()
    for side, vectors in enumerate((rotate(k.float(), angles), v)):
        if key_value_scales is not None:
            vectors, key_value_scales[block, side, :, offset] = quantize_kv(vectors)
        past_key_value[block, side, :, offset] = vectors.to(past_key_value.dtype)

    context = torch.empty(qkv.shape[0], num_heads, head_size, dtype=qkv.dtype)
    starts = query_starts.tolist()
    for index, total in enumerate(sequence_length.tolist()):
        first, last = starts[index], starts[index + 1]
        blocks = block_tables[index, : -(-total // block_size)].long()
        cached = past_key_value[blocks].float()
        if key_value_scales is not None:
            cached *= key_value_scales[blocks][..., None]
        # [blocks, 2, kv_heads, block_size, head_size] -> [2, kv_heads, total, head_size]
        cached = cached.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_size)
        keys, values = cached[:, :, :total]
        context[first:last] = scaled_dot_product_attention(
            query[first:last].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=_mask(position_ids[first:last], total) if 1 < last - first < total else None,
            is_causal=1 < last - first == total,
            scale=1 / (q_scaling * math.sqrt(head_size)),
            enable_gqa=num_kv_heads != num_heads,
        )[0].transpose(0, 1)
    return context.flatten(1)


def _angles(
    position_ids: torch.Tensor,
    query_lengths: torch.Tensor,
    context_lengths: torch.Tensor,
    rotary_base: float,
    rotary_dim: int,
    ntk_length: int,
) -> torch.Tensor:
    """Rotation angles [T, rotary_dim / 2], each sequence by its own alpha."""
    alphas = [ntk_alpha(length, ntk_length) if ntk_length else 1 for length in context_lengths.tolist()]
    if len(set(alphas)) == 1:
        return rope_angles(
            position_ids, rotary_base=rotary_base, rotary_dim=rotary_dim, alpha=alphas[0], dtype=torch.float32
        )
    pieces = [
        rope_angles(positions, rotary_base=rotary_base, rotary_dim=rotary_dim, alpha=alpha, dtype=torch.float32)
        for positions, alpha in zip(position_ids.split(query_lengths.tolist()), alphas, strict=True)
    ]
    return torch.cat(pieces)


def _mask(positions: torch.Tensor, total: int) -> torch.Tensor:
    """[queries, total], true where a query may look."""
    return torch.arange(total)[None] <= positions[:, None]
