"""run.py: text in and out, ids in and out, streaming, debug table, and what a user can do wrong."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run
from checkpoints import write_qwen1_checkpoint
from engines_of_modes import engine_of_mode, write_engine
from models_for_tests import engine_from_checkpoint

from tensorrt_llm import Builder, Limits
from tensorrt_llm.inspect import accuracy_of
from tensorrt_llm.quantization import QuantMode

LIMITS = Limits(max_batch_size=3, max_input_len=64, max_output_len=32, max_num_tokens=64, tokens_per_block=8)
# The byte tokenizer of conftest.py has 256 bytes and 208 special tokens.
VOCAB = 464


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = write_qwen1_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab=VOCAB, seq_length=64)
    engine = engine_from_checkpoint(checkpoint, limits=LIMITS)
    engine.save(folder / engine.config.engine_name)
    Builder.save_config(engine.config, folder / "config.json")
    return folder


def run_args(engine_dir: Path, **changes: object) -> run.RunArgs:
    return run.RunArgs(engine_dir=engine_dir, device="cpu", **changes)  # type: ignore[arg-type]


def save_ids(path: Path, *rows: list[int]) -> Path:
    longest = max(map(len, rows))
    np.save(path, np.array([row + [-1] * (longest - len(row)) for row in rows], dtype=np.int32))
    return path


def test_ids_in_give_full_sequences_out(engine_dir: Path, tmp_path: Path) -> None:
    prompts = save_ids(tmp_path / "in.npy", [1, 2, 3, 4, 5], [6, 7])
    run.main(run_args(engine_dir, input_file=prompts, output_npy=tmp_path / "out.npy", max_new_tokens=4))
    sequences = np.load(tmp_path / "out.npy")
    assert sequences.dtype == np.int32 and sequences.shape == (2, 9)
    assert sequences[0, :5].tolist() == [1, 2, 3, 4, 5] and sequences[1, :2].tolist() == [6, 7]


def test_a_quantized_engine_says_what_that_cost_on_stderr_and_leaves_stdout_alone(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of_mode(QuantMode.use_weight_only(), "W8A16")
    write_engine(engine, tmp_path)
    prompts = save_ids(tmp_path / "in.npy", [1, 2, 3])
    printed = []
    for folder in (tmp_path, engine_dir):
        run.main(run_args(folder, input_file=prompts, output_npy=tmp_path / "out.npy", max_new_tokens=1))
        printed.append(tuple(capsys.readouterr()))
    assert printed == [("", f"Accuracy: {accuracy_of(engine.config)}\n"), ("", "")]


def test_csv_and_npy_outputs_hold_the_same_ids(engine_dir: Path, tmp_path: Path) -> None:
    prompts = save_ids(tmp_path / "in.npy", [1, 2, 3])
    outputs = {"output_npy": tmp_path / "out.npy", "output_csv": tmp_path / "out.csv"}
    run.main(run_args(engine_dir, input_file=prompts, max_new_tokens=4, **outputs))
    assert np.loadtxt(tmp_path / "out.csv", delimiter=",", ndmin=2).tolist() == np.load(tmp_path / "out.npy").tolist()


def test_more_prompts_than_the_batch_limit_all_come_out_as_alone(engine_dir: Path, tmp_path: Path) -> None:
    rows = [[length, *range(1, length)] for length in range(2, 10)]
    run.main(
        run_args(
            engine_dir,
            input_file=save_ids(tmp_path / "all.npy", *rows),
            output_npy=tmp_path / "all_out.npy",
            max_new_tokens=5,
        )
    )
    together = np.load(tmp_path / "all_out.npy")
    for index, row in enumerate(rows):
        one = save_ids(tmp_path / "one.npy", row)
        run.main(run_args(engine_dir, input_file=one, output_npy=tmp_path / "one_out.npy", max_new_tokens=5))
        assert together[index, : len(row) + 5].tolist() == np.load(tmp_path / "one_out.npy")[0].tolist()


def test_logits_come_out_for_each_new_token(engine_dir: Path, tmp_path: Path) -> None:
    prompts = save_ids(tmp_path / "in.npy", [1, 2, 3])
    outputs = {"output_npy": tmp_path / "out.npy", "output_logits_npy": tmp_path / "logits.npy"}
    run.main(run_args(engine_dir, input_file=prompts, max_new_tokens=4, **outputs))
    assert np.load(tmp_path / "logits.npy").argmax(-1).tolist() == np.load(tmp_path / "out.npy")[0, 3:].tolist()


def test_new_tokens_are_clipped_to_the_room_in_the_engine(engine_dir: Path, tmp_path: Path) -> None:
    prompts = save_ids(tmp_path / "in.npy", [1] * 60)
    run.main(run_args(engine_dir, input_file=prompts, output_npy=tmp_path / "out.npy", max_new_tokens=1000))
    assert np.load(tmp_path / "out.npy").shape == (1, LIMITS.max_seq_len)


def test_texts_are_printed_with_their_prompts(
    engine_dir: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(run_args(engine_dir, tokenizer_dir=tokenizer_dir, input_text=["a", "b"], max_new_tokens=3, system="s"))
    assert re.fullmatch(r'Input: "a"\nOutput: ".*"\nInput: "b"\nOutput: ".*"\n', capsys.readouterr().out, re.DOTALL)


def test_streamed_text_is_the_text_of_a_plain_run(
    engine_dir: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for streaming in (False, True):
        run.main(
            run_args(
                engine_dir,
                tokenizer_dir=tokenizer_dir,
                input_text=["a"],
                system="s",
                max_new_tokens=20,
                streaming=streaming,
                streaming_interval=3,
            )
        )
        outputs.append(capsys.readouterr().out.partition("Output: ")[2].rstrip("\n").strip('"'))
    assert outputs[0] == outputs[1]


def test_the_debug_table_names_every_layer_and_finds_agreement(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(run_args(engine_dir, input_file=save_ids(tmp_path / "in.npy", [1, 2, 3]), debug_mode=True))
    printed = capsys.readouterr().out
    assert "layers.0.attention" in printed and "layers.1.mlp" in printed and "All tensors agree" in printed


def test_profiling_prints_three_figures(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PROFILED_RUNS", 2)
    prompts = save_ids(tmp_path / "in.npy", [1, 2, 3])
    run.main(run_args(engine_dir, input_file=prompts, max_new_tokens=3, run_profiling=True))
    assert re.search(r"first token +\d.*per token +\d.*tokens/s +\d", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--input_text", "hello"], 1, "text prompts need --tokenizer_dir"),
        (["--input_file", "missing.npy"], 1, "missing.npy"),
        (["--input_file", "prompts.json"], 1, "ends in '.json'"),
        (["--input_file", "long.npy"], 1, "65 tokens, expected at most 64"),
        (["--input_file", "wide.npy"], 1, "token id 464, expected 0 to 463"),
        (["--input_file", "empty.npy"], 1, "is empty"),
        (["--input_file", "none.npy"], 1, "holds no row"),
        (["--input_file", "good.npy", "--num_beams", "2"], 1, "beam search is not supported"),
        (["--input_file", "good.npy", "--max_new_tokens", "0"], 1, "max_new_tokens is 0"),
        (["--input_file", "good.npy", "--temperature", "-1"], 1, "temperature is -1.0"),
        (["--input_file", "good.npy", "--device", "cuda:99"], 1, "cuda"),
        (["--input_file", "good.npy", "--device", "tpu"], 1, "expected cpu or cuda"),
        (["--input_file", "good.npy", "--stop", "x"], 1, "no tokenizer"),
        (["--max_new_tokens", "many"], 2, "invalid int value"),
        (["--nonsense"], 2, "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_clear_line(
    flags: list[str], code: int, message: str, engine_dir: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "good.npy", np.array([[1, 2]]))
    np.save(tmp_path / "long.npy", np.ones((1, 65), dtype=np.int32))
    np.save(tmp_path / "wide.npy", np.array([[1, VOCAB]]))
    np.save(tmp_path / "empty.npy", np.array([[-1, -1]]))
    np.save(tmp_path / "none.npy", np.zeros((0, 4), dtype=np.int32))
    command = [sys.executable, run.__file__, "--engine_dir", str(engine_dir), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and message in last_line and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_input_length": -3}, "--max_input_length is -3"),
        ({"streaming": True, "output_npy": Path("out.npy")}, "no --output_"),
        ({"streaming_interval": 0}, "--streaming_interval is 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, object], message: str, engine_dir: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run.main(run_args(engine_dir, **flags))


@pytest.mark.parametrize(("ids", "message"), [([99999], "token id 99999"), ([1] * 65, "65 tokens"), ([-1, 2], "-1")])
def test_the_debug_run_checks_its_prompt(ids: list[int], message: str, engine_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "in.npy"
    np.save(prompts, np.array([ids]))
    with pytest.raises(ValueError, match=message):
        run.main(run_args(engine_dir, input_file=prompts, debug_mode=True))
