"""Speed figures: what is computed from which times, and how backends serve requests of different lengths."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import Backend, EngineBackend, HfBackend
from benchmarking.figures import Figures, Percentiles, fastest_hf
from benchmarking.timing import Runs, Trace, measure, trace
from benchmarking.workload import Shape, Workload, equal_requests, random_prompts
from checkpoints import write_qwen1_checkpoint
from models_for_tests import LIMITS, engine_from_checkpoint
from timed_backends import TimedBackend, make_dataset_figures, make_figures

# Three requests: 1, 3 and 2 new tokens.
RAGGED = Workload(Path("lengths.json"), [[1, 2], [3], [4, 5, 6]], [1, 3, 2])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TimedBackend:
    backend = TimedBackend()
    monkeypatch.setattr(time, "perf_counter", backend.clock)
    return backend


def test_decode_speed_leaves_out_the_time_to_the_first_token(backend: TimedBackend) -> None:
    figures = measure(backend, equal_requests(Shape(3, 7, 9), 11, 0), 3, Runs(0, 3))
    # 3 * 8 tokens in 8 steps of a quarter, and 3 * 16 in the 3 seconds of the whole run.
    assert (figures.one_token_seconds, figures.decode_tokens_per_second, figures.tokens_per_second) == (1.0, 12, 16)
    assert (figures.requests_per_second, figures.output_tokens_per_second) == (1, 9)


def test_every_run_to_warm_up_comes_before_those_that_count(backend: TimedBackend) -> None:
    measure(backend, equal_requests(Shape(2, 7, 9), 11, 0), 2, Runs(2, 3))
    one_token = [("warm up", 2, 1)] * 2 + [("serve", 2, 1)] * 3
    assert backend.calls == one_token + [("warm up", 2, 9)] * 2 + [("serve", 2, 9)] * 3


def test_a_dataset_has_a_decode_speed_and_no_share_of_the_roofline(backend: TimedBackend) -> None:
    figures = measure(backend, RAGGED, 2, Runs(1, 1))
    assert backend.calls == [("warm up", 3, 1), ("serve", 3, 1), ("warm up", 3, 3), ("serve", 3, 3)]
    seconds = figures.total_seconds - figures.one_token_seconds
    assert figures.decode_tokens_per_second == (sum(RAGGED.output_lens) - 3) / seconds
    assert figures.step_bytes is None and figures.roofline_share is None


def test_the_first_token_counts_from_the_submission_of_all(backend: TimedBackend) -> None:
    """The third request waits for the first batch of two."""
    assert trace(backend, RAGGED, 2).first == [1.0, 1.0, 2.5]


def test_time_between_tokens_is_that_of_one_request() -> None:
    run = Trace([[1.0, 1.5, 3.0], [2.0], [1.0, 5.0]], 5.0)
    assert run.gaps == [0.5, 1.5, 4.0]


def test_speed_is_the_median_run_and_percentiles_are_over_the_requests_of_all_runs(backend: TimedBackend) -> None:
    seconds = iter((0.0, 0.0, 0.0, 1.0, 5.0, 2.0))  # runs of one token come first
    serve = backend.serve

    def serve_late(*args: Any) -> None:
        backend.now += next(seconds)
        serve(*args)

    backend.serve = serve_late  # type: ignore[method-assign]
    figures = measure(backend, Workload(Path("one.json"), [[1]], [2]), 1, Runs(0, 3))
    assert figures.run_seconds == (2.25, 6.25, 3.25) and figures.total_seconds == 3.25
    assert figures.first_token == Percentiles.of([2.0, 6.0, 3.0])


def test_percentiles_lie_between_the_two_nearest_values() -> None:
    """Of 5 values p50 is the third, and p99 lies 0.96 of the way from the fourth to the fifth."""
    found = Percentiles.of([50.0, 10.0, 40.0, 20.0, 30.0])
    assert (found.p50, found.p99) == pytest.approx((30.0, 40 + 0.96 * 10))


def test_a_run_of_one_token_has_no_decode_speed() -> None:
    figures = make_figures(output_tokens=2, between_tokens=None)
    assert figures.decode_tokens_per_second is None


def test_a_run_within_the_noise_of_the_clock_has_no_decode_speed() -> None:
    assert make_figures(run_seconds=(0.9,)).decode_tokens_per_second is None


def test_the_roofline_share_is_the_time_of_the_bytes_over_that_of_a_step() -> None:
    # 8 tokens of 2 sequences in a second are 4 steps, of 100 bytes each, beside 1000 bytes a second.
    assert make_figures().roofline_share == 0.4


def test_a_step_moves_what_the_mean_context_has(backend: TimedBackend) -> None:
    figures = measure(backend, equal_requests(Shape(3, 8, 5), 11, 0), 3, Runs(0, 1))
    # Its 4 decode steps move 9, 10, 11 and 12 tokens of each of 3 sequences: 10.5 of 2 bytes, beside 1000 and 10.
    assert figures.step_bytes == 1000 + 3 * (10 + 10.5 * 2)


def test_a_record_has_all_that_figures_are_made_of() -> None:
    for figures in (make_figures(), make_dataset_figures(between_tokens=None)):
        assert Figures.from_record(figures.record()) == figures


def test_the_fastest_hugging_face_row_of_the_same_requests_is_the_reference() -> None:
    row = make_dataset_figures()
    slow, fast = (make_dataset_figures(backend="hf", run_seconds=(seconds,)) for seconds in (9.0, 8.0))
    other = make_dataset_figures(backend="hf", workload="another", run_seconds=(1.0,))
    assert fastest_hf(row, [row, slow, fast, other]) is fast


def test_another_batch_of_equal_prompts_is_no_reference() -> None:
    row, hf = make_figures(), make_figures(backend="hf", shape=Shape(1, 8, 5))
    assert fastest_hf(row, [row, hf]) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen1_checkpoint(tmp_path_factory.mktemp("timing") / "checkpoint")


@pytest.fixture
def engine_backend(checkpoint: Path) -> EngineBackend:
    return EngineBackend(engine_from_checkpoint(checkpoint), "engine", torch.device("cpu"))


@pytest.fixture(params=["engine", "hf"])
def real_backend(request: pytest.FixtureRequest, checkpoint: Path) -> Backend:
    if request.param == "engine":
        return EngineBackend(engine_from_checkpoint(checkpoint), "engine", torch.device("cpu"))
    return HfBackend(checkpoint, "fp32", torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, LIMITS.max_batch_size])
def test_each_request_gets_its_own_number_of_tokens(real_backend: Backend, batch_size: int) -> None:
    output_lens = [3, 1, 7, 2, 5]
    counts = [0] * 5

    def count(positions: Sequence[int]) -> None:
        for position in positions:
            counts[position] += 1

    real_backend.serve(random_prompts([9, 2, 1, 20, 4], 97, 0), output_lens, batch_size, count)
    assert counts == output_lens


def test_an_engine_serves_all_at_once(engine_backend: EngineBackend) -> None:
    steps: list[list[int]] = []
    engine_backend.serve(random_prompts([4, 4, 4], 97, 0), [2, 2, 2], LIMITS.max_batch_size, steps.append)
    assert [sorted(step) for step in steps if step] == [[0, 1, 2]] * 2


def test_a_smaller_batch_of_an_engine_is_filled_up_whenever_a_request_is_done(engine_backend: EngineBackend) -> None:
    prompts, output_lens, running, most = random_prompts([4] * 6, 97, 0), [5, 2, 3, 1, 4, 2], set[int](), []
    counts = [0] * 6

    def follow(positions: Sequence[int]) -> None:
        for position in positions:
            counts[position] += 1
            running.add(position)
        most.append(len(running))
        running.difference_update(position for position in positions if counts[position] == output_lens[position])

    engine_backend.serve(prompts, output_lens, 2, follow)
    assert max(most) == 2 and counts == output_lens
    # One at a time would take 17 steps, and batches that wait for their longest 5 + 3 + 4.
    assert len([count for count in most if count]) < 12


def test_hugging_face_serves_batches_in_their_order(checkpoint: Path) -> None:
    steps: list[list[int]] = []
    backend = HfBackend(checkpoint, "fp32", torch.device("cpu"))
    backend.serve(random_prompts([4, 2, 3], 97, 0), [3, 1, 2], 2, lambda positions: steps.append(list(positions)))
    assert steps == [[0, 1], [0], [0], [2], [2]]
