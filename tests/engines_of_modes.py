"""Small engines of any mode, weights without meaning, and folders as build.py leaves them. Any test may use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compiling.compile_model import compile_model
from models_for_tests import LIMITS, make_config

from tensorrt_llm import Builder, Engine, Limits, Mapping
from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode

# Wide enough for two groups of 32 columns.
CONFIG = make_config(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_size=16,
    mlp_hidden_size=96,
)


# By name, for tests of what all of them have in common.
MODES = {
    "float": QuantMode(0),
    "int8": QuantMode.use_weight_only(),
    "int4": QuantMode.use_weight_only(use_int4_weights=True),
    "int8_kv": QuantMode.INT8_KV_CACHE,
    "smooth": QuantMode.use_smooth_quant(per_token=True, per_channel=True),
}


def engine_of_mode(
    mode: QuantMode, algo: str = "", dtype: str = "float32", mapping: Mapping | None = None, **layout: Any
) -> Engine:
    """All weights are zero, and all that is floating is one; `layout` is what quantize_model takes."""
    model = quantize_model(QWenForCausalLM(CONFIG, dtype, mapping or Mapping()), mode, **layout)
    for _, parameter in model.named_parameters():
        kind = torch_dtype(parameter.dtype)
        parameter.value = torch.full(parameter.shape, int(kind.is_floating_point), dtype=kind)
    engine = compile_model(model, LIMITS)
    return Engine(replace(engine.config, quant_algo=algo), engine.plan, engine.weights)


def random_engine(mode: QuantMode, config: QWenConfig, limits: Limits, *, batch_invariant: bool = False) -> Engine:
    """In float16. Random weights, integers and scales, of a size that keeps activations as large as they are."""
    model = quantize_model(QWenForCausalLM(config, "float16"), mode)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        kind = torch_dtype(parameter.dtype)
        if not kind.is_floating_point:
            parameter.value = torch.randint(torch.iinfo(kind).min, 127, parameter.shape, generator=generator).to(kind)
        elif name.endswith("scale"):
            parameter.value = torch.full(parameter.shape, 1 / 1200 if mode == MODES["int8"] else 1 / 80)
        else:
            noise = torch.randn(parameter.shape, generator=generator)
            noise = noise / parameter.shape[1] ** 0.5 if noise.dim() == 2 else 1 + 0.2 * noise
            parameter.value = noise.to(kind)
    return compile_model(model, limits, batch_invariant=batch_invariant)


def write_engine(engine: Engine, folder: Path) -> Path:
    """The path of the engine file in a folder with its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / engine.config.engine_name
    engine.save(path)
    Builder.save_config(engine.config, folder / "config.json")
    return path
