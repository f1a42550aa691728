"""python -m tensorrt_llm.inspect: what it says is what the engine holds, and what is damaged it does not show."""

import hashlib
import json
import re
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from engines_of_modes import engine_of_mode, write_engine

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.inspect import accuracy_of, group_sizes, main, quantized_formats, weight_kinds
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.verdict import Gate, LayerError, Verdict

INT4_GROUPS = QuantMode.use_weight_only(True, per_group=True)
VERDICT = Verdict(
    reference="the checkpoint",
    text="calibration.jsonl",
    num_tokens=100,
    mean_kl=0.0125,
    top1_agreement=0.97,
    perplexity=1.25,
    unquantized_perplexity=1.24,
    worst_layers=(LayerError("layers.1.mlp", 0.14), LayerError("layers.0.attention", 0.05)),
    gate=Gate(mean_kl=0.1, layer_error=0.4),
    loss_was_allowed=False,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A quantized engine's file in its folder."""
    return write_engine(engine_of_mode(INT4_GROUPS, "W4A16", "float16", group_size=32), tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What goes to stdout, with code 0 and nothing on stderr."""
    assert main(list(map(str, arguments))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def facts(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(shown(capsys, "--json", *arguments))
    return result


# What is shown


def test_json_holds_the_engines_own_config(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, path)["config"] == json.loads(json.dumps(asdict(Engine.load(path).config)))


def test_a_folder_shows_what_its_file_shows(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, path.parent, "--plan") == shown(capsys, path, "--plan")


def test_the_header_digest_is_that_of_the_header(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = facts(capsys, path)["files"]
    raw = path.read_bytes()
    header = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
    digest = hashlib.sha256(header.replace(file["header_sha256"].encode(), b"0" * 64)).hexdigest()
    assert (file["header_sha256"], file["num_bytes"]) == (digest, len(raw))


def test_kinds_of_weights_and_of_nodes_add_up_to_all_of_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, found = Engine.load(path), facts(capsys, path)
    assert sum(kind["num_bytes"] for kind in found["weights"]) == found["weight_bytes"] == engine.weight_bytes
    assert sum(kind["count"] for kind in found["weights"]) == len(engine.weights)
    assert sum(found["nodes"].values()) == len(engine.plan.nodes)


def test_the_same_weight_of_all_layers_is_one_kind() -> None:
    kinds = {kind.name: kind.count for kind in weight_kinds(engine_of_mode(QuantMode(0)).plan)}
    assert kinds["layers.*.mlp.fc.weight"] == 2 and kinds["lm_head.weight"] == 1


def test_the_plan_is_shown_when_asked_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, plain = Engine.load(path), shown(capsys, path)
    assert shown(capsys, path, "--plan") == f"{plain}\n{engine.plan}\n"
    assert "plan" not in facts(capsys, path)
    assert facts(capsys, path, "--plan")["plan"] == json.loads(json.dumps(engine.plan.to_dict()))


@pytest.mark.parametrize(
    "line",
    [
        "Model QWenLMHeadModel: 2 layers of width 64, 4 heads of 16 (4 of keys and values)",
        "Limits 8 sequences, 128 tokens in, 96 out",
        "Made as float16, W4A16, quant_mode 33 (INT4_WEIGHTS | PER_GROUP)",
        "KV cache float16, 512 bytes a token",
        "Accuracy not measured",
        "2 x layers.*.mlp.fc.weight uint8[96, 32] 6,144 bytes int4, groups of 32",
        "6 x weight_only_quant_matmul",
    ],
)
def test_the_report_states(line: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in " ".join(shown(capsys, path).split())


# How it was made


@pytest.mark.parametrize(
    ("mode", "layout", "expected"),
    [
        (QuantMode(0), {}, {}),
        (QuantMode.INT8_KV_CACHE, {}, {}),
        (QuantMode.use_weight_only(), {}, {"layers": (8, None)}),
        (QuantMode.use_weight_only(), {"quantize_lm_head": True}, {"layers": (8, None), "lm_head": (8, None)}),
        (QuantMode.use_weight_only(True), {}, {"layers": (4, None)}),
        (INT4_GROUPS, {"group_size": 32}, {"layers": (4, 32)}),
        (INT4_GROUPS, {"group_size": 16, "zero": True, "act_order": True}, {"layers": (4, 16)}),
        (INT4_GROUPS, {"group_size": 32, "quantize_lm_head": True}, {"layers": (4, 32), "lm_head": (8, None)}),
        (QuantMode.use_smooth_quant(), {}, {"layers": (8, None)}),
        (QuantMode.use_smooth_quant(True, True), {}, {"layers": (8, None)}),
    ],
)
def test_bits_and_groups_are_those_the_model_was_quantized_to(
    mode: QuantMode, layout: dict[str, Any], expected: dict[str, tuple[int, int | None]]
) -> None:
    """Of all matrices of the layers alike, in fused nodes and in others."""
    formats = quantized_formats(engine_of_mode(mode, **layout).plan)
    assert {name.partition(".")[0]: form for name, form in formats.items()} == expected
    layers = [name for name in formats if name.startswith("layers.")]
    assert len(layers) == (2 * 5 if "layers" in expected else 0) and len(set(formats.values())) <= len(expected)


def test_group_sizes_leave_out_scales_of_whole_rows() -> None:
    assert group_sizes(engine_of_mode(INT4_GROUPS, group_size=32, quantize_lm_head=True).plan) == [32]


# Its verdict


def test_an_unquantized_engine_needs_no_verdict() -> None:
    assert accuracy_of(engine_of_mode(QuantMode(0)).config) == "not quantized"


@pytest.mark.parametrize("mode", [QuantMode.INT8_KV_CACHE, INT4_GROUPS])
def test_a_quantized_engine_without_a_verdict_says_so(mode: QuantMode) -> None:
    assert accuracy_of(engine_of_mode(mode, group_size=32).config) == "not measured"


def test_an_engine_whose_lm_head_alone_is_quantized_is_quantized() -> None:
    engine = engine_of_mode(QuantMode(0), "W8A16_LM_HEAD", quantize_lm_head=True)
    assert accuracy_of(engine.config) == "not measured"


def test_the_verdict_is_shown_with_its_worst_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of_mode(INT4_GROUPS, "W4A16", group_size=32)
    path = write_engine(Engine(replace(engine.config, verdict=VERDICT), engine.plan, engine.weights), tmp_path)
    output = shown(capsys, path)
    assert f"Accuracy  {VERDICT}\n" in output
    assert re.search(r"layers\.1\.mlp +relative error 14\.00%\n +layers\.0\.attention +relative error 5\.00%", output)
    assert facts(capsys, path)["config"]["verdict"]["mean_kl"] == 0.0125


# Damage and wrong arguments


def damage(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def refusal(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    """The one line on stderr, with code 1 and nothing on stdout."""
    assert main([str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("place", [4, 40, 2000, -1])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_flipped_bit_is_one_line(path: Path, place: int, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(path, place)
    assert str(path) in refusal(capsys, path if form == "file" else path.parent)


def test_a_damaged_rank_of_a_folder_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        write_engine(engine_of_mode(QuantMode(0), mapping=Mapping(2, rank, tp_size=2)), tmp_path) for rank in (1, 0)
    ]
    assert [Path(file["path"]) for file in facts(capsys, tmp_path)["files"]] == paths[::-1]
    damage(paths[0], -1)
    assert paths[0].name in refusal(capsys, tmp_path)


def test_a_config_json_of_another_engine_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = path.parent / "config.json"
    file.write_text(file.read_text().replace('"max_batch_size": 8', '"max_batch_size": 9'))
    assert "max_batch_size is 9" in refusal(capsys, path.parent)


@pytest.mark.parametrize("name", ["missing.engine", "config.json"])
def test_what_is_no_engine_is_one_line(path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in refusal(capsys, path.parent / name)


def test_a_folder_without_engine_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"is {tmp_path} a folder that build.py wrote?" in refusal(capsys, tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--plans", "x"], ["a", "b"]])
def test_wrong_arguments_end_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


# The command


def run_module(*arguments: str | Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        *(["-c", code] if code else ["-m", "tensorrt_llm.inspect"]),
    ]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_module_runs_as_a_command(path: Path) -> None:
    done = run_module(path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"Engine    {path}: ")


def test_its_name_hides_no_module_of_the_standard_library() -> None:
    code = "import tensorrt_llm.inspect, inspect, sys; print(inspect.signature(len), inspect is tensorrt_llm.inspect)"
    assert run_module(code=code).stdout == "(obj, /) False\n"


def test_it_loads_no_library_that_an_engine_does_without() -> None:
    code = "import tensorrt_llm.inspect, sys; print({'transformers', 'triton', 'matplotlib'} & set(sys.modules))"
    assert run_module(code=code).stdout == "set()\n"
