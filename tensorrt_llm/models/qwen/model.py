"""Qwen, both generations, from token ids to logits. Knows no kernel, no cache layout and no quantization.

Per layer: h = x + dense(attention(rms(x))), x = h + proj(silu(fc(rms(h))) * gate(rms(h))).
Qwen-1's w2 is `fc`, w1 is `gate`; Qwen2's gate_proj is `fc`, up_proj is `gate`.
"""

from typing import Any

from ...functional import RotaryScalingType, cast, gather_last_token_logits
from ...layers import (
    Attention,
    AttentionParams,
    ColumnLinear,
    Embedding,
    GatedMLP,
    KeyValueCacheParams,
    LayerCache,
    RmsNorm,
)
from ...mapping import Mapping
from ...module import Module, ModuleList
from ...network import Tensor
from ...quantization import QuantMode
from .config import QWenConfig


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds vocab_size."""
    return -(-vocab_size // tp_size) * tp_size


class QWenDecoderLayer(Module):
    def __init__(self, config: QWenConfig, dtype: str, mapping: Mapping) -> None:
        super().__init__()
        self.ln_1 = RmsNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
            bias=True,
            dtype=dtype,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scale_type=(
                RotaryScalingType.dynamic if config.use_dynamic_ntk else RotaryScalingType.none
            ),
            rotary_embedding_max_positions=config.seq_length,
            use_logn_scaling=config.use_logn_attn,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
        )
        self.ln_2 = RmsNorm(config.hidden_size, config.norm_epsilon, dtype)
        self.mlp = GatedMLP(
            config.hidden_size, config.mlp_hidden_size, "silu", dtype, mapping.tp_group, mapping.tp_size
        )

    def forward(self, hidden_states: Tensor, cache: LayerCache, attention_params: AttentionParams) -> Tensor:
        attention_output = self.attention(self.ln_1(hidden_states), cache, attention_params)
        self.register_network_output("attention", attention_output)
        hidden_states = hidden_states + attention_output
        mlp_output = self.mlp(self.ln_2(hidden_states))
        self.register_network_output("mlp", mlp_output)
        hidden_states = hidden_states + mlp_output
        self.register_network_output("output", hidden_states)
        return hidden_states


class QWenForCausalLM(Module):
    """Logits of a Qwen model; `dtype` is that of weights and activations. `models.quantize_model` changes both.

    The residual stream is float32 in every precision: Qwen's outliers overflow float16 there, and what each layer
    adds would be rounded away otherwise. It costs 2 hidden_size bytes per token and layer, next to all the weights.
    """

    def __init__(self, config: QWenConfig, dtype: str, mapping: Mapping | None = None) -> None:
        super().__init__()
        mapping = mapping or Mapping()
        if mapping.pp_size > 1:
            raise ValueError(f"pp_size is {mapping.pp_size}: pipeline parallelism is not supported, expected 1")
        self.config = config
        self.dtype = dtype
        self.kv_dtype = dtype  # of the KV pools; "int8" comes with scales
        self.quant_mode = QuantMode(0)
        self.mapping = mapping
        self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = ModuleList([QWenDecoderLayer(config, dtype, mapping) for _ in range(config.num_hidden_layers)])
        self.ln_f = RmsNorm(config.hidden_size, config.norm_epsilon, dtype)
        # A split lm_head holds other rows on each rank, while every rank embeds all ids: only tp 1 can share.
        shares_embedding = config.tie_word_embeddings and mapping.tp_size == 1
        self.lm_head = ColumnLinear(
            config.hidden_size,
            pad_vocab_size(config.vocab_size, mapping.tp_size),
            bias=False,
            dtype=dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            share_weight=self.vocab_embedding.weight if shares_embedding else None,
            output_dtype="float32",
        )

    def engine_facts(self) -> dict[str, Any]:
        """What the engine says of the architecture; counts are of the whole model."""
        config = self.config
        return {
            "name": "qwen",
            "architecture": config.architecture,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "inter_size": config.mlp_hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": config.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "seq_length": config.seq_length,
            "rotary_base": config.rotary_base,
            "use_dynamic_ntk": config.use_dynamic_ntk,
            "use_logn_attn": config.use_logn_attn,
            "norm_epsilon": config.norm_epsilon,
        }

    def prepare_inputs(self, tokens_per_block: int) -> dict[str, object]:
        """The network inputs of `forward`, packed and paged; ranges are the engine's limits, not part of the graph."""
        attention = self.layers[0].attention
        pool = ("num_blocks", 2, attention.num_kv_heads, tokens_per_block, attention.head_size)
        layers = range(len(self.layers))
        has_scales = self.kv_dtype == "int8"
        return {
            "input_ids": Tensor("input_ids", "int32", ["num_tokens"]),
            "last_token_ids": Tensor("last_token_ids", "int32", ["num_logits"]),
            "attention_params": AttentionParams(
                position_ids=Tensor("position_ids", "int32", ["num_tokens"]),
                query_starts=Tensor("query_starts", "int32", ["batch+1"]),
                sequence_length=Tensor("sequence_length", "int32", ["batch"]),
                context_lengths=Tensor("context_lengths", "int32", ["batch"]),
            ),
            "kv_cache_params": KeyValueCacheParams(
                past_key_value=tuple(Tensor(f"past_key_value_{index}", self.kv_dtype, pool) for index in layers),
                block_tables=Tensor("block_tables", "int32", ["batch", "max_blocks"]),
                key_value_scales=(
                    tuple(Tensor(f"key_value_scales_{index}", "float32", pool[:-1]) for index in layers)
                    if has_scales
                    else None
                ),
            ),
        }

    def forward(
        self,
        input_ids: Tensor,
        last_token_ids: Tensor,
        attention_params: AttentionParams,
        kv_cache_params: KeyValueCacheParams,
    ) -> Tensor:
        hidden_states = cast(self.vocab_embedding(input_ids), "float32")
        self.register_network_output("embedding", hidden_states)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, kv_cache_params.of_layer(index), attention_params)
        hidden_states = gather_last_token_logits(hidden_states, last_token_ids)
        logits = self.lm_head(self.ln_f(hidden_states))
        self.register_network_output("logits", logits)
        logits.mark_output("logits")
        return logits
