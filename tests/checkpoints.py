"""Writes small random Qwen checkpoints in Hugging Face's layout. Knows no engine; any test may use it.

Matrices are drawn with deviation 1/sqrt(columns), biases and norms with visible noise: activations keep their size
from layer to layer, every weight matters, and logits spread over about plus or minus three.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

Storage = Literal["safetensors", "bin"]


def write_qwen1_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    mlp_width: int = 48,
    vocab: int = 97,
    seq_length: int = 64,
    max_position_embeddings: int = 512,
    rotary_base: float = 10000.0,
    norm_epsilon: float = 1e-6,
    use_dynamic_ntk: bool = True,
    use_logn_attn: bool = True,
    dtype: torch.dtype = torch.float32,
    storage: Storage = "safetensors",
    shards: int = 1,
) -> Path:
    """A QWenLMHeadModel; `mlp_width` is that of one branch, so config.json says twice as much."""
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "intermediate_size": 2 * mlp_width,
        "layer_norm_epsilon": norm_epsilon,
        "max_position_embeddings": max_position_embeddings,
        "seq_length": seq_length,
        "rotary_pct": 1.0,
        "rotary_emb_base": rotary_base,
        "use_dynamic_ntk": use_dynamic_ntk,
        "use_logn_attn": use_logn_attn,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {
            f"transformer.h.{layer}.ln_1.weight": (hidden,),
            f"transformer.h.{layer}.attn.c_attn.weight": (3 * hidden, hidden),
            f"transformer.h.{layer}.attn.c_attn.bias": (3 * hidden,),
            f"transformer.h.{layer}.attn.c_proj.weight": (hidden, hidden),
            f"transformer.h.{layer}.ln_2.weight": (hidden,),
            f"transformer.h.{layer}.mlp.w1.weight": (mlp_width, hidden),
            f"transformer.h.{layer}.mlp.w2.weight": (mlp_width, hidden),
            f"transformer.h.{layer}.mlp.c_proj.weight": (hidden, mlp_width),
        }
    shapes |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_tensors(path, random_tensors(shapes, seed, dtype), storage, shards)
    return path


def write_qwen2_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    num_kv_heads: int = 4,
    mlp_width: int = 48,
    vocab: int = 97,
    max_position_embeddings: int = 512,
    rotary_base: float = 1e6,
    norm_epsilon: float = 1e-6,
    tie: bool = False,
    head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    storage: Storage = "safetensors",
    shards: int = 1,
) -> Path:
    """A Qwen2ForCausalLM, its config.json written by transformers; `head_dim` by default is hidden / heads."""
    optional: dict[str, Any] = {} if head_dim is None else {"head_dim": head_dim}
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": rotary_base},
        tie_word_embeddings=tie,
        **optional,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    q_rows, kv_rows = (count * (head_dim or hidden // heads) for count in (heads, num_kv_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_rows, hidden),
            f"{prefix}.self_attn.q_proj.bias": (q_rows,),
            f"{prefix}.self_attn.k_proj.weight": (kv_rows, hidden),
            f"{prefix}.self_attn.k_proj.bias": (kv_rows,),
            f"{prefix}.self_attn.v_proj.weight": (kv_rows, hidden),
            f"{prefix}.self_attn.v_proj.bias": (kv_rows,),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_rows),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (mlp_width, hidden),
            f"{prefix}.mlp.up_proj.weight": (mlp_width, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, mlp_width),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tie:
        shapes["lm_head.weight"] = (vocab, hidden)
    config.save_pretrained(path)
    write_tensors(path, random_tensors(shapes, seed, dtype), storage, shards)
    return path


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values for every name: vectors called weight are norms and lie around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            value = noise / shape[1] ** 0.5
        else:
            value = 1 + 0.2 * noise if name.endswith("weight") else 0.3 * noise
        tensors[name] = value.to(dtype)
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], storage: Storage, shards: int) -> None:
    """One file, or `shards` files and their index, named as Hugging Face names them."""
    stem = "model" if storage == "safetensors" else "pytorch_model"
    if shards == 1:
        _write_file(path / f"{stem}.{storage}", tensors, storage)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{storage}"
        members = names[shard::shards]
        weight_map |= dict.fromkeys(members, file)
        _write_file(path / file, {name: tensors[name] for name in members}, storage)
    total_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    index: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (path / f"{stem}.{storage}.index.json").write_text(json.dumps(index))


def _write_file(file: Path, tensors: dict[str, torch.Tensor], storage: Storage) -> None:
    if storage == "safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)
