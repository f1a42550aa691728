"""Summaries on small random checkpoints: both sides, the command, and what a user can do wrong."""

import base64
import json
import math
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backends import EngineBackend, HfBackend
from build import main as build
from checkpoints import write_qwen1_checkpoint
from command_line import run_script
from compiling.args import BuildArgs
from engines_of_modes import engine_of_mode, write_engine
from hf_model import load_hf_model
from summarize import SummarizeArgs, check_accuracy
from summarize import main as summarize
from summary.exam import to_text
from summary.figures import Difference, Figures, Mean
from summary.tasks import make_tasks
from summary.teacher_forcing import follow_references
from texts.summary_prompt import SYSTEM_PROMPT

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.quantization import QuantMode
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
    engines: Path  # holds engine_dir and a bfloat16 engine
    engine_dir: Path
    articles: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A random checkpoint with a tokenizer of single bytes, its float32 and bfloat16 engines, and articles."""
    folder = tmp_path_factory.mktemp("summarize")
    checkpoint = write_qwen1_checkpoint(folder / "checkpoint", vocab=VOCAB, seq_length=1024)
    lines = (f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
    (checkpoint / "qwen.tiktoken").write_text("".join(lines))
    # What a checkpoint recommends must not change what is compared.
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_p": 0.8, "repetition_penalty": 5.0, "eos_token_id": 7})
    )
    engines = folder / "engines"
    for dtype in ("float32", "bfloat16"):
        build(
            BuildArgs(
                hf_model_dir=checkpoint,
                output_dir=engines / "all" / dtype,
                dtype=dtype,
                max_input_len=320,
                max_output_len=32,
            )
        )
    articles = folder / "articles.jsonl"
    articles.write_text("".join(json.dumps(article) + "\n" for article in ARTICLES))
    return World(checkpoint, engines, engines / "all" / "float32", articles)


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


def figures_of(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    """What --output_json holds after a run."""
    summarize(args_for(world, output_json=folder / "figures.json", **changes))
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures


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
def test_in_float32_an_engine_gives_the_tokens_of_hugging_face(world: World, tmp_path: Path, batch_size: int) -> None:
    _, engine = figures_of(world, tmp_path, batch_size=batch_size)["runs"]
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
        assert follow_references(backend, tasks).perplexity == pytest.approx(expected, rel=1e-4)


# The command


def test_the_command_prints_an_article_and_one_table(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, world) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"Article: {ARTICLES[0]['article']}\nHighlights: {ARTICLES[0]['highlights']}\nSummary, ")
    assert "1 articles on cpu" in output and output.count("| run ") == 1


def test_one_command_runs_all_engines_below_a_folder(world: World, tmp_path: Path) -> None:
    runs = figures_of(world, tmp_path, engine_dir=[world.engines])["runs"]
    assert [run["run"] for run in runs] == ["HF float32", "bfloat16", "float32"]
    kl = [run["mean_kl"]["mean"] for run in runs[1:]]
    # float32 on both sides: what is left is the order of sums. bfloat16 has 8 bits.
    assert 0 <= kl[1] < 1e-9 < 1e-6 < kl[0] < 1e-2
    assert runs[2]["top1_agreement"] == 1 and runs[1]["top1_agreement"] > 0.9


def test_kl_is_the_one_of_the_whole_distributions(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = figures_of(world, tmp_path, engine_dir=[world.engines / "all" / "bfloat16"])["runs"][1]["mean_kl"]["mean"]
    tasks = make_tasks(tokenizer, [tuple(article.values()) for article in ARTICLES], 320, 24)  # type: ignore[misc]
    hf = HfBackend(world.checkpoint, "fp32", CPU)
    ours = EngineBackend(Engine.from_dir(world.engines / "all" / "bfloat16"), "ours", CPU)
    total = 0.0
    for task in tasks:
        p, q = (
            backend.logits(task.scored_prompt + task.reference)[len(task.scored_prompt) - 1 : -1]
            .double()
            .log_softmax(1)
            for backend in (hf, ours)
        )
        total += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
    assert found == pytest.approx(total / sum(len(task.reference) for task in tasks), rel=1e-9)


def test_kl_takes_the_articles_that_have_room(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Room for two references of 24 tokens.
    facts = figures_of(world, tmp_path, kl_memory_gib=2.5 * 24 * VOCAB * 4 / 2**30)
    assert facts["kl_articles"] == 2 and "KL (of 2 articles)" in capsys.readouterr().out


def test_the_markdown_file_holds_the_table_that_is_printed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summarize(args_for(world, output_markdown=tmp_path / "made" / "table.md"))
    written = (tmp_path / "made" / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith(f"\n\n{written}")
    assert written.startswith("5 articles on cpu") and written.count("\n| ") == 3


def test_the_chart_is_a_png(world: World, tmp_path: Path) -> None:
    summarize(args_for(world, output_chart=tmp_path / "chart.png"))
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_without_hugging_face_nothing_is_compared(world: World, tmp_path: Path) -> None:
    facts = figures_of(world, tmp_path, backend="trt_llm", engine_dir=[world.engines])
    assert facts["kl_articles"] == 0 and not any("mean_kl" in run for run in facts["runs"])


def test_one_session_is_open_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[EngineBackend]] = []
    alive: list[int] = []
    open_backend = EngineBackend.__init__

    def counted(backend: EngineBackend, *arguments: Any) -> None:
        alive.append(sum(reference() is not None for reference in opened))
        opened.append(weakref.ref(backend))
        open_backend(backend, *arguments)

    monkeypatch.setattr(EngineBackend, "__init__", counted)
    summarize(args_for(world, backend="trt_llm", engine_dir=[world.engines], max_ite=1))
    assert alive == [0, 0]


def test_thresholds_are_those_of_every_engine(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"engine_dir": world.engines, "check_accuracy": True, "tensorrt_llm_rouge1_threshold": 99.5}
    assert run_command(monkeypatch, world, **flags) == 1
    error = capsys.readouterr().err
    assert "bfloat16 has ROUGE-1" in error and "float32 has ROUGE-1" in error.replace("bfloat16", "")


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


@pytest.mark.parametrize("difference", [-1.5, 1.5, math.nan])
def test_a_difference_beyond_the_threshold_is_missed_on_either_side(world: World, difference: float) -> None:
    rouge, nothing = {"rouge1": Mean(50.0, 50.0, 50.0)}, Mean(0.0, 0.0, 0.0)
    beside = Difference(Mean(difference, difference, difference), nothing, 1.0, 1.0, 1.0)
    hf, engine = Figures("HF", rouge, 8.0, 1.0, 1.0, None), Figures("ours", rouge, 8.0, 1.0, 1.0, beside)
    with pytest.raises(ValueError, match=r"ours has ROUGE-1 .* away from HF, expected at most 1.0"):
        check_accuracy(args_for(world), [hf, engine])


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
        ({"kl_memory_gib": 0}, "--kl_memory_gib is 0.0, expected more than 0"),
        ({"output_chart": "x.png"}, "--output_chart shows differences, expected --backend both, found trt_llm"),
        ({"output_markdown": "/tmp"}, "--output_markdown /tmp is a folder, expected a file"),
        ({"engine_dir": "/nowhere"}, "--engine_dir /nowhere: no such folder"),
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


def test_a_chart_of_another_format_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"--output_chart is x.svg, expected a name that ends in .png"):
        summarize(args_for(world, output_chart=Path("x.svg")))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [(Mapping(), "has a vocabulary of 61, expected 480"), (Mapping(2, 0, tp_size=2), "is split over 2 ranks")],
)
def test_an_engine_that_cannot_take_the_exam_is_found_before_any_other_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapping: Mapping, message: str
) -> None:
    monkeypatch.setattr("summarize.take_exam", lambda *_, **__: pytest.fail("an exam was taken"))
    write_engine(engine_of_mode(QuantMode(0), mapping=mapping), tmp_path)
    with pytest.raises(ValueError, match=message):
        summarize(args_for(world, engine_dir=[world.engine_dir, tmp_path]))


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
