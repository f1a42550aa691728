"""Text that a model reads while it is quantized or judged, as token ids: never what its accuracy is shown on.

Files: .jsonl or .jsonl.gz whose lines hold an article with highlights (asked and answered as summarize.py does), chat
`messages`, or `text`; .txt, a text per line; .npy or .csv, token ids, one text per row.
"""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat_prompt import DEFAULT_SYSTEM, make_context, stop_words_for
from token_files import read_prompts, read_token_ids

from tensorrt_llm.tokenizer import Tokenizer

from .summary_prompt import summary_prompt, summary_query

BUNDLED_TEXT = Path(__file__).resolve().parents[1] / "data" / "calibration_train.jsonl.gz"
_JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
_ID_SUFFIXES = (".npy", ".csv")
_SHORTEST = 2  # tokens: one that is read and one that follows


@dataclass(frozen=True)
class CalibrationText:
    """Token ids of some texts, and where they are from."""

    name: str
    texts: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))


def needs_tokenizer(path: Path) -> bool:
    return path.suffix not in _ID_SUFFIXES


def load_calibration_text(
    path: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_length: int,
    max_tokens: int,
    seed: int = 0,
    *,
    from_end: bool = False,
) -> CalibrationText:
    """Texts of the file in an order drawn by `seed`, cut to `max_length` tokens each and `max_tokens` together.

    `from_end` turns the order around: what judges a model then reads other texts than what calibrated it, as long as
    the two do not meet in the middle.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, expected calibration text ({', '.join(_JSON_SUFFIXES)}, .txt, .npy, .csv)"
        )
    records = list(_records(path))
    random.Random(seed).shuffle(records)
    if from_end:
        records.reverse()
    texts: list[list[int]] = []
    left = max_tokens
    for where, record in records:
        ids = _ids_of(record, tokenizer, max_length, where)[: min(max_length, left)]
        if len(ids) < _SHORTEST:
            continue
        if not all(0 <= token < vocab_size for token in ids):
            bad = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(f"{where}: holds token id {bad}, expected 0 to {vocab_size - 1}")
        texts.append(ids)
        left -= len(ids)
        if left < _SHORTEST:
            break
    if not texts:
        raise ValueError(f"{path}: has no text of {_SHORTEST} or more tokens")
    return CalibrationText(path.name, texts)


def random_text(vocab_size: int, max_length: int, max_tokens: int) -> CalibrationText:
    """Token ids without meaning, for a model without a tokenizer."""
    draw = random.Random(0)
    length = max(_SHORTEST, min(max_length, max_tokens))
    texts = [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(max(1, max_tokens // length))]
    return CalibrationText("random token ids", texts)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record with the place that an error should name."""
    if path.suffix in _ID_SUFFIXES:
        records: list[Any] = read_token_ids(path, pad_ids=())
    elif path.suffix == ".txt":
        records = list(read_prompts(path))
    elif path.name.endswith(_JSON_SUFFIXES):
        records = _json_lines(path)
    else:
        expected = ", ".join((*_JSON_SUFFIXES, ".txt", *_ID_SUFFIXES))
        raise ValueError(f"{path}: found a {path.suffix or 'file without suffix'}, expected {expected}")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _json_lines(path: Path) -> list[Any]:
    records = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    records.append(json.loads(line))
    except (ValueError, OSError, EOFError) as error:  # not JSON, not UTF-8, not gzip
        raise ValueError(
            f"{path}, record {len(records) + 1}: not readable ({error}), expected a JSON object"
        ) from error
    return records


def _ids_of(record: Any, tokenizer: Tokenizer | None, max_length: int, where: str) -> list[int]:
    if isinstance(record, list):
        return record
    if tokenizer is None:
        raise ValueError(f"{where}: is text, which takes a tokenizer; give token ids (.npy or .csv)")
    if isinstance(record, str):
        return tokenizer.encode(record)
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return tokenizer.encode(record["text"])
        if isinstance(record.get("article"), str) and isinstance(record.get("highlights"), str):
            prompt = summary_prompt(tokenizer, summary_query(record["article"]), max_length)
            return prompt + _answer(tokenizer, record["highlights"])
        if isinstance(record.get("messages"), list):
            return _chat(tokenizer, record["messages"], max_length, where)
    found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"{where}: found {found}, expected article and highlights, messages, or text")


def _chat(tokenizer: Tokenizer, messages: list[Any], max_length: int, where: str) -> list[int]:
    """A chat whose last message is the assistant's."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    system = messages.pop(0)["content"] if roles[:1] == ["system"] else DEFAULT_SYSTEM
    turns = roles[len(roles) - len(messages) :]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"{where}: the roles are {roles}, expected user and assistant in turn, and an answer at the end"
        )
    contents = [str(message.get("content")) for message in messages]
    pairs = list(zip(contents[0::2], contents[1::2], strict=True))
    query, answer = pairs.pop()
    _, prompt = make_context(tokenizer, query, pairs, system, max_length, max_window_size=max_length + 1)
    return prompt + _answer(tokenizer, answer)


def _answer(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text), stop_words_for(tokenizer, "chatml").ids[0]]
