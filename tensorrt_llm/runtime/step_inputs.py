"""A batch as the tensors that a network reads: packed tokens, lengths, block tables.

All of a step's integers lie in one buffer on the device, behind the tokens that the last step sampled:

    | sampled ids | input_ids | token_sources | position_ids | query_starts | ... | block_tables |
    |-- on the device already --|------------ from the host, in one copy -------------------------|
                  ^ num_sampled

The first two are one array to choose from. `token_sources` says for each token of the step where it stands there, so
the host may launch a step before it has read what it will compute.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import StepShape
from .batch import Batch
from .transfers import staging


@dataclass(frozen=True)
class StepInputs:
    """The step inputs of a plan, by name, and what the host knows of them."""

    tensors: dict[str, torch.Tensor]
    shape: StepShape


class Room(NamedTuple):
    """What a step's inputs are padded to."""

    num_tokens: int
    num_sequences: int
    num_logits: int
    max_blocks: int  # of a sequence

    @classmethod
    def of(cls, batch: Batch) -> "Room":
        """No padding."""
        return cls(
            batch.num_tokens, len(batch.rows), batch.num_logits, max(len(row.request.blocks) for row in batch.rows)
        )


class StepBuffer:
    """Device memory for the integers of steps that are packed into equal rooms."""

    def __init__(self, arrays: dict[str, np.ndarray], num_sampled: int, device: torch.device) -> None:
        """`arrays` are of the shapes of those that will come; `num_sampled` is the most that a step samples."""
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self._sizes = [array.size for array in arrays.values()]
        self._num_sampled = num_sampled
        # Zeros are token ids for whoever reads before the first step has filled it.
        self._memory = torch.zeros(num_sampled + sum(self._sizes), dtype=torch.int32, device=device)

    def fill(self, arrays: dict[str, np.ndarray], sampled_ids: torch.Tensor | None) -> None:
        """Copy a step's integers there, once the device is through with the steps that read the last ones."""
        host = staging(sum(self._sizes), torch.int32, self._memory.device)
        np.concatenate([array.ravel() for array in arrays.values()], out=host.numpy())
        self._memory[self._num_sampled :].copy_(host, non_blocking=True)
        if sampled_ids is not None:
            self._memory[: len(sampled_ids)].copy_(sampled_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The step inputs of a plan. Tokens are gathered here, so a graph that is to follow the buffer holds this."""
        pieces = self._memory[self._num_sampled :].split(self._sizes)
        tensors = {name: piece.view(self._shapes[name]) for name, piece in zip(self._shapes, pieces, strict=True)}
        choice = self._memory[: self._num_sampled + len(tensors["input_ids"])]
        tensors["input_ids"] = choice.index_select(0, tensors.pop("token_sources"))
        return tensors


def pack(batch: Batch, device: torch.device, sampled_ids: torch.Tensor | None = None) -> StepInputs:
    """The inputs of one step of `batch`, whose pending tokens are among the `sampled_ids`."""
    num_sampled = 0 if sampled_ids is None else len(sampled_ids)
    arrays = to_arrays(batch, Room.of(batch), num_sampled)
    buffer = StepBuffer(arrays, num_sampled, device)
    buffer.fill(arrays, sampled_ids)
    return StepInputs(buffer.tensors(), shape_of(batch))


def to_arrays(batch: Batch, room: Room, num_sampled: int) -> dict[str, np.ndarray]:
    """The step's integers, padded to `room`, in the order of the buffer.

    Sequences of padding have scratch block 0 for all of their blocks, so they write nowhere that matters. Either each
    of them is one token, or the last one holds all tokens of padding and the others are empty.
    """
    rows = batch.rows
    lengths = np.array([row.length for row in rows] + _padding_lengths(batch, room))
    starts = _filled_up([row.start for row in rows], room.num_sequences)
    query_stops = lengths.cumsum()
    num_logits = np.array([row.num_logits for row in rows])
    token_sources = np.arange(num_sampled, num_sampled + room.num_tokens)
    # A pending token is the only one of its row, and a zero for the host.
    pending = [index for index, row in enumerate(rows) if row.request.num_pending]
    token_sources[query_stops[pending] - 1] = [rows[index].request.sampled_row for index in pending]
    token_ids = [token for row in rows for token in ((0,) if row.request.num_pending else row.token_ids)]
    arrays = {
        "input_ids": _filled_up(token_ids, room.num_tokens),
        "token_sources": token_sources,
        "position_ids": _ranges(starts, lengths),
        "query_starts": np.concatenate(([0], query_stops)),
        "sequence_length": starts + lengths,
        "context_lengths": _filled_up([row.request.context_length for row in rows], room.num_sequences, 1),
        "last_token_ids": _filled_up(_ranges(query_stops[: len(rows)] - num_logits, num_logits), room.num_logits),
        "block_tables": _filled_up(
            np.concatenate([row.request.block_row(room.max_blocks) for row in rows]),
            room.num_sequences * room.max_blocks,
        ).reshape(room.num_sequences, room.max_blocks),
    }
    return {name: array.astype(np.int32, copy=False) for name, array in arrays.items()}


def shape_of(batch: Batch) -> StepShape:
    contexts = batch.rows[: batch.num_contexts]
    return StepShape(
        num_tokens=batch.num_tokens,
        batch_size=len(batch.rows),
        num_contexts=len(contexts),
        num_context_tokens=sum(row.length for row in contexts),
        max_query_length=max(row.length for row in batch.rows),
        max_sequence_length=max(row.start + row.length for row in batch.rows),
    )


def _padding_lengths(batch: Batch, room: Room) -> list[int]:
    num_sequences, num_tokens = room.num_sequences - len(batch.rows), room.num_tokens - batch.num_tokens
    assert num_tokens >= 0 and (num_sequences > 0 or num_tokens == 0), f"{batch.num_tokens} tokens in {room}"
    if num_tokens == num_sequences:
        return [1] * num_sequences
    return [0] * (num_sequences - 1) + [num_tokens]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, ..., start + length - 1 of each, one after the other."""
    stops = lengths.cumsum()
    return np.arange(stops[-1]) + np.repeat(starts - (stops - lengths), lengths)


def _filled_up(values: list[int] | np.ndarray, size: int, filler: int = 0) -> np.ndarray:
    array = np.full(size, filler, dtype=np.int32)
    array[: len(values)] = values
    return array
