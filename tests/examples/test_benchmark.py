"""Speed figures: what is computed from which times, on which prompts, and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import BenchmarkArgs, Figures, Shape, measure_backend, random_prompts, seconds_since_process_start
from benchmark import main as benchmark
from build import main as build
from build_args import BuildArgs
from checkpoints import write_qwen1_checkpoint
from command_line import run_script

from tensorrt_llm.runtime import SamplingConfig

ROOT = Path(__file__).resolve().parents[2]


class FakeBackend:
    """Takes one second for a prompt and a quarter for every further token, on a clock that the test moves."""

    name = "fake"
    device = torch.device("cpu")
    vocab_size = 11

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[int, int, int]] = []

    def generate(self, prompts: Any, sampling: SamplingConfig) -> list[list[int]]:
        count = sampling.for_sequence(0, 1).max_new_tokens
        self.calls.append((len(prompts), len(prompts[0]), count))
        self.now += 1.0 + 0.25 * (count - 1)
        return [[1] * count for _ in prompts]

    def logits(self, ids: list[int]) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen1_checkpoint(tmp_path_factory.mktemp("benchmark") / "checkpoint")


@pytest.fixture(scope="module")
def engine_dir(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "engine"
    build(
        BuildArgs(
            hf_model_dir=checkpoint,
            output_dir=folder,
            dtype="float32",
            max_batch_size=2,
            max_input_len=16,
            max_output_len=8,
        )
    )
    return folder


def test_decode_speed_leaves_out_the_time_to_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    monkeypatch.setattr(time, "perf_counter", lambda: backend.now)
    args = BenchmarkArgs(batch_size=[3], input_len=[7], output_len=[9])
    (figures,) = measure_backend(lambda: backend, args, is_first=False)
    # 3 * 8 tokens in 8 steps of a quarter, and 3 * 16 in the 3 seconds of the whole run.
    assert (figures.first_token_seconds, figures.decode_tokens_per_second, figures.tokens_per_second) == (1.0, 12, 16)


def test_runs_to_warm_up_come_before_those_that_count() -> None:
    backend = FakeBackend()
    args = BenchmarkArgs(batch_size=[2], input_len=[7], output_len=[9], warm_up=2, repeats=3)
    measure_backend(lambda: backend, args, is_first=True)
    assert backend.calls == [(1, 7, 2)] + [(2, 7, 1)] * 5 + [(2, 7, 9)] * 5


def test_a_run_of_one_token_has_no_decode_speed() -> None:
    figures = Figures("x", Shape(1, 8, 1), 0.5, 0.6, None, None)
    assert figures.decode_tokens_per_second is None


def test_lists_stand_side_by_side_and_one_value_is_for_all() -> None:
    args = BenchmarkArgs(batch_size=[1, 32], input_len=[128], output_len=[128, 64])
    assert args.shapes() == [Shape(1, 128, 128), Shape(32, 128, 64)]


def test_prompts_are_random_and_the_same_every_time() -> None:
    prompts = random_prompts(Shape(3, 50, 1), vocab_size=11, seed=0)
    assert prompts == random_prompts(Shape(3, 50, 1), vocab_size=11, seed=0)
    assert prompts[0] != prompts[1] and {token for prompt in prompts for token in prompt} == set(range(11))


def test_the_time_since_the_process_started_counts_what_was_before_python() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; import benchmark; print(benchmark.seconds_since_process_start())"
    started = time.monotonic()
    output = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(ROOT / "examples" / "qwen")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    outside = time.monotonic() - started
    # Loading torch alone takes longer than this.
    assert 0.3 < float(output.stdout) < outside + 0.1
    assert seconds_since_process_start() > outside


def test_both_backends_stand_in_one_table(
    checkpoint: Path, engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(
        BenchmarkArgs(
            backend="both",
            engine_dir=engine_dir,
            hf_model_dir=checkpoint,
            data_type="fp32",
            batch_size=[1, 2],
            input_len=[8],
            output_len=[4],
            repeats=1,
            device="cpu",
            output_json=tmp_path / "figures.json",
        )
    )
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [
        ["trt_llm float32", "1", "8", "4"],
        ["trt_llm float32", "2", "8", "4"],
        ["HF float32", "1", "8", "4"],
        ["HF float32", "2", "8", "4"],
    ]
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert [run["ready_seconds"] is not None for run in runs] == [True, True, False, False]
    assert all(run["decode_tokens_per_second"] > 0 for run in runs)


def test_dummy_weights_need_only_config_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    benchmark(
        BenchmarkArgs(
            backend="hf",
            hf_model_dir=tmp_path,
            dummy_weights=True,
            data_type="bf16",
            input_len=[8],
            output_len=[2],
            repeats=1,
            device="cpu",
        )
    )
    assert "| HF bfloat16 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "3"], "--batch_size is 3, expected at most 2 as"),
        (["--input_len", "17"], "--input_len is 17, expected at most 16 as"),
        (["--input_len", "16", "--output_len", "9"], "--input_len + output_len is 25, expected at most 24 as"),
        (["--output_len", "0"], "--output_len is 0, expected at least 1"),
        (["--batch_size", "1", "2", "--input_len", "1", "2", "3"], "--batch_size has 2 values, expected 1, or 3"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--backend", "both"], "--hf_model_dir is missing"),
    ],
)
def test_a_wrong_flag_is_one_line(
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    argv = ["benchmark.py", "--engine_dir", str(engine_dir), "--device", "cpu"]
    argv += ["--input_len", "8", "--output_len", "2", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        run_script(benchmark, BenchmarkArgs, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 1 and message in line
