"""The sampler against a plain one: a row at a time, in float64, in the order the words say."""

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorrt_llm.runtime.request import Request, SamplingConfig
from tensorrt_llm.runtime.sampling import BROKEN, Sampler

CPU = torch.device("cpu")
VOCAB_SIZE = 23


def make_request(
    request_id: int = 0, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **config: Any
) -> Request:
    request = Request(request_id, list(prompt), SamplingConfig(**config).for_sequence(0, 1))
    request.token_ids += output
    return request


def random_logits(rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def reference_token(row: list[float], request: Request, uniform: float) -> int:
    """The next token by definition; `uniform` is the number that the request draws."""
    sampling = request.sampling
    counts = Counter(request.output_ids)
    logits = list(row)
    for token in set(request.token_ids):
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
        logits[token] -= sampling.frequency_penalty * counts[token] + sampling.presence_penalty * (counts[token] > 0)
    for token in request.banned_ids():
        logits[token] = -math.inf
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0 or sampling.top_k == 1 or (sampling.top_k == 0 and sampling.top_p == 0):
        return order[0]
    order = order[: sampling.top_k or len(order)]
    weights = [math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in order]
    probs = [weight / math.fsum(weights) for weight in weights]
    kept = next((n for n in range(1, len(probs)) if math.fsum(probs[:n]) >= (sampling.top_p or 1)), len(probs))
    target = uniform * math.fsum(probs[:kept])
    return order[next(n for n in range(kept) if math.fsum(probs[: n + 1]) > target or n == kept - 1)]


tokens = st.integers(0, VOCAB_SIZE - 1)
requests = st.builds(
    make_request,
    st.just(0),
    st.lists(tokens, min_size=1, max_size=12).map(tuple),
    st.lists(tokens, max_size=12).map(tuple),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 22, 23, 100]),
    top_p=st.sampled_from([0.0, 0.31, 0.7, 0.97, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.2]),
    min_length=st.sampled_from([0, 1, 6]),
    end_id=tokens,
    stop_ids=st.lists(tokens, max_size=2),
    bad_words_list=st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3),
    random_seed=st.integers(0, 2**40),
)


def number(batch: list[Request]) -> list[Request]:
    for request_id, request in enumerate(batch):
        request.id = request_id
    return batch


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6).map(number), st.integers(0, 10**6))
def test_every_row_of_a_mixed_batch_is_as_defined(batch: list[Request], seed: int) -> None:
    logits = random_logits(len(batch), seed=seed)
    uniforms = [Random(request.sampling.random_seed).random() for request in batch]
    expected = [
        reference_token(row, request, uniform)
        for row, request, uniform in zip(logits.double().tolist(), batch, uniforms, strict=True)
    ]
    assert Sampler(CPU).sample(logits, batch).tokens == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=2, max_size=6).map(number), st.integers(0, 10**6))
def test_a_token_does_not_depend_on_the_batch(batch: list[Request], seed: int) -> None:
    logits = random_logits(len(batch), seed=seed)
    together = Sampler(CPU).sample(logits, batch).tokens
    for request in batch:
        vars(request).pop("random", None)  # begin again with the first number of its seed
    assert [Sampler(CPU).sample(logits[row : row + 1], [batch[row]]).tokens[0] for row in range(len(batch))] == together


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_penalties_follow_sequences_as_they_grow_come_and_go(data: st.DataObject) -> None:
    sampler = Sampler(CPU)
    penalties: dict[str, Any] = dict(repetition_penalty=1.5, frequency_penalty=0.4)
    pool = [make_request(i, prompt=(i, i + 1, 5), **penalties) for i in range(9)]
    for step in range(12):
        batch = [pool[i] for i in data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=5, unique=True))]
        logits = random_logits(len(batch), seed=step)
        expected = [reference_token(row, r, 0.0) for row, r in zip(logits.double().tolist(), batch, strict=True)]
        assert sampler.sample(logits, batch).tokens == expected
        for request, token in zip(batch, expected, strict=True):
            request.token_ids += [token] * data.draw(st.sampled_from([1, 1, 1, 40]))


def test_a_step_can_be_sampled_again() -> None:
    sampler, request, logits = Sampler(CPU), make_request(repetition_penalty=2.0), random_logits(1)
    assert sampler.sample(logits, [request]).tokens == sampler.sample(logits, [request]).tokens


@pytest.mark.parametrize("config", [{}, dict(top_k=5), dict(top_p=0.9, top_k=0), dict(repetition_penalty=1.0001)])
def test_of_equal_logits_the_lower_id_comes_first(config: dict[str, Any]) -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 1000:] = 1.0
    request = make_request(temperature=1e-6, random_seed=0, **config)
    request.random.random = lambda: 0.0  # type: ignore[method-assign]
    assert Sampler(CPU).sample(logits, [request]).tokens == [1000]


def test_minus_zero_equals_zero() -> None:
    request = make_request(top_k=2, random_seed=0)
    request.random.random = lambda: 0.0  # type: ignore[method-assign]
    logits = torch.full((1, VOCAB_SIZE), -1.0)
    logits[0, 4], logits[0, 9] = -0.0, 0.0
    assert Sampler(CPU).sample(logits, [request]).tokens == [4]


def test_drawn_tokens_have_the_probabilities_of_the_model() -> None:
    draws = 5_000
    logits = random_logits(1, vocab_size=5)
    batch = [make_request(i, prompt=(0,), top_k=0, top_p=1.0, random_seed=i) for i in range(draws)]
    counts = torch.tensor(Sampler(CPU).sample(logits.expand(draws, -1), batch).tokens).bincount(minlength=5)
    # Five standard deviations of a frequency are at most 5 * sqrt(0.25 / draws) = 0.036.
    assert (counts / draws - logits[0].softmax(-1)).abs().max() < 0.036


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("config", [dict(top_k=4), dict(top_k=0, top_p=0.6), dict(top_k=0, top_p=1.0)])
def test_the_ends_of_the_unit_interval_choose_candidates_too(uniform: float, config: dict[str, Any]) -> None:
    logits = random_logits(1, vocab_size=1000)
    request = make_request(random_seed=0, **config)
    request.random.random = lambda: uniform  # type: ignore[method-assign]
    assert Sampler(CPU).sample(logits, [request]).tokens == [reference_token(logits[0].tolist(), request, uniform)]


def test_a_temperature_near_zero_draws_among_the_largest_logits() -> None:
    logits = random_logits(1).clamp(max=2.0)
    logits[0, [4, 9]] = 3.0
    request = make_request(temperature=1e-310, top_k=0, top_p=1.0)
    request.random.random = lambda: 0.9  # type: ignore[method-assign]
    assert Sampler(CPU).sample(logits, [request]).tokens == [9]


def test_log_probs_are_those_of_the_model_whatever_edits_the_choice() -> None:
    logits = random_logits(3)
    edits: dict[str, Any] = dict(
        output_log_probs=True, repetition_penalty=5.0, bad_words_list=[[int(logits[1].argmax())]]
    )
    batch = [make_request(0, **edits), make_request(1, **edits), make_request(2, top_k=3, output_cum_log_probs=True)]
    sampled = Sampler(CPU).sample(logits, batch)
    expected = logits.double().log_softmax(-1)[range(3), sampled.tokens]
    assert sampled.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def test_log_probs_are_not_computed_unasked() -> None:
    assert Sampler(CPU).sample(random_logits(1), [make_request(top_k=3)]).log_probs is None


@pytest.mark.parametrize("config", [{}, dict(top_k=3), dict(repetition_penalty=1.2), dict(output_log_probs=True)])
def test_the_logits_stay_as_they_are(config: dict[str, Any]) -> None:
    logits = random_logits(2)
    before = logits.clone()
    Sampler(CPU).sample(logits, [make_request(0, bad_words_list=[[3]], **config), make_request(1, **config)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize(
    "config",
    [{}, dict(top_k=3), dict(top_k=0, top_p=0.9), dict(repetition_penalty=1.2), dict(output_log_probs=True)],
)
def test_a_row_of_broken_logits_has_no_token_and_an_id_that_the_next_step_can_read(
    broken: float, config: dict[str, Any]
) -> None:
    logits = random_logits(2)
    logits[1, 7] = broken
    sampled = Sampler(CPU).sample(logits, [make_request(41, **config), make_request(42, **config)])
    assert (sampled.tokens[0] == BROKEN, sampled.tokens[1]) == (False, BROKEN)
    assert 0 <= int(sampled.ids[1]) < VOCAB_SIZE


def test_there_is_no_token_where_every_token_is_banned() -> None:
    everything = [[token] for token in range(VOCAB_SIZE)]
    assert Sampler(CPU).sample(random_logits(1), [make_request(bad_words_list=everything)]).tokens == [BROKEN]


def test_no_requests_give_no_tokens() -> None:
    assert Sampler(CPU).sample(torch.empty(0, VOCAB_SIZE), []).tokens == []
