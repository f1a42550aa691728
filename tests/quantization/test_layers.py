"""quantize_model changes the network as the mode says, and nothing else."""

import re
from functools import partial

import pytest
import torch
from models_for_tests import describe, make_config

from tensorrt_llm import Mapping, Network
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.passes import optimize
from tensorrt_llm.quantization import QuantizedWeight, QuantMode, quantize_weight
from tensorrt_llm.quantization.layers import (
    SmoothQuantAttention,
    SmoothQuantMLP,
    SmoothQuantRmsNorm,
    WeightOnlyQuantLinear,
    WeightOnlyQuantRowLinear,
)
from tensorrt_llm.quantization.quantize import dequantize

INT8, INT4 = QuantMode.use_weight_only(), QuantMode.use_weight_only(use_int4_weights=True)
GROUPS = QuantMode.use_weight_only(use_int4_weights=True, per_group=True)


def make_model(tp_size: int = 1, rank: int = 0, **changes: object) -> QWenForCausalLM:
    config = make_config(**{"hidden_size": 64, "head_size": 32, "mlp_hidden_size": 96, **changes})
    return QWenForCausalLM(config, "float16", Mapping(world_size=tp_size, tp_size=tp_size, rank=rank))


def ops(network: Network) -> list[str]:
    return [node.op for node in network.nodes]


def weights(network: Network) -> dict[str, str]:
    return {name: str(tensor).partition(": ")[2] for name, tensor in network.weights.items()}


@pytest.mark.parametrize(("mode", "qkv", "scale"), [
    (INT8, "int8[192, 64]", "float32[192, 1]"),
    (INT4, "uint8[192, 32]", "float32[192, 1]"),
    (GROUPS, "uint8[192, 32]", "float32[192, 2]"),
])  # fmt: skip
def test_weight_only_layers_hold_integers_and_scales(mode: QuantMode, qkv: str, scale: str) -> None:
    found = weights(describe(quantize_model(make_model(), mode, group_size=32)))
    assert found["layers.0.attention.qkv.weight"] == qkv and found["layers.0.attention.qkv.scale"] == scale
    assert found["lm_head.weight"] == "float16[11, 64]" and found["layers.0.ln_1.weight"] == "float16[64]"


def test_weight_only_branches_of_the_mlp_are_one_op() -> None:
    network = describe(quantize_model(make_model(), INT8))
    optimize(network)
    assert ops(network).count("weight_only_gated_mlp") == 1 and ops(network).count("weight_only_quant_matmul") == 3


def test_smooth_quant_layers_pass_integers_on() -> None:
    model = quantize_model(make_model(), QuantMode.use_smooth_quant(per_token=True))
    layer = model.layers[0]
    kinds = [type(module) for module in (layer.ln_1, layer.attention, layer.ln_2, layer.mlp)]
    assert kinds == [SmoothQuantRmsNorm, SmoothQuantAttention, SmoothQuantRmsNorm, SmoothQuantMLP]
    network = describe(model)
    optimize(network)
    # Four inputs are quantized: of qkv, dense, the two branches together, and proj.
    found = ops(network)
    assert found.count("rms_norm_quantize") + found.count("add_rms_norm_quantize") == 2
    assert found.count("quantize_per_token") == 2 and found.count("smooth_quant_gated_mlp") == 1


def test_static_smooth_quant_reads_one_scale_twice() -> None:
    network = describe(quantize_model(make_model(), QuantMode.use_smooth_quant()))
    reads = [node for node in network.nodes if any(x.name == "layers.0.ln_1.act_scale" for x in node.inputs)]
    assert [node.op for node in reads] == ["quantize_tensor", "smooth_quant_gemm"]


def test_the_output_layer_is_quantized_only_when_asked() -> None:
    model = quantize_model(make_model(tie_word_embeddings=True), INT4, quantize_lm_head=True)
    found = weights(describe(model))
    assert found["lm_head.weight"] == "int8[11, 64]" and found["vocab_embedding.weight"] == "float16[11, 64]"


def test_an_int8_cache_has_scales_and_nothing_else_changes() -> None:
    plain, int8 = (describe(quantize_model(make_model(), mode)) for mode in (QuantMode(0), QuantMode.INT8_KV_CACHE))
    assert str(int8.inputs["past_key_value_0"]) == "past_key_value_0: int8[num_blocks, 2, 2, 16, 32]"
    assert str(int8.inputs["key_value_scales_0"]) == "key_value_scales_0: float32[num_blocks, 2, 2, 16]"
    without = re.sub(r"input key_value_scales.*\n|, key_value_scales_0", "", str(int8)).replace("int8[", "float16[")
    assert without == str(plain)


def test_a_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.qkv: group size is 48, expected a divisor .* 64"):
        quantize_model(make_model(), GROUPS, group_size=48)


def test_groups_that_ranks_cut_become_smaller_ones_with_equal_scales() -> None:
    model = quantize_model(make_model(tp_size=2), GROUPS, group_size=32)
    proj = model.layers[0].mlp.proj  # 96 columns, 48 on each rank: groups of 16
    assert isinstance(proj, WeightOnlyQuantRowLinear) and proj.scale.shape == (64, 3)
    whole = quantize_weight(torch.randn(64, 96), 4, 32)
    parts = []
    for start in (0, 48):
        proj.set_loader(partial(whole.columns, start, start + 48))
        parts.append(dequantize(proj.weight.load(), proj.scale.load(), None, bits=4))
    assert torch.equal(torch.cat(parts, dim=1), whole.dequantize())


def test_groups_that_ranks_cut_too_small_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.proj: a rank has 24 of 96 .* cut to 8, expected at least 16"
    ):
        quantize_model(make_model(tp_size=4, num_attention_heads=4, head_size=16), GROUPS, group_size=32)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_named(bad: float) -> None:
    model = quantize_model(make_model(), INT8)
    network = describe(model)  # names the parameters
    linear = model.layers[0].mlp.fc
    assert isinstance(linear, WeightOnlyQuantLinear) and network.weights
    quantized = quantize_weight(torch.randn(96, 64), 8)
    scale = quantized.scale.clone()
    scale[3] = bad
    linear.set_loader(lambda: QuantizedWeight(8, quantized.weight, scale))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.fc\.weight: a quantization scale is"):
        linear.scale.load()


def test_a_weight_is_quantized_once_for_its_tensors_and_then_forgotten() -> None:
    linear = quantize_model(make_model(), INT8).layers[0].mlp.fc
    calls = []

    def load() -> QuantizedWeight:
        calls.append(1)
        return quantize_weight(torch.randn(96, 64), 8)

    linear.set_loader(load)
    for _ in range(2):
        linear.weight.load()
        linear.scale.load()
    assert len(calls) == 2
