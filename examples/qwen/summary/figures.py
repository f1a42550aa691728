"""What runs over the same articles come to: scores, distance to Hugging Face and speed, as a table and as JSON.

Knows neither models nor where the runs come from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from table import markdown_table

from .rouge import METRICS, bootstrap_interval
from .teacher_forcing import Following


@dataclass(frozen=True)
class Run:
    """What one backend made of the tasks."""

    name: str
    output_ids: list[list[int]]
    summaries: list[str]
    seconds: float
    rouge: dict[str, np.ndarray]  # per article
    following: Following

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.output_ids)) / self.seconds


@dataclass(frozen=True)
class Mean:
    """Over articles, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Mean":
        return cls(float(values.mean()), *bootstrap_interval(values))

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Difference:
    """A run beside the Hugging Face run."""

    rouge1: Mean
    kl: Mean  # KL(HF || run) of the next token, nats per token
    top1: float  # share of the references' positions at which both find the same token most likely
    tokens: float  # share of greedy positions with the same token, of all where either run has one
    articles: float  # share of articles with all greedy tokens equal

    @classmethod
    def of(cls, run: Run, hf: Run) -> "Difference":
        pairs = list(zip(run.output_ids, hf.output_ids, strict=True))
        same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
        return cls(
            rouge1=Mean.of(run.rouge["rouge1"] - hf.rouge["rouge1"]),
            kl=Mean.of(run.following.kl_by_article()),
            top1=run.following.agreement(hf.following),
            tokens=same / sum(max(len(ours), len(theirs)) for ours, theirs in pairs),
            articles=sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        )


@dataclass(frozen=True)
class Figures:
    """A run as numbers. Intervals take thousands of draws, so this is made once for all that shows it."""

    name: str
    rouge: dict[str, Mean]
    perplexity: float
    seconds: float
    tokens_per_second: float
    difference: Difference | None  # None for Hugging Face itself, or without it

    @classmethod
    def of(cls, run: Run, hf: Run | None) -> "Figures":
        return cls(
            name=run.name,
            rouge={metric: Mean.of(run.rouge[metric]) for metric in METRICS},
            perplexity=run.following.perplexity,
            seconds=run.seconds,
            tokens_per_second=run.tokens_per_second,
            difference=None if hf is None or run is hf else Difference.of(run, hf),
        )

    def record(self) -> dict[str, Any]:
        """All digits, for JSON."""
        row: dict[str, Any] = {
            "run": self.name,
            **{metric: asdict(mean) for metric, mean in self.rouge.items()},
            "perplexity": self.perplexity,
            "latency_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.difference:
            row |= {
                "rouge1_difference": asdict(self.difference.rouge1),
                "mean_kl": asdict(self.difference.kl),
                "top1_agreement": self.difference.top1,
                "token_agreement": self.difference.tokens,
                "article_agreement": self.difference.articles,
            }
        return row


_HEADER = (
    "run",
    "ROUGE-1",
    "ROUGE-1 less HF",
    "ROUGE-2",
    "ROUGE-L",
    "ROUGE-Lsum",
    "perplexity",
    "mean KL from HF, nats",
    "top-1 as HF",
    "tokens as HF",
    "articles as HF",
    "latency s",
    "tokens/s",
)


def summary_table(figures: Sequence[Figures]) -> str:
    return markdown_table(_HEADER, [_table_row(row) for row in figures])


def _table_row(row: Figures) -> list[str]:
    rouge1, less_hf, kl, top1, tokens, articles = f"{row.rouge['rouge1']:.2f}", "-", "-", "-", "-", "-"
    if row.difference:
        less_hf, kl = f"{row.difference.rouge1:+.2f}", f"{row.difference.kl:.1e}"
        top1, tokens = f"{row.difference.top1:.2%}", f"{row.difference.tokens:.2%}"
        articles = f"{row.difference.articles:.1%}"
    return [
        row.name,
        rouge1,
        less_hf,
        *(f"{row.rouge[metric].mean:.2f}" for metric in METRICS[1:]),
        f"{row.perplexity:.4f}",
        kl,
        top1,
        tokens,
        articles,
        f"{row.seconds:.2f}",
        f"{row.tokens_per_second:.1f}",
    ]
