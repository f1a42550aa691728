"""ROUGE of summaries against references, one value per article, and what a sample of articles says about the mean.

The metric is that of the `rouge-score` package with the settings of the datasets metric "rouge", which published
figures of Qwen use: no stemming, and for rougeLsum each line is a sentence. Values are F-measures times 100.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_RESAMPLES = 2000


def new_scorer() -> Any:
    """A scorer for `score_summaries`; a ValueError if the package it needs is not installed."""
    # Imported here, as engines run without the package.
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(f"ROUGE needs the package rouge-score: pip install rouge-score ({error})") from error
    return RougeScorer(METRICS, use_stemmer=False)


def score_summaries(scorer: Any, summaries: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> one value for each article."""
    scores = [scorer.score(reference, text) for text, reference in zip(summaries, references, strict=True)]
    return {metric: np.array([100 * score[metric].fmeasure for score in scores]) for metric in METRICS}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean, from means over articles drawn with replacement (percentile method).

    Equal seeds draw equal articles, so intervals of several runs over the same articles can be compared.
    """
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
