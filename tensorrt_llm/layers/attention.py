"""Attention with its projections, and the step inputs that it reads."""

from dataclasses import dataclass
from typing import NamedTuple

from ..functional import RotaryScalingType, gpt_attention
from ..module import Module
from ..network import Tensor
from .linear import ColumnLinear, RowLinear


@dataclass(frozen=True)
class AttentionParams:
    """What a step says of its sequences, all int32: B sequences, T new tokens, contexts before decodes."""

    position_ids: Tensor  # [T] position of each new token in its sequence, from 0
    query_starts: Tensor  # [B + 1] prefix sums of new tokens per sequence
    sequence_length: Tensor  # [B] tokens in the cache after this step
    context_lengths: Tensor  # [B] tokens of the prompt


@dataclass(frozen=True)
class KeyValueCacheParams:
    """The paged cache: one pool per layer, and for each sequence the blocks that are its own."""

    past_key_value: tuple[Tensor, ...]  # per layer [num_blocks, 2, num_kv_heads, tokens_per_block, head_size]
    block_tables: Tensor  # [B, max_blocks] int32
    # Of int8 pools, per layer [num_blocks, 2, num_kv_heads, tokens_per_block] float32.
    key_value_scales: tuple[Tensor, ...] | None = None

    def of_layer(self, index: int) -> "LayerCache":
        scales = self.key_value_scales
        return LayerCache(self.past_key_value[index], self.block_tables, scales[index] if scales else None)


class LayerCache(NamedTuple):
    """What one layer sees of the cache; see KeyValueCacheParams."""

    past_key_value: Tensor
    block_tables: Tensor
    key_value_scales: Tensor | None


class Attention(Module):
    """qkv projection, gpt_attention (RoPE inside), output projection. Head counts are those of the whole model."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_kv_heads: int,
        attention_head_size: int,
        bias: bool = True,
        dtype: str = "float16",
        rotary_embedding_base: float = 10000.0,
        rotary_embedding_scale_type: RotaryScalingType = RotaryScalingType.none,
        rotary_embedding_max_positions: int = 0,
        use_logn_scaling: bool = False,
        tp_group: tuple[int, ...] = (0,),
        tp_size: int = 1,
    ) -> None:
        super().__init__()
        if num_attention_heads % tp_size:
            raise ValueError(f"num_attention_heads is {num_attention_heads}, not a multiple of tp_size {tp_size}")
        if num_kv_heads % tp_size and tp_size % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}: neither it nor tp_size {tp_size} divides the other")
        self.num_heads = num_attention_heads // tp_size
        self.num_kv_heads = -(-num_kv_heads // tp_size)  # with more ranks than KV heads, ranks hold copies
        self.head_size = attention_head_size
        self.rotary_embedding_base = rotary_embedding_base
        self.rotary_embedding_scale_type = rotary_embedding_scale_type
        self.rotary_embedding_max_positions = rotary_embedding_max_positions
        self.use_logn_scaling = use_logn_scaling
        self.qkv: Module = ColumnLinear(
            hidden_size,
            tp_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_size,
            bias=bias,
            dtype=dtype,
            tp_group=tp_group,
            tp_size=tp_size,
            gather_output=False,
        )
        self.dense: Module = RowLinear(num_attention_heads * self.head_size, hidden_size, dtype, tp_group, tp_size)

    def forward(self, hidden_states: Tensor, cache: LayerCache, attention_params: AttentionParams) -> Tensor:
        context, _ = gpt_attention(
            self.qkv(hidden_states),
            cache.past_key_value,
            attention_params.position_ids,
            attention_params.query_starts,
            attention_params.sequence_length,
            attention_params.context_lengths,
            cache.block_tables,
            cache.key_value_scales,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            hidden_size_per_head=self.head_size,
            rotary_embedding_dim=self.head_size,
            rotary_embedding_base=self.rotary_embedding_base,
            rotary_embedding_scale_type=self.rotary_embedding_scale_type,
            rotary_embedding_max_positions=self.rotary_embedding_max_positions,
            use_logn_scaling=self.use_logn_scaling,
        )
        return self.dense(context)
