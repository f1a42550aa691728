"""Models and engines of quantized checkpoints, and small plain checkpoints to quantize. Any test may use it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_quantized_checkpoint
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from compiling.compile_model import compile_model
from hf_model import load_hf_model
from models_for_tests import LIMITS, on_cpu, random_prompts
from quantized_folders import Tensors
from safetensors.torch import load_file, save_file
from weight import load_from_quantized

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantizedWeight, QuantMode
from tensorrt_llm.runtime import SamplingConfig

SHAPE: dict[str, Any] = {"hidden": 64, "heads": 4, "mlp_width": 128, "vocab": 101, "dtype": torch.float16}
# Relative errors of logits: float32 sums, and 16-bit roundings of every activation of two layers.
TOLERANCES = {"float32": 2e-5, "float16": 5e-3}


def write_plain(path: Path, generation: str) -> Path:
    """A checkpoint of "qwen1", or of "qwen2" with grouped KV heads."""
    if generation == "qwen1":
        return write_qwen1_checkpoint(path, seq_length=256, **SHAPE)
    return write_qwen2_checkpoint(path, num_kv_heads=2, **SHAPE)


def config_of(folder: Path) -> QWenConfig:
    return QWenConfig.from_hf_dir(folder, accepts_quantized=True)


def model_of(checkpoint: QuantizedCheckpoint, config: QWenConfig, dtype: str, mapping: Mapping) -> QWenForCausalLM:
    """A model with the layers that the checkpoint asks for, its weights loaded."""
    layout = checkpoint.layout
    model = quantize_model(
        QWenForCausalLM(config, dtype, mapping),
        QuantMode.use_weight_only(layout.bits == 4, per_group=layout.group_size > 0),
        group_size=layout.group_size,
        zero=layout.zero,
        pre_quant_scale=layout.pre_quant_scale,
        act_order=layout.act_order,
        exclude_modules=() if checkpoint.quantizes_lm_head else ("lm_head",),
    )
    load_from_quantized(model, checkpoint, config, mapping)
    return model


def engine_of(path: Path, folder: Path, dtype: str = "float32") -> Engine:
    """The engine of the quantized weights at `path`; config.json is in `folder`."""
    checkpoint = open_quantized_checkpoint(path)
    return compile_model(model_of(checkpoint, config_of(folder), dtype, Mapping()), LIMITS)


def weights_of(path: Path, folder: Path, tp_size: int = 1) -> list[Tensors]:
    """What the engines of all ranks hold."""
    ranks = []
    for rank in range(tp_size):
        mapping = Mapping(world_size=tp_size, rank=rank, tp_size=tp_size)
        model = model_of(open_quantized_checkpoint(path), config_of(folder), "float16", mapping)
        ranks.append({name: parameter.load() for name, parameter in model.named_parameters()})
    return ranks


def assert_same_logits(engine: Engine, plain: Path, dtype: str) -> None:
    (prompt,) = random_prompts([37], 101, seed=5)
    with torch.no_grad():
        expected = load_hf_model(plain, "float32", "cpu")(torch.tensor([prompt])).logits[0]
    error = (logits_of(engine) - expected).norm() / expected.norm()
    assert error <= TOLERANCES[dtype]


def logits_of(engine: Engine) -> torch.Tensor:
    (prompt,) = random_prompts([37], 101, seed=5)
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    logits: torch.Tensor = on_cpu(engine).decode_batch([prompt], sampling)["context_logits"][0]
    return logits


def rejoined(name: str, ranks: list[Tensors], config: QWenConfig, bits: int) -> torch.Tensor:
    """The whole dequantized weight from the ranks' parts."""
    parts = [
        QuantizedWeight(bits, rank[f"{name}.weight"], rank[f"{name}.scale"], rank.get(f"{name}.zero")).dequantize()
        for rank in ranks
    ]
    if name.endswith(("dense", "proj")):
        return torch.cat(parts, dim=1)
    if not name.endswith("qkv"):
        return torch.cat(parts)
    tp_size, size = len(ranks), config.head_size
    q_rows = config.num_attention_heads // tp_size * size
    copies = max(tp_size // config.num_key_value_heads, 1)
    kv = [part[q_rows:].chunk(2) for part in parts[::copies]]
    return torch.cat([*(part[:q_rows] for part in parts), *(k for k, _ in kv), *(v for _, v in kv)])


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))
