"""benchmark.py from its flags to its table, files and charts, on small engines; and what it refuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import BenchmarkArgs, Candidate, measure_candidate
from benchmark import main as benchmark
from benchmarking.workload import Shape, Workload, equal_requests
from build import main as build
from checkpoints import write_qwen1_checkpoint
from command_line import run_script
from compiling.args import BuildArgs
from engines_of_modes import engine_of_mode, write_engine
from process_age import seconds_since_process_start
from timed_backends import TimedBackend

from tensorrt_llm.quantization import QuantMode

ROOT = Path(__file__).resolve().parents[2]
READ_RATE = 1e9


@pytest.fixture(autouse=True)
def known_read_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes a GiB."""
    monkeypatch.setattr("benchmark.measure_read_rate", lambda device: READ_RATE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen1_checkpoint(tmp_path_factory.mktemp("benchmark") / "checkpoint")


@pytest.fixture(scope="module")
def engine_dir(checkpoint: Path) -> Path:
    return build_engine(checkpoint, checkpoint.parent / "engine")


def build_engine(checkpoint: Path, folder: Path, **flags: Any) -> Path:
    limits = {"max_batch_size": 2, "max_input_len": 16, "max_output_len": 8}
    build(BuildArgs(hf_model_dir=checkpoint, output_dir=folder, dtype="float32", **limits, **flags))
    return folder


def write_lengths(folder: Path, *lengths: tuple[int, int]) -> Path:
    path = folder / "lengths.json"
    path.write_text(json.dumps([{"input_len": first, "output_len": second} for first, second in lengths]))
    return path


def cells_of(table: str) -> list[list[str]]:
    """The header and the rows of what was printed."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def png_size(path: Path) -> int:
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG")
    return len(raw)


def test_lists_stand_side_by_side_and_one_value_is_for_all() -> None:
    args = BenchmarkArgs(batch_size=[1, 32], input_len=[128], output_len=[128, 64])
    assert args.shapes() == [Shape(1, 128, 128), Shape(32, 128, 64)]


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
            engine_dir=[engine_dir],
            hf_model_dir=checkpoint,
            data_type="fp32",
            batch_size=[1, 2],
            input_len=[8],
            output_len=[16],  # enough for the clock of a busy machine
            repeats=1,
            device="cpu",
            output_json=tmp_path / "figures.json",
        )
    )
    _, *rows = cells_of(capsys.readouterr().out)
    assert [row[:4] for row in rows] == [
        ["trt_llm float32", "1", "8", "16"],
        ["trt_llm float32", "2", "8", "16"],
        ["HF float32", "1", "8", "16"],
        ["HF float32", "2", "8", "16"],
    ]
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert [run["ready_seconds"] is not None for run in runs] == [True, True, False, False]
    assert all(run["decode_tokens_per_second"] > 0 for run in runs)
    assert all(run["read_bytes_per_second"] == READ_RATE and run["roofline_share"] > 0 for run in runs)
    # Engine and Hugging Face hold the same weights in the same dtype.
    assert [run["step_bytes"] for run in runs[:2]] == [run["step_bytes"] for run in runs[2:]]


def test_a_dataset_is_served_at_every_batch_size_and_compared_with_the_fastest_hugging_face(
    checkpoint: Path, engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(
        BenchmarkArgs(
            backend="both",
            engine_dir=[engine_dir],
            hf_model_dir=checkpoint,
            data_type="fp32",
            dataset=[write_lengths(tmp_path, (5, 3), (16, 8), (1, 1), (9, 4))],
            trt_max_batch_size=[1, 2],
            hf_max_batch_size=[1, 4],
            hf_repeats=1,
            device="cpu",
            output_json=tmp_path / "figures.json",
            output_markdown=tmp_path / "table.md",
            output_chart=tmp_path,
        )
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    header, *rows = cells_of(printed)
    assert [row[:5] for row in rows] == [
        ["trt_llm float32", "4 of lengths", "1", "7.75", "4"],
        ["trt_llm float32", "4 of lengths", "2", "7.75", "4"],
        ["HF float32", "4 of lengths", "1", "7.75", "4"],
        ["HF float32", "4 of lengths", "4", "7.75", "4"],
    ]
    ratios = [float(row[header.index("x HF")]) for row in rows]
    assert max(ratios[2:]) == 1
    fastest = ratios.index(1.0, 2)
    # Of so few tokens of so small a model one alone may take as long as all of them: then there is no rate of decodes.
    decode_ratios = [row[header.index("decode x HF")] for row in rows]
    assert decode_ratios[fastest] in ("1.00", "-")
    assert all(ratio == "-" or float(ratio) > 0 for ratio in decode_ratios)
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert [len(run["run_seconds"]) for run in runs] == [3, 3, 1, 1]
    assert all((run["input_tokens"], run["output_tokens"]) == (31, 16) for run in runs)
    assert all(png_size(tmp_path / f"{name}.png") for name in ("requests_per_second", "tokens_per_second"))


def test_an_engine_without_a_batch_size_takes_its_own(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = [write_lengths(tmp_path, (5, 3), (2, 2), (4, 1))]
    benchmark(BenchmarkArgs(engine_dir=[engine_dir], dataset=dataset, num_prompts=2, device="cpu"))
    assert cells_of(capsys.readouterr().out)[1][:3] == ["trt_llm float32", "2 of lengths", "2"]


def test_sharegpt_needs_its_tokenizer_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = ROOT / "examples" / "qwen" / "tiny_qwen_chat"
    dataset = tmp_path / "talks.json"
    turns = [{"from": "human", "value": "你好，请问你叫什么？"}, {"from": "gpt", "value": "我叫通义千问。"}]
    dataset.write_text(json.dumps([{"conversations": turns}] * 3))
    limits = {"max_batch_size": 2, "max_input_len": 64, "max_output_len": 64}
    build(BuildArgs(hf_model_dir=chat, output_dir=tmp_path / "engine", dtype="float32", **limits))
    flags = {"dataset": [dataset], "num_prompts": 2, "tokenizer_dir": chat, "device": "cpu", "repeats": 1}
    benchmark(BenchmarkArgs(engine_dir=[tmp_path / "engine"], **flags))
    assert cells_of(capsys.readouterr().out)[-1][1] == "2 of talks"


@pytest.mark.parametrize(
    "mode",
    [
        QuantMode.use_smooth_quant(),
        QuantMode.use_smooth_quant(per_token=True, per_channel=True),
        QuantMode.use_smooth_quant(per_token=True, per_channel=True).set_int8_kv_cache(),
        QuantMode.INT8_KV_CACHE,
    ],
    ids=["smooth", "smooth per token", "smooth with INT8 KV", "INT8 KV"],
)
def test_engines_with_int8_activations_or_cache_serve_datasets_and_equal_prompts(
    mode: QuantMode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_engine(engine_of_mode(mode), tmp_path / "engine")
    flags: dict[str, Any] = {"engine_dir": [tmp_path / "engine"], "repeats": 1, "device": "cpu"}
    benchmark(BenchmarkArgs(dataset=[write_lengths(tmp_path, (5, 3), (16, 8))], **flags))
    benchmark(BenchmarkArgs(batch_size=[2], input_len=[8], output_len=[16], **flags))
    assert [row[1] for row in cells_of(capsys.readouterr().out)] == ["requests", "2 of lengths", "batch", "2"]


def test_several_engines_are_rows_of_one_table(
    checkpoint: Path, engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_engine(checkpoint, tmp_path / "int8", use_weight_only=True, allow_accuracy_loss=True)
    capsys.readouterr()
    flags = {"input_len": [8], "output_len": [4], "repeats": 1, "device": "cpu"}
    benchmark(BenchmarkArgs(engine_dir=[engine_dir, other], output_json=tmp_path / "figures.json", **flags))
    rows = cells_of(capsys.readouterr().out)[1:]
    assert [row[0] for row in rows] == ["trt_llm float32", "trt_llm float32 W8A16"]
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert runs[1]["step_bytes"] < runs[0]["step_bytes"]


def test_files_of_several_measurements_make_one_table_and_its_charts(
    engine_dir: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"input_len": [8], "output_len": [4], "repeats": 1, "device": "cpu"}
    files = [tmp_path / "engine.json", tmp_path / "hf.json"]
    benchmark(BenchmarkArgs(engine_dir=[engine_dir], output_json=files[0], **flags))
    benchmark(BenchmarkArgs(backend="hf", hf_model_dir=checkpoint, output_json=files[1], **flags))
    capsys.readouterr()
    benchmark(BenchmarkArgs(from_json=files, output_chart=tmp_path / "both.png"))
    header, *rows = cells_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["trt_llm float32", "HF float16"]
    assert float(rows[0][header.index("x HF")]) > 0
    assert png_size(tmp_path / "both_requests_per_second.png") and png_size(tmp_path / "both_tokens_per_second.png")


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


def test_a_backend_is_ready_after_an_answer_of_two_tokens() -> None:
    backend = TimedBackend()
    candidate = Candidate(lambda: backend, [(equal_requests(Shape(3, 7, 9), 11, 0), 3)], repeats=1)
    (first,) = measure_candidate(candidate, warm_up=0, planning_seconds=0.0)
    assert backend.calls[0] == ("serve", 1, 2)
    (later,) = measure_candidate(candidate, warm_up=0, planning_seconds=None)
    assert first.ready_seconds and later.ready_seconds is None


def test_a_batch_of_hugging_face_that_memory_does_not_hold_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class SmallBackend(TimedBackend):
        kind = "hf"

        def serve(self, prompts: Any, output_lens: Any, batch_size: int, on_tokens: Any) -> None:
            if batch_size > 1:
                raise torch.OutOfMemoryError("a message of many lines")
            super().serve(prompts, output_lens, batch_size, on_tokens)

    workload = Workload(Path("lengths.json"), [[1], [2]], [2, 2])
    rows = measure_candidate(Candidate(SmallBackend, [(workload, 2), (workload, 1)], repeats=1), 0, None)
    assert [row.batch_size for row in rows] == [1]
    assert [record.getMessage() for record in caplog.records] == ["timed, lengths, batch 2: out of memory, left out"]


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> object:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", *map(str, flags)])
    with pytest.raises(SystemExit) as exit_:
        run_script(benchmark, BenchmarkArgs, None)
    return exit_.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "3"], "--batch_size is 3, expected at most 2 as"),
        (["--input_len", "17"], "--input_len is 17, expected at most 16 as"),
        (["--input_len", "16", "--output_len", "9"], "--input_len + output_len is 25, expected at most 24 as"),
        (["--output_len", "0"], "--output_len is 0, expected at least 1"),
        (["--batch_size", "1", "2", "--input_len", "1", "2", "3"], "--batch_size has 2 values, expected 1, or 3"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--hf_repeats", "0"], "--hf_repeats is 0, expected at least 1"),
        (["--num-prompts", "0"], "--num_prompts is 0, expected at least 1"),
        (["--max-batch-size", "0"], "--trt_max_batch_size is 0, expected at least 1"),
        (["--hf-max-batch-size", "-1"], "--hf_max_batch_size is -1, expected at least 1"),
        (["--backend", "both"], "--hf_model_dir is missing"),
        (["--dataset", "nowhere.json"], "--dataset nowhere.json: cannot be read"),
        (["--dataset", "a/x.json", "b/x.json"], "--dataset has two files called x"),
        (["--from_json", "nowhere.json"], "--from_json nowhere.json: cannot be read"),
        (["--output_json", str(ROOT)], f"--output_json {ROOT} is a folder, expected a file"),
    ],
)
def test_a_wrong_flag_is_one_line(
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    code = run(monkeypatch, "--engine_dir", engine_dir, "--input_len", "8", "--output_len", "2", *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1 and message in line


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([(1, 1), (17, 1)], "input_len of request 1 is 17, expected at most 16 as"),
        ([(1, 1), (2, 2), (16, 9)], "input_len of request 2 + output_len is 25, expected at most 24 as"),
    ],
)
def test_a_request_beyond_an_engines_limits_is_named_before_anything_is_measured(
    engine_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lengths: list[tuple[int, int]],
    message: str,
) -> None:
    path = write_lengths(tmp_path, *lengths)
    assert run(monkeypatch, "--engine_dir", engine_dir, "--dataset", path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--dataset {path}: {message} {engine_dir}" in line


def test_a_batch_beyond_an_engines_limit_is_refused_for_a_dataset_too(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lengths(tmp_path, (1, 1))
    assert run(monkeypatch, "--engine_dir", engine_dir, "--dataset", path, "--trt-max-batch-size", "1", "3") == 1
    assert "--trt_max_batch_size is 3, expected at most 2 as" in capsys.readouterr().err


def test_conversations_without_a_tokenizer_are_refused(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talks.json"
    path.write_text('[{"conversations": []}]')
    assert run(monkeypatch, "--engine_dir", engine_dir, "--dataset", path) == 1
    assert "--tokenizer_dir is missing" in capsys.readouterr().err


def test_an_engine_of_another_model_is_refused(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_qwen1_checkpoint(tmp_path / "other", vocab=101)
    assert run(monkeypatch, "--backend", "both", "--engine_dir", engine_dir, "--hf_model_dir", other) == 1
    assert f"has a vocabulary of 97, expected 101 as {other} has" in capsys.readouterr().err
