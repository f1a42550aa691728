"""What one step computes: rows of new tokens, one row per sequence. Numbers only; the session turns it into tensors."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .request import Request


class Row(NamedTuple):
    """The new tokens of one sequence in one step."""

    request: Request
    start: int  # tokens already cached
    length: int  # new tokens
    num_logits: int  # 0: unfinished prompt chunk; 1: the last token; length: every token, for context logits

    @property
    def token_ids(self) -> list[int]:
        return self.request.token_ids[self.start : self.start + self.length]

    @property
    def is_context(self) -> bool:
        """Some of a prompt, or of a sequence that is computed anew; otherwise one decoded token."""
        return self.length > 1 or self.start < self.request.context_length

    @property
    def gives_token(self) -> bool:
        """The row reaches the end of its sequence, so its last logits choose the next token."""
        return self.start + self.length == len(self.request.token_ids)


@dataclass(frozen=True)
class Batch:
    """The rows of one step, contexts first."""

    rows: tuple[Row, ...]

    @cached_property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)

    @cached_property
    def num_logits(self) -> int:
        return sum(row.num_logits for row in self.rows)

    @cached_property
    def num_contexts(self) -> int:
        return sum(row.is_context for row in self.rows)

    @cached_property
    def receivers(self) -> list[Request]:
        """The requests that get a token from this step, in row order. To be asked for before they have it."""
        return [row.request for row in self.rows if row.gives_token]
