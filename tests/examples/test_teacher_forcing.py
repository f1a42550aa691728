"""Perplexity, KL and agreement along references, on backends whose logits are made up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from summary.rouge import bootstrap_interval
from summary.tasks import Task
from summary.teacher_forcing import Following, articles_within, follow_references

VOCAB = 13
TASKS = [
    Task("", prompt=[1] * 5, scored_prompt=[1] * length, reference=list(range(count)))
    for length, count in ((4, 3), (2, 7), (5, 1))
]


class Oracle:
    """Random logits that depend on the ids; `change` may edit those of a text."""

    name, device, vocab_size = "oracle", torch.device("cpu"), VOCAB

    def __init__(self, seed: int, change: Callable[[torch.Tensor, int], object] = lambda logits, length: None) -> None:
        self._seed = seed
        self._change = change

    def generate(self, *_: Any) -> list[list[int]]:
        raise NotImplementedError

    def logits(self, ids: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed + len(ids))
        logits = torch.randn(len(ids), VOCAB, generator=generator)
        self._change(logits, len(ids))
        return logits


def kept(backend: Oracle) -> dict[int, torch.Tensor]:
    return follow_references(backend, TASKS, keep=range(len(TASKS))).logits


def references_logits(backend: Oracle) -> torch.Tensor:
    """All rows that score a reference's token."""
    rows = [backend.logits(task.scored_prompt + task.reference) for task in TASKS]
    return torch.cat([row[len(task.scored_prompt) - 1 : -1] for row, task in zip(rows, TASKS, strict=True)])


def test_kl_and_perplexity_are_those_of_torch() -> None:
    p, q = (references_logits(Oracle(seed)).double().log_softmax(1) for seed in (1, 2))
    targets = torch.tensor([token for task in TASKS for token in task.reference])
    found = follow_references(Oracle(2), TASKS, compare_with=kept(Oracle(1)))
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert found.mean_kl == pytest.approx(kl.item(), rel=1e-12)
    assert found.perplexity == pytest.approx(torch.nn.functional.nll_loss(q, targets).exp().item(), rel=1e-12)


def test_agreement_is_the_share_of_equal_likeliest_tokens() -> None:
    ours, theirs = (follow_references(Oracle(seed), TASKS) for seed in (1, 2))
    same = references_logits(Oracle(1)).argmax(1) == references_logits(Oracle(2)).argmax(1)
    assert 0 < ours.agreement(theirs) == same.double().mean().item() < 1


def test_a_backend_beside_itself_differs_in_nothing() -> None:
    found = follow_references(Oracle(1), TASKS, compare_with=kept(Oracle(1)))
    assert (found.mean_kl, found.agreement(found)) == (0, 1)


def test_only_the_rows_before_a_references_tokens_count() -> None:
    prompt_length = {len(task.scored_prompt + task.reference): len(task.scored_prompt) for task in TASKS}

    def spoil_others(logits: torch.Tensor, length: int) -> None:
        logits[: prompt_length[length] - 1] = 99
        logits[-1] = torch.nan

    found = follow_references(Oracle(1, spoil_others), TASKS, compare_with=kept(Oracle(1)))
    assert (found.mean_kl, found.perplexity) == (0, follow_references(Oracle(1), TASKS).perplexity)


def test_a_backend_that_gives_nan_is_not_called_close() -> None:
    broken = Oracle(1, lambda logits, length: logits.fill_(torch.nan))
    found = follow_references(broken, TASKS, compare_with=kept(Oracle(1)))
    assert np.isnan(found.mean_kl) and np.isnan(found.perplexity)


# How much is kept


def test_what_is_kept_holds_no_more_memory_than_its_rows() -> None:
    for article, logits in kept(Oracle(1)).items():
        assert logits.untyped_storage().nbytes() == len(TASKS[article].reference) * VOCAB * 4


@pytest.mark.parametrize(("room", "expected"), [(0, [0]), (1, [0]), (2, [0, 2]), (2.9, [0, 2]), (3, [0, 1, 2])])
def test_articles_are_as_many_as_have_room(room: float, expected: list[int]) -> None:
    assert articles_within(room * 7 * VOCAB * 4, TASKS, VOCAB) == expected


@pytest.mark.parametrize("count", [2, 17, 60, 99, 100])
def test_articles_are_spread_evenly(count: int) -> None:
    chosen = articles_within(count * 4 * VOCAB, [Task("", [1], [1], [1])] * 100, VOCAB)
    gaps = np.diff(chosen)
    assert (len(chosen), chosen[0], chosen[-1]) == (count, 0, 99) and gaps.max() - gaps.min() <= 1


# The interval of KL


def test_the_spread_by_article_is_that_of_the_ratio_of_sums() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(10, 90, size=300)
    sums = tokens * random.gamma(1.0, 1e-3, size=300)
    following = Following(tokens.tolist(), [], [], {}, dict(enumerate(sums.tolist())))
    values = following.kl_by_article()
    assert values.mean() == pytest.approx(following.mean_kl, rel=1e-12) == sums.sum() / tokens.sum()
    draws = [random.integers(300, size=300) for _ in range(2000)]
    low, high = np.percentile([sums[draw].sum() / tokens[draw].sum() for draw in draws], (2.5, 97.5))
    assert bootstrap_interval(values) == pytest.approx((low, high), rel=0.03)
