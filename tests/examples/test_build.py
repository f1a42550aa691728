"""build.py as a user runs it: engines from checkpoints, one line for whatever is wrong, nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import build
import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from command_line import run_script
from compiling.args import BuildArgs
from models_for_tests import on_cpu, random_prompts
from safetensors.torch import load_file, save_file

from tensorrt_llm import Engine
from tensorrt_llm.runtime import SamplingConfig

SCRIPT = Path(build.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ("--max_batch_size", "2", "--max_input_len", "32", "--max_output_len", "32", "--tokens_per_block", "8")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def qwen1(tmp_path: Path) -> Path:
    return write_qwen1_checkpoint(tmp_path / "qwen1", shards=2)


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return write_qwen2_checkpoint(tmp_path / "qwen2", heads=4, num_kv_heads=2, tie=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """build.py in this process, writing to tmp_path/engine by default: (exit code, stdout, stderr without the bar)."""

    def run_build(checkpoint: Path | None, *flags: object, output: Path = tmp_path / "engine") -> tuple[int, str, str]:
        source = () if checkpoint is None else ("--hf_model_dir", checkpoint)
        argv = ["build.py", *source, "--output_dir", output, *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as caught:
            run_script(build.main, BuildArgs, None)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, without_bar(err)

    return run_build


def without_bar(stderr: str) -> str:
    """The lines that are not a progress bar's."""
    lines = stderr.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.startswith("rank "))


def assert_refused(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    """The code, and one line that says all the words."""
    found, _, err = result
    assert found == code and len(err.splitlines()) == 1 and err.startswith("build.py: error: "), err
    for word in words:
        assert word in err


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# What is built


@pytest.mark.parametrize("generation", ["qwen1", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_engine_is_built(
    run: Run, request: pytest.FixtureRequest, tmp_path: Path, generation: str, dtype: str
) -> None:
    code, out, err = run(request.getfixturevalue(generation), "--dtype", dtype)
    assert (code, err) == (0, "") and "peak host memory" in out and "engine size" in out
    assert files(tmp_path / "engine") == ["config.json", f"qwen_{dtype}_tp1_rank0.engine"]
    engine = Engine.from_dir(tmp_path / "engine")
    assert engine.config.limits.max_input_len == 32
    assert all(weight.dtype == getattr(torch, dtype) for weight in engine.weights.values())


@pytest.mark.parametrize("generation", ["qwen1", "qwen2"])
@pytest.mark.parametrize("parallel", [(), ("--parallel_build",)], ids=["serial", "parallel"])
def test_each_rank_has_its_file(
    run: Run, request: pytest.FixtureRequest, tmp_path: Path, generation: str, parallel: tuple[str, ...]
) -> None:
    checkpoint = request.getfixturevalue(generation)
    code, _, err = run(checkpoint, "--dtype", "float32", "--world_size", 2, "--tp_size", 2, *parallel)
    assert (code, err) == (0, "")
    names = [f"qwen_float32_tp2_rank{rank}.engine" for rank in range(2)]
    assert files(tmp_path / "engine") == ["config.json", *names]
    first, second = (Engine.from_dir(tmp_path / "engine", rank) for rank in range(2))
    assert not torch.equal(first.weights["lm_head.weight"], second.weights["lm_head.weight"])


def test_the_script_runs_alone(qwen1: Path, tmp_path: Path) -> None:
    """As a subprocess in another folder: nothing of this test's paths helps it."""
    command = [sys.executable, SCRIPT, "--hf_model_dir", qwen1, "--output_dir", tmp_path / "engine", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "100%" in done.stderr and "Built in" in done.stdout
    assert "Traceback" not in done.stderr
    Engine.from_dir(tmp_path / "engine")


def test_dummy_weights_need_only_config_json(run: Run, qwen1: Path, tmp_path: Path) -> None:
    for shard in qwen1.glob("model*"):
        shard.unlink()
    assert run(qwen1, "--dummy_weights", "--device", "cpu")[0] == 0
    sampling = SamplingConfig(max_new_tokens=3, return_dict=True, gather_context_logits=True)
    output = on_cpu(Engine.from_dir(tmp_path / "engine")).decode_batch(random_prompts([5], 97), sampling)
    assert torch.stack(output["context_logits"]).isfinite().all()


def test_dummy_weights_are_the_same_every_time(run: Run, qwen1: Path, tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        run(qwen1, "--dummy_weights", "--device", "cpu", output=tmp_path / name)
        contents.append((tmp_path / name / "qwen_float16_tp1_rank0.engine").read_bytes())
    assert contents[0] == contents[1]


def test_a_dry_run_prints_the_estimate_and_writes_nothing(run: Run, qwen1: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, out, err = run(qwen1, "--dry_run")
    assert (code, err) == (0, "")
    assert all(what in out for what in ("host memory to build", "disk", "device memory to run"))
    assert files(tmp_path) == before


def test_the_optimized_network_can_be_seen(run: Run, qwen1: Path, tmp_path: Path) -> None:
    run(qwen1, "--visualize")
    text = (tmp_path / "engine" / "network_rank0.txt").read_text()
    assert "add_rms_norm" in text and text == f"{Engine.from_dir(tmp_path / 'engine').plan}\n"


def test_a_second_build_replaces_the_first(run: Run, qwen1: Path, tmp_path: Path) -> None:
    run(qwen1, "--max_input_len", 16)
    run(qwen1, "--max_input_len", 24)
    assert Engine.from_dir(tmp_path / "engine").config.limits.max_input_len == 24


def test_the_longest_output_has_two_flags(run: Run, qwen1: Path, tmp_path: Path) -> None:
    run(qwen1, "--max_new_tokens", 77)
    assert Engine.from_dir(tmp_path / "engine").config.limits.max_output_len == 77


def test_the_originals_plugin_flags_are_accepted(run: Run, qwen1: Path) -> None:
    flags = ("--use_gpt_attention_plugin", "float16", "--use_gemm_plugin", "--remove_input_padding", "--paged_kv_cache")
    assert run(qwen1, *flags, "--use_inflight_batching", "--enable_context_fmha")[0] == 0


# What is refused


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_missing_config_json_is_named(run: Run, tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "nowhere"), "nowhere/config.json", "cannot be read")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"architectures": 3}', "[" * 100_000])
def test_a_malformed_config_json_is_named(run: Run, qwen1: Path, content: str) -> None:
    (qwen1 / "config.json").write_text(content)
    assert_refused(run(qwen1), "config.json", "expected" if content != '{"architectures": 3}' else "supported")


def test_an_unknown_architecture_is_named(run: Run, qwen1: Path) -> None:
    edit_json(qwen1 / "config.json", architectures=["LlamaForCausalLM"])
    assert_refused(run(qwen1), "LlamaForCausalLM", "QWenLMHeadModel", "Qwen2ForCausalLM")


def test_an_unsupported_option_is_named(run: Run, qwen2: Path) -> None:
    edit_json(qwen2 / "config.json", use_sliding_window=True)
    assert_refused(run(qwen2), "use_sliding_window", "sliding-window attention is not supported")


def test_a_missing_shard_is_named(run: Run, qwen1: Path) -> None:
    (qwen1 / "model-00002-of-00002.safetensors").unlink()
    assert_refused(run(qwen1), "model-00002-of-00002.safetensors", "cannot be read")


def test_a_checkpoint_without_weights_says_what_it_looked_for(run: Run, qwen1: Path) -> None:
    for shard in qwen1.glob("model*"):
        shard.unlink()
    assert_refused(run(qwen1), "no weights found", "model.safetensors")


def test_a_truncated_shard_is_named(run: Run, qwen1: Path) -> None:
    shard = qwen1 / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(run(qwen1), shard.name, "truncated")


def test_a_wrong_shape_is_named(run: Run, qwen1: Path) -> None:
    edit_json(qwen1 / "config.json", intermediate_size=64)
    assert_refused(run(qwen1), "of wrong shape", "transformer.h.0.mlp.w1.weight is [48, 32], expected [32, 32]")


def enlarge(file: Path, name: str) -> None:
    """Give a tensor one element that float16 cannot hold, in its last column."""
    tensors = load_file(file)
    tensors[name][0, -1] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_value_beyond_float16_names_the_tensor_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    checkpoint = write_qwen2_checkpoint(tmp_path / "large", dtype=torch.bfloat16)
    enlarge(checkpoint / "model.safetensors", "model.layers.1.mlp.down_proj.weight")
    assert_refused(
        run(checkpoint, "--dtype", "float16"), "layers.1.mlp.proj.weight", "does not fit float16", "bfloat16"
    )
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max_batch_size", 0), ("max_batch_size is 0", "expected")),
        (("--max_input_len", -5), ("max_input_len is -5", "expected")),
        (("--max_output_len", 2**40), ("max_output_len is 1099511627776", "expected")),
        (("--tokens_per_block", 48), ("tokens_per_block is 48", "power of two")),
        (("--max_num_tokens", 1), ("max_num_tokens is 1", "max_batch_size=2")),
        (("--max_beam_width", 4), ("max_beam_width is 4", "beam search is not supported")),
        (("--world_size", 0), ("world_size is 0", "expected at least 1")),
        (("--world_size", -1), ("world_size is -1", "expected at least 1")),
        (("--world_size", 2), ("tp_size 1 x pp_size 1 is 1", "expected world_size 2")),
        (("--world_size", 3, "--tp_size", 3), ("num_attention_heads is 4", "tp_size 3")),
        (("--world_size", 2, "--pp_size", 2), ("pp_size is 2", "not supported")),
        (("--device", "tpu"), ("device is 'tpu'", "expected cpu or cuda")),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(
    run: Run, qwen1: Path, tmp_path: Path, flags: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run(qwen1, *flags), *words)
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_but_absent_is_an_error(run: Run, qwen1: Path) -> None:
    assert_refused(run(qwen1, "--dummy_weights", "--device", "cuda"), "no CUDA device")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "int3"), ("int3", "float32", "float16", "bfloat16")),
        (("--max_batch_size", "many"), ("--max_batch_size", "many")),
        (("--no_such_flag",), ("--no_such_flag",)),
    ],
    ids=str,
)
def test_an_argument_that_is_no_argument_is_code_2(
    run: Run, qwen1: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run(qwen1, *flags), *words, code=2)


def test_a_build_without_a_checkpoint_is_code_2(run: Run, tmp_path: Path) -> None:
    assert_refused(run(None), "--hf_model_dir is missing", "only --tune", code=2)
    assert files(tmp_path) == []


# Tuned


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The engines that are tuned, on a GPU that is not there."""
    engines: list[Path | None] = []

    def tune(engine: Engine, device: torch.device, on_measured: Callable[..., None]) -> str:
        engines.append(engine.path)
        return "5 tactics timed"

    monkeypatch.setattr(build, "tune", tune)
    monkeypatch.setattr(build, "pick_device", lambda name: torch.device("cuda", 0))
    return engines


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_tuning_without_a_gpu_is_code_2_and_nothing_is_built(run: Run, qwen1: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    for checkpoint in (qwen1, None):
        assert_refused(run(checkpoint, "--tune"), "--tune times kernels on a GPU", "there is none", code=2)
    assert files(tmp_path) == before


def test_an_engine_is_tuned_after_its_build_and_again_without_its_checkpoint(
    run: Run, qwen1: Path, tmp_path: Path, tuned: list[Path | None]
) -> None:
    engine = tmp_path / "engine" / "qwen_float16_tp1_rank0.engine"
    code, out, _ = run(qwen1, "--tune")
    assert code == 0 and tuned == [engine] and "Built in" in out and "5 tactics timed" in out
    written = engine.stat().st_mtime_ns
    code, out, _ = run(None, "--tune")
    assert code == 0 and tuned == [engine] * 2 and "Built in" not in out and engine.stat().st_mtime_ns == written


def test_there_is_nothing_to_tune_in_a_batch_invariant_engine(run: Run, qwen1: Path, tuned: list[Path | None]) -> None:
    code, out, _ = run(qwen1, "--tune", "--batch_invariant")
    assert code == 0 and not tuned and "Nothing to tune" in out


def test_a_new_engine_has_no_timings_of_the_one_before(run: Run, qwen1: Path, tmp_path: Path) -> None:
    run(qwen1)
    (tmp_path / "engine" / "tactics.json").write_text("of other shapes")
    assert run(qwen1)[0] == 0
    assert files(tmp_path / "engine") == ["config.json", "qwen_float16_tp1_rank0.engine"]


def test_a_file_in_the_place_of_the_output_folder_stays(run: Run, qwen1: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("mine")
    assert_refused(run(qwen1), "engine is a file, expected a folder")
    assert (tmp_path / "engine").read_text() == "mine"


def test_an_output_folder_below_a_file_is_refused(run: Run, qwen1: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(run(qwen1, output=tmp_path / "file" / "engine"), "file/engine")


def test_an_unwritable_output_folder_is_named(
    run: Run, qwen1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops; so the refusal is the system call's."""

    def refuse(path: str, mode: int = 0o777) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert_refused(run(qwen1), "Permission denied", str(tmp_path / "engine"))


def test_a_full_disk_is_seen_before_the_build(
    run: Run, qwen1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    assert_refused(run(qwen1, output=tmp_path / "a" / "b"), "the engine takes", "the disk has")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    run: Run, qwen1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert_refused(run(qwen1, output=tmp_path / "a" / "b"), "No space left on device")
    assert not (tmp_path / "a").exists()


def test_a_failed_build_leaves_the_engine_before_it(run: Run, qwen1: Path, tmp_path: Path) -> None:
    run(qwen1)
    before = {name: (tmp_path / "engine" / name).read_bytes() for name in files(tmp_path / "engine")}
    shard = qwen1 / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    run(qwen1)
    assert {name: (tmp_path / "engine" / name).read_bytes() for name in files(tmp_path / "engine")} == before


def test_a_failing_rank_of_a_parallel_build_leaves_nothing(run: Run, tmp_path: Path) -> None:
    checkpoint = write_qwen1_checkpoint(tmp_path / "large", dtype=torch.bfloat16)
    enlarge(checkpoint / "model.safetensors", "transformer.h.1.mlp.c_proj.weight")  # its last column: rank 1 alone
    flags = ("--dtype", "float16", "--world_size", 2, "--tp_size", 2, "--parallel_build")
    assert_refused(run(checkpoint, *flags), "layers.1.mlp.proj.weight")
    assert not (tmp_path / "engine").exists()


# Interrupted


# Each weight takes its time, so that the signal meets the build in its middle.
SLOW_BUILD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import build
from tensorrt_llm import Parameter
load = Parameter.load
Parameter.load = lambda self: (time.sleep(0.3), load(self))[1]
build.run_script(build.main, build.BuildArgs, None)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_build_leaves_nothing(qwen1: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "a" / "engine"
    command = [sys.executable, "-c", SLOW_BUILD, SCRIPT.parent, "--hf_model_dir", qwen1, "--output_dir", output, *SMALL]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(output.glob(".building-*/.*.partial")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and without_bar(err) == "-c: interrupted"
    assert not (tmp_path / "a").exists()


def test_an_interrupted_parallel_build_leaves_nothing(qwen1: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the group; only the parent speaks."""
    output = tmp_path / "engine"
    command = [sys.executable, SCRIPT, "--hf_model_dir", qwen1, "--output_dir", output, *SMALL]
    command += ["--world_size", "2", "--tp_size", "2", "--parallel_build"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(output.glob(".building-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)  # the ranks' processes start now, which takes them seconds
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and without_bar(err) == "build.py: interrupted"
    assert not output.exists()
