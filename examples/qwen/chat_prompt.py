"""A question, its history and a system prompt -> the ids that a Qwen model expects, and what ends its reply.

The rules are those of Qwen's own make_context, with three differences. The question counts in the window too. What is
too long loses its oldest turns and then the end of the question, never the system prompt or a header. And as text is
encoded without special tokens, nothing that a user writes becomes a marker: give the model the ids, not the raw text.
Knows no engine: limits come as numbers.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tensorrt_llm.tokenizer import TextStream, Tokenizer  # noqa: E402

logger = logging.getLogger(__name__)

DEFAULT_SYSTEM = "You are a helpful assistant."


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = DEFAULT_SYSTEM,
    max_input_length: int = 2048,
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt as (text, ids): at most `max_input_length` ids, in chatml also less than `max_window_size`.

    `history` holds (question, answer) pairs, the oldest first. The text shows what the ids mean, after any truncation.
    """
    if max_input_length < 1 or max_window_size < 1:
        raise ValueError(
            f"max_input_length is {max_input_length} and max_window_size is {max_window_size}, expected at least 1 each"
        )
    if chat_format == "chatml":
        # The window's bound is strict, as in the original.
        budget = min(max_input_length, max_window_size - 1)
        ids = _ChatMl(tokenizer).prompt(query, history or (), system, budget)
    elif chat_format == "raw":
        ids = tokenizer.encode(query)[-max_input_length:]
    else:
        raise _unknown_format(chat_format)
    return tokenizer.decode(ids, skip_special_tokens=False), ids


class StopRules(NamedTuple):
    """What ends a reply. The first id is also the one to pad with."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


def stop_words_for(tokenizer: Tokenizer, chat_format: str) -> StopRules:
    """Stop ids and stop strings of a chat format."""
    if chat_format == "chatml":
        im_start, im_end = _chat_markers(tokenizer)
        return StopRules(ids=(im_end, im_start, tokenizer.eod_id), strings=())
    if chat_format == "raw":
        # Base models know dialogues as "Human: ... Assistant: ...", and would write the user's next turn.
        return StopRules(ids=(tokenizer.eod_id,), strings=("Human:",))
    raise _unknown_format(chat_format)


class _ChatMl:
    """Writes messages `<|im_start|>role newline content<|im_end|>` as ids, with a newline between them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._im_start, self._im_end = _chat_markers(tokenizer)
        self._newline = tokenizer.encode("\n")

    def prompt(self, query: str, history: Sequence[tuple[str, str]], system: str, budget: int) -> list[int]:
        """System prompt, as many of the newest turns as fit, the question, and the header of the answer to come."""
        system_ids = self._message("system", self._tokenizer.encode(system))
        header_length = len(self._open_turn([]))
        room = budget - len(system_ids) - header_length
        if room < 0:
            raise ValueError(
                f"the system prompt takes {len(system_ids)} tokens and the chat headers {header_length}, but only "
                f"{budget} are allowed; shorten the system prompt, or raise the limits of input length and window"
            )
        question = self._cut(self._tokenizer.encode(query), room)
        return [*system_ids, *self._newest_turns(history, room - len(question)), *self._open_turn(question)]

    def _cut(self, question: list[int], room: int) -> list[int]:
        """The beginning of a question that fits, in whole characters.

        It is the end that goes, as instructions ("summarize this: ...") mostly stand before the text they are about.
        """
        if len(question) <= room:
            return question
        logger.warning("the question has %d tokens, but there is room for %d: its end is cut off", len(question), room)
        stream = TextStream(self._tokenizer)
        for length in range(room, 0, -1):
            stream.push(question[:length])
            if not stream.flush():
                return question[:length]
        return []

    def _newest_turns(self, history: Sequence[tuple[str, str]], room: int) -> list[int]:
        ids: list[int] = []
        for number, (user, assistant) in enumerate(reversed(history)):
            turn = self._turn(user, assistant)
            if len(ids) + len(turn) > room:
                logger.info("the oldest %d of %d turns are left out", len(history) - number, len(history))
                break
            ids = turn + ids
        return ids

    def _open_turn(self, content: list[int]) -> list[int]:
        assistant_header = [self._im_start, *self._tokenizer.encode("assistant"), *self._newline]
        return [*self._newline, *self._message("user", content), *self._newline, *assistant_header]

    def _turn(self, user: str, assistant: str) -> list[int]:
        user_ids = self._message("user", self._tokenizer.encode(user))
        assistant_ids = self._message("assistant", self._tokenizer.encode(assistant))
        return [*self._newline, *user_ids, *self._newline, *assistant_ids]

    def _message(self, role: str, content: list[int]) -> list[int]:
        return [self._im_start, *self._tokenizer.encode(role), *self._newline, *content, self._im_end]


def _chat_markers(tokenizer: Tokenizer) -> tuple[int, int]:
    if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
        raise ValueError(
            "the tokenizer has no <|im_start|> and <|im_end|>, expected both for chat_format 'chatml'; "
            "use the tokenizer of a chat model, or chat_format 'raw'"
        )
    return tokenizer.im_start_id, tokenizer.im_end_id


def _unknown_format(chat_format: str) -> ValueError:
    return ValueError(f"chat_format is {chat_format!r}, expected 'chatml' or 'raw'")
