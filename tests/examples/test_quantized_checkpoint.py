"""Quantized checkpoints: every element is the one that was packed, engines compute what the dequantized model does, and
ranks together hold the whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoint.quantized_checkpoint import open_quantized_checkpoint
from checkpoints import write_qwen2_checkpoint
from quantized_folders import Scheme, Tensors, write_dequantized, write_quantized
from quantized_models import (
    SHAPE,
    TOLERANCES,
    assert_same_logits,
    change_tensor,
    config_of,
    engine_of,
    logits_of,
    model_of,
    rejoined,
    weights_of,
    write_plain,
)
from safetensors.torch import load_file, save_file
from weight import load_from_quantized

from tensorrt_llm import Mapping
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode, quantize_weight
from tensorrt_llm.quantization.layers import WeightOnlyLayout

GPTQ, AWQ, COMPRESSED = Scheme("gptq"), Scheme("awq"), Scheme("compressed-tensors")
SCHEMES = {
    "gptq-sym": replace(GPTQ, symmetric=True),
    "gptq": GPTQ,
    "gptq-act-order": replace(GPTQ, act_order=True),
    "gptq-per-channel": replace(GPTQ, group_size=-1, symmetric=True),
    "gptq-by-gptqmodel": replace(GPTQ, by_gptqmodel=True, smallest_zero=0),
    "gptq-v2": replace(GPTQ, version=2, smallest_zero=0),
    "gptq-int8-sym": replace(GPTQ, bits=8, symmetric=True),
    "gptq-int8-v2-act-order": replace(GPTQ, bits=8, version=2, act_order=True, group_size=32),
    "awq": replace(AWQ, smallest_zero=0),
    "compressed": COMPRESSED,
    "compressed-sym-act-order": replace(COMPRESSED, symmetric=True, act_order=True),
    "compressed-int8-per-channel": replace(COMPRESSED, bits=8, group_size=-1, symmetric=True),
    "compressed-plain-zeros": replace(COMPRESSED, packs_zeros=False, group_size=32),
}
ALGORITHMS = {"gptq": "W{bits}A16_GPTQ", "awq": "W4A16_AWQ", "compressed-tensors": "W{bits}A16"}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module", params=["qwen1", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"), request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_checkpoint(tmp_path_factory.mktemp("qwen2"), num_kv_heads=2, layers=1, **SHAPE)


def layer_tensors(folder: Path, name: str) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


# ---- every element ----


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_are_those_of_an_unpacking_element_by_element(plain: Path, tmp_path: Path, scheme: Scheme) -> None:
    rounded = write_quantized(plain, tmp_path, scheme)
    checkpoint = open_quantized_checkpoint(tmp_path)
    assert checkpoint.linears.keys() == rounded.keys()
    for name, linear in list(checkpoint.linears.items())[: len(rounded) // 2]:
        expected = scheme.dequantized(layer_tensors(tmp_path, name), linear.shape)
        assert torch.equal(expected, rounded[name].weight)  # the unpacking is right
        if linear.order is not None:
            expected = expected[:, linear.order.long()]
        rows = linear.shape[0]
        assert torch.equal(checkpoint.read_rows(name, 0, rows).dequantize(), expected)
        assert torch.equal(checkpoint.read_rows(name, 3, rows - 6).dequantize(), expected[3 : rows - 6])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_layout_says_what_the_layers_need(qwen2: Path, tmp_path: Path, scheme: Scheme) -> None:
    write_quantized(qwen2, tmp_path, scheme)
    checkpoint = open_quantized_checkpoint(tmp_path)
    assert checkpoint.quant_algo == ALGORITHMS[scheme.method].format(bits=scheme.bits)
    assert checkpoint.layout == WeightOnlyLayout(
        scheme.bits, max(scheme.group_size, 0), zero=not scheme.symmetric, act_order=scheme.act_order
    )
    assert not checkpoint.quantizes_lm_head


def test_rows_are_unpacked_in_runs_that_join(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    checkpoint = open_quantized_checkpoint(tmp_path)
    whole = checkpoint.read_rows(f"{ATTENTION}.o_proj", 0, 64).dequantize()
    monkeypatch.setattr("checkpoint.packed_linear._ELEMENTS_AT_ONCE", 64 * 7)
    assert torch.equal(checkpoint.read_rows(f"{ATTENTION}.o_proj", 0, 64).dequantize(), whole)


@pytest.mark.parametrize(("bits", "largest"), [(4, 15), (8, 255)])
def test_the_largest_v1_zero_point_is_one_more_than_bits_hold(
    qwen2: Path, tmp_path: Path, bits: int, largest: int
) -> None:
    write_quantized(qwen2, tmp_path, replace(GPTQ, bits=bits))
    change_tensor(tmp_path, f"{ATTENTION}.o_proj.qzeros", lambda zeros: torch.full_like(zeros, -1))
    weight = open_quantized_checkpoint(tmp_path).read_rows(f"{ATTENTION}.o_proj", 0, 64)
    assert weight.zero is not None and torch.equal(
        weight.zero + (largest + 1) // 2, torch.full((64, 4), largest + 1).short()
    )


def test_a_layer_with_zero_points_in_the_middle_gets_them_where_others_have_some(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    change_tensor(tmp_path, f"{ATTENTION}.o_proj.qzeros", lambda zeros: torch.full_like(zeros, 0x77777777))
    checkpoint = open_quantized_checkpoint(tmp_path)
    assert checkpoint.layout.zero and not checkpoint.linears[f"{ATTENTION}.o_proj"].has_zero
    (weights,) = weights_of(tmp_path, tmp_path)
    assert torch.equal(weights["layers.0.attention.dense.zero"], torch.zeros(64, 4, dtype=torch.int16))
    assert weights["layers.0.attention.qkv.zero"].any()


@pytest.mark.parametrize("version", [1, 2])
def test_a_symmetric_file_tells_its_version_itself(
    qwen2: Path, tmp_path: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    """GPTQModel has published v2 zero points under the name of v1."""
    scheme = replace(GPTQ, symmetric=True, version=version)
    rounded = write_quantized(qwen2, tmp_path, scheme, checkpoint_format="gptq_v2" if version == 1 else "gptq")
    checkpoint = open_quantized_checkpoint(tmp_path)
    assert not checkpoint.layout.zero and "zero points of a symmetric model are stored as" in caplog.text
    name = f"{ATTENTION}.o_proj"
    assert torch.equal(checkpoint.read_rows(name, 0, 64).dequantize(), rounded[name].weight)


# ---- engines ----


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logits_are_those_of_the_dequantized_model(plain: Path, tmp_path: Path, scheme: Scheme, dtype: str) -> None:
    rounded = write_quantized(plain, tmp_path / "quantized", scheme)
    dequantized = {name: layer.weight for name, layer in rounded.items()}
    expected = write_dequantized(plain, tmp_path / "dequantized", dequantized)
    assert_same_logits(engine_of(tmp_path / "quantized", tmp_path / "quantized", dtype), expected, dtype)


@pytest.mark.parametrize(
    "scheme", [SCHEMES["gptq-act-order"], SCHEMES["compressed-sym-act-order"]], ids=lambda s: s.method
)
def test_g_idx_decides_the_logits(qwen2: Path, tmp_path: Path, scheme: Scheme) -> None:
    write_quantized(qwen2, tmp_path, scheme)
    right = logits_of(engine_of(tmp_path, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if name.endswith("g_idx"):
            tensors[name] = tensors[name].sort().values
    save_file(tensors, tmp_path / "model.safetensors")
    assert (logits_of(engine_of(tmp_path, tmp_path)) - right).norm() > 0.1 * right.norm()


def test_act_order_without_effect_needs_no_order(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, replace(GPTQ, act_order=True), ordered=("none",))
    assert not open_quantized_checkpoint(tmp_path).layout.act_order


def test_a_g_idx_that_compressed_tensors_never_set_means_runs(qwen2: Path, tmp_path: Path) -> None:
    rounded = write_quantized(qwen2, tmp_path, replace(COMPRESSED, act_order=True), ordered=("none",))
    change_tensor(tmp_path, f"{ATTENTION}.o_proj.weight_g_idx", lambda g_idx: torch.full_like(g_idx, -1))
    weight = open_quantized_checkpoint(tmp_path).read_rows(f"{ATTENTION}.o_proj", 0, 64)
    assert torch.equal(weight.dequantize(), rounded[f"{ATTENTION}.o_proj"].weight)


@pytest.mark.parametrize("scheme", [GPTQ, replace(GPTQ, act_order=True), AWQ], ids=["gptq", "act-order", "awq"])
def test_a_quantized_lm_head_is_used_as_it_is(qwen2: Path, tmp_path: Path, scheme: Scheme) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", layers=1, **SHAPE | {"vocab": 104})
    rounded = write_quantized(plain, tmp_path / "quantized", scheme, also=("lm_head",))
    assert open_quantized_checkpoint(tmp_path / "quantized").quantizes_lm_head
    dequantized = {name: layer.weight for name, layer in rounded.items()}
    expected = write_dequantized(plain, tmp_path / "dequantized", dequantized)
    assert_same_logits(engine_of(tmp_path / "quantized", tmp_path / "quantized"), expected, "float32")


def test_an_lm_head_left_alone_may_be_rounded_to_int8(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, replace(GPTQ, symmetric=True))
    config = config_of(tmp_path)
    model = quantize_model(
        QWenForCausalLM(config, "float16"), QuantMode.use_weight_only(True, True), group_size=16, quantize_lm_head=True
    )
    load_from_quantized(model, open_quantized_checkpoint(tmp_path), config)
    expected = quantize_weight(load_file(qwen2 / "model.safetensors")["lm_head.weight"], 8)
    assert torch.equal(model.lm_head.weight.load(), expected.weight)
    assert torch.equal(model.lm_head.scale.load(), expected.scale)


# ---- ranks ----


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["gptq", "gptq-int8-sym", "gptq-per-channel", "awq", "compressed-plain-zeros"])
def test_the_ranks_together_hold_the_weights_bit_for_bit(plain: Path, tmp_path: Path, name: str, tp_size: int) -> None:
    """Four ranks cut groups of 32 in two: each has 16 of 64 columns of `dense`."""
    scheme = SCHEMES[name]
    write_quantized(plain, tmp_path, scheme)
    config = config_of(tmp_path)
    whole, ranks = weights_of(tmp_path, tmp_path), weights_of(tmp_path, tmp_path, tp_size)
    for linear in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        path = f"layers.1.{linear}"
        assert torch.equal(rejoined(path, ranks, config, scheme.bits), rejoined(path, whole, config, scheme.bits)), path


def test_groups_that_ranks_would_cut_too_small_are_refused_by_name(tmp_path: Path) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", layers=1, **SHAPE | {"mlp_width": 96})
    write_quantized(plain, tmp_path / "quantized", replace(GPTQ, group_size=32))
    with pytest.raises(ValueError, match="mlp.proj: a rank has 24 of 96 columns: groups of 32 would be cut to 8"):
        weights_of(tmp_path / "quantized", tmp_path / "quantized", tp_size=4)


def test_ranks_share_layers_in_act_order_whose_outputs_are_split(qwen2: Path, tmp_path: Path) -> None:
    """Each holds some of the outputs, and reads all inputs in the same order."""
    write_quantized(qwen2, tmp_path, replace(GPTQ, act_order=True), ordered=("q_proj", "k_proj", "v_proj", "up_proj"))
    config = config_of(tmp_path)
    (whole,), ranks = weights_of(tmp_path, tmp_path), weights_of(tmp_path, tmp_path, 2)
    for name in ("attention.qkv", "mlp.gate", "mlp.fc", "attention.dense", "mlp.proj"):
        path = f"layers.0.{name}"
        assert torch.equal(rejoined(path, ranks, config, 4), rejoined(path, [whole], config, 4)), path
        if not name.endswith(("dense", "proj")):
            assert all(torch.equal(rank[f"{path}.order"], whole[f"{path}.order"]) for rank in ranks)
    assert torch.equal(ranks[1]["layers.0.mlp.proj.order"], torch.arange(64, dtype=torch.int32))
    assert not torch.equal(whole["layers.0.mlp.gate.order"], whole["layers.0.mlp.fc.order"])


@pytest.mark.parametrize(
    "scheme",
    [replace(COMPRESSED, packs_zeros=False), replace(COMPRESSED, bits=8, symmetric=True)],
    ids=["int4", "int8"],
)
def test_a_quantized_lm_head_gets_rows_of_zeros_where_ranks_need_them(tmp_path: Path, scheme: Scheme) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", layers=1, **SHAPE | {"vocab": 9})
    folder = tmp_path / "quantized"
    write_quantized(plain, folder, scheme, also=("lm_head",))
    (whole,), ranks = weights_of(folder, folder), weights_of(folder, folder, 4)
    joined = rejoined("lm_head", ranks, config_of(plain), scheme.bits)  # the last of 4 x 3 rows are all padding
    assert torch.equal(joined[:9], rejoined("lm_head", [whole], config_of(plain), scheme.bits))
    assert torch.equal(joined[9:], torch.zeros(3, 64))


def test_nothing_but_its_rows_is_read_for_a_rank(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    checkpoint = open_quantized_checkpoint(tmp_path)
    read: dict[str, int] = {}
    real = HfCheckpoint._read

    def counted(self: HfCheckpoint, name: str, index: Any) -> torch.Tensor:
        tensor = real(self, name, index)
        read[name] = read.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(HfCheckpoint, "_read", counted)
    mapping = Mapping(world_size=4, rank=1, tp_size=4)
    model = model_of(checkpoint, config_of(tmp_path), "float16", mapping)
    assert not read
    for _, parameter in model.named_parameters():
        parameter.load()
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert read[f"{ATTENTION}.q_proj.qweight"] == sizes[f"{ATTENTION}.q_proj.qweight"] // 4
    assert read["model.layers.0.mlp.up_proj.scales"] == sizes["model.layers.0.mlp.up_proj.scales"] // 4
