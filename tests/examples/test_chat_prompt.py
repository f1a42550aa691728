"""Claims on prompts: what they say, that text cannot forge markers, and what goes first when there is too much."""

import re
from typing import Any

import pytest
from chat_prompt import make_context, stop_words_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorrt_llm.tokenizer import Tokenizer

same_tokenizer = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

IM_START, IM_END = 257, 258
HEADERS = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def length_of(text: str) -> int:
    """Ids of a prompt's text: one per byte, one per marker."""
    return len(re.sub(r"<\|im_(start|end)\|>", "#", text).encode())


EMPTY_LENGTH = length_of(HEADERS.format("s", ""))  # with the system prompt "s" and an empty question
TURN = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"


def test_a_first_question_has_system_question_and_open_answer(tokenizer: Tokenizer) -> None:
    text, _ = make_context(tokenizer, "你好")
    assert text == HEADERS.format("You are a helpful assistant.", "你好")


def test_older_turns_stand_between_system_and_question(tokenizer: Tokenizer) -> None:
    text, _ = make_context(tokenizer, "q3", [("q1", "a1"), ("q2", "a2")], system="s")
    assert text == (
        "<|im_start|>system\ns<|im_end|>"
        "\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>"
        "\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>"
        "\n<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_ids_are_markers_and_plain_text(tokenizer: Tokenizer) -> None:
    _, ids = make_context(tokenizer, "q", system="s")
    assert ids == [
        *(IM_START, *b"system\ns", IM_END),
        *(*b"\n", IM_START, *b"user\nq", IM_END),
        *(*b"\n", IM_START, *b"assistant\n"),
    ]


@same_tokenizer
@given(
    texts=st.lists(
        st.lists(st.text(max_size=5) | st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])).map("".join),
        min_size=4,
        max_size=4,
    )
)
def test_no_text_of_a_user_becomes_a_marker(tokenizer: Tokenizer, texts: list[str]) -> None:
    query, system, old_query, old_answer = texts
    _, ids = make_context(tokenizer, query, [(old_query, old_answer)], system, max_input_length=10_000)
    specials = [token_id for token_id in ids if token_id >= 256]
    assert specials == [IM_START, IM_END] * 4 + [IM_START]


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_a_turn_stays_if_it_fits_to_the_last_token(tokenizer: Tokenizer, spare: int) -> None:
    turn = length_of(TURN.format("q2", "a2"))
    limit = EMPTY_LENGTH + len("q3") + turn + spare
    text, ids = make_context(tokenizer, "q3", [("q1", "a1"), ("q2", "a2")], "s", max_input_length=limit)
    assert ("q1" in text, "a2" in text, len(ids)) == (False, True, limit - spare)


def test_a_turn_goes_whole_if_one_token_is_too_much(tokenizer: Tokenizer) -> None:
    limit = EMPTY_LENGTH + len("q3") + length_of(TURN.format("q2", "a2")) - 1
    text, _ = make_context(tokenizer, "q3", [("q2", "a2")], "s", max_input_length=limit)
    assert text == HEADERS.format("s", "q3")


def test_no_older_turn_jumps_a_gap(tokenizer: Tokenizer) -> None:
    history = [("q1", "a1"), ("q2", "a" * 500), ("q3", "a3")]
    text, _ = make_context(tokenizer, "q4", history, "s", max_input_length=300)
    assert ("q1" in text, "q2" in text, "q3" in text) == (False, False, True)


def test_the_question_counts_in_the_window(tokenizer: Tokenizer) -> None:
    turn = length_of(TURN.format("q1", "a1"))
    window = EMPTY_LENGTH + 100 + turn  # one short: the bound of the window is strict
    _, with_turn = make_context(tokenizer, "x" * 100, [("q1", "a1")], "s", max_window_size=window + 1)
    _, without = make_context(tokenizer, "x" * 100, [("q1", "a1")], "s", max_window_size=window)
    assert (len(with_turn), len(without)) == (window, window - turn)


@pytest.mark.parametrize("limits", [{"max_input_length": 99}, {"max_window_size": 100}])
def test_a_question_that_is_too_long_keeps_its_beginning(tokenizer: Tokenizer, limits: dict[str, Any]) -> None:
    query = "Summarize this: " + "x" * 9000
    text, ids = make_context(tokenizer, query, [("q1", "a1")], "s", **limits)
    assert (text, len(ids)) == (HEADERS.format("s", query[: 99 - EMPTY_LENGTH]), 99)


@pytest.mark.parametrize("room", range(9))
def test_a_question_is_cut_between_characters(tokenizer: Tokenizer, room: int) -> None:
    text, _ = make_context(tokenizer, "你👍é", system="s", max_input_length=EMPTY_LENGTH + room)
    whole = {0: "", 3: "你", 7: "你👍"}
    assert text == HEADERS.format("s", whole[max(length for length in whole if length <= room)])


def test_a_cut_question_is_logged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    make_context(tokenizer, "x" * 50, system="s", max_input_length=EMPTY_LENGTH + 20)
    assert "the question has 50 tokens, but there is room for 20" in caplog.text


@same_tokenizer
@given(
    query=st.text(),
    history=st.lists(st.tuples(st.text(), st.text())),
    limit=st.integers(EMPTY_LENGTH, 400),
    window=st.integers(EMPTY_LENGTH + 1, 400),
)
def test_any_prompt_fits_and_keeps_system_and_headers(
    tokenizer: Tokenizer, query: str, history: list[tuple[str, str]], limit: int, window: int
) -> None:
    _, ids = make_context(tokenizer, query, history, "s", max_input_length=limit, max_window_size=window)
    head = [IM_START, *b"system\ns", IM_END, *b"\n", IM_START, *b"user\n"]
    tail = [IM_END, *b"\n", IM_START, *b"assistant\n"]
    assert (len(ids) <= limit, len(ids) < window, ids[: len(head)], ids[-len(tail) :]) == (True, True, head, tail)


def test_a_system_prompt_that_does_not_fit_is_refused_with_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="system prompt takes 3009 tokens and the chat headers 20, but only 2048"):
        make_context(tokenizer, "q", system="x" * 3000)


def test_headers_that_do_not_fit_by_one_token_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"but only {EMPTY_LENGTH - 1} are allowed"):
        make_context(tokenizer, "", system="s", max_input_length=EMPTY_LENGTH - 1)


def test_raw_is_the_text_alone(tokenizer: Tokenizer) -> None:
    context = make_context(tokenizer, "1 + 1 =", [("q", "a")], "s", chat_format="raw")
    assert context == ("1 + 1 =", list(b"1 + 1 ="))


def test_raw_keeps_the_last_tokens(tokenizer: Tokenizer) -> None:
    assert make_context(tokenizer, "abcdef", max_input_length=2, chat_format="raw") == ("ef", list(b"ef"))


def test_raw_text_makes_no_markers_either(tokenizer: Tokenizer) -> None:
    _, ids = make_context(tokenizer, "<|im_end|>", chat_format="raw")
    assert ids == list(b"<|im_end|>")


@pytest.mark.parametrize("chat_format", ["ChatML", "", "llama"])
def test_another_chat_format_is_refused(tokenizer: Tokenizer, chat_format: str) -> None:
    with pytest.raises(ValueError, match=f"chat_format is '{chat_format}', expected 'chatml' or 'raw'"):
        make_context(tokenizer, "q", chat_format=chat_format)


def test_another_chat_format_has_no_stop_words(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="chat_format is 'llama', expected 'chatml' or 'raw'"):
        stop_words_for(tokenizer, "llama")


@pytest.mark.parametrize("limits", [{"max_input_length": 0}, {"max_window_size": -1}])
@pytest.mark.parametrize("chat_format", ["chatml", "raw"])
def test_limits_below_one_are_refused(tokenizer: Tokenizer, limits: dict[str, Any], chat_format: str) -> None:
    with pytest.raises(ValueError, match="expected at least 1 each"):
        make_context(tokenizer, "q", chat_format=chat_format, **limits)


def test_a_tokenizer_without_markers_cannot_write_chatml(tokenizer: Tokenizer) -> None:
    tokenizer.im_end_id = None
    with pytest.raises(ValueError, match="has no <|im_start|> and <|im_end|>"):
        make_context(tokenizer, "q")


def test_a_chat_reply_ends_at_any_marker(tokenizer: Tokenizer) -> None:
    assert stop_words_for(tokenizer, "chatml") == ((IM_END, IM_START, 256), ())


def test_a_raw_text_ends_where_a_human_would_speak(tokenizer: Tokenizer) -> None:
    assert stop_words_for(tokenizer, "raw") == ((256,), ("Human:",))
