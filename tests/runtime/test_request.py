"""Sampling settings are checked where they are born; a request knows why it ends."""

import math

import numpy as np
import pytest
import torch

from tensorrt_llm.runtime.request import FinishReason, Request, SamplingConfig


def make_request(config: SamplingConfig, prompt: list[int], output: list[int]) -> Request:
    request = Request(0, prompt, config.for_sequence(0, 1))
    request.token_ids += output
    return request


def test_the_defaults_are_greedy_and_ask_for_nothing_else() -> None:
    assert SamplingConfig(end_id=2, pad_id=2).for_sequence(0, 1).is_plain


@pytest.mark.parametrize(
    ("settings", "is_greedy"),
    [
        (dict(temperature=0.0, top_k=50, top_p=0.9), True),
        (dict(top_k=1, top_p=0.9), True),
        (dict(top_k=0, top_p=0.0), True),
        (dict(top_k=0, top_p=0.5), False),
        (dict(top_k=0, top_p=1.0), False),
        (dict(top_k=50, top_p=0.0), False),
        (dict(top_k=50, top_p=0.9), False),
    ],
)
def test_what_is_greedy(settings: dict[str, float], is_greedy: bool) -> None:
    assert SamplingConfig(**settings).for_sequence(0, 1).is_greedy is is_greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-0.1), r"temperature is -0.1, expected a number of at least 0"),
        (dict(temperature=math.nan), r"temperature is nan"),
        (dict(temperature=math.inf), r"temperature is inf"),
        (dict(temperature="hot"), r"temperature is 'hot'"),
        (dict(temperature=None), r"temperature is None"),
        (dict(top_p=1.1), r"top_p is 1.1, expected a number from 0 to 1"),
        (dict(top_p=-0.1), r"top_p is -0.1"),
        (dict(top_p=math.nan), r"top_p is nan"),
        (dict(top_k=-1), r"top_k is -1, expected an integer of at least 0"),
        (dict(top_k=2.5), r"top_k is 2.5"),
        (dict(top_k=True), r"top_k is True"),
        (dict(num_beams=2), r"num_beams is 2, expected 1: beam search is not supported"),
        (dict(num_beams=0), r"num_beams is 0"),
        (dict(max_new_tokens=0), r"max_new_tokens is 0, expected an integer of at least 1"),
        (dict(min_length=-1), r"min_length is -1"),
        (dict(repetition_penalty=0.0), r"repetition_penalty is 0.0, expected a number above 0"),
        (dict(repetition_penalty=math.nan), r"repetition_penalty is nan"),
        (dict(presence_penalty=math.inf), r"presence_penalty is inf"),
        (dict(frequency_penalty=math.nan), r"frequency_penalty is nan"),
        (dict(length_penalty=math.nan), r"length_penalty is nan"),
        (dict(random_seed=-1), r"random_seed is -1, expected None or an integer of at least 0"),
        (dict(random_seed=1.5), r"random_seed is 1.5"),
        (dict(end_id=-1), r"end_id is -1, expected token ids"),
        (dict(pad_id=-1), r"pad_id is -1"),
        (dict(stop_ids=5), r"stop_ids is 5, expected a list of token ids"),
        (dict(stop_ids=[1.5]), r"stop_ids is 1.5"),
        (dict(stop_words_list=[1, 2]), r"stop_words_list is 1, expected a list of token ids"),
        (dict(stop_words_list=[[]]), r"stop_words_list is \[\[\]\], expected lists of token ids that are not empty"),
        (dict(bad_words_list=[["no"]]), r"bad_words_list is 'no', expected token ids"),
        (dict(stop_strings="end"), r"stop_strings is 'end', expected a list of strings"),
        (dict(stop_strings=[""]), r"stop_strings is \[''\], expected a list of strings that are not empty"),
        (dict(temperature=[1.0, 0.5]), r"temperature is \[1.0, 0.5\], expected one number, or one for each of 1"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_wanted(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"SamplingConfig\.{message}"):
        SamplingConfig(**settings).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [[0.0, 0.5, 1.5], (0.0, 0.5, 1.5), np.array([0.0, 0.5, 1.5]), torch.tensor([0.0, 0.5, 1.5])]
)
def test_a_number_may_differ_from_sequence_to_sequence(values: list[float]) -> None:
    config = SamplingConfig(temperature=values)
    assert [config.for_sequence(index, 3).temperature for index in range(3)] == [0.0, 0.5, 1.5]


def test_one_wrong_number_in_a_list_is_found() -> None:
    with pytest.raises(ValueError, match="top_k is -3"):
        SamplingConfig(top_k=[1, 2, -3]).validate(batch_size=3)


def test_update_sets_known_fields_and_returns_the_others() -> None:
    config = SamplingConfig()
    assert config.update(top_k=7, prompt_table=None) == {"prompt_table": None}
    assert config.top_k == 7


def test_any_of_the_end_ids_ends_a_sequence() -> None:
    config = SamplingConfig(end_id=2, stop_ids=[3, 4])
    assert [make_request(config, [9], [5, last]).stop_reason() for last in (2, 3, 4, 5)] == [
        FinishReason.END_ID,
        FinishReason.END_ID,
        FinishReason.END_ID,
        None,
    ]


def test_stop_words_end_a_sequence_only_inside_its_output() -> None:
    config = SamplingConfig(stop_words_list=[[7, 8]])
    assert make_request(config, [1], [7, 8]).stop_reason() is FinishReason.STOP_WORDS
    assert make_request(config, [1, 7], [8]).stop_reason() is None


def test_stop_words_wait_for_min_length() -> None:
    config = SamplingConfig(stop_words_list=[[7]], min_length=3)
    assert make_request(config, [1], [6, 7]).stop_reason() is None
    assert make_request(config, [1], [6, 6, 7]).stop_reason() is FinishReason.STOP_WORDS


def test_end_ids_are_banned_while_the_output_would_be_shorter_than_min_length() -> None:
    config = SamplingConfig(end_id=2, min_length=3)
    assert [make_request(config, [1], [5] * n).banned_ids() for n in range(4)] == [[2], [2], [], []]


def test_the_last_token_of_a_bad_word_is_banned_after_the_others() -> None:
    config = SamplingConfig(bad_words_list=[[4], [5, 6, 7]])
    assert make_request(config, [5], [6]).banned_ids() == [4, 7]
    assert make_request(config, [6], [5]).banned_ids() == [4]
    assert make_request(config, [6], []).banned_ids() == [4]


@pytest.mark.parametrize("field", ["stop_words_list", "bad_words_list"])
def test_words_outside_the_vocabulary_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} holds token id 10, expected 0 to 9"):
        SamplingConfig(**{field: [[1, 10]]}).for_sequence(0, 1).check_vocabulary(10)


def test_end_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(ValueError, match=r"end_id or stop_ids holds token id 151643, expected 0 to 9"):
        SamplingConfig(end_id=151643).for_sequence(0, 1).check_vocabulary(10)


def test_equal_seeds_draw_equal_numbers_and_no_seed_draws_new_ones() -> None:
    def draw(seed: int | None) -> float:
        return Request(0, [1], SamplingConfig(random_seed=seed).for_sequence(0, 1)).random.random()

    assert draw(5) == draw(5)
    assert len({draw(5), draw(6), draw(None), draw(None)}) == 4
