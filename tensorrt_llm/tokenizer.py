"""Text to ids and back: Qwen-1 rank files (`qwen.tiktoken`) and Hugging Face byte-level tokenizers (`tokenizer.json`).

Beside them stand the tools for text that arrives token by token: `TextStream` gives whole characters, and
`StopStringMatcher` ends the text at a stop string. Only data files are read: no code of a checkpoint runs, and the
network is never asked. Does not know prompts, chat formats, sampling or engines.
"""

import base64
import binascii
import codecs
import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

QWEN_FILE = "qwen.tiktoken"
HF_FILE = "tokenizer.json"

# How Qwen-1 cuts text into the pieces inside which bytes are merged; its ids depend on every character of this.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Special tokens of Qwen-1 in the order of their ids, the first one right after the ranks.
QWEN_SPECIALS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

# tiktoken's regex engine panics at 1,000,000 whitespace characters in a row; we refuse well before.
_LONGEST_WHITESPACE_RUN = 500_000


class Tokenizer(Protocol):
    """What the runtime and the scripts ask of a tokenizer."""

    vocab_size: int  # ids are 0 .. vocab_size - 1; an engine's vocabulary may be padded beyond that
    eod_id: int
    im_start_id: int | None
    im_end_id: int | None
    stop_ids: tuple[int, ...]  # ids that end a reply: im_end, im_start, eod, as far as they exist

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: the name of a special token in it stays text."""

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which names of special tokens mean these tokens. Not for text of a user."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: b"" for a special token, perhaps only a part of a character."""


def load_tokenizer(tokenizer_dir: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, chosen by the file that is there (the rank file if both are)."""
    folder = Path(tokenizer_dir)
    if (folder / QWEN_FILE).is_file():
        return QwenTokenizer(folder / QWEN_FILE)
    if (folder / HF_FILE).is_file():
        return HfTokenizer(folder / HF_FILE)
    state = "has neither of these files" if folder.is_dir() else "is not a folder"
    raise ValueError(
        f"{folder}: no tokenizer, expected {QWEN_FILE} (Qwen-1) or {HF_FILE} (Qwen1.5 and later), but it {state}"
    )


class _ByteLevelTokenizer(ABC):
    """What both kinds share, as each of their tokens is either special or a string of bytes."""

    def __init__(self, vocab_size: int, special_ids: dict[str, int], eod_id: int) -> None:
        self.vocab_size = vocab_size
        self.eod_id = eod_id
        self.im_start_id = special_ids.get(IM_START)
        self.im_end_id = special_ids.get(IM_END)
        found = (token_id for token_id in (self.im_end_id, self.im_start_id, eod_id) if token_id is not None)
        self.stop_ids = tuple(dict.fromkeys(found))
        self._special_names = {token_id: name for name, token_id in special_ids.items()}

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in the vocabulary, expected 0 to {self.vocab_size - 1}")
        return b"" if token_id in self._special_names else self._text_token_bytes(token_id)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        shown = {} if skip_special_tokens else self._special_names
        pieces = (shown[i].encode() if i in shown else self.token_bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    @abstractmethod
    def _text_token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token inside the vocabulary that is not special."""


class QwenTokenizer(_ByteLevelTokenizer):
    """Qwen-1: byte-pair ranks from a file, then the special tokens. Text is NFC-normalised first."""

    def __init__(self, rank_file: Path) -> None:
        # Imported here because a run on ids needs no tokenizer library.
        import tiktoken

        ranks = read_ranks(rank_file)
        special_ids = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
        super().__init__(len(ranks) + len(special_ids), special_ids, special_ids[ENDOFTEXT])
        self._token_of_rank = sorted(ranks, key=ranks.__getitem__)
        self._encoding = tiktoken.Encoding(
            rank_file.name, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(_normalize(text))

    def encode_with_specials(self, text: str) -> list[int]:
        return self._encoding.encode(_normalize(text), allowed_special="all")

    def _text_token_bytes(self, token_id: int) -> bytes:
        return self._token_of_rank[token_id]


def _normalize(text: str) -> str:
    if len(text) > _LONGEST_WHITESPACE_RUN:
        longest = max((match.end() - match.start() for match in re.finditer(r"\s+", text)), default=0)
        if longest > _LONGEST_WHITESPACE_RUN:
            raise ValueError(
                f"the text has {longest} whitespace characters in a row, expected at most {_LONGEST_WHITESPACE_RUN}"
            )
    return unicodedata.normalize("NFC", _replace_lone_surrogates(text))


def _replace_lone_surrogates(text: str) -> str:
    """`text` as valid Unicode: command lines and JSON can carry halves of UTF-16 pairs, which no tokenizer takes."""
    if re.search("[\ud800-\udfff]", text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank of a tiktoken file: lines `<base64 of the token> <rank>`, ranks 0, 1, 2, ... in any order."""
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _parse_rank_line(line, f"{path}, line {number}")
        if rank in line_of_rank:
            first = line_of_rank[rank]
            raise ValueError(f"{path}, line {number}: found rank {rank} again (line {first}), expected it once")
        if token in ranks:
            first = line_of_rank[ranks[token]]
            raise ValueError(f"{path}, line {number}: found token {token!r} again (line {first}), expected it once")
        ranks[token] = rank
        line_of_rank[rank] = number
    _check_complete(ranks, line_of_rank, path)
    return ranks


def _parse_rank_line(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    # Nine digits are more than any vocabulary has, and int() refuses thousands of them in words of its own.
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
        raise ValueError(f"{where}: found {line[:60]!r}, expected base64 of a token, a space and its rank")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: found {fields[0][:60]!r}, expected base64 of a token ({error})") from error
    if not token:
        raise ValueError(f"{where}: found an empty token, expected at least one byte")
    return token, int(fields[1])


def _check_complete(ranks: dict[bytes, int], line_of_rank: dict[int, int], path: Path) -> None:
    if not ranks:
        raise ValueError(f"{path}: found no ranks, expected lines of base64 and rank")
    missing_rank = next((rank for rank in range(len(ranks)) if rank not in line_of_rank), None)
    if missing_rank is not None:
        highest = max(line_of_rank)
        raise ValueError(
            f"{path}: rank {missing_rank} is missing, expected every rank up to {highest}, "
            f"the highest one (line {line_of_rank[highest]})"
        )
    missing_bytes = [value for value in range(256) if bytes([value]) not in ranks]
    if missing_bytes:
        raise ValueError(
            f"{path}: {len(missing_bytes)} of the 256 single bytes have no rank, the first is "
            f"0x{missing_bytes[0]:02x}; expected all of them, as without them some text has no ids"
        )


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as one visible character: printable Latin-1 as itself, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(value): value for value in visible} | {chr(0x100 + i): value for i, value in enumerate(hidden)}


class HfTokenizer(_ByteLevelTokenizer):
    """A Hugging Face byte-level BPE, as Qwen1.5 and later ship it.

    Read by the `tokenizers` library that transformers itself stands on: the ids are the same (a test compares them),
    it loads without the seconds that importing transformers takes, and it has no way to run code or to download.
    """

    def __init__(self, tokenizer_file: Path) -> None:
        data = _read_json_object(tokenizer_file)
        decoder = data.get("decoder")
        decoder_type = decoder.get("type") if isinstance(decoder, dict) else None
        if decoder_type != "ByteLevel":
            raise ValueError(f"{tokenizer_file}: decoder is {decoder_type!r}, expected 'ByteLevel' (a byte-level BPE)")
        self._file = tokenizer_file
        self._byte_of_character = _byte_of_character()
        added = self._with_specials.get_added_tokens_decoder()
        self._added_tokens = {token_id: token.content for token_id, token in added.items()}
        special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        _check_chat_markers(self._added_tokens.values(), special_ids, tokenizer_file)
        eod_id = _find_eod(special_ids, tokenizer_file)
        highest_id = max(self._with_specials.get_vocab(with_added_tokens=True).values())
        super().__init__(highest_id + 1, special_ids, eod_id)

    @cached_property
    def _plain(self) -> "FastTokenizer":
        tokenizer = _load_hf(self._file)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _with_specials(self) -> "FastTokenizer":
        # An object of its own: switching one between both meanings at each call would not be safe among threads.
        return _load_hf(self._file)

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(_replace_lone_surrogates(text), add_special_tokens=False).ids

    def encode_with_specials(self, text: str) -> list[int]:
        return self._with_specials.encode(_replace_lone_surrogates(text), add_special_tokens=False).ids

    def _text_token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_tokens:
            return self._added_tokens[token_id].encode()
        token = self._with_specials.id_to_token(token_id)
        if token is None or not all(character in self._byte_of_character for character in token):
            raise ValueError(f"{self._file}: token id {token_id} is {token!r}, expected a byte-level token")
        return bytes(self._byte_of_character[character] for character in token)


def _check_chat_markers(added: Iterable[str], special_ids: dict[str, int], path: Path) -> None:
    for name in added:
        if name in (ENDOFTEXT, IM_START, IM_END) and name not in special_ids:
            raise ValueError(f'{path}: {name} has "special": false, expected true, or any text could contain the token')


def _find_eod(special_ids: dict[str, int], path: Path) -> int:
    """<|endoftext|>, else what tokenizer_config.json calls eos or pad. (The eos of a chat model is <|im_end|>.)"""
    config_file = path.with_name("tokenizer_config.json")
    config = _read_json_object(config_file) if config_file.is_file() else {}
    for value in (ENDOFTEXT, config.get("eos_token"), config.get("pad_token")):
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str) and name in special_ids:
            return special_ids[name]
    raise ValueError(
        f"{path}: found no end-of-text token, expected a special token {ENDOFTEXT} "
        f"or one that {config_file} names as eos_token or pad_token"
    )


def _load_hf(path: Path) -> "FastTokenizer":
    # Imported here because a run on ids needs no tokenizer library.
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a tokenizer that the tokenizers library can read: {error}") from error
    # A file may ask to cut or fill every text to one length, which is meant for training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json recommends; None where it says nothing."""

    chat_format: str | None = None
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_window_size: int | None = None


_GENERATION_FIELDS: dict[str, type] = {
    "chat_format": str,
    "pad_token_id": int,
    "do_sample": bool,
    "top_k": int,
    "top_p": float,
    "temperature": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "max_window_size": int,
}


def read_generation_defaults(checkpoint_dir: str | Path) -> GenerationDefaults:
    """The recommendations in a folder's generation_config.json; all None if there is no such file."""
    path = Path(checkpoint_dir) / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    data = _read_json_object(path)
    values: dict[str, Any] = {name: _typed(data, name, kind, path) for name, kind in _GENERATION_FIELDS.items()}
    return GenerationDefaults(eos_token_ids=_eos_token_ids(data, path), **values)


def _typed(data: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    value: Any = data.get(name)
    if value is None:
        return None
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    # type() and not isinstance(): to Python, true is an int.
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{path}: {name} is {value!r}, expected {kind.__name__}")
    return value


def _eos_token_ids(data: dict[str, Any], path: Path) -> tuple[int, ...] | None:
    value = data.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}, expected an int or a list of ints")
    return tuple(ids)


class TextStream:
    """Turns the ids of one sequence, as they come, into text of whole characters. Special tokens give no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Keeps the bytes of an unfinished character, and gives U+FFFD as soon as they cannot become one any more.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(token_id) for token_id in ids))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. The stream can start anew."""
        return self._decoder.decode(b"", final=True)


class StopStringMatcher:
    """Ends a stream of text just before the first stop string, wherever the pieces of the stream were cut.

    The first match is the one that is complete first, so the result does not depend on how the text was cut.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(f"stop strings are {stop_strings!r}, expected a list of strings that are not empty")
        self._stop_strings = tuple(stop_strings)
        self._held = ""  # the end of the text so far, if a stop string may have begun there
        self._matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now safe to show, and whether a stop string was found. After a match nothing more comes."""
        if self._matched:
            return "", True
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop_strings if stop in text]
        if found:
            self._held, self._matched = "", True
            start, _ = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            return text[:start], True
        safe_length = len(text) - self._length_of_begun_stop(text)
        self._held = text[safe_length:]
        return text[:safe_length], False

    def flush(self) -> str:
        """The text held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _length_of_begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop_strings), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop_strings)), 0)
