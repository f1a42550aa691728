"""Summarize news with engines and with Hugging Face, and compare: ROUGE, perplexity, token agreement, speed.

    python summarize.py --backend both --engine_dir engines/fp16 engines/bf16 --hf_model_dir Qwen-7B-Chat

The Hugging Face side runs no remote code: a Qwen-1 checkpoint is loaded into transformers' Qwen2ForCausalLM, which is
the same function up to the trained length of the model.

Prompts, system prompt and metric are those of the original port. Latency is the time of generating ids and turning them
into text, batch by batch, after one batch to warm up; prompts are made before. Perplexity is that of the reference
summaries, their first --max_new_tokens tokens, given the article.
"""

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from articles import BUNDLED_ARTICLES, Article, load_articles  # noqa: E402
from backends import DATA_TYPES, Backend, EngineBackend, HfBackend  # noqa: E402
from chat_prompt import stop_words_for  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from rouge import new_scorer, score_summaries  # noqa: E402
from summary_prompt import summary_prompt, summary_query  # noqa: E402
from summary_table import Run, summary_records, summary_table  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tensorrt_llm import Engine  # noqa: E402
from tensorrt_llm.models import QWenConfig  # noqa: E402
from tensorrt_llm.runtime import SamplingConfig  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

Item = TypeVar("Item")

logger = logging.getLogger("summarize")


@dataclass(frozen=True)
class SummarizeArgs:
    backend: str = flag("hf", help="what to run; both also compares token by token", choices=("trt_llm", "hf", "both"))
    hf_model_dir: Path | None = flag(
        None,
        help="folder of the Hugging Face checkpoint. No remote code is run: Qwen-1 is loaded into Qwen2ForCausalLM of "
        "transformers, the same function up to the trained length",
    )
    tokenizer_dir: Path | None = flag(None, help="folder of the tokenizer (default: hf_model_dir)")
    engine_dir: list[Path] = flag([], help="folders that build.py wrote, each of them a row of the table")
    data_type: str = flag("fp32", help="dtype of the Hugging Face model", choices=tuple(DATA_TYPES))
    dataset_path: Path | None = flag(
        None,
        help="local cnn_dailymail: a datasets folder, parquet files, json or jsonl, with article and highlights "
        "(default: the bundled articles, which fit the bundled checkpoint)",
    )
    max_ite: int = flag(500, help="articles to summarize, the first ones of the dataset")
    batch_size: int = flag(
        1, help="articles at a time; Hugging Face pads them on the left, so 1 is its exact reference"
    )
    max_new_tokens: int = flag(100, help="longest summary in tokens")
    max_input_length: int | None = flag(
        None,
        help="longest prompt in tokens, the article's end is cut off (default: what all engines allow, without engines "
        "what the model was trained for)",
    )
    num_beams: int = flag(1, help="only 1 is supported: there is no beam search yet")
    temperature: float = flag(1.0, help="of sampling, which top_k 1 turns off")
    top_k: int = flag(1, help="1 is greedy, 0 keeps every token")
    top_p: float = flag(0.0, help="keep the likeliest tokens that together reach this probability; 0 keeps all")
    random_seed: int = flag(0, help="of sampling")
    check_accuracy: bool = flag(False, help="exit with 1 if an engine misses a threshold")
    tensorrt_llm_rouge1_threshold: float = flag(15.0, help="smallest ROUGE-1 of an engine")
    rouge1_difference_threshold: float = flag(
        1.0, help="largest difference in ROUGE-1 between an engine and Hugging Face, with --backend both"
    )
    output_json: Path | None = flag(None, help="also write the table's figures to this file")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")

    def check(self) -> None:
        """Raise a ValueError for flags that are out of range or do not go together."""
        for name in ("max_ite", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if self.runs_engines and not self.engine_dir:
            raise ValueError(f"--engine_dir is missing, expected the folder of an engine for --backend {self.backend}")
        if self.runs_hf and self.hf_model_dir is None:
            raise ValueError(f"--hf_model_dir is missing, expected a checkpoint's folder for --backend {self.backend}")
        if self.tokenizer_dir is None and self.hf_model_dir is None:
            raise ValueError("--tokenizer_dir is missing, expected the folder of the checkpoint or its tokenizer")
        if self.output_json:
            self.output_json.parent.mkdir(parents=True, exist_ok=True)
        if self.check_accuracy and not self.runs_engines:
            raise ValueError("--check_accuracy is about engines, expected --backend trt_llm or both")

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer_dir or self.hf_folder

    @property
    def hf_folder(self) -> Path:
        assert self.hf_model_dir is not None, "check() refuses this"
        return self.hf_model_dir

    @property
    def runs_engines(self) -> bool:
        return self.backend != "hf"

    @property
    def runs_hf(self) -> bool:
        return self.backend != "trt_llm"

    def sampling(self, tokenizer: Tokenizer) -> SamplingConfig:
        return SamplingConfig(
            stop_ids=stop_words_for(tokenizer, "chatml").ids,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            random_seed=self.random_seed,
        )


def main(args: SummarizeArgs) -> None:
    args.check()
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer_folder)
    sampling = args.sampling(tokenizer)
    sampling.validate()
    articles = load_articles(args.dataset_path or BUNDLED_ARTICLES, args.max_ite)
    engines = [Engine.from_dir(folder) for folder in args.engine_dir] if args.runs_engines else []
    tasks = make_tasks(tokenizer, articles, max_input_length(args, engines), args.max_new_tokens)
    if args.runs_hf:
        warn_beyond_trained_length(args, tasks)
    exam = Exam(tasks, tokenizer, sampling, args.batch_size, new_scorer())
    # Engines first: they have the limits, so what does not fit shows before Hugging Face has run for minutes.
    engine_runs = [
        take_exam(exam, partial(EngineBackend, engine, f"{folder} {engine.config.precision}", device))
        for engine, folder in zip(engines, args.engine_dir, strict=False)
    ]
    hf_run = take_exam(exam, partial(HfBackend, args.hf_folder, args.data_type, device)) if args.runs_hf else None
    runs = [hf_run, *engine_runs] if hf_run else engine_runs

    print(show_article(articles[0], runs))
    print(f"\n{len(articles)} articles on {device}, batch size {args.batch_size}, in brackets 95 % intervals:\n")
    print(summary_table(runs, hf_run))
    if args.output_json:
        facts = {"articles": len(articles), "device": str(device), "batch_size": args.batch_size}
        args.output_json.write_text(json.dumps(facts | {"runs": summary_records(runs, hf_run)}, indent=2) + "\n")
    if args.check_accuracy:
        check_accuracy(args, engine_runs, hf_run)


def check_accuracy(args: SummarizeArgs, engine_runs: Sequence[Run], hf_run: Run | None) -> None:
    """Raise a ValueError that names every threshold that an engine misses."""
    missed = []
    for run in engine_runs:
        lowest, widest = args.tensorrt_llm_rouge1_threshold, args.rouge1_difference_threshold
        # Written so that NaN misses, too.
        if not run.mean_rouge1 >= lowest:
            missed.append(f"{run.name} has ROUGE-1 {run.mean_rouge1:.2f}, expected at least {lowest}")
        if hf_run and not abs(run.mean_rouge1 - hf_run.mean_rouge1) <= widest:
            difference = run.mean_rouge1 - hf_run.mean_rouge1
            missed.append(
                f"{run.name} has ROUGE-1 {difference:+.2f} away from {hf_run.name}, expected at most {widest}"
            )
    if missed:
        raise ValueError(f"the accuracy check failed: {'; '.join(missed)}")


def max_input_length(args: SummarizeArgs, engines: list[Engine]) -> int:
    """The longest prompt, the same for every run so that all rows of the table are about the same prompts."""
    for engine, folder in zip(engines, args.engine_dir, strict=True):
        limits = engine.config.limits
        if args.max_new_tokens > limits.max_output_len:
            raise ValueError(
                f"--max_new_tokens is {args.max_new_tokens}, expected at most {limits.max_output_len}, "
                f"the max_output_len of {folder}"
            )
        if (args.max_input_length or 0) > limits.max_input_len:
            raise ValueError(
                f"--max_input_length is {args.max_input_length}, expected at most {limits.max_input_len}, "
                f"the max_input_len of {folder}"
            )
    if args.max_input_length is not None:
        return args.max_input_length
    if engines:
        return min(engine.config.limits.max_input_len for engine in engines)
    return QWenConfig.from_hf_dir(args.hf_folder).seq_length - args.max_new_tokens


def warn_beyond_trained_length(args: SummarizeArgs, tasks: Sequence["Task"]) -> None:
    trained = QWenConfig.from_hf_dir(args.hf_folder).seq_length
    count = sum(len(task.prompt) + args.max_new_tokens > trained for task in tasks)
    if count:
        logger.warning(
            "%d of %d prompts may grow beyond the trained length of %d tokens, where the Hugging Face side of a Qwen-1 "
            "checkpoint is another function (no dynamic NTK, no log-n attention); lower --max_input_length",
            count,
            len(tasks),
            trained,
        )


@dataclass(frozen=True)
class Task:
    """One article as ids."""

    highlights: str
    prompt: list[int]
    scored_prompt: list[int]  # the prompt, or with less of the article where the reference does not fit behind it
    reference: list[int]


def make_tasks(
    tokenizer: Tokenizer, articles: Sequence[Article], max_input_length: int, max_new_tokens: int
) -> list[Task]:
    tasks = []
    for article, highlights in articles:
        query = summary_query(article)
        reference = tokenizer.encode(highlights)[:max_new_tokens]
        prompt = scored_prompt = summary_prompt(tokenizer, query, max_input_length)
        if len(prompt) + len(reference) > max_input_length:
            scored_prompt = summary_prompt(tokenizer, query, max_input_length - len(reference))
        tasks.append(Task(highlights, prompt, scored_prompt, reference))
    return tasks


@dataclass(frozen=True)
class Exam:
    """What every backend has to do, and how it is marked."""

    tasks: Sequence[Task]
    tokenizer: Tokenizer
    sampling: SamplingConfig
    batch_size: int
    scorer: Any


def take_exam(exam: Exam, open_backend: Callable[[], Backend]) -> Run:
    """Open a backend, let it do all tasks, and let go of its memory."""
    backend = open_backend()
    prompts = [task.prompt for task in exam.tasks]
    # Kernels are compiled and graphs captured at their first use: that is not counted.
    backend.generate(prompts[: exam.batch_size], exam.sampling)
    output_ids: list[list[int]] = []
    summaries: list[str] = []
    seconds = 0.0
    for start in progress(range(0, len(prompts), exam.batch_size), f"{backend.name}: summaries"):
        started = time.perf_counter()
        ids = backend.generate(prompts[start : start + exam.batch_size], exam.sampling)
        summaries += [to_text(exam.tokenizer, row) for row in ids]
        seconds += time.perf_counter() - started
        output_ids += ids
    run = Run(
        name=backend.name,
        output_ids=output_ids,
        summaries=summaries,
        seconds=seconds,
        rouge=score_summaries(exam.scorer, summaries, [task.highlights for task in exam.tasks]),
        perplexity=reference_perplexity(backend, progress(exam.tasks, f"{backend.name}: perplexity")),
    )
    del backend
    gc.collect()  # a session and its graphs know each other
    return run


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """The items, with a bar where stderr is a terminal."""
    bar: Iterable[Item] = tqdm(items, desc=title, disable=None)
    return bar


def to_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of new tokens. Neither special tokens nor ids that pad the vocabulary give any."""
    return tokenizer.decode(token_id for token_id in ids if token_id < tokenizer.vocab_size).strip()


def reference_perplexity(backend: Backend, tasks: Iterable[Task]) -> float:
    """exp of the mean negative log-likelihood of all tokens of all references, each given what stands before it."""
    total, count = 0.0, 0
    for task in tasks:
        logits = backend.logits(task.scored_prompt + task.reference)
        # The row of a token scores the next one.
        log_probs = logits[len(task.scored_prompt) - 1 : -1].double().log_softmax(-1)
        total -= log_probs.gather(-1, torch.tensor(task.reference)[:, None]).sum().item()
        count += len(task.reference)
    return float(np.exp(total / count))


def show_article(article: Article, runs: Sequence[Run]) -> str:
    parts = [("Article", article.article), ("Highlights", article.highlights)]
    parts += [(f"Summary, {run.name}", run.summaries[0]) for run in runs]
    return "\n".join(f"{title}: {text}" for title, text in parts)


if __name__ == "__main__":
    run_script(main, SummarizeArgs, __doc__)
