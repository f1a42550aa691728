"""A Qwen checkpoint as a transformers model: the baseline that engines are measured against. Runs no remote code.

Qwen-1 has no class in transformers, but up to its trained length (`seq_length`) it is the same function as
Qwen2ForCausalLM with as many key/value heads as heads: there dynamic NTK leaves the RoPE base alone and log-n
multiplies by one. Beyond that length the baseline is NOT the original model. Knows nothing of engines.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from weight import check_complete

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.models.qwen.config import QWEN1, QWenConfig

# Qwen-1 module -> the Qwen2 modules that its rows are stacked from.
_QWEN2_MODULES = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.h.{i}.ln_1": ("model.layers.{i}.input_layernorm",),
    "transformer.h.{i}.attn.c_attn": tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
    "transformer.h.{i}.attn.c_proj": ("model.layers.{i}.self_attn.o_proj",),
    "transformer.h.{i}.ln_2": ("model.layers.{i}.post_attention_layernorm",),
    "transformer.h.{i}.mlp.w1": ("model.layers.{i}.mlp.up_proj",),
    "transformer.h.{i}.mlp.w2": ("model.layers.{i}.mlp.gate_proj",),
    "transformer.h.{i}.mlp.c_proj": ("model.layers.{i}.mlp.down_proj",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}


def load_hf_model(hf_model_dir: str | Path, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """The checkpoint in `dtype` on `device`, ready for inference.

    A Qwen-1 checkpoint is loaded into Qwen2ForCausalLM: the same function up to the trained length.
    """
    config = QWenConfig.from_hf_dir(hf_model_dir)
    checkpoint = HfCheckpoint(hf_model_dir)
    check_complete(checkpoint, config)  # transformers would fill what is missing with random numbers
    if config.architecture == QWEN1:
        model = _load_qwen1(checkpoint, config, torch_dtype(dtype))
    else:
        model = Qwen2ForCausalLM.from_pretrained(hf_model_dir, dtype=torch_dtype(dtype), local_files_only=True)
    return model.eval().to(device)


def random_hf_model(hf_model_dir: str | Path, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """The model that config.json describes, with random weights made on `device`; no other file is needed."""
    config = QWenConfig.from_hf_dir(hf_model_dir)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(_as_qwen2_config(config), dtype=torch_dtype(dtype))
    return model.eval()


def _as_qwen2_config(config: QWenConfig) -> Qwen2Config:
    head_size: dict[str, Any] = {"head_dim": config.head_size}  # known to every version, declared by none
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        tie_word_embeddings=config.tie_word_embeddings,
        **head_size,
    )


def _load_qwen1(checkpoint: HfCheckpoint, config: QWenConfig, dtype: torch.dtype) -> PreTrainedModel:
    # The tensors are backed by the shards: transformers copies them out one by one.
    tensors = dict(_as_qwen2(checkpoint, config))
    model = Qwen2ForCausalLM.from_pretrained(None, config=_as_qwen2_config(config), state_dict=tensors, dtype=dtype)
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def _as_qwen2(checkpoint: HfCheckpoint, config: QWenConfig) -> Iterator[tuple[str, torch.Tensor]]:
    present = checkpoint.tensors()
    for source, targets in _QWEN2_MODULES.items():
        for layer in range(config.num_hidden_layers if "{i}" in source else 1):
            for kind in ("weight", "bias"):
                name = f"{source.format(i=layer)}.{kind}"
                if name in present:
                    parts = checkpoint.read(name).chunk(len(targets))
                    yield from zip((f"{target.format(i=layer)}.{kind}" for target in targets), parts, strict=True)
