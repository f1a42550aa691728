"""What runs over the same articles come to: scores, agreement with Hugging Face and speed, as a table and as JSON.

Knows neither models nor where the runs come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rouge import METRICS, bootstrap_interval
from table import markdown_table


@dataclass(frozen=True)
class Run:
    """What one backend made of the tasks."""

    name: str
    output_ids: list[list[int]]
    summaries: list[str]
    seconds: float
    rouge: dict[str, np.ndarray]  # per article
    perplexity: float

    @property
    def mean_rouge1(self) -> float:
        return float(self.rouge["rouge1"].mean())

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.output_ids)) / self.seconds


@dataclass(frozen=True)
class Agreement:
    """How far greedy tokens are those of the Hugging Face run."""

    tokens: float  # share of positions with the same token, of all positions where either run has one
    articles: float  # share of articles with all tokens equal
    rouge1_difference: np.ndarray  # per article

    @classmethod
    def of(cls, run: Run, reference: Run) -> "Agreement":
        pairs = list(zip(run.output_ids, reference.output_ids, strict=True))
        same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
        return cls(
            tokens=same / sum(max(len(ours), len(theirs)) for ours, theirs in pairs),
            articles=sum(ours == theirs for ours, theirs in pairs) / len(pairs),
            rouge1_difference=run.rouge["rouge1"] - reference.rouge["rouge1"],
        )


def summary_table(runs: Sequence[Run], reference: Run | None) -> str:
    return markdown_table(_HEADER, [_table_row(run, _agreement(run, reference)) for run in runs])


def summary_records(runs: Sequence[Run], reference: Run | None) -> list[dict[str, Any]]:
    """The table's figures with their full digits, for JSON."""
    return [_json_row(run, _agreement(run, reference)) for run in runs]


def _agreement(run: Run, reference: Run | None) -> Agreement | None:
    return None if reference is None or run is reference else Agreement.of(run, reference)


_HEADER = (
    "run",
    "ROUGE-1",
    "ROUGE-2",
    "ROUGE-L",
    "ROUGE-Lsum",
    "ROUGE-1 less HF",
    "perplexity",
    "tokens as HF",
    "articles as HF",
    "latency s",
    "tokens/s",
)


def _table_row(run: Run, agreement: Agreement | None) -> list[str]:
    compared = ["-", "-", "-"]
    if agreement:
        difference = _with_interval(agreement.rouge1_difference, "+.2f")
        compared = [difference, f"{agreement.tokens:.2%}", f"{agreement.articles:.1%}"]
    return [
        run.name,
        *(_with_interval(run.rouge[metric], ".2f") for metric in METRICS),
        compared[0],
        f"{run.perplexity:.4f}",
        *compared[1:],
        f"{run.seconds:.2f}",
        f"{run.tokens_per_second:.1f}",
    ]


def _with_interval(values: np.ndarray, form: str) -> str:
    low, high = bootstrap_interval(values)
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def _json_row(run: Run, agreement: Agreement | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": run.name,
        **{metric: _mean_and_interval(run.rouge[metric]) for metric in METRICS},
        "perplexity": run.perplexity,
        "latency_seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
    }
    if agreement:
        row |= {
            "rouge1_difference": _mean_and_interval(agreement.rouge1_difference),
            "token_agreement": agreement.tokens,
            "article_agreement": agreement.articles,
        }
    return row


def _mean_and_interval(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}
