"""Figures of runs, against values counted by hand; intervals, against the normal approximation."""

import numpy as np
import pytest
import torch
from summary.figures import Difference, Figures, Run, summary_table
from summary.rouge import METRICS, bootstrap_interval, new_scorer, score_summaries
from summary.teacher_forcing import Following


def make_run(name: str, output_ids: list[list[int]], rouge1: list[float], likeliest: int = 1) -> Run:
    """A run of perplexity 8 over references of two tokens, 0.25 nats per token away from the other."""
    count = len(rouge1)
    following = Following(
        num_tokens=[2] * count,
        nll=[2 * np.log(8.0)] * count,
        likeliest=[torch.tensor([1, likeliest])] * count,
        logits={},
        kl=dict.fromkeys(range(count), 0.5),
    )
    return Run(name, output_ids, ["text"] * count, 2.0, dict.fromkeys(METRICS, np.array(rouge1)), following)


def test_agreement_counts_positions_and_articles() -> None:
    hf = make_run("hf", [[1, 2, 3, 4], [5, 6], [7]], [10.0, 20.0, 30.0])
    ours = make_run("ours", [[1, 2, 9, 4], [5, 6, 8, 8], [7]], [10.0, 23.0, 30.0])
    found = Difference.of(ours, hf)
    # Equal: 3 of 4, 2 of 4 (the longer one counts), 1 of 1.
    assert (found.tokens, found.articles, found.rouge1.mean) == (6 / 9, 1 / 3, 1.0)


def test_the_table_shows_means_differences_and_speed() -> None:
    hf = make_run("hf", [[1, 2], [3, 4]], [10.0, 10.0])
    ours = make_run("ours", [[1, 2], [3, 9, 9]], [12.5, 12.5], likeliest=7)
    table = summary_table([Figures.of(run, hf) for run in (hf, ours)])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2:] == [
        ["hf", "10.00 [10.00, 10.00]", "-", *["10.00"] * 3, "8.0000", "-", "-", "-", "-", "2.00", "2.0"],
        ["ours", "12.50 [12.50, 12.50]", "+2.50 [+2.50, +2.50]", *["12.50"] * 3, "8.0000"]
        + ["2.5e-01 [2.5e-01, 2.5e-01]", "50.00%", "60.00%", "50.0%", "2.00", "2.5"],
    ]


def test_every_row_has_a_cell_for_every_title() -> None:
    run = make_run("hf", [[1]], [10.0])
    assert len({line.count("|") for line in summary_table([Figures.of(run, None)]).splitlines()}) == 1


def test_the_record_has_what_the_table_has_and_all_intervals() -> None:
    hf, ours = make_run("hf", [[1]], [10.0]), make_run("ours", [[1]], [11.0])
    record = Figures.of(ours, hf).record()
    assert set(record) - set(Figures.of(hf, hf).record()) == {
        "rouge1_difference",
        "mean_kl",
        "top1_agreement",
        "token_agreement",
        "article_agreement",
    }
    assert record["mean_kl"] == {"mean": 0.25, "low": 0.25, "high": 0.25}


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
