"""The kernel of greedy tokens against its reference; odd sizes, ties, and rows that have no token."""

import math

import pytest
import torch

from tensorrt_llm.kernels import BROKEN
from tensorrt_llm.kernels.reference import greedy_tokens

pytest.importorskip("triton")

from tensorrt_llm.kernels.cuda.greedy import GreedyTokens  # noqa: E402


def assert_as_reference(kernel: GreedyTokens, logits: torch.Tensor) -> None:
    for found, wanted in zip(kernel(logits), greedy_tokens(logits), strict=True):
        assert found.dtype == torch.int32 and torch.equal(found, wanted)


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("vocab_size", [7, 4096, 4097, 20001])
def test_the_largest_logit_wins(device: torch.device, rows: int, vocab_size: int) -> None:
    # Rows of a wider tensor, as a real head has padding beyond the vocabulary.
    logits = torch.randn((rows, vocab_size + 5), device=device)
    logits[:, vocab_size:] = math.inf
    kernel = GreedyTokens()
    for _ in range(2):  # the count of arrivals is zero again
        assert_as_reference(kernel, logits[:, :vocab_size])


def test_of_equal_logits_the_lowest_id_wins(device: torch.device) -> None:
    logits = torch.randn((4, 13000), device=device).clamp(max=1)
    for row, ids in enumerate([(12999, 5), (5, 4100), (4096, 8192), (8191, 8192)]):
        logits[row, list(ids)] = 2
        assert GreedyTokens()(logits)[0][row] == min(ids)
    assert_as_reference(GreedyTokens(), logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4095, 9000])
def test_a_row_without_a_finite_largest_logit_is_broken(device: torch.device, bad: float, place: int) -> None:
    logits = torch.randn((3, 9001), device=device)
    logits[1, place] = bad
    logits[2] = -math.inf
    ids, tokens = GreedyTokens()(logits)
    assert tokens.tolist() == [int(logits[0].argmax()), BROKEN, BROKEN]
    assert (0 <= ids).all() and (ids < 9001).all()


def test_impossible_tokens_beside_possible_ones_do_not_break_a_row(device: torch.device) -> None:
    logits = torch.full((2, 5000), -math.inf, device=device)
    logits[0, 4999], logits[1, 0] = -1e30, 3
    assert_as_reference(GreedyTokens(), logits)


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    assert GreedyTokens()(torch.empty((0, 10), device=device))[1].tolist() == []
