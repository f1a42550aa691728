"""Quantized engines against the same fake-quantized model in transformers, FP32, for every architecture and mode.

Weights are replaced by what their integers stand for; keys and values are rounded on their way into the cache. What
the engine then adds is its dtype's rounding: a relative error of the logits of some half units in the last place.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from compiling.compile_model import compile_model
from hf_model import load_hf_model
from models_for_tests import LIMITS, on_cpu, random_prompts
from transformers import DynamicCache, PreTrainedModel
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode, quantize_weight
from tensorrt_llm.quantization.quantize import dequantize
from tensorrt_llm.runtime import SamplingConfig

# Mode, its arguments, and bits and group size for the fake-quantized model.
MODES: dict[str, tuple[QuantMode, dict[str, Any], int, int]] = {
    "int8": (QuantMode.use_weight_only(), {}, 8, 0),
    "int8-lm-head": (QuantMode.use_weight_only(), {"quantize_lm_head": True}, 8, 0),
    "int4": (QuantMode.use_weight_only(True), {}, 4, 0),
    "int4-groups": (QuantMode.use_weight_only(True, True), {"group_size": 32}, 4, 32),
    "int8-kv": (QuantMode.INT8_KV_CACHE, {}, 0, 0),
    "int4-groups-int8-kv": (QuantMode.use_weight_only(True, True).set_int8_kv_cache(), {"group_size": 16}, 4, 16),
}
# Relative errors of logits: float32 sums, and 16-bit roundings of every activation of two layers.
TOLERANCES = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=["qwen1", "qwen2", "qwen2-grouped", "qwen2-grouped-tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    shape = {"hidden": 64, "heads": 4, "mlp_width": 192, "vocab": 101}
    if request.param == "qwen1":
        return write_qwen1_checkpoint(path, seq_length=256, **shape)
    num_kv_heads = 2 if "grouped" in request.param else 4
    return write_qwen2_checkpoint(path, num_kv_heads=num_kv_heads, tie="tied" in request.param, **shape)


def quantized_engine(checkpoint: Path, mode: str, dtype: str) -> Engine:
    config = QWenConfig.from_hf_dir(checkpoint)
    quant_mode, options, _, _ = MODES[mode]
    model = quantize_model(QWenForCausalLM(config, dtype), quant_mode, **options)
    load_from_hf_qwen(model, checkpoint, config)
    return compile_model(model, LIMITS)


def fake_quantized(checkpoint: Path, mode: str, dtype: str) -> PreTrainedModel:
    """transformers' model in float32 with weights that went through the engine's dtype and through integers."""
    _, options, bits, group_size = MODES[mode]
    model = load_hf_model(checkpoint, "float32", "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in LAYERS and bits:
                module.weight.copy_(quantize_weight(module.weight, bits, group_size).dequantize())
        if options.get("quantize_lm_head"):
            rounded = quantize_weight(model.lm_head.weight, 8).dequantize()
            model.lm_head.weight = torch.nn.Parameter(rounded)  # the embedding may share the old one
    return model


class Int8Cache(DynamicCache):
    """Keys and values as an INT8 cache gives them back, written independently of the engine's."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(self._rounded(keys), self._rounded(values), *args, **kwargs)

    @staticmethod
    def _rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("mode", list(MODES))
def test_logits_are_those_of_the_fake_quantized_model(checkpoint: Path, mode: str, dtype: str) -> None:
    engine = quantized_engine(checkpoint, mode, dtype)
    expected_model = fake_quantized(checkpoint, mode, dtype)
    (prompt,) = random_prompts([37], engine.config.vocab_size, seed=5)
    with torch.no_grad():
        cache = Int8Cache() if "kv" in mode else DynamicCache()
        expected = expected_model(torch.tensor([prompt]), past_key_values=cache).logits[0]
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    found = on_cpu(engine).decode_batch([prompt], sampling)["context_logits"][0]
    assert (found - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("mode", list(MODES))
def test_quantization_is_what_makes_the_difference(checkpoint: Path, mode: str) -> None:
    """The claim above could not fail if the modes changed nothing: each moves the logits by more than its tolerance."""
    engine = quantized_engine(checkpoint, mode, "float32")
    (prompt,) = random_prompts([37], engine.config.vocab_size, seed=5)
    with torch.no_grad():
        plain = load_hf_model(checkpoint, "float32", "cpu")(torch.tensor([prompt])).logits[0]
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    found = on_cpu(engine).decode_batch([prompt], sampling)["context_logits"][0]
    assert (found - plain).norm() > 20 * TOLERANCES["float32"] * plain.norm()


@pytest.mark.parametrize("mode", ["int8", "int4-groups-int8-kv"])
def test_greedy_tokens_are_those_of_the_fake_quantized_model(checkpoint: Path, mode: str) -> None:
    """Decode steps, a batch of several lengths, and chunked prompts read the cache that prefill wrote."""
    engine = quantized_engine(checkpoint, mode, "float32")
    model = fake_quantized(checkpoint, mode, "float32")
    prompts = random_prompts([3, 40, 17], engine.config.vocab_size, seed=7)
    output = on_cpu(engine).decode_batch(prompts, SamplingConfig(max_new_tokens=12, return_dict=True))
    for prompt, ids in zip(prompts, output["output_ids"], strict=True):
        sequence = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                cache = Int8Cache() if "kv" in mode else DynamicCache()
                logits = model(torch.tensor([sequence]), past_key_values=cache).logits
                sequence.append(int(logits[0, -1].argmax()))
        assert ids[0][: len(sequence)].tolist() == sequence


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("mode", ["int8", "int4", "int4-groups", "int8-lm-head"])
def test_ranks_hold_parts_of_the_whole_bit_by_bit(checkpoint: Path, mode: str, tp_size: int) -> None:
    config = QWenConfig.from_hf_dir(checkpoint)
    quant_mode, options, bits, _ = MODES[mode]

    def load(mapping: Mapping) -> dict[str, torch.Tensor]:
        model = quantize_model(QWenForCausalLM(config, "float16", mapping), quant_mode, **options)
        load_from_hf_qwen(model, checkpoint, config, mapping)
        return dict(compile_model(model, LIMITS).weights.items())

    whole = load(Mapping())
    ranks = [load(Mapping(world_size=tp_size, tp_size=tp_size, rank=rank)) for rank in range(tp_size)]
    bits_of = {"layers.0.mlp.fc": bits, "layers.1.mlp.proj": bits, "layers.0.attention.dense": bits}
    if "lm-head" in mode:
        bits_of["lm_head"] = 8
    for path, layer_bits in bits_of.items():
        parts = [dequantize(rank[f"{path}.weight"], rank[f"{path}.scale"], None, bits=layer_bits) for rank in ranks]
        joined = torch.cat(parts, dim=1 if path.endswith(("proj", "dense")) else 0)
        expected = dequantize(whole[f"{path}.weight"], whole[f"{path}.scale"], None, bits=layer_bits)
        assert torch.equal(joined[: len(expected)], expected), path
    assert torch.equal(join_qkv(ranks, config, tp_size, bits), join_qkv([whole], config, 1, bits))


def join_qkv(ranks: list[dict[str, torch.Tensor]], config: QWenConfig, tp_size: int, bits: int) -> torch.Tensor:
    """The whole qkv matrix from the ranks' rows of Q, K and V; ranks that copy a KV head count once."""
    size, copies = config.head_size, max(1, tp_size // config.num_key_value_heads)
    name = "layers.1.attention.qkv"
    parts = [dequantize(rank[f"{name}.weight"], rank[f"{name}.scale"], None, bits=bits) for rank in ranks]
    kv_rows = -(-config.num_key_value_heads // tp_size) * size
    q_rows = config.num_attention_heads // tp_size * size
    split = [part.split((q_rows, kv_rows, kv_rows)) for part in parts]
    return torch.cat(
        [*(q for q, _, _ in split), *(k for _, k, _ in split[::copies]), *(v for _, _, v in split[::copies])]
    )
