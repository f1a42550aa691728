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
        """The new tokens; none if it is a pending one."""
        return self.request.token_ids[self.start : self.start + self.length]

    @property
    def is_context(self) -> bool:
        """Some of a prompt, or of a sequence that is computed anew; otherwise one decoded token."""
        return self.length > 1 or self.start < self.request.context_length

    @property
    def gives_token(self) -> bool:
        """The row reaches the end of its sequence, so its last logits choose the next token."""
        # Of what lies before the end, only a piece of a prompt has logits.
        return self.num_logits > 0 and self.start + self.length >= self.request.context_length


@dataclass(frozen=True)
class Batch:
    """The rows of one step: contexts first, then decodes, each of which brings one token and gets one."""

    rows: tuple[Row, ...]

    @cached_property
    def num_contexts(self) -> int:
        return next((index for index, row in enumerate(self.rows) if not row.is_context), len(self.rows))

    @cached_property
    def contexts(self) -> tuple[Row, ...]:
        return self.rows[: self.num_contexts]

    @cached_property
    def decodes(self) -> tuple[Row, ...]:
        return self.rows[self.num_contexts :]

    @cached_property
    def num_context_tokens(self) -> int:
        return sum(row.length for row in self.contexts)

    @cached_property
    def num_tokens(self) -> int:
        return self.num_context_tokens + len(self.decodes)

    @cached_property
    def num_logits(self) -> int:
        return sum(row.num_logits for row in self.contexts) + len(self.decodes)

    @cached_property
    def requests(self) -> list[Request]:
        return [row.request for row in self.rows]

    @cached_property
    def receivers(self) -> list[Request]:
        """The requests that get a token from this step, in row order."""
        return [row.request for row in self.contexts if row.gives_token] + self.requests[self.num_contexts :]
