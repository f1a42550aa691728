"""Claims on text that comes token by token: whole characters only, and stop strings found wherever they are cut."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorrt_llm.tokenizer import QwenTokenizer, StopStringMatcher, TextStream, Tokenizer

same_tokenizer = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cut(sequence: Any, cuts: list[int]) -> list[Any]:
    """`sequence` in consecutive parts that end at `cuts` (taken modulo its length)."""
    ends = sorted(position % (len(sequence) + 1) for position in cuts)
    return [sequence[start:end] for start, end in zip([0, *ends], [*ends, len(sequence)], strict=True)]


CUTS = st.lists(st.integers(0, 1000), max_size=20)


# --- characters -------------------------------------------------------------------------------------------------------


@same_tokenizer
@given(text=st.text(), cuts=CUTS)
def test_streamed_text_is_the_decoded_text_for_any_cut(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    streamed = "".join(stream.push(part) for part in cut(ids, cuts)) + stream.flush()
    assert streamed == tokenizer.decode(ids)


@same_tokenizer
@given(data=st.data(), cuts=CUTS)
def test_any_ids_stream_to_what_they_decode_to(tokenizer: Tokenizer, data: st.DataObject, cuts: list[int]) -> None:
    ids = data.draw(st.lists(st.integers(0, 255) | st.integers(0, tokenizer.vocab_size - 1)))
    stream = TextStream(tokenizer)
    assert "".join(stream.push(part) for part in cut(ids, cuts)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("character", ["é", "龘", "🦜"])
def test_a_character_appears_with_its_last_byte(qwen: QwenTokenizer, character: str) -> None:
    ids = list(character.encode())  # ids below 256 are the bytes
    stream = TextStream(qwen)
    assert [stream.push([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + [character]


def test_a_wrong_byte_is_replaced_once_it_cannot_become_right(qwen: QwenTokenizer) -> None:
    stream = TextStream(qwen)
    assert [stream.push([token_id]) for token_id in b"\xe4\xbdA"] == ["", "", "\ufffdA"]


def test_flush_replaces_an_unfinished_character(qwen: QwenTokenizer) -> None:
    stream = TextStream(qwen)
    stream.push(list(b"ok\xf0\x9f"))
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


def test_a_flushed_stream_starts_anew(qwen: QwenTokenizer) -> None:
    stream = TextStream(qwen)
    stream.push(list(b"\xe4\xbd"))
    stream.flush()
    assert stream.push(list("好".encode())) == "好"


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials("<|im_start|>a<|extra_0|>b<|im_end|>")
    assert TextStream(tokenizer).push(ids) == "ab"


# --- stop strings -----------------------------------------------------------------------------------------------------


def text_before_stop(text: str, stop_strings: list[str]) -> str:
    """The definition: what stands before the stop string that is complete first, the longest if two end there."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    text=st.text(alphabet="abc", max_size=40),
    stop_strings=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    cuts=CUTS,
)
def test_the_text_before_the_first_stop_string_comes_out_for_any_cut(
    text: str, stop_strings: list[str], cuts: list[int]
) -> None:
    matcher = StopStringMatcher(stop_strings)
    shown = "".join(matcher.push(part)[0] for part in cut(text, cuts)) + matcher.flush()
    assert shown == text_before_stop(text, stop_strings)


@given(text=st.text(alphabet="abc", max_size=40), stop=st.text(alphabet="abc", min_size=1, max_size=5), cuts=CUTS)
def test_a_match_is_told_at_the_push_that_completes_it(text: str, stop: str, cuts: list[int]) -> None:
    matcher = StopStringMatcher([stop])
    parts = cut(text, cuts)
    told = [matcher.push(part)[1] for part in parts]
    assert told == [stop in "".join(parts[: i + 1]) for i in range(len(parts))]


def test_a_stop_string_over_three_pushes_is_cut_off() -> None:
    matcher = StopStringMatcher(["\nHuman:"])
    assert [matcher.push(text) for text in ("Yes.\nHu", "man", ": No")] == [("Yes.", False), ("", False), ("", True)]


def test_text_that_only_began_like_a_stop_string_follows() -> None:
    matcher = StopStringMatcher(["\nHuman:"])
    assert [matcher.push(text)[0] for text in ("a\nHum", "mus")] == ["a", "\nHummus"]


def test_flush_gives_the_text_held_back() -> None:
    matcher = StopStringMatcher(["STOP"])
    assert (matcher.push("the ST"), matcher.flush(), matcher.flush()) == (("the ", False), "ST", "")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopStringMatcher(["."])
    assert (matcher.push("a.b"), matcher.push("c"), matcher.flush()) == (("a", True), ("", True), "")


@pytest.mark.parametrize("stop_strings", [[""], ["a", ""], "abc"])
def test_stop_strings_that_make_no_sense_are_refused(stop_strings: list[str]) -> None:
    with pytest.raises(ValueError, match="expected a list of strings that are not empty"):
        StopStringMatcher(stop_strings)
