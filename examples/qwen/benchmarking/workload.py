"""What is asked of a backend: prompts as token ids, and how many new tokens each of them gets.

Three sources: equal prompts of random ids, a file of lengths that is filled with random ids, and ShareGPT by the rules
of the original port. Knows neither engines nor clocks; limits come as numbers.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import chat_prompt
import torch

from tensorrt_llm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# How many conversations the published figures are about.
SHAREGPT_PROMPTS = 100
# A conversation with a shorter prompt or answer is left out, as the original did.
_FEWEST_TOKENS = 4
_LENGTHS = ("input_len", "output_len")


class Shape(NamedTuple):
    """Equal requests, all at once."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Workload:
    """Requests in their order."""

    source: Shape | Path  # a file: a dataset
    prompts: list[list[int]]
    output_lens: list[int]

    def __post_init__(self) -> None:
        assert self.prompts and len(self.prompts) == len(self.output_lens)

    @property
    def name(self) -> str:
        if isinstance(self.source, Path):
            return self.source.stem
        return f"{self.source.input_len} in, {self.source.output_len} out"

    @property
    def shape(self) -> Shape | None:
        """None: a dataset's requests differ."""
        return None if isinstance(self.source, Path) else self.source

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    def asking_for(self, most: int) -> "Workload":
        """The same prompts, no answer longer than `most` tokens."""
        return replace(self, output_lens=[min(most, length) for length in self.output_lens])


class SharegptLimits(NamedTuple):
    """A prompt is cut to the first; what is then longer than both together is left out."""

    max_input_len: int
    max_new_tokens: int


def equal_requests(shape: Shape, vocab_size: int, seed: int) -> Workload:
    prompts = random_prompts([shape.input_len] * shape.batch_size, vocab_size, seed)
    return Workload(shape, prompts, [shape.output_len] * shape.batch_size)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Equal seeds give equal ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (sum(lengths),), generator=generator).tolist()
    stream = iter(ids)
    return [[next(stream) for _ in range(length)] for length in lengths]


def read_entries(path: Path) -> list[Any]:
    """The entries of a dataset, all of the first one's kind and whole."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--dataset {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"--dataset {path}: not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--dataset {path}: holds {shortened(entries)}, expected a list of requests or conversations")
    is_whole, wanted = (
        (_is_conversation, 'an object with "conversations", a list of objects with a text as "value"')
        if is_sharegpt(entries)
        else (_is_lengths, "an object with input_len and output_len, integers of at least 1")
    )
    for index, entry in enumerate(entries):
        if not is_whole(entry):
            raise ValueError(f"--dataset {path}: entry {index} is {shortened(entry)}, expected {wanted}")
    return entries


def is_sharegpt(entries: Sequence[Any]) -> bool:
    return isinstance(entries[0], dict) and "conversations" in entries[0]


def _is_conversation(entry: Any) -> bool:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    )


def _is_lengths(entry: Any) -> bool:
    return isinstance(entry, dict) and all(type(entry.get(name)) is int and entry[name] >= 1 for name in _LENGTHS)


def requests_of_lengths(
    path: Path, entries: Sequence[dict[str, int]], num_prompts: int | None, vocab_size: int, seed: int
) -> Workload:
    """Random ids of the first `num_prompts` entries' lengths; None: of all."""
    count = len(entries) if num_prompts is None else num_prompts
    if count > len(entries):
        raise ValueError(f"--dataset {path}: holds {len(entries)} requests, expected the {count} of --num_prompts")
    inputs, outputs = ([entry[name] for entry in entries[:count]] for name in _LENGTHS)
    return Workload(path, random_prompts(inputs, vocab_size, seed), outputs)


def requests_of_sharegpt(
    path: Path,
    entries: Sequence[Any],
    num_prompts: int | None,
    tokenizer: Tokenizer,
    limits: SharegptLimits,
    seed: int,
) -> Workload:
    """`num_prompts` random conversations: the first turn is the prompt, the second one's length that of the answer."""
    count = num_prompts or SHAREGPT_PROMPTS
    with _one_warning_instead_of_many():
        usable = [pair for entry in entries if (pair := _request(entry["conversations"], tokenizer, limits))]
    if count > len(usable):
        raise ValueError(
            f"--dataset {path}: {len(usable)} of {len(entries)} conversations are within max_input_len "
            f"{limits.max_input_len} and max_new_tokens {limits.max_new_tokens}, expected the {count} of --num_prompts"
        )
    cut = sum(len(prompt) == limits.max_input_len for prompt, _ in usable)
    logger.info("%s: %d usable conversations, %d prompts cut to %d tokens", path, len(usable), cut, limits[0])
    # The original seeds the module's generator: its sample, in its order.
    prompts, output_lens = zip(*random.Random(seed).sample(usable, count), strict=True)
    return Workload(path, list(prompts), list(output_lens))


def _request(
    turns: Sequence[dict[str, str]], tokenizer: Tokenizer, limits: SharegptLimits
) -> tuple[list[int], int] | None:
    """A prompt's ids and its answer's length; None: left out."""
    if len(turns) < 2:
        return None
    answer_len = len(tokenizer.encode(turns[1]["value"]))
    if answer_len < _FEWEST_TOKENS:
        return None
    longest = limits.max_input_len
    _, prompt = chat_prompt.make_context(
        tokenizer, turns[0]["value"], max_input_length=longest, max_window_size=longest + 1
    )
    if len(prompt) < _FEWEST_TOKENS or len(prompt) + answer_len > sum(limits):
        return None
    return prompt, answer_len


@contextmanager
def _one_warning_instead_of_many() -> Iterator[None]:
    """A chat's user wants to know that a question was cut; of thousands of questions the count says more."""
    was_disabled, chat_prompt.logger.disabled = chat_prompt.logger.disabled, True
    try:
        yield
    finally:
        chat_prompt.logger.disabled = was_disabled
