"""Which files a quantized checkpoint is read from, and that whatever does not fit is refused by name."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.quantized_checkpoint import open_quantized_checkpoint
from checkpoints import write_qwen2_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_folders import Scheme, Tensors, write_quantized
from quantized_models import (
    SHAPE,
    change_config,
    change_tensor,
    config_of,
    rewrite,
    weights_of,
    write_plain,
)
from safetensors.torch import load_file, save_file

from tensorrt_llm.models import QWenConfig

GPTQ, AWQ, COMPRESSED = Scheme("gptq"), Scheme("awq"), Scheme("compressed-tensors")
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_checkpoint(tmp_path_factory.mktemp("qwen2"), num_kv_heads=2, layers=1, **SHAPE)


# ---- files ----


def drop_config(folder: Path) -> dict[str, Any]:
    """Take quantization_config out of config.json, as the first AutoGPTQ and AutoAWQ leave it."""
    config = json.loads((folder / "config.json").read_text())
    inner: dict[str, Any] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return inner


@pytest.mark.parametrize("base_name", ["gptq_model-4bit-16g", "mine", None])
def test_weights_are_found_by_the_name_that_quantize_config_gives(
    qwen2: Path, tmp_path: Path, base_name: str | None
) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    facts = drop_config(tmp_path) | {"model_file_base_name": base_name}
    del facts["quant_method"], facts["checkpoint_format"]  # the first releases know neither
    (tmp_path / "quantize_config.json").write_text(json.dumps(facts))
    (tmp_path / "model.safetensors").rename(tmp_path / f"{base_name or 'gptq_model-4bit-16g'}.safetensors")
    assert len(open_quantized_checkpoint(tmp_path).linears) == 7


def test_one_file_is_described_by_its_folder(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    (tmp_path / "model.safetensors").rename(tmp_path / "any.safetensors")
    assert len(open_quantized_checkpoint(tmp_path / "any.safetensors").linears) == 7


def test_shards_with_an_index_are_read(qwen2: Path, tmp_path: Path) -> None:
    rounded = write_quantized(qwen2, tmp_path, AWQ)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"gptq_model-1.safetensors": names[::2], "gptq_model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    name = f"{ATTENTION}.q_proj"
    weight = open_quantized_checkpoint(tmp_path).read_rows(name, 0, 64)
    assert torch.equal(weight.dequantize(), rounded[name].weight)


def test_the_names_of_the_first_autoawq_mean_the_same(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, AWQ)
    layout = open_quantized_checkpoint(tmp_path).layout
    drop_config(tmp_path)
    facts = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(facts))
    assert open_quantized_checkpoint(tmp_path).layout == layout


@pytest.mark.parametrize("generation", ["qwen1", "qwen2"])
def test_biases_of_zeros_are_ignored(tmp_path: Path, generation: str, caplog: pytest.LogCaptureFixture) -> None:
    """AutoGPTQ writes one for every layer."""
    rounded = write_quantized(write_plain(tmp_path / "plain", generation), tmp_path, GPTQ)

    def add_biases(tensors: Tensors) -> None:
        for name, layer in rounded.items():
            tensors.setdefault(f"{name}.bias", torch.zeros(len(layer.integers), dtype=torch.float16))

    rewrite(tmp_path, add_biases)
    with caplog.at_level(logging.INFO):
        weights_of(tmp_path, tmp_path)
    assert "a bias of zeros, which AutoGPTQ gives to every layer" in caplog.text


def test_a_config_with_quantized_weights_is_read_only_for_them(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    assert config_of(tmp_path) == config_of(qwen2)
    with pytest.raises(ValueError, match="quant_method is 'gptq'.*read by build.py .*--quant_ckpt_path"):
        QWenConfig.from_hf_dir(tmp_path)


# ---- what does not fit: one ValueError that names it ----

Damage = Callable[[Path], None]
Q = f"{ATTENTION}.q_proj"


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda folder: change_tensor(folder, name, change)


def facts(**changes: Any) -> Damage:
    return lambda folder: change_config(folder, **changes)


def without(name: str) -> Damage:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def added(**tensors: torch.Tensor) -> Damage:
    return lambda folder: rewrite(folder, lambda present: present.update(tensors))


def unquantized(name: str) -> Damage:
    def change(tensors: Tensors) -> None:
        for kind in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{kind}"]
        tensors[f"{name}.weight"] = torch.ones(64, 64, dtype=torch.float16)

    return lambda folder: rewrite(folder, change)


def beside(**content: Any) -> Damage:
    return lambda folder: (folder / "quantize_config.json").write_text(json.dumps(content)) and None


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scales: torch.Tensor) -> torch.Tensor:
        scales = scales.clone()
        scales[1, 2] = value
        return scales

    return change


def fewer_outputs(tensors: Tensors) -> None:
    for kind, count in (("qweight", 32), ("qzeros", 4), ("scales", 32)):
        tensors[f"{Q}.{kind}"] = tensors[f"{Q}.{kind}"][:, :count]


def group_of(**changes: Any) -> dict[str, Any]:
    (group,) = COMPRESSED.config()["config_groups"].values()
    weights = group["weights"] | {key: value for key, value in changes.items() if key in group["weights"]}
    rest = {key: value for key, value in changes.items() if key not in group["weights"]}
    return {"group_0": group | rest | {"weights": weights}}


ACT_ORDER = replace(GPTQ, act_order=True)
SYMMETRIC = replace(GPTQ, symmetric=True)
BAD: dict[str, tuple[Scheme, Damage, str]] = {
    "bits-3": (GPTQ, facts(bits=3), "bits in quantization_config of config.json is 3, expected 4 or 8"),
    "bits-2": (GPTQ, facts(bits=2), "bits in .* is 2, expected 4 or 8"),
    "bits-of-another-kind": (GPTQ, facts(bits=True), "bits in .* is True, expected 4 or 8"),
    "bits-that-tensors-deny": (
        GPTQ,
        facts(bits=8),
        r"scales is float16 \[8, 64\], expected .* \[4, 64\]: .*qweight of 8 bits and groups of 16",
    ),
    "group-size-that-tensors-deny": (
        GPTQ,
        facts(group_size=32),
        r"scales is float16 \[8, 64\], expected .* \[4, 64\]: .*qweight of 4 bits and groups of 32",
    ),
    "group-size-0": (GPTQ, facts(group_size=0), "group_size in .* is 0, expected -1 or 1 to"),
    "no-group-size": (GPTQ, facts(group_size=None), "group_size in .* is None, expected"),
    "group-size-that-does-not-divide": (
        GPTQ,
        facts(group_size=24),
        "qweight: has .* input columns, expected a multiple of the group size 24",
    ),
    "format": (
        GPTQ,
        facts(checkpoint_format="marlin"),
        "checkpoint_format in .* is 'marlin', expected .gptq. or .gptq_v2.",
    ),
    "marlin": (GPTQ, facts(is_marlin_format=True), "is_marlin_format in .* is True"),
    "method": (GPTQ, facts(quant_method="aqlm"), "quant_method in .* is 'aqlm', expected .gptq. or .awq. or"),
    "base-name-elsewhere": (
        GPTQ,
        facts(model_file_base_name="../model"),
        "model_file_base_name in .* is '../model', expected the name of a file",
    ),
    "two-answers": (
        GPTQ,
        beside(bits=8, group_size=16, sym=False),
        "bits of quantize_config.json is 8 but bits of quantization_config of config.json is 4, expected the same",
    ),
    "not-symmetric": (GPTQ, facts(sym=True), "qzeros stores zero points from .* as sym is true"),
    "two-versions": (
        SYMMETRIC,
        tensor(f"{Q}.qzeros", lambda zeros: torch.full_like(zeros, -0x77777778)),
        f"{Q}.qzeros stores zero points from 8 to 8, expected everywhere 7",
    ),
    "g-idx-length": (
        ACT_ORDER,
        tensor(f"{Q}.g_idx", lambda g_idx: g_idx[:-1]),
        rf"{Q}.g_idx is int32 \[63\], expected int32 \[64\]",
    ),
    "g-idx-dtype": (ACT_ORDER, tensor(f"{Q}.g_idx", torch.Tensor.long), f"{Q}.g_idx is int64"),
    "g-idx-missing": (ACT_ORDER, without(f"{Q}.g_idx"), f"has no tensor {Q}.g_idx"),
    "g-idx-unequal-groups": (
        ACT_ORDER,
        tensor(f"{Q}.g_idx", lambda g_idx: g_idx.clamp(max=2)),
        f"{Q}.g_idx: group 2 has 32 columns, expected 16 in each of 4 groups",
    ),
    "g-idx-range": (
        ACT_ORDER,
        tensor(f"{Q}.g_idx", lambda g_idx: g_idx + 1),
        f"{Q}.g_idx: groups are numbered 1 to 4, expected 0 to 3",
    ),
    "g-idx-of-k-and-q": (
        ACT_ORDER,
        tensor(f"{Q}.g_idx", lambda g_idx: g_idx.flip(0)),
        f"the g_idx of {Q} and {ATTENTION}.k_proj differ",
    ),
    "qweight-dtype": (
        GPTQ,
        tensor(f"{Q}.qweight", torch.Tensor.long),
        f"{Q}.qweight is int64 .*expected a matrix of int32",
    ),
    "qzeros-missing": (GPTQ, without(f"{Q}.qzeros"), f"has no tensor {Q}.qzeros"),
    "qweight-missing": (GPTQ, without(f"{Q}.qweight"), rf"1 missing: {Q}.weight \[64, 64\]; 3 left over: {Q}.g_idx"),
    "qzeros-shape": (
        GPTQ,
        tensor(f"{Q}.qzeros", lambda zeros: zeros[:-1]),
        rf"{Q}.qzeros is int32 \[3, 8\], expected int32 \[4, 8\]",
    ),
    "outputs-of-another-model": (
        GPTQ,
        lambda folder: rewrite(folder, fewer_outputs),
        rf"1 of wrong shape: {Q}.weight is \[32, 64\], expected \[64, 64\]",
    ),
    "scale-zero": (
        GPTQ,
        tensor(f"{Q}.scales", with_value(0)),
        f"{Q}.scales: the quantization scale of output 2 and group 1 is 0.0",
    ),
    "scale-nan": (GPTQ, tensor(f"{Q}.scales", with_value(float("nan"))), f"{Q}.scales: .* is nan, expected finite"),
    "scale-inf": (AWQ, tensor(f"{Q}.scales", with_value(float("inf"))), f"{Q}.scales: .* is inf, expected finite"),
    "scale-inf-compressed": (
        COMPRESSED,
        tensor(f"{Q}.weight_scale", with_value(float("inf"))),
        f"{Q}.weight_scale: the quantization scale of output 1 and group 2 is inf",
    ),
    "a-bias": (
        GPTQ,
        added(**{"model.layers.0.mlp.up_proj.bias": torch.ones(128)}),
        r"1 left over: model.layers.0.mlp.up_proj.bias \[128\]",
    ),
    "a-layer-left-alone": (
        GPTQ,
        unquantized(f"{ATTENTION}.o_proj"),
        f"1 of wrong dtype: {ATTENTION}.o_proj.weight is float16, expected int4",
    ),
    "awq-version": (AWQ, facts(version="gemv"), "version in .* is 'gemv', expected .gemm."),
    "awq-marlin": (AWQ, facts(version="marlin"), "version in .* is 'marlin', expected .gemm."),
    "awq-gemv-fast": (AWQ, facts(version="gemv_fast"), "version in .* is 'gemv_fast', expected .gemm."),
    "awq-bits": (AWQ, facts(bits=8), "bits in .* is 8, expected 4"),
    "awq-shape": (AWQ, tensor(f"{Q}.qzeros", lambda zeros: zeros[:, 1:]), rf"{Q}.qzeros is int32 \[4, 7\], expected"),
    "compressed-format": (
        COMPRESSED,
        facts(format="marlin-24"),
        "format in .* is 'marlin-24', expected .pack-quantized.",
    ),
    "compressed-activations": (
        COMPRESSED,
        facts(config_groups=group_of(input_activations={"num_bits": 8})),
        "input_activations in .* expected null: only weights",
    ),
    "compressed-bits": (
        COMPRESSED,
        facts(config_groups=group_of(num_bits=3)),
        "weights.num_bits in .* is 3, expected one of 4, 8",
    ),
    "compressed-type": (COMPRESSED, facts(config_groups=group_of(type="float")), "weights.type in .* is 'float'"),
    "compressed-strategy": (
        COMPRESSED,
        facts(config_groups=group_of(strategy="block")),
        "weights.strategy in .* is 'block'",
    ),
    "compressed-two-groups": (
        COMPRESSED,
        facts(config_groups=group_of() | {"group_1": group_of(num_bits=8)["group_0"]}),
        "expected the same weights in all groups",
    ),
    "compressed-kv-cache": (COMPRESSED, facts(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme in .* not supported"),
    "compressed-sparse": (
        COMPRESSED,
        facts(sparsity_config={"format": "sparse-24"}),
        "sparsity_config in .* not supported",
    ),
    "compressed-shape": (
        COMPRESSED,
        tensor(f"{Q}.weight_shape", lambda shape: shape.flip(0) + 1),
        rf"{Q}.weight_shape is \[65, 65\], expected \[64, 64\]",
    ),
    "compressed-zero-missing": (COMPRESSED, without(f"{Q}.weight_zero_point"), f"has no tensor {Q}.weight_zero_point"),
    "compressed-g-idx-missing": (
        COMPRESSED,
        facts(config_groups=group_of(actorder="group")),
        "has no tensor .*weight_g_idx",
    ),
}


@pytest.mark.parametrize(("scheme", "damage", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_by_name(
    qwen2: Path, tmp_path: Path, scheme: Scheme, damage: Damage, message: str
) -> None:
    write_quantized(qwen2, tmp_path, scheme)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        weights_of(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_act_order_cannot_be_split_along_its_input(qwen2: Path, tmp_path: Path, name: str) -> None:
    write_quantized(qwen2, tmp_path, ACT_ORDER, ordered=(name,))
    weights_of(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=f"{name} is quantized with act-order .*cannot be split .*expected tp_size 1"):
        weights_of(tmp_path, tmp_path, tp_size=2)


def test_a_quantized_lm_head_of_a_tied_model_is_left_over(tmp_path: Path) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", layers=1, **SHAPE | {"vocab": 104})
    write_quantized(plain, tmp_path, GPTQ, also=("lm_head",))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"1 left over: lm_head.weight \[104, 64\]"):
        weights_of(tmp_path, tmp_path)


@pytest.mark.parametrize("stored", [False, True])
def test_the_embedding_of_a_tied_model_is_its_lm_head(tmp_path: Path, stored: bool) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", layers=1, tie=True, **SHAPE)
    write_quantized(plain, tmp_path, GPTQ)
    if stored:
        rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1}))
    (weights,) = weights_of(tmp_path, tmp_path)
    assert "lm_head.weight" not in weights and weights["vocab_embedding.weight"].shape == (101, 64)


def test_a_folder_that_says_nothing_of_quantization_is_refused(qwen2: Path) -> None:
    with pytest.raises(ValueError, match="nothing says how the checkpoint is quantized, expected quantize_config.json"):
        open_quantized_checkpoint(qwen2)


def test_a_folder_without_quantized_layers_is_refused(qwen2: Path, tmp_path: Path) -> None:
    write_quantized(qwen2, tmp_path, GPTQ)
    (tmp_path / "model.safetensors").write_bytes((qwen2 / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no quantized linear layers, expected those of a W4A16_GPTQ checkpoint"):
        open_quantized_checkpoint(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder, expected a quantized checkpoint"):
        open_quantized_checkpoint(tmp_path / "nowhere")


JSON_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([4, 8, 16, -1, "gptq", "gptq_v2", "awq", "gemm", "compressed-tensors", "pack-quantized", [], {}])
    | st.dictionaries(st.sampled_from(["weights", "num_bits", "format"]), st.integers() | st.none(), max_size=2)
)


@pytest.mark.parametrize("scheme", [GPTQ, AWQ, COMPRESSED], ids=lambda scheme: scheme.method)
def test_any_quantization_config_is_read_or_a_value_error(qwen2: Path, tmp_path: Path, scheme: Scheme) -> None:
    write_quantized(qwen2, tmp_path, scheme)
    original = (tmp_path / "config.json").read_text()
    keys = [*scheme.config(), "meta", "is_marlin_format", "sparsity_config"]

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(changes=st.dictionaries(st.sampled_from(keys), JSON_VALUES, min_size=1, max_size=3))
    def check(changes: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(original)
        change_config(tmp_path, **changes)
        try:
            assert len(open_quantized_checkpoint(tmp_path).linears) == 7
        except ValueError as error:
            assert str(tmp_path) in str(error) or Q in str(error) or "model.layers.0" in str(error)

    check()
