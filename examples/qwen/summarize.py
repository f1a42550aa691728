"""Summarize news with engines and with Hugging Face, and compare: ROUGE, perplexity, KL, equal tokens, speed.

    python summarize.py --backend both --engine_dir engines --hf_model_dir Qwen-7B-Chat --output_chart accuracy.png

The Hugging Face side runs no remote code: a Qwen-1 checkpoint is loaded into transformers' Qwen2ForCausalLM, which is
the same function up to the trained length of the model.

Prompts, system prompt and metric are those of the original port. Latency is the time of generating ids and turning them
into text, batch by batch, after a warm-up; prompts are made before. Perplexity, KL(Hugging Face || engine) and top-1
agreement are those of the next token along the reference summaries, their first --max_new_tokens tokens.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from backends import DATA_TYPES, Backend, EngineBackend, HfBackend  # noqa: E402
from chat_prompt import stop_words_for  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from summary.chart import new_figure, write_chart  # noqa: E402
from summary.engine_folders import EngineFolder, find_engines  # noqa: E402
from summary.exam import Exam, take_exam  # noqa: E402
from summary.figures import Figures, Run, summary_table  # noqa: E402
from summary.rouge import new_scorer  # noqa: E402
from summary.tasks import Task, make_tasks  # noqa: E402
from texts.articles import BUNDLED_ARTICLES, Article, load_articles  # noqa: E402

from tensorrt_llm.models import QWenConfig  # noqa: E402
from tensorrt_llm.runtime import SamplingConfig  # noqa: E402
from tensorrt_llm.runtime.engine_folder import open_engine  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

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
    engine_dir: list[Path] = flag(
        [],
        help="folders that build.py wrote, each of them a row of the table; a folder that holds such folders, at any "
        "depth, stands for all of them",
    )
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
    kl_memory_gib: float = flag(
        1.0,
        help="host memory for what Hugging Face says along the reference summaries; KL is taken over as many articles "
        "as have room there, evenly spread",
    )
    output_json: Path | None = flag(None, help="also write the table's figures to this file")
    output_markdown: Path | None = flag(None, help="also write the table to this file")
    output_chart: Path | None = flag(
        None, help="also draw differences to Hugging Face, with --backend both, to this .png file"
    )
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
        if not self.kl_memory_gib > 0:
            raise ValueError(f"--kl_memory_gib is {self.kl_memory_gib}, expected more than 0")
        if self.output_chart and self.backend != "both":
            raise ValueError(f"--output_chart shows differences, expected --backend both, found {self.backend}")
        if self.output_chart and self.output_chart.suffix != ".png":
            raise ValueError(f"--output_chart is {self.output_chart}, expected a name that ends in .png")
        for name in ("output_json", "output_markdown", "output_chart"):
            file: Path | None = getattr(self, name)
            if file and file.is_dir():
                raise ValueError(f"--{name} {file} is a folder, expected a file")
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
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
    engines = find_engines(args.engine_dir) if args.runs_engines else []
    check_engines(args, engines)
    tasks = make_tasks(tokenizer, articles, max_input_length(args, engines), args.max_new_tokens)
    exam = Exam(tasks, tokenizer, sampling, args.batch_size, new_scorer(), args.kl_memory_gib * 2**30)
    if args.output_chart:
        new_figure(1, 1)  # a missing package shows before the work, too
    hf_run = None
    if args.runs_hf:
        warn_beyond_trained_length(args, tasks)
        hf_run = take_exam(exam, partial(HfBackend, args.hf_folder, args.data_type, device), keeps=args.runs_engines)
    engine_runs = [take_exam(exam, partial(open_backend, engine, device), beside=hf_run) for engine in engines]
    runs = [hf_run, *engine_runs] if hf_run else engine_runs
    figures = [Figures.of(run, hf_run) for run in runs]

    caption = describe_exam(exam, device, hf_run)
    table = summary_table(figures)
    print(show_article(articles[0], runs))
    print(f"\n{caption}:\n\n{table}")
    if args.output_json:
        facts = {"articles": len(articles), "device": str(device), "batch_size": args.batch_size}
        facts["kl_articles"] = len(hf_run.following.logits) if hf_run else 0
        args.output_json.write_text(json.dumps(facts | {"runs": [row.record() for row in figures]}, indent=2) + "\n")
    if args.output_markdown:
        args.output_markdown.write_text(f"{caption}:\n\n{table}\n", encoding="utf-8")
    if args.output_chart:
        write_chart(args.output_chart, figures, f"{len(articles)} articles on {device}, 95 % intervals")
    if args.check_accuracy:
        check_accuracy(args, figures)


def open_backend(engine: EngineFolder, device: torch.device) -> Backend:
    return EngineBackend(open_engine(engine.path, check_weights=False), engine.name, device)


def check_accuracy(args: SummarizeArgs, figures: Sequence[Figures]) -> None:
    """Raise a ValueError that names every threshold that an engine misses."""
    lowest, widest = args.tensorrt_llm_rouge1_threshold, args.rouge1_difference_threshold
    missed = []
    for row in figures[args.runs_hf :]:
        # Written so that NaN misses, too.
        rouge1 = row.rouge["rouge1"].mean
        if not rouge1 >= lowest:
            missed.append(f"{row.name} has ROUGE-1 {rouge1:.2f}, expected at least {lowest}")
        if row.difference and not abs(row.difference.rouge1.mean) <= widest:
            difference = row.difference.rouge1.mean
            missed.append(
                f"{row.name} has ROUGE-1 {difference:+.2f} away from {figures[0].name}, expected at most {widest}"
            )
    if missed:
        raise ValueError(f"the accuracy check failed: {'; '.join(missed)}")


def check_engines(args: SummarizeArgs, engines: Sequence[EngineFolder]) -> None:
    """Raise a ValueError for an engine that cannot do the exam, before others have worked for hours."""
    vocab_size = QWenConfig.from_hf_dir(args.hf_folder).vocab_size if args.runs_hf else None
    for engine in engines:
        limits = engine.config.limits
        if args.max_new_tokens > limits.max_output_len:
            raise ValueError(
                f"--max_new_tokens is {args.max_new_tokens}, expected at most {limits.max_output_len}, "
                f"the max_output_len of {engine.path}"
            )
        if (args.max_input_length or 0) > limits.max_input_len:
            raise ValueError(
                f"--max_input_length is {args.max_input_length}, expected at most {limits.max_input_len}, "
                f"the max_input_len of {engine.path}"
            )
        if engine.config.world_size > 1:
            raise ValueError(
                f"{engine.path} is split over {engine.config.world_size} ranks, which cannot run yet, expected one rank"
            )
        if vocab_size and engine.config.vocab_size != vocab_size:
            raise ValueError(
                f"{engine.path} has a vocabulary of {engine.config.vocab_size}, expected {vocab_size} as "
                f"{args.hf_folder} has: it was built from another model"
            )


def max_input_length(args: SummarizeArgs, engines: Sequence[EngineFolder]) -> int:
    """The longest prompt, the same for every run so that all rows of the table are about the same prompts."""
    if args.max_input_length is not None:
        return args.max_input_length
    if engines:
        return min(engine.config.limits.max_input_len for engine in engines)
    return QWenConfig.from_hf_dir(args.hf_folder).seq_length - args.max_new_tokens


def warn_beyond_trained_length(args: SummarizeArgs, tasks: Sequence[Task]) -> None:
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


def describe_exam(exam: Exam, device: torch.device, hf_run: Run | None) -> str:
    """What stands above the table."""
    count = len(exam.tasks)
    words = f"{count} articles on {device}, batch size {exam.batch_size}, in brackets 95 % intervals"
    if hf_run and hf_run.following.logits:
        kept = len(hf_run.following.logits)
        words += (
            f"; perplexity, KL (of {kept} articles) and top-1 are those of the next token along the reference summaries"
        )
    return words


def show_article(article: Article, runs: Sequence[Run]) -> str:
    parts = [("Article", article.article), ("Highlights", article.highlights)]
    parts += [(f"Summary, {run.name}", run.summaries[0]) for run in runs]
    return "\n".join(f"{title}: {text}" for title, text in parts)


if __name__ == "__main__":
    run_script(main, SummarizeArgs, __doc__)
