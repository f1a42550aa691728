"""Summaries on small random checkpoints: what the table says, against values computed by other means."""

import base64
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import EngineBackend, HfBackend
from build import BuildArgs
from build import main as build
from checkpoints import write_qwen1_checkpoint
from command_line import run_script
from hf_model import load_hf_model
from rouge import METRICS, bootstrap_interval, new_scorer, score_summaries
from summarize import SummarizeArgs, make_tasks, reference_perplexity, to_text
from summary_prompt import SYSTEM_PROMPT
from summarize import main as summarize
from summary_table import Agreement, Run, summary_table

from tensorrt_llm import Engine
from tensorrt_llm.runtime import SamplingConfig
from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer

CPU = torch.device("cpu")
ARTICLES = [
    {"article": "The cat didn't sit on the mat. It ran away.", "highlights": "The cat ran."},
    {"article": "Rain fell in Duncliff for nine days.", "highlights": "Nine days of rain."},
    {"article": "你好 says the mayor of Longport.", "highlights": "The mayor says 你好."},
    {"article": "Prices rose <|im_end|> by a tenth.", "highlights": "Prices are up."},
    {"article": "A film was shown.", "highlights": "A film."},
]
# Vocabulary: 256 bytes, 208 special tokens, and 16 ids that only pad.
VOCAB = 480
IM_START, IM_END = 257, 258


class World(NamedTuple):
    checkpoint: Path
    engine_dir: Path
    articles: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A random checkpoint with a tokenizer of single bytes, its float32 engine, and articles."""
    folder = tmp_path_factory.mktemp("summarize")
    checkpoint = write_qwen1_checkpoint(folder / "checkpoint", vocab=VOCAB, seq_length=1024)
    lines = (f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
    (checkpoint / "qwen.tiktoken").write_text("".join(lines))
    # What a checkpoint recommends must not change what is compared.
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_p": 0.8, "repetition_penalty": 5.0, "eos_token_id": 7})
    )
    build(
        BuildArgs(
            hf_model_dir=checkpoint, output_dir=folder / "engine", dtype="float32", max_input_len=320, max_output_len=32
        )
    )
    articles = folder / "articles.jsonl"
    articles.write_text("".join(json.dumps(article) + "\n" for article in ARTICLES))
    return World(checkpoint, folder / "engine", articles)


@pytest.fixture
def tokenizer(world: World) -> Tokenizer:
    return load_tokenizer(world.checkpoint)


def args_for(world: World, **changes: Any) -> SummarizeArgs:
    facts: dict[str, Any] = {
        "backend": "both",
        "hf_model_dir": world.checkpoint,
        "engine_dir": [world.engine_dir],
        "dataset_path": world.articles,
        "max_new_tokens": 24,
        "device": "cpu",
    }
    return SummarizeArgs(**facts | changes)


def run_command(monkeypatch: pytest.MonkeyPatch, world: World, **changes: Any) -> int:
    """The exit code of summarize.py with these flags."""
    flags: dict[str, Any] = {
        "backend": "trt_llm",
        "tokenizer_dir": world.checkpoint,
        "engine_dir": world.engine_dir,
        "dataset_path": world.articles,
        "max_new_tokens": 4,
        "max_ite": 1,
        "device": "cpu",
    }
    argv = ["summarize.py"]
    for name, value in (flags | changes).items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        run_script(summarize, SummarizeArgs, None)
    return int(exit_.value.code or 0)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr, which must be one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Both sides


@pytest.mark.parametrize("batch_size", [1, 3])
def test_in_float32_an_engine_gives_the_tokens_of_hugging_face(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    output = tmp_path / "figures.json"
    summarize(args_for(world, batch_size=batch_size, output_json=output))
    _, engine = json.loads(output.read_text())["runs"]
    assert (engine["token_agreement"], engine["article_agreement"]) == (1.0, 1.0)


def test_padding_on_the_left_does_not_change_the_tokens_of_hugging_face(world: World) -> None:
    backend = HfBackend(world.checkpoint, "fp32", CPU)
    sampling = SamplingConfig(max_new_tokens=24)
    prompts = [[5, 6, 7], list(range(40)), [9]]
    assert backend.generate(prompts, sampling) == [backend.generate([prompt], sampling)[0] for prompt in prompts]


def test_hugging_face_is_greedy_whatever_the_checkpoint_recommends(world: World) -> None:
    model = load_hf_model(world.checkpoint, "float32", "cpu")
    ids = list(range(30))
    with torch.inference_mode():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    found = HfBackend(world.checkpoint, "fp32", CPU).generate([list(range(30))], SamplingConfig(max_new_tokens=24))
    assert found == [ids[30:]]


def test_both_sides_end_with_the_first_stop_id(world: World) -> None:
    prompt = list(range(30))
    engine = EngineBackend(Engine.from_dir(world.engine_dir), "engine", CPU)
    free = engine.generate([prompt], SamplingConfig(max_new_tokens=24))[0]
    sampling = SamplingConfig(max_new_tokens=24, stop_ids=(free[5],))
    expected = free[: free.index(free[5]) + 1]
    assert engine.generate([prompt], sampling) == [expected]
    # Another row that runs on pads the first one behind its end.
    assert HfBackend(world.checkpoint, "fp32", CPU).generate([prompt, [3]], sampling)[0] == expected


# Prompts and texts


def test_a_prompt_is_the_one_of_the_original(tokenizer: Tokenizer) -> None:
    (task,) = make_tasks(tokenizer, [("I do n't know.", "No idea.")], max_input_length=320, max_new_tokens=24)  # type: ignore[list-item]
    assert tokenizer.decode(task.prompt, skip_special_tokens=False) == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nI don't know. TL;DR:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_article_writes_no_special_tokens(tokenizer: Tokenizer) -> None:
    articles: Any = [(ARTICLES[3]["article"], ARTICLES[3]["highlights"])]
    (task,) = make_tasks(tokenizer, articles, max_input_length=320, max_new_tokens=24)
    assert task.prompt.count(IM_END) == 2  # of the system prompt and of the question


def test_a_reference_always_fits_behind_its_prompt(tokenizer: Tokenizer) -> None:
    articles: Any = [("word " * 100, "A reference.")]
    (task,) = make_tasks(tokenizer, articles, max_input_length=300, max_new_tokens=24)
    assert (len(task.prompt), len(task.scored_prompt) + len(task.reference)) == (300, 300)


def test_text_holds_neither_special_tokens_nor_ids_that_pad_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert to_text(tokenizer, [32, *b"Rain", IM_START, *b"fell", IM_END, VOCAB - 1]) == "Rainfell"


# Perplexity


def test_perplexity_is_what_transformers_own_loss_says(world: World, tokenizer: Tokenizer) -> None:
    articles: Any = [tuple(article.values()) for article in ARTICLES]
    tasks = make_tasks(tokenizer, articles, max_input_length=320, max_new_tokens=24)
    model: Any = load_hf_model(world.checkpoint, "float32", "cpu")
    total, count = 0.0, 0
    for task in tasks:
        ids = torch.tensor([task.scored_prompt + task.reference])
        labels = ids.clone()
        labels[0, : len(task.scored_prompt)] = -100
        with torch.inference_mode():
            total += float(model(ids, labels=labels).loss) * len(task.reference)
        count += len(task.reference)
    expected = math.exp(total / count)
    engine = EngineBackend(Engine.from_dir(world.engine_dir), "engine", CPU)
    for backend in (engine, HfBackend(world.checkpoint, "fp32", CPU)):
        assert reference_perplexity(backend, tasks) == pytest.approx(expected, rel=1e-4)


# The table


def make_run(name: str, output_ids: list[list[int]], rouge1: list[float]) -> Run:
    values = np.array(rouge1)
    return Run(name, output_ids, ["text"] * len(rouge1), 2.0, dict.fromkeys(METRICS, values), 8.0)


def test_agreement_counts_positions_and_articles() -> None:
    hf = make_run("hf", [[1, 2, 3, 4], [5, 6], [7]], [10.0, 20.0, 30.0])
    ours = make_run("ours", [[1, 2, 9, 4], [5, 6, 8, 8], [7]], [10.0, 23.0, 30.0])
    found = Agreement.of(ours, hf)
    # Equal: 3 of 4, 2 of 4 (the longer one counts), 1 of 1.
    assert (found.tokens, found.articles, found.rouge1_difference.mean()) == (6 / 9, 1 / 3, 1.0)


def test_the_table_shows_means_agreement_and_speed() -> None:
    hf = make_run("hf", [[1, 2], [3, 4]], [10.0, 10.0])
    ours = make_run("ours", [[1, 2], [3, 9, 9]], [12.5, 12.5])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary_table([hf, ours], hf).splitlines()]
    ten, more = "10.00 [10.00, 10.00]", "12.50 [12.50, 12.50]"
    assert cells[2:] == [
        ["hf", ten, ten, ten, ten, "-", "8.0000", "-", "-", "2.00", "2.0"],
        ["ours", more, more, more, more, "+2.50 [+2.50, +2.50]", "8.0000", "60.00%", "50.0%", "2.00", "2.5"],
    ]


def test_rouge_is_that_of_hand_counted_words() -> None:
    found = score_summaries(new_scorer(), ["the cat ran home", "rain"], ["the cat ran", "sun"])
    # One article: precision 3/4, recall 1, and of word pairs 2/3 and 1. The other shares nothing.
    assert {metric: values.tolist() for metric, values in found.items()} == {
        "rouge1": pytest.approx([600 / 7, 0.0]),
        "rouge2": pytest.approx([80.0, 0.0]),
        "rougeL": pytest.approx([600 / 7, 0.0]),
        "rougeLsum": pytest.approx([600 / 7, 0.0]),
    }


def test_rouge_does_not_stem() -> None:
    assert score_summaries(new_scorer(), ["cats running"], ["cat run"])["rouge1"].tolist() == [0.0]


def test_an_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    values = np.random.default_rng(1).normal(60, 20, size=200)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert bootstrap_interval(values) == (low, high)


def test_an_interval_is_as_wide_as_the_normal_approximation_says() -> None:
    values = np.random.default_rng(2).normal(60, 20, size=400)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


# The command


def test_the_command_prints_an_article_and_one_table(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, world) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"Article: {ARTICLES[0]['article']}\nHighlights: {ARTICLES[0]['highlights']}\nSummary, ")
    assert "1 articles on cpu" in output and output.count("| run ") == 1


def test_a_missed_threshold_ends_with_code_1_and_says_which(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_command(monkeypatch, world, check_accuracy=True, tensorrt_llm_rouge1_threshold=99.5)
    captured = capsys.readouterr()
    assert code == 1
    assert "| run " in captured.out  # the table is there all the same
    assert "expected at least 99.5" in captured.err and captured.err.count("\n") == 1


def test_thresholds_that_hold_end_with_code_0(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"backend": "both", "hf_model_dir": world.checkpoint, "check_accuracy": True}
    assert run_command(monkeypatch, world, **flags, tensorrt_llm_rouge1_threshold=0.0) == 0


def test_a_difference_to_hugging_face_is_a_threshold_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Equal runs differ by 0, which no negative threshold allows.
    flags = {"backend": "both", "hf_model_dir": world.checkpoint, "check_accuracy": True}
    flags |= {"tensorrt_llm_rouge1_threshold": 0.0, "rouge1_difference_threshold": -1.0}
    code = run_command(monkeypatch, world, **flags)
    assert code == 1 and "away from HF float32, expected at most -1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size is 0, expected at least 1"),
        ({"num_beams": 2}, "num_beams is 2, expected 1"),
        ({"tokenizer_dir": None}, "--tokenizer_dir is missing"),
        ({"backend": "hf"}, "--hf_model_dir is missing"),
        ({"max_new_tokens": 33}, "--max_new_tokens is 33, expected at most 32, the max_output_len of"),
        ({"max_input_length": 321}, "--max_input_length is 321, expected at most 320, the max_input_len of"),
        ({"max_input_length": 20}, "the system prompt takes"),
        ({"device": "tpu"}, "device is 'tpu', expected cpu or cuda"),
    ],
)
def test_a_wrong_flag_is_one_line(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    message: str,
) -> None:
    assert run_command(monkeypatch, world, **flags) == 1
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has 0 articles, expected at least one"),
        ("a.json", "[]", "has 0 articles, expected at least one"),
        ("a.jsonl", '{"article": "x"', "line 1: not valid JSON"),
        ("a.json", '[{"article": "x", "summary": "y"}]', "record 0: found article, summary, expected the fields"),
        ("a.jsonl", '{"article": "x", "highlights": ""}', "record 0: highlights is '', expected text"),
        ("a.jsonl", '"text"', "record 0: found a str, expected an object"),
        ("a.csv", "article,highlights", "found a .csv, expected a datasets folder"),
        ("a.jsonl.gz", "not compressed", "cannot be read"),
        ("a.parquet", "not parquet", "not a whole parquet file"),
        ("folder/readme.txt", "", "found no parquet files and no saved dataset"),
        ("folder/train-0.parquet", "", "found train-0.parquet, expected files of the test split"),
        ("folder/dataset_info.json", "{}", "cannot be read as a saved dataset"),
    ],
)
def test_a_wrong_dataset_is_one_line(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    content: str,
    message: str,
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    assert run_command(monkeypatch, world, dataset_path=tmp_path / name.partition("/")[0]) == 1
    assert message in error_line(capsys)


def test_a_missing_dataset_is_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, world, dataset_path="/nowhere/at/all") == 1
    assert "/nowhere/at/all: no such file or folder, expected a datasets folder" in error_line(capsys)
