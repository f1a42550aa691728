"""build.py with quantization flags: what it builds, what it says of it, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import build
import pytest
import torch
import weight
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from command_line import run_script
from compiling.args import BuildArgs
from models_for_tests import on_cpu, random_prompts
from quantized_folders import Scheme, write_ammo, write_quantized

from tensorrt_llm import Engine
from tensorrt_llm.quantization import QuantizedWeight, QuantMode, quantize_weight
from tensorrt_llm.runtime import SamplingConfig

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--max_batch_size", "2", "--max_input_len", "32", "--max_output_len", "32", "--tokens_per_block", "8")
INT8 = ("--use_weight_only",)
INT4 = ("--use_weight_only", "--weight_only_precision", "int4")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_qwen1_checkpoint(tmp_path / "qwen", hidden=64, heads=4, mlp_width=96)


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """build.py in this process: (exit code, stdout, the last line of stderr)."""

    def run_build(*flags: object, source: Path = checkpoint) -> tuple[int, str, str]:
        fixed = ("--hf_model_dir", source, "--output_dir", tmp_path / "engine", "--accuracy_tokens", 64)
        monkeypatch.setattr(sys, "argv", list(map(str, ["build.py", *fixed, *SMALL, *flags])))
        with pytest.raises(SystemExit) as caught:
            run_script(build.main, BuildArgs, None)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err.strip().splitlines()[-1] if err.strip() else ""

    return run_build


@pytest.mark.parametrize(
    ("flags", "mode", "algo"),
    [
        (INT8, QuantMode.INT8_WEIGHTS, "W8A16"),
        (INT4, QuantMode.INT4_WEIGHTS, "W4A16"),
        ((*INT4, "--per_group", "--group_size", 32), QuantMode.INT4_WEIGHTS | QuantMode.PER_GROUP, "W4A16"),
        ((*INT8, "--int8_kv_cache"), QuantMode.INT8_WEIGHTS | QuantMode.INT8_KV_CACHE, "W8A16"),
        (("--int8_kv_cache",), QuantMode.INT8_KV_CACHE, ""),
        ((*INT8, "--quantize_lm_head"), QuantMode.INT8_WEIGHTS, "W8A16"),
    ],
)
def test_an_engine_says_how_it_was_quantized_and_what_that_costs(
    flags: tuple[object, ...], mode: QuantMode, algo: str, run: Run, tmp_path: Path
) -> None:
    code, out, err = run(*flags, "--accuracy_gate", 1)
    assert code == 0, err
    engine = Engine.from_dir(tmp_path / "engine")
    config = json.loads((tmp_path / "engine/config.json").read_text())["builder_config"]
    verdict = engine.config.verdict
    assert (engine.config.quant_mode, engine.config.quant_algo) == (int(mode), algo)
    assert verdict is not None and verdict.passes and f"Accuracy: {verdict}" in out
    assert config["quant_mode"] == int(mode) and config["verdict"]["mean_kl"] == verdict.mean_kl
    assert verdict.text == "random token ids"  # the checkpoint has no tokenizer
    on_cpu(engine).decode_batch(random_prompts([5], 97), SamplingConfig(max_new_tokens=3))


def test_an_unquantized_engine_has_no_verdict(run: Run, tmp_path: Path) -> None:
    _, out, _ = run()
    assert Engine.from_dir(tmp_path / "engine").config.verdict is None and "Accuracy" not in out


def test_integers_take_the_place_of_weights(run: Run, tmp_path: Path) -> None:
    sizes = {}
    for name, flags in {"plain": (), "int8": INT8, "int4": INT4}.items():
        run(*flags, "--dtype", "float32", "--accuracy_gate", 1)
        engine = Engine.from_dir(tmp_path / "engine")
        sizes[name] = sum(spec.num_bytes for spec in engine.plan.weights if spec.name.endswith("mlp.fc.weight"))
    assert sizes["int8"] * 4 == sizes["int4"] * 8 == sizes["plain"]


def test_a_broken_quantization_fails_the_build_and_names_its_layer(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def permuted_in_one_layer(tensor: object, bits: int, group_size: int, **options: bool) -> QuantizedWeight:
        quantized = quantize_weight(tensor, bits, group_size, **options)  # type: ignore[arg-type]
        seen.append(quantized.shape)
        if quantized.shape == (64, 96) and sum(shape == (64, 96) for shape in seen) == 2:
            return QuantizedWeight(bits, quantized.weight, quantized.scale.flip(0))
        return quantized

    monkeypatch.setattr(weight, "quantize_weight", permuted_in_one_layer)
    code, _, err = run(*INT8)
    assert code == 1 and "loses more than the gate allows" in err and "worst layers: layers.1.mlp" in err
    assert not (tmp_path / "engine").exists()


def test_a_missed_gate_can_be_allowed_and_is_recorded(run: Run, tmp_path: Path) -> None:
    code, _, err = run(*INT4, "--accuracy_gate", 0)
    assert code == 1 and "gate 0" in err and "--allow_accuracy_loss" in err
    code, out, _ = run(*INT4, "--accuracy_gate", 0, "--allow_accuracy_loss")
    verdict = Engine.from_dir(tmp_path / "engine").config.verdict
    assert code == 0 and verdict is not None and verdict.loss_was_allowed and not verdict.passes
    assert "WORSE than the gate, allowed" in out


def test_ranks_share_one_verdict(run: Run, tmp_path: Path) -> None:
    code, _, err = run(*INT8, "--world_size", 2, "--tp_size", 2, "--accuracy_gate", 1)
    assert code == 0, err
    verdicts = [Engine.from_dir(tmp_path / "engine", rank).config.verdict for rank in range(2)]
    assert verdicts[0] is not None and verdicts[0] == verdicts[1]


def test_accuracy_can_be_measured_on_ids(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("1,2,3,4\n5,6,7\n")
    _, out, err = run(*INT8, "--accuracy_gate", 1, "--accuracy_text", tmp_path / "ids.csv")
    assert "on 5 tokens of ids.csv" in out, err


def test_random_weights_are_not_judged(run: Run, tmp_path: Path) -> None:
    for flags in (INT8, (*INT4, "--per_group", "--group_size", 32), ("--use_smooth_quant", "--per_token")):
        code, out, err = run(*flags, "--dummy_weights")
        assert code == 0 and "not measured, the weights are random" in out, err
        on_cpu(Engine.from_dir(tmp_path / "engine")).decode_batch([[1, 2]], SamplingConfig(max_new_tokens=2))


def test_random_scales_of_groups_are_such_as_a_kernel_holds_in_float16(run: Run, tmp_path: Path) -> None:
    run(*INT4, "--per_group", "--group_size", 32, "--dummy_weights")
    weights = Engine.from_dir(tmp_path / "engine").weights
    scales = [weights[name] for name in weights if name.endswith("scale") and weights[name].shape[1] > 1]
    assert scales and all(torch.equal(scale.half().float(), scale) for scale in scales)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weight_only_precision", "int4"), "--weight_only_precision is given without --use_weight_only"),
        (("--per_group",), "--per_group is given without --use_weight_only"),
        ((*INT4, "--group_size", 64), "--group_size is given without --per_group"),
        ((*INT8, "--per_group"), "--weight_only_precision int8 and --per_group exclude each other"),
        ((*INT4, "--per_token"), "--per_token is given without --use_smooth_quant"),
        (("--use_smooth_quant",), "--use_smooth_quant is given without --ft_dir_path"),
        ((*INT8, "--use_smooth_quant"), "--use_smooth_quant"),
        ((*INT8, "--quant_ckpt_path", "x"), "--quant_ckpt_path is given without --weight_only_precision int4_gptq"),
        ((*INT4, "--per_group", "--group_size", 48), "layers.0.attention.qkv: group size is 48, expected a divisor"),
        ((*INT4, "--per_group", "--group_size", 0), "--group_size is 0, expected at least 1"),
        ((*INT8, "--accuracy_gate", -1), "--accuracy_gate is -1.0, expected nats"),
        ((*INT8, "--accuracy_text", "missing.txt"), "no tokenizer"),
    ],
)
def test_flags_that_would_build_something_else_are_refused(flags: tuple[object, ...], words: str, run: Run) -> None:
    code, _, err = run(*flags)
    assert code == 1 and words in err, err


def test_an_unknown_precision_is_a_bad_argument(run: Run) -> None:
    assert run("--use_weight_only", "--weight_only_precision", "int3")[0] == 2


def test_grouped_heads_and_tied_embeddings_build_too(run: Run, tmp_path: Path) -> None:
    source = write_qwen2_checkpoint(tmp_path / "qwen2", hidden=64, heads=4, num_kv_heads=2, mlp_width=96, tie=True)
    code, _, err = run(*INT8, "--quantize_lm_head", "--int8_kv_cache", "--accuracy_gate", 1, source=source)
    assert code == 0, err


# Quantized checkpoints


@pytest.mark.parametrize(
    ("scheme", "precision", "algo"),
    [
        (Scheme("gptq", act_order=True), "int4_gptq", "W4A16_GPTQ"),
        (Scheme("gptq", bits=8, symmetric=True), "int8_gptq", "W8A16_GPTQ"),
        (Scheme("awq"), "int4_awq", "W4A16_AWQ"),
        (Scheme("compressed-tensors"), "int4_awq", "W4A16"),
    ],
)
def test_a_published_checkpoint_is_judged_by_what_is_at_hand(
    scheme: Scheme, precision: str, algo: str, run: Run, tmp_path: Path, checkpoint: Path
) -> None:
    """Alone it can only be held against its own dequantized weights; beside the plain checkpoint its loss shows."""
    folder = tmp_path / "quantized"
    write_quantized(checkpoint, folder, scheme)
    flags = ("--use_weight_only", "--weight_only_precision", precision, "--accuracy_gate", 1)
    verdicts = []
    for source, more in ((folder, ()), (checkpoint, ("--quant_ckpt_path", folder))):
        code, _, err = run(*flags, *more, source=source)
        assert code == 0, err
        config = Engine.from_dir(tmp_path / "engine").config
        assert config.quant_algo == algo and config.verdict is not None
        verdicts.append(config.verdict)
    own, plain = verdicts
    assert "own dequantized weights" in own.reference and own.mean_kl < 1e-5
    assert "unquantized weights of qwen" in plain.reference and plain.mean_kl > 10 * own.mean_kl


def test_ammo_weights_are_judged_with_their_input_scales(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    write_ammo(checkpoint, tmp_path / "awq.pt", group_size=16)
    flags = ("--use_weight_only", "--weight_only_precision", "int4_awq", "--quant_ckpt_path", tmp_path / "awq.pt")
    code, _, err = run(*flags, "--accuracy_gate", 1)
    verdict = Engine.from_dir(tmp_path / "engine").config.verdict if code == 0 else None
    assert verdict is not None and verdict.mean_kl < 0.3, err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weight_only_precision", "int4_awq"), "but the checkpoint is W4A16_GPTQ of 4 bits"),
        (("--weight_only_precision", "int8_gptq"), "but the checkpoint is W4A16_GPTQ of 4 bits"),
        (
            ("--weight_only_precision", "int4_gptq", "--per_group", "--group_size", 64),
            "--group_size is 64, but the checkpoint has groups of 16",
        ),
        (("--weight_only_precision", "int4"), "quantization_config"),
    ],
)
def test_a_quantized_checkpoint_is_not_taken_for_another(
    flags: tuple[object, ...], words: str, run: Run, tmp_path: Path, checkpoint: Path
) -> None:
    write_quantized(checkpoint, tmp_path / "quantized", Scheme("gptq"))
    code, _, err = run("--use_weight_only", *flags, source=tmp_path / "quantized")
    assert code == 1 and words in err, err
