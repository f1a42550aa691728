"""quantize.py as a user runs it: published layouts, engines of what folders hold, one line for what is wrong."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantize
import torch
from calibration.calibrated_layers import QuantizedLinear
from calibration.int4_packing import pack_awq, pack_gptq
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoints import write_qwen2_checkpoint
from command_line import run_script
from compiling.compile_model import compile_model
from models_for_tests import LIMITS, engine_from_checkpoint
from quantize import QuantizeArgs
from quantized_folders import awq_element, dequantize_elements, gptq_element
from quantized_models import SHAPE, assert_same_logits, engine_of, logits_of, write_plain
from safetensors.torch import load_file, save_file
from weight import load_from_hf_qwen

from tensorrt_llm import Engine
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantizedWeight, QuantMode
from tensorrt_llm.quantization.quantize import pack_int4

Tensors = dict[str, torch.Tensor]
Run = Callable[..., tuple[int, str, str]]

GROUP = 16
FORMATS = {
    "gptq": ("--qformat", "int4_gptq"),
    "gptq-act-order": ("--qformat", "int4_gptq", "--desc_act"),
    "gptq-zero-points": ("--qformat", "int4_gptq", "--asym"),
    "awq": ("--qformat", "int4_awq"),
}


@pytest.fixture(params=["qwen1", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """qwen2 has grouped KV heads."""
    return write_plain(tmp_path / "plain", request.param)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """quantize.py in this process, writing tmp_path/int4 from 8 texts of token ids: (exit code, stdout, last line of
    stderr)."""
    ids = np.random.default_rng(0).integers(0, 101, (8, 64), dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)

    def run_quantize(checkpoint: Path, *flags: object, output: Path = tmp_path / "int4") -> tuple[int, str, str]:
        given = ["--model_dir", checkpoint, "--export_path", output, "--group_size", GROUP]
        argv = ["quantize.py", *given, "--calibration_text", tmp_path / "ids.npy", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as caught:
            run_script(quantize.main, QuantizeArgs, None)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, "".join(err.replace("\r", "\n").splitlines()[-1:])

    return run_quantize


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, line = result
    assert code == 1 and line.startswith("quantize.py: error: "), line
    for word in words:
        assert word in line


def tensors_of(folder: Path) -> Tensors:
    """Of all shards, as the index lists them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for file in set(index.values()) for name, tensor in load_file(folder / file).items()}
    assert found.keys() == index.keys()
    return found


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] -> [..., 8], from the low end."""
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15


def dequantize_gptq(tensors: Tensors) -> torch.Tensor:
    """[n, k] by AutoGPTQ's formula."""
    integers = nibbles(tensors["qweight"].T).flatten(1)  # [n, k]
    zeros = nibbles(tensors["qzeros"]).flatten(1).T + 1  # [n, groups]
    groups = tensors["g_idx"].long()
    return (integers - zeros[:, groups]).float() * tensors["scales"].float().T[:, groups]


def dequantize_awq(tensors: Tensors) -> torch.Tensor:
    """[n, k] by AutoAWQ's formula."""
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    integers, zeros = (nibbles(tensors[name])[..., places].flatten(1) for name in ("qweight", "qzeros"))
    spread = [part.repeat_interleave(GROUP, dim=0) for part in (zeros, tensors["scales"].float())]
    return ((integers - spread[0]).float() * spread[1]).T


def write_dequantized(folder: Path, target: Path) -> Path:
    """The folder as a plain checkpoint of float32."""
    config = json.loads((folder / "config.json").read_text())
    dequantize = {"gptq": dequantize_gptq, "awq": dequantize_awq}[config.pop("quantization_config")["quant_method"]]
    tensors = tensors_of(folder)
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    made = {}
    for module in modules:
        packed = {name: tensors.pop(f"{module}.{name}") for name in ("qweight", "qzeros", "scales")}
        if f"{module}.g_idx" in tensors:
            packed["g_idx"] = tensors.pop(f"{module}.g_idx")
        made[f"{module}.weight"] = dequantize(packed).contiguous()
    target.mkdir()
    save_file({name: tensor.float() for name, tensor in (tensors | made).items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def rounded_engine(plain: Path) -> Engine:
    """Weights rounded to INT4 in groups, without calibration."""
    config = QWenConfig.from_hf_dir(plain)
    model = QWenForCausalLM(config, "float32")
    quantize_model(model, QuantMode.use_weight_only(use_int4_weights=True, per_group=True), group_size=GROUP)
    load_from_hf_qwen(model, plain, config)
    return compile_model(model, LIMITS)


# ---- layouts ----


def random_linear(rows: int, columns: int, with_order: bool, with_zero: bool) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand((rows, columns // GROUP), generator=generator) - 0.5).half().float()
    zero = torch.randint(-7, 8, scale.shape, generator=generator, dtype=torch.int16)
    order = torch.randperm(columns, generator=generator).int()
    weight = QuantizedWeight(4, pack_int4(q), scale, zero if with_zero else None)
    return QuantizedLinear(weight, order if with_order else None)


@pytest.mark.parametrize("with_order", [False, True])
@pytest.mark.parametrize("with_zero", [False, True])
def test_gptq_unpacks_element_by_element(with_order: bool, with_zero: bool) -> None:
    linear = random_linear(24, 48, with_order, with_zero)
    packed = pack_gptq(linear)
    assert [packed[name].shape for name in ("qweight", "qzeros", "scales", "g_idx")] == [
        (6, 24),
        (3, 3),
        (3, 24),
        (48,),
    ]
    found = dequantize_elements(24, 48, lambda n, k: gptq_element(packed, n, k, 4, less=1))
    assert torch.equal(found, linear.dequantize())


@pytest.mark.parametrize("with_zero", [False, True])
def test_awq_unpacks_element_by_element(with_zero: bool) -> None:
    linear = random_linear(24, 48, with_order=False, with_zero=with_zero)
    packed = pack_awq(linear)
    assert [packed[name].shape for name in ("qweight", "qzeros", "scales")] == [(48, 3), (3, 3), (3, 24)]
    found = dequantize_elements(24, 48, lambda n, k: awq_element(packed, n, k, GROUP))
    assert torch.equal(found, linear.dequantize())


# ---- what is written ----


@pytest.mark.parametrize("flags", FORMATS.values(), ids=FORMATS)
def test_an_engine_computes_what_the_folder_holds_and_loses_less_than_by_rounding(
    plain: Path, run: Run, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    code, out, err = run(plain, *flags)
    assert code == 0, err
    assert "Quantized checkpoint:" in out and "on 512 tokens" in out
    engine = engine_of(tmp_path / "int4", tmp_path / "int4")
    assert_same_logits(engine, write_dequantized(tmp_path / "int4", tmp_path / "dequantized"), "float32")
    expected = logits_of(engine_from_checkpoint(plain))
    error, error_of_rounding = (
        (logits_of(made) - expected).norm() / expected.norm() for made in (engine, rounded_engine(plain))
    )
    assert error < 0.95 * error_of_rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_and_unquantized_tensors_are_of_the_dtype(run: Run, tmp_path: Path, dtype: str) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    assert run(plain, "--qformat", "int4_awq", "--dtype", dtype)[0] == 0
    tensors = tensors_of(tmp_path / "int4")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, getattr(torch, dtype)}
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("flags", [FORMATS["gptq"], FORMATS["awq"]], ids=["gptq", "awq"])
def test_one_scale_per_output(run: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    assert run(plain, *flags, "--group_size", -1)[0] == 0
    assert tensors_of(tmp_path / "int4")["transformer.h.1.mlp.c_proj.scales"].shape == (1, 64)
    logits_of(engine_of(tmp_path / "int4", tmp_path / "int4"))


def test_gptq_changes_matrices_only(plain: Path, run: Run, tmp_path: Path) -> None:
    assert run(plain, *FORMATS["gptq"])[0] == 0
    source, made = HfCheckpoint(plain), tensors_of(tmp_path / "int4")
    kept = source.tensors().keys() & made.keys()
    matrices = {name for name, info in source.tensors().items() if len(info.shape) == 2 and ".1." in name}
    assert matrices and not matrices & kept
    for name in kept:
        assert torch.equal(made[name], source.read(name))


def test_awq_divides_norms_and_what_feeds_a_weight_channel_by_channel(run: Run, tmp_path: Path) -> None:
    """With grouped KV heads a value feeds many channels of the output projection, so these two stay."""
    changed = {}
    for generation in ("qwen1", "qwen2"):
        plain = write_plain(tmp_path / generation, generation)
        assert run(plain, *FORMATS["awq"], output=tmp_path / f"{generation}-int4")[0] == 0
        source, made = HfCheckpoint(plain), tensors_of(tmp_path / f"{generation}-int4")
        kept = source.tensors().keys() & made.keys()
        changed[generation] = {name for name in kept if not torch.equal(made[name], source.read(name))}
    norms = [f"{norm}.weight" for norm in ("ln_1", "ln_2")]
    assert changed["qwen1"] == {
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in (*norms, "attn.c_attn.bias")
    }
    norms = [f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    assert changed["qwen2"] == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in norms}


def test_the_folder_describes_itself_as_its_tool_does(run: Run, tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    original = json.loads((plain / "config.json").read_text())
    assert run(plain, *FORMATS["gptq-act-order"], output=tmp_path / "gptq")[0] == 0
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    described = config.pop("quantization_config")
    assert described == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert described.items() >= {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}.items()
    assert described["sym"] is True and described["checkpoint_format"] == "gptq"
    assert config == original | {"torch_dtype": "float16"}

    assert run(plain, *FORMATS["awq"], output=tmp_path / "awq")[0] == 0
    described = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert described.items() >= {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}.items()
    assert json.loads((tmp_path / "awq" / "quant_config.json").read_text())["q_group_size"] == GROUP


def test_tokenizer_and_generation_settings_come_along_but_neither_weights_nor_code(run: Run, tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    for name in ("qwen.tiktoken", "generation_config.json", "modeling_qwen.py", "pytorch_model.bin", "README.md"):
        (plain / name).write_text("{}")
    assert run(plain, *FORMATS["gptq"])[0] == 0
    shards = {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    described = {"config.json", "quantize_config.json", "model.safetensors.index.json"}
    copied = {"qwen.tiktoken", "generation_config.json"}
    assert {file.name for file in (tmp_path / "int4").iterdir()} == shards | described | copied


def test_a_tied_embedding_is_written_once(run: Run, tmp_path: Path) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", tie=True, layers=1, **SHAPE)
    assert run(plain, *FORMATS["gptq"])[0] == 0
    assert "lm_head.weight" not in tensors_of(tmp_path / "int4")
    logits_of(engine_of(tmp_path / "int4", tmp_path / "int4"))


def test_texts_are_drawn_by_seed_and_bounded_in_number_and_length(run: Run, tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    bounds: dict[str, tuple[Any, ...]] = {
        "on 192 tokens": ("--calib_size", 3),
        "on 80 tokens": ("--max_length", 10),
        "on 100 tokens": ("--calib_tokens", 100),
    }
    for number, (words, flags) in enumerate(bounds.items()):
        code, out, _ = run(plain, *FORMATS["gptq"], *flags, output=tmp_path / f"bounded{number}")
        assert code == 0 and words in out
    made = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"seed{number}"
        assert run(plain, *FORMATS["gptq"], "--calib_size", 2, "--seed", seed, output=output)[0] == 0
        made.append(tensors_of(output)["transformer.h.0.attn.c_attn.qweight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_an_empty_folder_is_filled(run: Run, tmp_path: Path) -> None:
    (tmp_path / "int4").mkdir()
    assert run(write_plain(tmp_path / "plain", "qwen1"), *FORMATS["gptq"])[0] == 0


# ---- bad input ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--group_size", 48), ("c_attn.weight", "64 inputs", "--group_size 48")),
        (("--group_size", 0), ("--group_size is 0", "-1")),
        (("--group_size", -1, "--desc_act"), ("--desc_act", "--group_size -1")),
        (("--qformat", "int4_awq", "--desc_act"), ("--desc_act", "int4_gptq")),
        (("--qformat", "int4_awq", "--asym"), ("--asym", "int4_gptq")),
        (("--calib_size", 0), ("--calib_size is 0", "at least 1")),
        (("--calib_tokens", 1), ("--calib_tokens is 1", "at least 2")),
        (("--max_length", -3), ("--max_length is -3",)),
        (("--calibration_text", "nowhere.npy"), ("nowhere.npy", "no such file")),
        (("--device", "tpu"), ("tpu", "expected cpu or cuda")),
        (("--model_dir", "nowhere"), ("nowhere", "config.json")),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_written(
    run: Run, tmp_path: Path, flags: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    before = sorted(tmp_path.iterdir())
    assert_refused(run(plain, "--qformat", "int4_gptq", *flags, output=tmp_path / "made" / "int4"), *words)
    assert sorted(tmp_path.iterdir()) == before


def test_text_without_a_tokenizer_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n")
    plain = write_plain(tmp_path / "plain", "qwen1")
    assert_refused(run(plain, *FORMATS["gptq"], "--calibration_text", tmp_path / "text.txt"), str(plain))


def test_a_folder_that_holds_something_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    assert_refused(run(plain, *FORMATS["gptq"], output=plain), "--export_path", "exists")
    assert_refused(run(plain, *FORMATS["gptq"], output=plain / "config.json" / "int4"), "config.json", "is a file")


def test_a_full_disk_is_seen_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(run(plain, *FORMATS["gptq"], output=tmp_path / "a" / "b"), "the folder takes", "0.00 GiB free")
    assert not (tmp_path / "a").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(run: Run, tmp_path: Path) -> None:
    assert run(write_plain(tmp_path / "plain", "qwen1"), *FORMATS["gptq"])[0] == 0
    assert_refused(run(tmp_path / "int4", *FORMATS["gptq"], output=tmp_path / "again"), "quantization_config")


def test_sizes_that_words_cannot_hold_are_refused(run: Run, tmp_path: Path) -> None:
    plain = write_qwen2_checkpoint(tmp_path / "plain", hidden=32, heads=4, num_kv_heads=1, head_dim=4, mlp_width=48)
    assert_refused(run(plain, *FORMATS["gptq"]), "k_proj.weight: is 4 x 32", "multiples of 8")


@pytest.mark.parametrize("flags", [FORMATS["gptq"], FORMATS["awq"]], ids=["gptq", "awq"])
def test_activations_that_overflow_are_named_and_leave_nothing_behind(
    run: Run, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    plain = write_plain(tmp_path / "plain", "qwen1")
    tensors = load_file(plain / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors["transformer.h.1.ln_2.weight"] *= 1e25
    save_file(tensors, plain / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    assert_refused(run(plain, *flags), "the input of layers.1.mlp.fc", "infinite or NaN")
    assert sorted(tmp_path.iterdir()) == before
