"""A loop that launches a step before it has read the last one gives what a loop gives that reads first."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fakes import LIMITS, VOCAB_SIZE, FakeSession, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import make_config, make_engine

from tensorrt_llm import Limits
from tensorrt_llm.runtime import GenerationSession, Session
from tensorrt_llm.runtime.request import FinishReason, Request, SamplingConfig

# Three letters for all ids, so that a stop string of two is soon complete.
TOKENIZER = FakeTokenizer([b"", b"", b"", *(b"abc"[i % 3 : i % 3 + 1] for i in range(VOCAB_SIZE - 3))])


@dataclass
class Task:
    """A request, when it comes and when somebody gives it up."""

    prompt: list[int]
    sampling: dict[str, Any] = field(default_factory=dict)
    arrival: int = 0  # calls of `step` before it
    cancelled_at: int | None = None  # output tokens


def run_all(session: Any, tasks: list[Task]) -> list[Request]:
    """Serve the tasks to their ends, and check what holds after every step."""
    generation = GenerationSession(session, TOKENIZER)  # type: ignore[arg-type]
    requests: dict[int, Request] = {}
    calls = 0
    while len(requests) < len(tasks) or generation.has_work:
        for index, task in enumerate(tasks):
            if index not in requests and task.arrival <= calls:
                requests[index] = generation.submit(task.prompt, SamplingConfig(**task.sampling), with_text=True)
        lengths = {request: request.num_output for request in requests.values()}
        receivers = generation.step()
        calls += 1
        gained = {request: request.num_output - length for request, length in lengths.items()}
        assert Counter(receivers) == Counter({request: count for request, count in gained.items() if count})
        assert all(not request.blocks and not request.num_pending for request in receivers if request.is_finished)
        for index, request in requests.items():
            if request.num_output == tasks[index].cancelled_at:
                generation.cancel(request)
    generation._allocator.check_balanced()
    assert not generation._texts
    return [requests[index] for index in range(len(tasks))]


def results(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [(request.output_ids, request.finish_reason, request.text) for request in requests]


def fake(runs_ahead: bool, limits: Limits = LIMITS, num_blocks: int = 1000) -> FakeSession:
    session = FakeSession(limits, num_blocks)
    session.runs_ahead = runs_ahead
    return session


token_ids = st.integers(0, VOCAB_SIZE - 1)
words = st.lists(st.lists(token_ids, min_size=1, max_size=2), max_size=3)
PENALTIES = dict(repetition_penalty=1.3, frequency_penalty=0.2)


@st.composite
def samplings(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly plain, as whoever needs his newest token makes the whole loop wait."""
    kinds: list[dict[str, Any]] = [
        {},
        {},
        {"top_k": 5, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.9, "output_log_probs": True},
        PENALTIES,
        {"bad_words_list": draw(words)},
        {"gather_generation_logits": True},
        {"gather_context_logits": True},
    ]
    return draw(st.sampled_from(kinds)) | {
        "random_seed": draw(st.integers(0, 99)),
        "max_new_tokens": draw(st.integers(1, 24)),
        "stop_ids": draw(st.lists(token_ids, max_size=6)),
        "stop_words_list": draw(words),
        "stop_strings": draw(st.sampled_from([[], [], ["abc", "bb"]])),
        "min_length": draw(st.sampled_from([0, 1, 4])),
    }


tasks_of_anyone = st.lists(
    st.builds(
        Task,
        st.lists(token_ids, min_size=1, max_size=24),
        samplings(),
        st.integers(0, 12),
        st.none() | st.integers(1, 10),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(tasks_of_anyone, st.integers(4, 16), st.integers(0, 6))
def test_everybody_gets_the_same_whatever_the_depth(tasks: list[Task], step_tokens: int, spare_blocks: int) -> None:
    limits = replace(LIMITS, max_num_tokens=step_tokens)
    # Just enough for the largest request, so that most others are preempted or wait.
    needed = max(-(-(len(task.prompt) + task.sampling["max_new_tokens"]) // 4) for task in tasks)
    plain, ahead = (run_all(fake(depth, limits, 1 + needed + spare_blocks), tasks) for depth in (False, True))
    assert results(ahead) == results(plain)
    for found, expected in zip(ahead, plain, strict=True):
        assert found.log_probs == pytest.approx(expected.log_probs)
        assert logits_of(found).equal(logits_of(expected))


def logits_of(request: Request) -> torch.Tensor:
    """All that is kept. The pieces of a prompt are as long as the steps had room for."""
    pieces = [*request.context_logits, *request.generation_logits]
    return torch.cat([torch.empty(0, VOCAB_SIZE), *(piece.view(-1, VOCAB_SIZE) for piece in pieces)])


def test_preempted_requests_lose_no_pending_token() -> None:
    tasks = [Task([5, 9, index], dict(max_new_tokens=24)) for index in range(6)]
    session = fake(True, num_blocks=14)
    ahead = run_all(session, tasks)
    starts = sum(row.start == 0 for batch in session.batches for row in batch.rows)
    assert starts > len(tasks) and session.num_pending_read > 50, "nobody was preempted or nothing ran ahead"
    assert results(ahead) == results(run_all(fake(False), tasks))


def test_a_step_is_launched_before_the_last_one_is_read() -> None:
    session = fake(True)
    generation = GenerationSession(session)  # type: ignore[arg-type]
    request = generation.submit([5, 9], SamplingConfig(max_new_tokens=4))
    seen = []
    while generation.has_work:
        receivers = generation.step()
        seen.append((len(session.batches), len(receivers), request.num_output))
    assert seen == [(1, 0, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3), (4, 1, 4)]


def test_a_known_end_costs_no_further_step_and_an_unknown_one_a_single_row() -> None:
    prompt = [5, 9, 30]
    [plain] = run_all(fake(False), [Task(prompt, dict(max_new_tokens=8))])
    rows = {}
    for name, sampling in {"known": dict(max_new_tokens=5), "unknown": dict(end_id=plain.output_ids[4])}.items():
        session = fake(True)
        [request] = run_all(session, [Task(prompt, sampling)])
        assert request.output_ids == plain.output_ids[: request.num_output]
        rows[name] = sum(len(batch.rows) for batch in session.batches) - request.num_output
    assert rows == {"known": 0, "unknown": 1}


def test_a_pending_token_counts_for_min_length() -> None:
    for depth in (False, True):
        session = FakeSession(next_token=lambda ids: 7)
        session.runs_ahead = depth
        [request] = run_all(session, [Task([5, 9], dict(end_id=7, min_length=4))])
        assert request.output_ids == [0, 0, 0, 7]


@pytest.mark.parametrize(
    ("sampling", "waits"),
    [
        (dict(), False),
        (dict(top_k=5), False),
        (dict(output_log_probs=True), False),
        (dict(end_id=3, min_length=9), False),
        (dict(bad_words_list=[[3]]), False),
        (dict(stop_words_list=[[3, 4]], stop_strings=["abab"]), False),
        (dict(bad_words_list=[[3, 4]]), True),
        (dict(gather_generation_logits=True), False),
        (PENALTIES, False),
    ],
)
def test_only_who_needs_the_newest_token_waits_for_it(sampling: dict[str, Any], waits: bool) -> None:
    session = fake(True)
    run_all(session, [Task([5, 9], dict(max_new_tokens=8) | sampling)])
    assert (session.num_pending_read == 0) is waits


def test_a_place_in_the_batch_is_free_as_soon_as_the_last_token_is_sampled() -> None:
    tasks = [Task([5, index], dict(max_new_tokens=3 + index % 4)) for index in range(12)]
    sessions = [fake(False), fake(True)]
    for session in sessions:
        run_all(session, tasks)
    assert len(sessions[1].batches) == len(sessions[0].batches)


def test_a_request_without_a_next_token_is_named_and_the_others_go_on() -> None:
    prompts = [[5, 9], [7, 7, 7], [11]]
    [expected] = run_all(fake(False), [Task(prompts[2])])

    class BreakingSession(FakeSession):
        def logits_after(self, token_ids: list[int]) -> torch.Tensor:
            is_broken = token_ids[:3] == prompts[1] and len(token_ids) >= 6
            return super().logits_after(token_ids) * (torch.nan if is_broken else 1)

    for depth in (False, True):
        session = BreakingSession()
        session.runs_ahead = depth
        generation = GenerationSession(session)  # type: ignore[arg-type]
        requests = [generation.submit(prompt, SamplingConfig()) for prompt in prompts]
        with pytest.raises(ValueError, match=r"no next token for request 1 \(1 of 3 in this step\)"):
            while generation.has_work:
                generation.step()
        while generation.has_work:
            generation.step()
        generation._allocator.check_balanced()
        assert (requests[1].num_output, requests[1].finish_reason) == (3, FinishReason.CANCELLED)
        assert requests[2].output_ids == expected.output_ids


def test_what_is_left_of_a_cancelled_request_disturbs_nobody() -> None:
    session = fake(True)
    generation = GenerationSession(session)  # type: ignore[arg-type]
    first = generation.submit([5, 9], SamplingConfig())
    for _ in range(3):
        generation.step()
    assert first.num_pending == 1
    generation.cancel(first)
    assert not generation.has_work
    second = generation.submit([7, 7, 7], SamplingConfig())
    while generation.has_work:
        generation.step()
    assert [second.output_ids] == [r.output_ids for r in run_all(fake(False), [Task([7, 7, 7])])]
    assert first.num_output == 2


ENGINE_LIMITS = Limits(max_batch_size=6, max_input_len=64, max_output_len=40, max_num_tokens=48, tokens_per_block=4)
ENGINE_TASKS = [
    Task([1, 2, 3], dict(max_new_tokens=30)),
    Task([4] * 60, dict(max_new_tokens=12, stop_ids=[7])),
    Task([9, 8], dict(max_new_tokens=20, top_k=4, temperature=2.0, random_seed=1), arrival=3),
    Task([5, 6, 7, 8, 9], dict(max_new_tokens=25, **PENALTIES), arrival=14),
    Task([3, 3], dict(max_new_tokens=20, stop_words_list=[[1], [2]]), arrival=4),
    Task([10], dict(max_new_tokens=9, output_log_probs=True), arrival=5),
    Task([2] * 17, dict(max_new_tokens=40), cancelled_at=5),
    Task([6] * 33, dict(max_new_tokens=30, top_k=0, top_p=0.9, random_seed=2), arrival=8),
]


def run_on_engine(device: str, runs_ahead: bool, **options: Any) -> list[Request]:
    engine = make_engine(make_config(hidden_size=64, head_size=32, num_hidden_layers=2), limits=ENGINE_LIMITS)
    # Blocks for two of the longest: somebody is preempted.
    session = Session(engine, device, kv_cache_tokens=160, **options)
    session.runs_ahead = runs_ahead
    return run_all(session, ENGINE_TASKS)


def test_an_engine_gives_the_same_whatever_the_depth() -> None:
    assert results(run_on_engine("cpu", True)) == results(run_on_engine("cpu", False))


@pytest.mark.gpu
@pytest.mark.parametrize("use_cuda_graphs", [False, True])
def test_a_gpu_gives_the_same_whatever_the_depth(use_cuda_graphs: bool) -> None:
    plain, ahead = (run_on_engine("cuda", depth, use_cuda_graphs=use_cuda_graphs) for depth in (False, True))
    assert results(ahead) == results(plain) == results(run_on_engine("cpu", False))


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, dict(top_k=4, random_seed=0), dict(output_log_probs=True), PENALTIES])
@pytest.mark.parametrize("use_cuda_graphs", [False, True])
def test_nothing_waits_for_the_device_but_the_reading_of_tokens(
    use_cuda_graphs: bool, sampling: dict[str, Any]
) -> None:
    engine = make_engine(make_config(hidden_size=64, head_size=32, num_hidden_layers=2), limits=ENGINE_LIMITS)
    session = Session(engine, "cuda", use_cuda_graphs=use_cuda_graphs)
    assert session.runs_ahead
    tasks = [Task([1, 2, 3], sampling), Task([4] * 60, sampling), Task([5], {}, arrival=5)]
    for _ in range(2):  # compiles kernels and captures graphs, some at the second time
        run_all(session, tasks)
    torch.cuda.set_sync_debug_mode("error")  # an event, which tells that tokens are there, is not such a wait
    try:
        run_all(session, tasks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
