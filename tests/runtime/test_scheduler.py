"""Whatever arrives, every request is served: once, in order, within the limits, and every block comes back."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from fakes import check_step
from hypothesis import given
from hypothesis import strategies as st

from tensorrt_llm.limits import Limits
from tensorrt_llm.runtime import step_sizes
from tensorrt_llm.runtime.batch import Batch
from tensorrt_llm.runtime.kv_cache import BlockAllocator
from tensorrt_llm.runtime.request import FinishReason, Request, SamplingConfig, State
from tensorrt_llm.runtime.scheduler import Scheduler


def make_limits(batch: int = 4, tokens: int = 16, block: int = 4) -> Limits:
    return Limits(
        max_batch_size=batch, max_input_len=64, max_output_len=64, max_num_tokens=tokens, tokens_per_block=block
    )


def make_request(request_id: int, prompt_length: int, new_tokens: int, **settings: object) -> Request:
    config = SamplingConfig(max_new_tokens=new_tokens, **settings)  # type: ignore[arg-type]
    return Request(request_id, [1] * prompt_length, config.for_sequence(0, 1))


def run_step(scheduler: Scheduler) -> Batch:
    """One step of a model that only ever says 1; requests end when they are long enough."""
    batch = next_batch(scheduler)
    read(scheduler, batch)
    return batch


def next_batch(scheduler: Scheduler) -> Batch:
    batch = scheduler.next_batch()
    assert batch is not None, "nothing is pending"
    return batch


def read(scheduler: Scheduler, batch: Batch) -> None:
    scheduler.launch(batch)
    for request in scheduler.accept(batch, [1] * len(batch.receivers)):
        if reason := request.stop_reason():
            scheduler.finish(request, reason)


@dataclass
class Life:
    """How much of a request is computed since it was last admitted."""

    computed: int = 0
    admissions: int = 0


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Limits, int, list[Request]]:
    batch = draw(st.integers(1, 6))
    limits = make_limits(batch, draw(st.integers(batch, 40)), draw(st.sampled_from([1, 2, 4, 8])))
    lengths = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12))
    needed = max(-(-(prompt + new - 1) // limits.tokens_per_block) for prompt, new in lengths)
    num_blocks = 1 + needed + draw(st.integers(0, 2 * needed))
    requests = [make_request(index, prompt, new) for index, (prompt, new) in enumerate(lengths)]
    return limits, num_blocks, requests


def test_the_longest_decodes_come_first() -> None:
    scheduler = Scheduler(make_limits(tokens=64), BlockAllocator(64))
    for index, length in enumerate((3, 20, 9)):
        scheduler.submit(make_request(index, length, 5))
    run_step(scheduler)
    assert [row.request.id for row in next_batch(scheduler).decodes] == [1, 2, 0]
    assert [request.id for request in scheduler.running] == [0, 1, 2], "who came last is preempted first"


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles that the workloads above fill, and that prompts beside few decodes wait for."""
    sizes = {"_TILE_TOKENS": 8, "_MOST_TOKENS_IN_TILES": 16, "_PROMPT_TOKENS_BESIDE_MANY": 8, "_MIXED_DECODES": (2, 4)}
    waits = {"_DECODES_FOR_A_PLACE": 2, "_MOST_STEPS_HELD": 3}
    with patch.multiple(step_sizes, **sizes), patch.multiple("tensorrt_llm.runtime.scheduler", **waits):
        yield


@pytest.mark.parametrize("tiles", [nullcontext, small_tiles])
@given(workloads(), st.integers(0, 2**32))
def test_every_request_is_served_once_in_order_within_the_limits(
    tiles: Callable[[], AbstractContextManager[None]], workload: tuple[Limits, int, list[Request]], seed: int
) -> None:
    with tiles():
        serve_all(*workload, seed)


def serve_all(limits: Limits, num_blocks: int, requests: list[Request], seed: int) -> None:
    allocator = BlockAllocator(num_blocks)
    scheduler = Scheduler(limits, allocator)
    arrivals = random.Random(seed)
    to_come = list(requests)
    lives = {request.id: Life() for request in requests}
    first_admissions: list[int] = []
    while to_come or scheduler.has_work:
        while to_come and arrivals.random() < 0.4:
            scheduler.submit(to_come.pop(0))
        if not scheduler.has_work:
            continue
        running_before = list(scheduler.running)
        batch = next_batch(scheduler)
        check_step(batch, limits, num_blocks)
        for request in running_before:
            if request.state is State.WAITING:
                lives[request.id].computed = 0
        for row in batch.rows:
            life = lives[row.request.id]
            if row.start == 0:
                life.admissions += 1
                if life.admissions == 1:
                    first_admissions.append(row.request.id)
            # Every token once per life: a row continues exactly where the last one stopped.
            assert row.start == life.computed
            life.computed += row.length
        # Nobody who only needs one token more has to wait for other people's prompts.
        computed = {row.request.id for row in batch.rows}
        decoding = {request.id for request in scheduler.running if len(request.token_ids) - request.num_cached == 1}
        assert decoding <= computed
        order = [request.id for request in scheduler.running] + [request.id for request in scheduler.waiting]
        assert order == sorted(order)
        read(scheduler, batch)
    assert first_admissions == sorted(lives)
    assert all(request.num_output == request.sampling.max_new_tokens for request in requests)
    allocator.check_balanced()


@given(workloads(), st.integers(0, 2**32))
def test_requests_cancelled_at_any_time_leave_nothing_behind(
    workload: tuple[Limits, int, list[Request]], seed: int
) -> None:
    limits, num_blocks, requests = workload
    allocator = BlockAllocator(num_blocks)
    scheduler = Scheduler(limits, allocator)
    chance = random.Random(seed)
    for request in requests:
        scheduler.submit(request)
    while scheduler.has_work:
        run_step(scheduler)
        if chance.random() < 0.3:
            scheduler.cancel(chance.choice(requests))
    assert all(request.is_finished for request in requests)
    allocator.check_balanced()


def test_a_long_prompt_is_cut_into_chunks_while_others_decode() -> None:
    scheduler = Scheduler(make_limits(tokens=8), BlockAllocator(100))
    scheduler.submit(make_request(0, 4, 20))
    run_step(scheduler)
    scheduler.submit(make_request(1, 16, 5))
    batches = [run_step(scheduler) for _ in range(3)]
    assert [[(row.request.id, row.start, row.length, row.num_logits) for row in batch.rows] for batch in batches] == [
        [(1, 0, 7, 0), (0, 4, 1, 1)],
        [(1, 7, 7, 0), (0, 5, 1, 1)],
        [(1, 14, 2, 1), (0, 6, 1, 1)],
    ]


def test_context_logits_are_asked_for_in_every_chunk() -> None:
    scheduler = Scheduler(make_limits(tokens=8), BlockAllocator(100))
    scheduler.submit(make_request(0, 12, 3, gather_context_logits=True))
    assert [run_step(scheduler).num_logits for _ in range(3)] == [8, 4, 1]


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    allocator = BlockAllocator(1 + 5)
    scheduler = Scheduler(make_limits(block=4), allocator)
    old, young = make_request(0, 4, 12), make_request(1, 4, 12)
    scheduler.submit(old)
    scheduler.submit(young)
    run_step(scheduler)
    assert scheduler.running == [old, young]
    while young.state is State.RUNNING:
        run_step(scheduler)
    assert (young.blocks, young.num_cached, list(scheduler.waiting)) == ([], 0, [young])
    written = list(young.token_ids)
    while not old.is_finished:
        run_step(scheduler)
    batch = run_step(scheduler)
    assert [(row.request, row.start, row.length) for row in batch.rows] == [(young, 0, len(written))]
    assert young.context_length == 4


@pytest.mark.parametrize(("olds", "is_admitted"), [(1, True), (2, True), (3, False)])
def test_a_newcomer_leaves_a_block_for_every_second_sequence_that_will_grow(olds: int, is_admitted: bool) -> None:
    scheduler = Scheduler(make_limits(block=4), BlockAllocator(1 + olds + 2))
    for index in range(olds):
        scheduler.submit(make_request(index, 3, 9))  # one block now, three in the end
    run_step(scheduler)
    scheduler.submit(make_request(olds, 2, 2))  # one block and no other
    assert scheduler.allocator.num_free == 2
    assert (next_batch(scheduler).num_contexts == 1) is is_admitted


def full_house(waiting: int, batch: int = 256, max_num_tokens: int = 4096) -> Scheduler:
    """A full batch of decodes, of which one in each step ends, and `waiting` requests of 100 tokens."""
    limits = Limits(
        max_batch_size=batch,
        max_input_len=1024,
        max_output_len=1024,
        max_num_tokens=max_num_tokens,
        tokens_per_block=64,
    )
    scheduler = Scheduler(limits, BlockAllocator(2000))
    for index in range(batch):
        scheduler.submit(make_request(index, 16, 2 + index if index < 40 else 200))
    while any(request.num_output == 0 for request in scheduler.running) or scheduler.waiting:
        run_step(scheduler)
    for index in range(waiting):
        scheduler.submit(make_request(batch + index, 100, 200))
    return scheduler


def test_prompts_come_in_whole_tiles_while_others_wait() -> None:
    scheduler = full_house(waiting=100)
    found = [run_step(scheduler) for _ in range(40)]
    prompts = [batch.num_context_tokens for batch in found]
    assert len([tokens for tokens in prompts if tokens]) >= 12 and set(prompts) == {0, 256}
    # Three prompts fill a tile: of 256 places a few are free at most.
    assert all(len(batch.rows) >= 256 - 4 for batch in found[1:])


def test_a_long_queue_fills_the_batch_in_steps_of_1024_tokens() -> None:
    limits = Limits(
        max_batch_size=64, max_input_len=1024, max_output_len=1024, max_num_tokens=4096, tokens_per_block=64
    )
    scheduler = Scheduler(limits, BlockAllocator(2000))
    for index in range(100):
        scheduler.submit(make_request(index, 100, 200))
    found = [run_step(scheduler) for _ in range(8)]
    # Ten decodes beside the second step's prompts are padded to 16, and so on; the last prompt of the batch is whole.
    assert [batch.num_context_tokens for batch in found[:3]] == [1024, 1008, 992]
    assert sum(batch.num_context_tokens for batch in found) == 6400 and len(scheduler.running) == 64


def test_nobody_waits_for_a_tile_if_there_is_room_for_all() -> None:
    scheduler = full_house(waiting=1)
    run_step(scheduler)
    assert [run_step(scheduler).num_context_tokens for _ in range(2)] == [100, 0]


def test_few_decodes_keep_no_place_for_a_tile() -> None:
    scheduler = full_house(waiting=40, batch=32)
    run_step(scheduler)
    assert [run_step(scheduler).num_context_tokens for _ in range(3)] == [100, 100, 100]


def test_nobody_waits_for_a_tile_that_a_step_cannot_hold() -> None:
    scheduler = full_house(waiting=200, max_num_tokens=400)
    while run_step(scheduler).num_contexts:
        pass
    for index, request in enumerate(scheduler.running[:20]):
        request.sampling = make_request(0, 16, request.num_output + 1 + index).sampling
    prompts = [run_step(scheduler).num_context_tokens for _ in range(21)]
    assert prompts == [0] + [100] * 20, "one ends in each step, and one comes"


def test_prompts_wait_a_few_steps_at_most() -> None:
    scheduler = full_house(waiting=100)
    for request in scheduler.running[1:]:  # only the first one ends
        request.sampling = make_request(0, 16, 200).sampling
    for _ in range(2):
        prompts = [run_step(scheduler).num_context_tokens for _ in range(40)]
        assert 16 <= prompts.index(100) <= 18 and sum(prompts) == 100
        oldest = scheduler.running[0]  # the next one to end
        oldest.sampling = make_request(0, 16, oldest.num_output + 1).sampling


def test_a_full_pool_admits_a_full_batch_of_the_longest_sequences() -> None:
    limits = make_limits(batch=4, tokens=64, block=4)
    scheduler = Scheduler(limits, BlockAllocator(1 + 4 * 8))
    for index in range(4):
        scheduler.submit(make_request(index, 16, 17))
    run_step(scheduler)
    assert len(scheduler.running) == 4


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    scheduler = Scheduler(make_limits(block=4), BlockAllocator(1 + 6))
    scheduler.submit(make_request(0, 12, 8))
    run_step(scheduler)
    scheduler.submit(make_request(1, 16, 1))
    scheduler.submit(make_request(2, 1, 1))
    run_step(scheduler)
    assert [request.id for request in scheduler.waiting] == [1, 2]


def test_a_request_that_could_never_fit_is_refused_with_numbers() -> None:
    scheduler = Scheduler(make_limits(block=4), BlockAllocator(1 + 3))
    with pytest.raises(
        ValueError, match=r"10 tokens with max_new_tokens 4 needs 4 KV blocks of 4 tokens, but .* has 3"
    ):
        scheduler.submit(make_request(0, 10, 4))
    assert not scheduler.has_work


def test_no_block_is_taken_for_a_last_token_that_is_pending() -> None:
    allocator = BlockAllocator(4)
    scheduler = Scheduler(make_limits(block=4), allocator)
    scheduler.submit(make_request(0, 4, 1))
    scheduler.launch(next_batch(scheduler))
    assert (next_batch(scheduler).rows, allocator.num_free) == ((), 2)


def test_without_preemption_a_sequence_enters_when_there_are_blocks_for_all_that_it_may_become() -> None:
    # Each may take three blocks of four tokens; five are there, so two at a time would need one more.
    scheduler = Scheduler(make_limits(block=4), BlockAllocator(6), preempts=False)
    requests = [make_request(index, 4, 8) for index in range(3)]
    for request in requests:
        scheduler.submit(request)
    most_running = 0
    while scheduler.has_work:
        run_step(scheduler)
        most_running = max(most_running, len(scheduler.running))
    assert most_running == 1 and all(request.is_finished for request in requests)


def test_a_preemption_waits_for_tokens_that_are_pending() -> None:
    scheduler = Scheduler(make_limits(block=4), BlockAllocator(1 + 3))
    old, young = make_request(0, 4, 5), make_request(1, 4, 5)
    for request in (old, young):
        scheduler.submit(request)
    batch = next_batch(scheduler)
    scheduler.launch(batch)
    assert scheduler.next_batch() is None
    scheduler.accept(batch, [1] * len(batch.receivers))
    assert [row.request for row in next_batch(scheduler).rows] == [old]
    assert list(scheduler.waiting) == [young] and young.num_pending == 0


def test_nothing_to_do_gives_no_rows() -> None:
    assert next_batch(Scheduler(make_limits(), BlockAllocator(4))).rows == ()


def test_cancelling_a_finished_request_changes_nothing() -> None:
    scheduler = Scheduler(make_limits(), BlockAllocator(8))
    request = make_request(0, 2, 1)
    scheduler.submit(request)
    run_step(scheduler)
    scheduler.cancel(request)
    assert request.finish_reason is FinishReason.LENGTH
