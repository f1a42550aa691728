"""What a user asks of the engine, and the state of one sequence while it is served.

`SamplingConfig` is what users write, for a whole batch, with the names of TensorRT-LLM 0.7.1. `Sampling` is the same
for one sequence, checked and immutable. `Request` is a sequence on its way from prompt to finish. This file knows no
tensors and no text: the sampler applies the numbers, and generation.py matches stop strings.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from functools import cached_property
from numbers import Integral, Real
from random import Random
from typing import Any, NamedTuple

from ..limits import Limits


@dataclass(frozen=True)
class Sampling:
    """How one sequence is sampled and when it stops."""

    max_new_tokens: int
    min_length: int  # new tokens, an end id included, before which no end id, stop word or stop string ends it
    temperature: float
    top_k: int  # 0: every token
    top_p: float  # 0 or 1: every token
    repetition_penalty: float  # counts prompt and output, as Hugging Face does
    presence_penalty: float  # counts the output only, as OpenAI does
    frequency_penalty: float  # counts the output only
    random_seed: int | None  # None: a new one every time
    end_ids: frozenset[int]  # any of them ends the sequence
    stop_words: tuple[tuple[int, ...], ...]  # token sequences that end it
    bad_words: tuple[tuple[int, ...], ...]  # token sequences it never holds
    stop_strings: tuple[str, ...]
    gather_log_probs: bool
    gather_context_logits: bool
    gather_generation_logits: bool

    @cached_property
    def is_greedy(self) -> bool:
        """Temperature 0, one candidate, or no sampling asked for at all."""
        return self.temperature == 0 or self.top_k == 1 or (self.top_k == 0 and self.top_p == 0)

    @cached_property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.has_output_penalties

    @cached_property
    def has_output_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def has_bans(self) -> bool:
        return bool(self.bad_words) or (self.min_length > 1 and bool(self.end_ids))

    @cached_property
    def needs_newest_token(self) -> bool:
        """The next token cannot be chosen before the host has read the one before it."""
        return any(len(word) > 1 for word in self.bad_words)

    @cached_property
    def is_plain(self) -> bool:
        """The next token is the one with the largest logit, and nothing else is asked for."""
        return self.is_greedy and not (self.has_penalties or self.has_bans or self.gather_log_probs)

    @cached_property
    def gathers_logits(self) -> bool:
        return self.gather_context_logits or self.gather_generation_logits

    def check_vocabulary(self, vocab_size: int) -> None:
        named_ids = [("end_id or stop_ids", token_id) for token_id in self.end_ids]
        named_ids += [("stop_words_list", token_id) for word in self.stop_words for token_id in word]
        named_ids += [("bad_words_list", token_id) for word in self.bad_words for token_id in word]
        for name, token_id in named_ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{name} holds token id {token_id}, expected 0 to {vocab_size - 1} (vocab_size - 1)")


@dataclass
class SamplingConfig:
    """Sampling of a batch. Fields of max_new_tokens' kind may be a list with one value per sequence.

    Greedy: temperature 0, or top_k 1, or top_k 0 with top_p 0. Otherwise top_k > 0 keeps the k likeliest tokens, and
    0 < top_p < 1 then keeps the likeliest ones that together reach top_p. Sequences of one seed draw the same numbers.
    """

    end_id: int | None = None  # None: no such id
    pad_id: int | None = None  # fills output tensors where there is no end_id
    max_new_tokens: int | Sequence[int] = 20
    num_beams: int = 1
    output_sequence_lengths: bool = False
    return_dict: bool = False
    stop_words_list: Sequence[Sequence[int]] | None = None  # token sequences, each of which ends any sequence
    bad_words_list: Sequence[Sequence[int]] | None = None
    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 1
    top_p: float | Sequence[float] = 0.0
    length_penalty: float | Sequence[float] = 1.0  # weighs beams against each other, so one beam ignores it
    repetition_penalty: float | Sequence[float] = 1.0
    min_length: int | Sequence[int] = 1
    presence_penalty: float | Sequence[float] = 0.0
    frequency_penalty: float | Sequence[float] = 0.0
    random_seed: int | Sequence[int | None] | None = None
    output_log_probs: bool = False
    output_cum_log_probs: bool = False
    stop_ids: Sequence[int] = ()  # further ids that end a sequence
    stop_strings: Sequence[str] = ()
    gather_context_logits: bool = False
    gather_generation_logits: bool = False

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the fields that `kwargs` name; return the rest of `kwargs`."""
        names = {f.name for f in fields(self)}
        for name in names & kwargs.keys():
            setattr(self, name, kwargs[name])
        return {name: value for name, value in kwargs.items() if name not in names}

    def validate(self, batch_size: int = 1) -> None:
        """Raise a ValueError naming the first field that is wrong for a batch of this size."""
        for index in range(batch_size):
            self.for_sequence(index, batch_size)

    def for_sequence(self, index: int, batch_size: int) -> Sampling:
        """The checked sampling of sequence `index` in a batch."""
        if self.num_beams != 1:
            _refuse("num_beams", self.num_beams, "1: beam search is not supported")
        numbers: dict[str, Any] = {
            rule.field: rule.pick(getattr(self, rule.field), index, batch_size) for rule in _NUMBER_RULES
        }
        del numbers["length_penalty"]
        stop_ids = _read_ids("stop_ids", self.stop_ids)
        end_id = () if self.end_id is None else _read_ids("end_id", (self.end_id,))
        if self.pad_id is not None:
            _read_ids("pad_id", (self.pad_id,))
        return Sampling(
            **numbers,
            end_ids=frozenset(end_id + stop_ids),
            stop_words=_read_words("stop_words_list", self.stop_words_list),
            bad_words=_read_words("bad_words_list", self.bad_words_list),
            stop_strings=_read_strings("stop_strings", self.stop_strings),
            gather_log_probs=self.output_log_probs or self.output_cum_log_probs,
            gather_context_logits=self.gather_context_logits,
            gather_generation_logits=self.gather_generation_logits,
        )


def _refuse(name: str, found: object, wanted: str) -> None:
    raise ValueError(f"SamplingConfig.{name} is {found!r}, expected {wanted}")


class _NumberRule(NamedTuple):
    """A field that is one number for all sequences, or a list with one for each."""

    field: str
    kind: type[int] | type[float]
    is_valid: Callable[[Any], bool]
    wanted: str
    may_be_none: bool = False

    def pick(self, value: Any, index: int, batch_size: int) -> int | float | None:
        if hasattr(value, "tolist"):  # arrays and tensors, as 0.7.1 took them
            value = value.tolist()
        if isinstance(value, list | tuple):
            if len(value) != batch_size:
                _refuse(self.field, value, f"one number, or one for each of {batch_size} sequences")
            value = value[index]
        if value is None and self.may_be_none:
            return None
        is_number = isinstance(value, Integral if self.kind is int else Real) and not isinstance(value, bool)
        if not is_number or not self.is_valid(value):
            _refuse(self.field, value, self.wanted)
        return self.kind(value)


_NUMBER_RULES = (
    _NumberRule("max_new_tokens", int, lambda n: n >= 1, "an integer of at least 1"),
    _NumberRule("min_length", int, lambda n: n >= 0, "an integer of at least 0"),
    _NumberRule("temperature", float, lambda x: 0 <= x < math.inf, "a number of at least 0 (0 is greedy)"),
    _NumberRule("top_k", int, lambda n: n >= 0, "an integer of at least 0 (0 keeps every token)"),
    _NumberRule("top_p", float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    _NumberRule("length_penalty", float, math.isfinite, "a finite number"),
    _NumberRule("repetition_penalty", float, lambda x: 0 < x < math.inf, "a number above 0 (1 changes nothing)"),
    _NumberRule("presence_penalty", float, math.isfinite, "a finite number (0 changes nothing)"),
    _NumberRule("frequency_penalty", float, math.isfinite, "a finite number (0 changes nothing)"),
    _NumberRule("random_seed", int, lambda n: n >= 0, "None or an integer of at least 0", may_be_none=True),
)


def _read_ids(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    ids = _to_list(name, ids, "token ids")
    for token_id in ids:
        if not isinstance(token_id, Integral) or isinstance(token_id, bool) or token_id < 0:
            _refuse(name, token_id, "token ids: integers of at least 0")
    return tuple(map(int, ids))


def _read_words(name: str, words: Iterable[Iterable[int]] | None) -> tuple[tuple[int, ...], ...]:
    result = tuple(_read_ids(name, word) for word in _to_list(name, words or (), "lists of token ids"))
    if not all(result):
        _refuse(name, words, "lists of token ids that are not empty")
    return result


def _read_strings(name: str, strings: Iterable[str]) -> tuple[str, ...]:
    result = tuple(_to_list(name, strings, "strings"))
    if not all(isinstance(string, str) and string for string in result):
        _refuse(name, strings, "a list of strings that are not empty")
    return result


def _to_list(name: str, values: Any, items: str) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        _refuse(name, values, f"a list of {items}")
    return list(values)


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence got no more tokens."""

    END_ID = "end_id"
    STOP_WORDS = "stop_words"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Request:
    """One sequence: its prompt, what was generated so far, and what it holds of the cache.

    A step is launched before the tokens of the one before it are read. In between, the newest token is pending: it is
    counted, takes part in steps and has a place in the cache, but only the device knows it.
    """

    id: int
    prompt_ids: list[int] = field(repr=False)
    sampling: Sampling
    token_ids: list[int] = field(init=False, repr=False)  # the prompt and then the output, as read; it only grows
    context_length: int = field(init=False)  # tokens of the prompt
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    text: str = ""  # of the output, whole characters, without what ended it; only if the text is followed
    num_pending: int = 0  # sampled tokens that are not read yet; they follow token_ids
    sampled_row: int = 0  # the newest pending token's row among the tokens that the last launched step samples
    num_cached: int = 0  # tokens whose keys and values are in the cache, or will be when the launched steps are through
    blocks: list[int] = field(default_factory=list)
    max_blocks: int = 0  # that it may come to hold; known once it is submitted
    # If asked for: of each output token; [chunk, vocab] tensors of the prompt's rows; a [vocab] row per output token.
    log_probs: list[float] = field(default_factory=list, repr=False)
    context_logits: list[Any] = field(default_factory=list, repr=False)
    generation_logits: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.context_length = len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output with what is pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def has_sampled_all(self) -> bool:
        """As many tokens as it may have are read or pending, so no step needs to compute more of it."""
        return self.num_tokens - self.context_length >= self.sampling.max_new_tokens

    @property
    def output_ids(self) -> list[int]:
        """New tokens; an id that ended the sequence is the last of them."""
        return self.token_ids[self.context_length :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.context_length

    @property
    def is_finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def cum_log_prob(self) -> float:
        return math.fsum(self.log_probs)

    @property
    def collects_context_logits(self) -> bool:
        """The rows of its prompt chunks are wanted. Once the prompt is through, a recomputation brings nothing new."""
        return self.sampling.gather_context_logits and self.num_tokens == self.context_length

    @cached_property
    def random(self) -> Random:
        """The sequence's own random numbers, so that its text does not depend on its batch."""
        return Random(self.sampling.random_seed)

    def banned_ids(self) -> list[int]:
        """Ids that may not come next. What `needs_newest_token` says must be read."""
        sampling = self.sampling
        banned = list(sampling.end_ids) if self.num_tokens + 1 - self.context_length < sampling.min_length else []
        return banned + [word[-1] for word in sampling.bad_words if self._ends_with(word[:-1])]

    def stop_reason(self) -> FinishReason | None:
        """Why the newest token ends the sequence, as far as ids tell."""
        sampling = self.sampling
        if self.token_ids[-1] in sampling.end_ids:
            return FinishReason.END_ID
        num_output = self.num_output
        if sampling.stop_words and num_output >= sampling.min_length:
            if any(len(word) <= num_output and self._ends_with(word) for word in sampling.stop_words):
                return FinishReason.STOP_WORDS
        return FinishReason.LENGTH if num_output >= sampling.max_new_tokens else None

    def _ends_with(self, word: tuple[int, ...]) -> bool:
        return not word or tuple(self.token_ids[-len(word) :]) == word


def check_prompt(ids: Sequence[int], limits: Limits, vocab_size: int, name: str) -> None:
    """A ValueError that begins with `name` for a prompt that an engine of these limits cannot take."""
    if not ids:
        raise ValueError(f"{name} is empty, expected at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"{name} holds token id {wrong}, expected 0 to {vocab_size - 1} (vocab_size - 1)")
    if len(ids) > limits.max_input_len:
        raise ValueError(f"{name} has {len(ids)} tokens, expected at most {limits.max_input_len} (max_input_len)")
