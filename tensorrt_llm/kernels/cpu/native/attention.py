"""Paged attention: sequences with one new token each by attention.c, prompts by torch.

A sequence takes the same way whatever else is in its step, so its result does not depend on that.
"""

import math

import torch

from ...step import StepShape
from .. import attention as prompt_attention
from .compiled import attend
from .launch import FLOATS, INT8, address, rows_of


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
    qkv = rows_of(qkv, (num_heads + 2 * num_kv_heads) * head_size)
    context = torch.empty(qkv.shape[0], num_heads * head_size, dtype=qkv.dtype)
    num_contexts, num_context_tokens = step.num_contexts, step.num_context_tokens
    if num_contexts:
        context[:num_context_tokens] = prompt_attention.gpt_attention(
            qkv[:num_context_tokens],
            past_key_value,
            position_ids[:num_context_tokens],
            query_starts[: num_contexts + 1],
            sequence_length[:num_contexts],
            context_lengths[:num_contexts],
            block_tables[:num_contexts],
            key_value_scales,
            step=step._replace(num_tokens=num_context_tokens, batch_size=num_contexts),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            q_scaling=q_scaling,
            rotary_base=rotary_base,
            rotary_dim=rotary_dim,
            ntk_length=ntk_length,
            logn_length=logn_length,
        )
    num_decodes = step.batch_size - num_contexts
    if num_decodes:
        _check(past_key_value, key_value_scales, num_heads, num_kv_heads, head_size, rotary_dim)
        qkv_of_decodes, context_of_decodes = qkv, context
        if num_contexts:
            position_ids = position_ids[num_context_tokens:]
            sequence_length = sequence_length[num_contexts:]
            context_lengths = context_lengths[num_contexts:]
            block_tables = block_tables[num_contexts:]
            qkv_of_decodes, context_of_decodes = qkv[num_context_tokens:], context[num_context_tokens:]
        attend(
            rotary_base,
            1 / (q_scaling * math.sqrt(head_size)),
            num_decodes,
            num_heads,
            num_kv_heads,
            head_size,
            past_key_value.shape[3],
            block_tables.shape[1],
            rotary_dim,
            ntk_length,
            logn_length,
            qkv_of_decodes.data_ptr(),
            FLOATS[qkv.dtype],
            past_key_value.data_ptr(),
            FLOATS[past_key_value.dtype] if key_value_scales is None else INT8,
            address(key_value_scales),
            position_ids.data_ptr(),
            sequence_length.data_ptr(),
            context_lengths.data_ptr(),
            block_tables.data_ptr(),
            context_of_decodes.data_ptr(),
        )
    return context


def _check(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rotary_dim: int,
) -> None:
    """What the kernel relies on to stay in its memory: an engine file may have been edited."""
    block_size = pool.shape[3]
    if pool.shape[1:] != (2, num_kv_heads, block_size, head_size) or not pool.is_contiguous():
        raise ValueError(
            f"the KV pool is {list(pool.shape)}, expected [blocks, 2, {num_kv_heads}, tokens, {head_size}]"
        )
    if scales is not None and (pool.dtype != torch.int8 or scales.shape != pool.shape[:4]):
        raise ValueError(f"a KV pool of {pool.dtype} {list(pool.shape)} does not go with scales {list(scales.shape)}")
    if num_heads % num_kv_heads or rotary_dim % 2 or not 0 <= rotary_dim <= head_size:
        raise ValueError(
            f"num_heads is {num_heads}, num_kv_heads {num_kv_heads}, rotary_dim {rotary_dim}, head_size {head_size}: "
            f"heads must share evenly, and an even number of dims be turned"
        )
