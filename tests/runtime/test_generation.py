"""The whole loop on a fake model: the same tokens whatever the batch, the pool or the way of asking; ends; errors.

All of it holds for a loop that reads each step before the next and for one that runs a step ahead.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import LIMITS, VOCAB_SIZE, FakeSession, FakeTokenizer

from tensorrt_llm.runtime.generation import GenerationSession
from tensorrt_llm.runtime.model_runner import ModelRunner
from tensorrt_llm.runtime.request import FinishReason, SamplingConfig

PROMPTS = [[5, 9, 30], [7] * 20, [60], [11, 12, 13, 14, 15, 16, 17], [3, 1, 4, 1, 5, 9], list(range(32)), [8, 8]]
# Ids 3 to 25 are the letters a to w, 26 and 27 the halves of é, 28 is 你, 29 a byte that is never UTF-8.
PIECES = [b"", b"", b"", *(bytes([ord("a") + i]) for i in range(23)), b"\xc3", b"\xa9", "你".encode(), b"\xff"]
LETTER = {piece: token for token, piece in enumerate(PIECES)}


@pytest.fixture(autouse=True, params=[False, True], ids=["", "ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSession, "runs_ahead", request.param)


def make_generation(session: FakeSession | None = None, tokenizer: FakeTokenizer | None = None) -> GenerationSession:
    return GenerationSession(session or FakeSession(), tokenizer)  # type: ignore[arg-type]


def ids_of(text: str) -> list[int]:
    return [LETTER[piece.encode()] for piece in text]


def make_speaker(says: list[int], num_blocks: int = 1000) -> GenerationSession:
    """A model that answers every prompt of two tokens with `says`."""
    session = FakeSession(next_token=lambda ids: (says + [0] * 100)[len(ids) - 2], num_blocks=num_blocks)
    return make_generation(session, FakeTokenizer(PIECES))


def outputs(generation: GenerationSession, prompts: list[list[int]], **config: Any) -> list[list[int]]:
    requests = [generation.submit(prompt, SamplingConfig(**config)) for prompt in prompts]
    while generation.has_work:
        generation.step()
    generation._allocator.check_balanced()
    return [request.output_ids for request in requests]


SAMPLINGS: list[dict[str, Any]] = [
    dict(),
    dict(temperature=1.3, top_k=10, random_seed=7),
    dict(top_k=0, top_p=0.8, random_seed=3, repetition_penalty=1.3, frequency_penalty=0.2),
]


@pytest.mark.parametrize("config", SAMPLINGS)
def test_a_request_gets_the_same_tokens_alone_and_among_others(config: dict[str, Any]) -> None:
    alone = [outputs(make_generation(), [prompt], **config)[0] for prompt in PROMPTS]
    assert outputs(make_generation(), PROMPTS, **config) == alone


@pytest.mark.parametrize("config", SAMPLINGS)
def test_preempted_requests_get_the_same_tokens(config: dict[str, Any]) -> None:
    session = FakeSession(num_blocks=14)
    crowded = outputs(make_generation(session), PROMPTS, **config)
    prompt_starts = sum(row.start == 0 for batch in session.batches for row in batch.rows)
    assert prompt_starts > len(PROMPTS), "nobody was preempted, so the test shows nothing"
    assert crowded == outputs(make_generation(), PROMPTS, **config)


def test_greedy_tokens_are_the_largest_logits_of_the_whole_sequence() -> None:
    session = FakeSession()
    [output] = outputs(make_generation(session), [PROMPTS[0]], max_new_tokens=10)
    expected = list(PROMPTS[0])
    for _ in range(10):
        expected.append(int(session.logits_after(expected).argmax()))
    assert output == expected[3:]


def test_more_prompts_than_the_batch_limit_all_finish() -> None:
    output_ids = make_generation().decode_batch(PROMPTS * 5, SamplingConfig(max_new_tokens=6))
    assert output_ids.shape == (35, 1, 38)


def test_requests_join_while_others_run() -> None:
    generation = make_generation()
    config = SamplingConfig(max_new_tokens=12)
    requests = []
    for prompt in PROMPTS:
        requests.append(generation.submit(prompt, config))
        generation.step()
    while generation.has_work:
        generation.step()
    assert [r.output_ids for r in requests] == outputs(make_generation(), PROMPTS, max_new_tokens=12)


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    def sample(seed: int) -> list[int]:
        return outputs(make_generation(), PROMPTS[:1], top_k=0, top_p=1.0, random_seed=seed, max_new_tokens=30)[0]

    assert sample(1) == sample(1) != sample(2)


# Forms of decode


def padded(prompts: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, prompts))
    return torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], dtype=torch.int32)


LENGTHS = torch.tensor([len(prompt) for prompt in PROMPTS], dtype=torch.int32)


@pytest.mark.parametrize(
    "input_ids",
    [padded(PROMPTS), torch.tensor(sum(PROMPTS, [])), torch.tensor([sum(PROMPTS, [])], dtype=torch.int32)],
    ids=["padded", "packed", "packed with a batch dimension"],
)
def test_decode_puts_new_tokens_right_after_each_prompt_and_end_ids_after_them(input_ids: torch.Tensor) -> None:
    output_ids = make_generation().decode(input_ids, LENGTHS, SamplingConfig(end_id=2, pad_id=0, max_new_tokens=5))
    expected = outputs(make_generation(), PROMPTS, end_id=2, max_new_tokens=5)
    assert output_ids.dtype == torch.int32
    assert output_ids[:, 0].tolist() == [
        (prompt + output + [2] * 37)[:37] for prompt, output in zip(PROMPTS, expected, strict=True)
    ]


def test_the_tail_is_pad_ids_when_there_is_no_end_id() -> None:
    output_ids = make_generation().decode_batch([[5, 6], [7]], SamplingConfig(pad_id=44, max_new_tokens=3))
    assert output_ids[1, 0, 4:].tolist() == [44]


def test_setup_fixes_the_shape_and_the_new_tokens_of_decode() -> None:
    generation = make_generation()
    generation.setup(batch_size=2, max_context_length=3, max_new_tokens=9)
    output_ids = generation.decode(padded([[5, 6, 7], [8]]), torch.tensor([3, 1]), SamplingConfig())
    assert output_ids.shape == (2, 1, 12)
    with pytest.raises(
        ValueError, match="decode got 1 prompts of at most 2 tokens, but setup was called for 2 of at most"
    ):
        generation.decode(padded([[5, 6]]), torch.tensor([2]), SamplingConfig())


@pytest.mark.parametrize(
    "config", [SamplingConfig(max_new_tokens=7), SamplingConfig(max_new_tokens=7, return_dict=True)]
)
def test_streaming_yields_the_same_tokens(config: SamplingConfig) -> None:
    def ids(output: Any) -> torch.Tensor:
        return output["output_ids"] if config.return_dict else output

    steps = [ids(output).clone() for output in make_generation().decode_batch(PROMPTS, config, streaming=True)]
    assert torch.equal(steps[-1], ids(make_generation().decode_batch(PROMPTS, config)))
    assert not torch.equal(steps[0], steps[-1])


def test_sequence_lengths_leave_out_the_id_that_ended_a_sequence() -> None:
    generation = make_speaker([*ids_of("abc"), 2])
    output = generation.decode_batch([[4, 5], [6, 7]], SamplingConfig(end_id=2, return_dict=True))
    assert output["sequence_lengths"].tolist() == [[5], [5]]
    assert output["finish_reasons"] == ["end_id", "end_id"]
    assert output["texts"] == ["abc", "abc"]


def test_asking_for_sequence_lengths_asks_for_the_dict() -> None:
    output = make_generation().decode_batch([[5]], SamplingConfig(max_new_tokens=4), output_sequence_lengths=True)
    assert output["sequence_lengths"].tolist() == [[5]]


@pytest.mark.parametrize("num_blocks", [1000, 14], ids=["roomy", "with preemption"])
def test_logits_on_demand_are_those_of_every_token(num_blocks: int) -> None:
    session = FakeSession(num_blocks=num_blocks)
    config = SamplingConfig(max_new_tokens=8, gather_context_logits=True, gather_generation_logits=True)
    output = make_generation(session).decode_batch(PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        ids = output["output_ids"][row, 0, : len(prompt) + 8].tolist()
        expected = torch.stack([session.logits_after(ids[: n + 1]) for n in range(len(ids) - 1)])
        assert torch.equal(output["context_logits"][row], expected[: len(prompt)])
        assert torch.equal(output["generation_logits"][row], expected[len(prompt) - 1 :])


def test_context_logits_are_complete_when_a_prompt_was_preempted_between_its_chunks() -> None:
    limits = replace(LIMITS, max_num_tokens=4)
    session = FakeSession(limits, num_blocks=1 + 11)
    generation = make_generation(session)
    generation.submit([5, 6, 7, 8], SamplingConfig(max_new_tokens=30))
    young = generation.submit(PROMPTS[5], SamplingConfig(max_new_tokens=1, gather_context_logits=True))
    while generation.has_work:
        generation.step()
    chunks = [row for batch in session.batches for row in batch.rows if row.request is young]
    assert [row.start for row in chunks].count(0) == 2 and chunks[1].start > 0, "it was not preempted between chunks"
    expected = torch.stack([session.logits_after(PROMPTS[5][: n + 1]) for n in range(32)])
    assert torch.equal(torch.cat(young.context_logits), expected)


def test_log_probs_on_demand_are_those_of_the_chosen_tokens() -> None:
    config = SamplingConfig(
        max_new_tokens=6,
        top_k=5,
        random_seed=0,
        gather_generation_logits=True,
        output_log_probs=True,
        output_cum_log_probs=True,
    )
    output = make_generation().decode_batch([[4, 5], [6]], config)
    for row, length in enumerate((2, 1)):
        ids = output["output_ids"][row, 0, length : length + 6].long()
        expected = output["generation_logits"][row].log_softmax(-1)[range(6), ids]
        torch.testing.assert_close(output["log_probs"][row, 0], expected)
        torch.testing.assert_close(output["cum_log_probs"][row, 0], expected.sum())


def test_log_probs_are_kept_only_for_the_requests_that_ask() -> None:
    generation = make_generation()
    asking = generation.submit([5], SamplingConfig(output_log_probs=True, max_new_tokens=4))
    other = generation.submit([5], SamplingConfig(max_new_tokens=4))
    while generation.has_work:
        generation.step()
    assert (len(asking.log_probs), len(other.log_probs)) == (4, 0)


# Ends


@pytest.mark.parametrize(
    ("config", "output", "reason"),
    [
        (dict(), "abcabcabc", FinishReason.LENGTH),
        (dict(end_id=LETTER[b"b"]), "ab", FinishReason.END_ID),
        (dict(stop_ids=ids_of("wc")), "abc", FinishReason.END_ID),
        (dict(stop_words_list=[ids_of("ca")]), "abca", FinishReason.STOP_WORDS),
        (dict(stop_words_list=[ids_of("ca")], min_length=5), "abcabca", FinishReason.STOP_WORDS),
        (dict(stop_strings=["ca"]), "abca", FinishReason.STOP_STRING),
        (dict(stop_strings=["ca"], min_length=5), "abcabca", FinishReason.STOP_STRING),
        (dict(bad_words_list=[ids_of("bc")]), "ab", None),
    ],
)
def test_what_ends_a_sequence(config: dict[str, Any], output: str, reason: FinishReason | None) -> None:
    generation = make_speaker(ids_of("abcabcabc"))
    request = generation.submit([4, 5], SamplingConfig(**{"max_new_tokens": 9, **config}))
    while generation.has_work:
        generation.step()
    assert request.output_ids[: len(output)] == ids_of(output)
    assert reason is None or (len(request.output_ids), request.finish_reason) == (len(output), reason)


def test_a_stop_string_that_spans_tokens_ends_the_request_and_cuts_its_text() -> None:
    generation = make_speaker(ids_of("hallodu") + [LETTER[b"a"]] * 20)
    request = generation.submit([4, 5], SamplingConfig(max_new_tokens=20, stop_strings=["lod"]))
    while generation.has_work:
        generation.step()
    assert (request.text, request.output_ids) == ("hal", ids_of("hallod"))


def test_no_end_before_min_length() -> None:
    [output] = outputs(
        make_generation(), [[5, 9, 30]], end_id=23, stop_ids=list(range(20)), min_length=15, max_new_tokens=30
    )
    assert len(output) >= 15


# Text


def test_streamed_text_is_whole_characters_without_special_tokens() -> None:
    says = [*ids_of("a"), 26, 27, 1, 28, 29, *ids_of("b"), 26, 2]
    pieces = list(make_speaker(says).stream_text([4, 5], SamplingConfig(end_id=2)))
    assert pieces == ["a", "é", "你", "\ufffd", "b", "\ufffd"]


def test_the_text_of_an_end_id_is_not_shown() -> None:
    pieces = list(make_speaker(ids_of("abc")).stream_text([4, 5], SamplingConfig(end_id=LETTER[b"c"])))
    assert pieces == ["a", "b"]


def test_text_that_may_begin_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    pieces = list(
        make_speaker(ids_of("abwab") + [2]).stream_text([4, 5], SamplingConfig(end_id=2, stop_strings=["abc"]))
    )
    assert pieces == ["abw", "ab"]


def test_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    pieces = list(make_speaker([*ids_of("a"), 55, *ids_of("b"), 2]).stream_text([4, 5], SamplingConfig(end_id=2)))
    assert pieces == ["a", "b"]


def test_stream_tells_which_prompt_got_which_token() -> None:
    collected: list[list[int]] = [[] for _ in PROMPTS]
    reasons: list[Any] = [None] * len(PROMPTS)
    for token in make_generation().stream(PROMPTS, SamplingConfig(max_new_tokens=6)):
        collected[token.prompt_index].append(token.token_id)
        reasons[token.prompt_index] = token.finish_reason
    assert collected == outputs(make_generation(), PROMPTS, max_new_tokens=6)
    assert reasons == [FinishReason.LENGTH] * len(PROMPTS)


def test_stream_without_a_tokenizer_has_no_text() -> None:
    assert {token.text for token in make_generation().stream(PROMPTS, SamplingConfig())} == {""}


# Leaving early


def stream_text(generation: GenerationSession) -> Iterator[Any]:
    return generation.stream_text([4, 5], SamplingConfig(max_new_tokens=20))


def stream(generation: GenerationSession) -> Iterator[Any]:
    return generation.stream(PROMPTS[:3], SamplingConfig(max_new_tokens=20))


def decode(generation: GenerationSession) -> Iterator[Any]:
    return generation.decode_batch(PROMPTS[:3], SamplingConfig(max_new_tokens=20), streaming=True)


@pytest.mark.parametrize("start", [stream_text, stream, decode])
def test_leaving_an_iterator_early_cancels_and_frees_blocks(
    start: Callable[[GenerationSession], Iterator[Any]],
) -> None:
    generation = make_generation(FakeSession(next_token=lambda ids: 3), FakeTokenizer(PIECES))
    for _ in start(generation):
        assert generation.has_work
        break
    assert not generation.has_work
    assert not generation._texts
    generation._allocator.check_balanced()


def test_an_iterator_that_is_never_begun_holds_nothing() -> None:
    generation = make_speaker(ids_of("abc"))
    stream_text(generation)
    assert not generation.has_work


def test_a_cancelled_request_frees_its_blocks_and_the_others_go_on() -> None:
    generation = make_generation()
    requests = [generation.submit(prompt, SamplingConfig(max_new_tokens=12)) for prompt in PROMPTS]
    for _ in range(6):
        generation.step()
    generation.cancel(requests[0])
    generation.cancel(requests[-1])
    assert (requests[0].blocks, requests[0].finish_reason) == ([], FinishReason.CANCELLED)
    while generation.has_work:
        generation.step()
    generation._allocator.check_balanced()
    assert [r.output_ids for r in requests[1:-1]] == outputs(make_generation(), PROMPTS, max_new_tokens=12)[1:-1]


def test_after_an_error_in_a_step_nothing_is_left_behind() -> None:
    session = FakeSession()
    generation = make_generation(session)
    session.logits_after = lambda ids: torch.full((VOCAB_SIZE,), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no next token"):
        generation.decode_batch(PROMPTS, SamplingConfig())
    assert not generation.has_work
    generation._allocator.check_balanced()


def test_a_refused_prompt_in_a_batch_leaves_nothing_behind() -> None:
    generation = make_generation(FakeSession(num_blocks=4))
    with pytest.raises(ValueError, match="needs 9 KV blocks of 4 tokens, but the cache has 3"):
        generation.decode_batch([[5], list(range(30))], SamplingConfig(max_new_tokens=6))
    assert not generation.has_work


# Bad input


@pytest.mark.parametrize(
    ("prompts", "config", "message"),
    [
        ([], {}, "the batch has 0 prompts, expected at least one"),
        ([[5], []], {}, "prompt 1 is empty, expected at least one token"),
        ([[5, VOCAB_SIZE]], {}, "prompt 0 holds token id 61, expected 0 to 60"),
        ([[5, -1]], {}, "prompt 0 holds token id -1, expected 0 to 60"),
        ([[5], [5] * 33], {}, r"prompt 1 has 33 tokens, expected at most 32 \(max_input_len\)"),
        ([[5] * 30], dict(max_new_tokens=35), r"30 tokens, with max_new_tokens 35 that makes 65, expected at most 64"),
        ([[5.0, 6.0]], {}, "prompt 0 is not a one-dimensional list or tensor of integer token ids"),
        ([[[5], [6]]], {}, "prompt 0 is not a one-dimensional list or tensor of integer token ids"),
        ([torch.ones(3)], {}, "prompt 0 is not a one-dimensional list or tensor of integer token ids"),
        (["hello"], {}, "prompt 0 is not a one-dimensional list or tensor of integer token ids"),
        ([7], {}, "prompt 0 is not a one-dimensional list or tensor of integer token ids"),
        ([[5]], dict(end_id=61), "end_id or stop_ids holds token id 61, expected 0 to 60"),
        ([[5]], dict(num_beams=4), "num_beams is 4, expected 1: beam search is not supported"),
        ([[5], [6]], dict(top_p=[0.1, 0.2, 1.5]), "top_p is .*, expected one number, or one for each of 2 sequences"),
        ([[5]], dict(stop_strings=["x"]), "stop_strings are .*, but there is no tokenizer"),
    ],
)
def test_a_wrong_request_is_refused_with_what_was_found_and_wanted(
    prompts: list[Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_generation().decode_batch(prompts, SamplingConfig(**config))


@pytest.mark.parametrize("start", ["stream", "decode_batch"])
def test_a_wrong_request_is_refused_at_the_call_and_not_at_the_first_token(start: str) -> None:
    arguments = {"streaming": True} if start == "decode_batch" else {}
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        getattr(make_generation(), start)([[]], SamplingConfig(), **arguments)


@pytest.mark.parametrize(
    ("input_ids", "lengths"),
    [
        (torch.ones(2, 3, dtype=torch.int32), [3, 4]),
        (torch.ones(2, 3, dtype=torch.int32), [3]),
        (torch.ones(2, 3, dtype=torch.int32), [3, -1]),
        (torch.ones(7, dtype=torch.int32), [3, 3]),
        (torch.ones(2, 3, 1, dtype=torch.int32), [3, 3]),
        (torch.ones(0, 3, dtype=torch.int32), []),
    ],
)
def test_ids_and_lengths_that_do_not_belong_together_are_refused(input_ids: torch.Tensor, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="input_ids have shape .* and context_lengths are"):
        make_generation().decode(input_ids, lengths, SamplingConfig())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 4, 4), "batch_size is 0, max_context_length 4, max_new_tokens 4, expected at least 1 of each"),
        ((1, 33, 4), "max_context_length is 33, expected at most 32"),
        ((1, 32, 33), r"max_context_length \+ max_new_tokens is 65, expected at most 64"),
        ((1, 4, 4, 2), "beam_width is 2, expected 1"),
    ],
)
def test_a_setup_beyond_the_limits_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generation().setup(*shape)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="stream_text needs a tokenizer"):
        make_generation().stream_text([5], SamplingConfig())
    with pytest.raises(ValueError, match="with_text needs a tokenizer"):
        make_generation().submit([5], SamplingConfig(), with_text=True)


# ModelRunner


def test_the_runner_takes_sampling_as_keywords_and_leaves_the_config_alone() -> None:
    config = SamplingConfig(max_new_tokens=3)
    output_ids = ModelRunner(make_generation()).generate([[5], np.array([6, 7])], config, max_new_tokens=8)
    assert output_ids.shape == (2, 1, 10)
    assert config == SamplingConfig(max_new_tokens=3)


def test_the_runner_names_keywords_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="generate got lora_uids, prompt_tasks, expected fields of SamplingConfig"):
        ModelRunner(make_generation()).generate([[5]], prompt_tasks="0", lora_uids=None)


def test_the_runner_ends_at_the_tokenizers_stop_ids_by_default() -> None:
    output = ModelRunner(make_speaker([*ids_of("ab"), 1, *ids_of("c")])).generate([[4, 5]], return_dict=True)
    assert (output["texts"], output["finish_reasons"]) == (["ab"], ["end_id"])


def test_the_runner_streams() -> None:
    runner = ModelRunner(make_generation())
    assert len(list(runner.generate(PROMPTS[:1], max_new_tokens=5, streaming=True))) >= 5


def test_one_step_at_a_time_stays_within_a_tight_budget() -> None:
    limits = replace(LIMITS, max_num_tokens=4)
    assert outputs(make_generation(FakeSession(limits)), PROMPTS) == outputs(make_generation(), PROMPTS)
