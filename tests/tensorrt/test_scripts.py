"""build.py --backend tensorrt and the scripts that run its plans, with the fake in NVIDIA's place, on the CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import build
import compiling.tensorrt_plans
import numpy as np
import pytest
import run
import summarize
import torch
from checkpoints import write_qwen1_checkpoint
from command_line import run_script
from fake_tensorrt import make_tensorrt

from tensorrt_llm.runtime import engine_folder

CHECKPOINT = Path(build.__file__).parent / "tiny_qwen_chat"
SMALL = ("--max_batch_size", "2", "--max_input_len", "32", "--max_output_len", "16", "--dtype", "float32")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A script in this process, on a machine that seems to have TensorRT: (exit code, stdout, stderr)."""
    trt = make_tensorrt()
    monkeypatch.setattr(compiling.tensorrt_plans, "tensorrt_for_building", lambda: trt)
    monkeypatch.setattr(build, "tensorrt_for_building", lambda: trt)
    monkeypatch.setattr(engine_folder, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(engine_folder, "_pick_gpu", lambda device, engine: torch.device("cpu"))

    def run_it(module: Any, args: type, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            run_script(module.main, args, None)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run_it


def build_both(script: Run, checkpoint: Path, folder: Path, *flags: str) -> tuple[Path, Path]:
    """An engine of ours and a plan of one checkpoint."""
    for name, backend in (("ours", ()), ("plan", ("--backend", "tensorrt"))):
        source = ("--hf_model_dir", checkpoint, "--output_dir", folder / name)
        code, _, err = script(build, build.BuildArgs, *source, *SMALL, *flags, *backend)
        assert code == 0, err
    return folder / "ours", folder / "plan"


def test_a_plan_lies_beside_its_description_and_config(script: Run, tmp_path: Path) -> None:
    _, plan = build_both(script, write_qwen1_checkpoint(tmp_path / "qwen1"), tmp_path)
    assert sorted(file.name for file in plan.iterdir()) == [
        "config.json",
        "qwen_float32_tp1_rank0.json",
        "qwen_float32_tp1_rank0.plan",
    ]
    written = json.loads((plan / "config.json").read_text())["builder_config"]
    assert written["backend"] == "tensorrt" and written["cache_length"] == 64


def test_run_gives_the_ids_of_our_own_engine(script: Run, tmp_path: Path) -> None:
    engines = build_both(script, write_qwen1_checkpoint(tmp_path / "qwen1"), tmp_path)
    np.save(tmp_path / "prompts.npy", np.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8, 0, 3]]))
    outputs = []
    for engine in engines:
        output = tmp_path / f"{engine.name}.npy"
        flags = ("--engine_dir", engine, "--input_file", tmp_path / "prompts.npy", "--output_npy", output)
        code, _, err = script(run, run.RunArgs, *flags, "--max_new_tokens", 12, "--device", "cpu")
        assert code == 0, err
        outputs.append(np.load(output))
    assert (outputs[0] == outputs[1]).all()


def test_int4_is_rounded_with_positive_scales_and_judged(script: Run, tmp_path: Path) -> None:
    """Our own engines have scales of both signs, which TensorRT would refuse."""
    flags = ("--use_weight_only", "--weight_only_precision", "int4", "--per_group", "--group_size", "16")
    checkpoint = write_qwen1_checkpoint(tmp_path / "qwen1")
    build_both(script, checkpoint, tmp_path, *flags, "--allow_accuracy_loss")
    described = json.loads((tmp_path / "plan" / "qwen_float32_tp1_rank0.json").read_text())
    assert described["engine"]["config"]["verdict"] is not None


def test_benchmark_serves_both_kinds_of_engines(script: Run, tmp_path: Path) -> None:
    build_both(script, write_qwen1_checkpoint(tmp_path / "qwen1"), tmp_path)
    flags = ("--engine_dir", tmp_path, "--batch_size", 1, 2, "--input_len", 8, "--output_len", 4, "--repeats", 1)
    code, out, err = script(
        benchmark, benchmark.BenchmarkArgs, "--backend", "trt_llm", *flags, "--warm_up", 1, "--device", "cpu"
    )
    assert code == 0, err
    assert "TensorRT float32" in out


def test_summarize_takes_a_plan(script: Run, tmp_path: Path) -> None:
    source = ("--hf_model_dir", CHECKPOINT, "--output_dir", tmp_path / "plan", "--backend", "tensorrt")
    limits = ("--max_batch_size", "1", "--max_input_len", "200", "--max_output_len", "8", "--dtype", "float32")
    assert script(build, build.BuildArgs, *source, *limits)[0] == 0
    flags = ("--engine_dir", tmp_path / "plan", "--tokenizer_dir", CHECKPOINT, "--max_ite", 1, "--max_new_tokens", 8)
    code, out, err = script(summarize, summarize.SummarizeArgs, "--backend", "trt_llm", *flags, "--device", "cpu")
    assert code == 0, err
    assert "TensorRT float32" in out


def test_debug_mode_is_for_our_own_engines(script: Run, tmp_path: Path) -> None:
    _, plan = build_both(script, write_qwen1_checkpoint(tmp_path / "qwen1"), tmp_path)
    code, _, err = script(run, run.RunArgs, "--engine_dir", plan, "--debug_mode")
    assert code == 1 and "--debug_mode looks into our own engines" in err
