"""The exam that backends take: summarize all articles against the clock, and follow their reference summaries.

Knows neither flags nor tables; one backend is open at a time.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from backends import Backend
from tqdm import tqdm

from tensorrt_llm.runtime import SamplingConfig
from tensorrt_llm.tokenizer import Tokenizer

from .figures import Run
from .rouge import score_summaries
from .tasks import Task
from .teacher_forcing import articles_within, follow_references

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exam:
    """What every backend has to do, and how it is marked."""

    tasks: Sequence[Task]
    tokenizer: Tokenizer
    sampling: SamplingConfig
    batch_size: int
    scorer: Any
    kl_memory_bytes: float


def take_exam(
    exam: Exam, open_backend: Callable[[], Backend], *, keeps: bool = False, beside: Run | None = None
) -> Run:
    """Open a backend, let it do all tasks, and let go of its memory.

    With `keeps` the run holds what KL takes, for runs that stand `beside` it.
    """
    backend = open_backend()
    warm_up(backend, exam)
    prompts = [task.prompt for task in exam.tasks]
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
        following=follow_references(
            backend,
            progress(exam.tasks, f"{backend.name}: references"),
            keep=articles_within(exam.kl_memory_bytes, exam.tasks, backend.vocab_size) if keeps else (),
            compare_with=beside.following.logits if beside else None,
        ),
    )
    logger.info("%s: %d articles in %.0f s", run.name, len(prompts), seconds)
    del backend
    gc.collect()  # a session and its graphs know each other
    return run


def warm_up(backend: Backend, exam: Exam) -> None:
    """Let kernels be compiled and graphs captured, which happens at the first use of each shape.

    A CPU has neither: one prompt wakes it up.
    """
    prompts, sampling = [task.prompt for task in exam.tasks[: exam.batch_size]], exam.sampling
    if backend.device.type == "cpu":
        prompts, sampling = prompts[:1], replace(sampling, max_new_tokens=1)
    backend.generate(prompts, sampling)


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """The items, with a bar where stderr is a terminal."""
    bar: Iterable[Item] = tqdm(items, desc=title, disable=None)
    return bar


def to_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of new tokens. Neither special tokens nor ids that pad the vocabulary give any."""
    return tokenizer.decode(token_id for token_id in ids if token_id < tokenizer.vocab_size).strip()
