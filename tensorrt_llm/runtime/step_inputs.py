"""A batch as the tensors that a network reads: packed tokens, lengths, block tables.

All of a step's integers lie in one buffer on the device:

    | input_ids | token_sources | position_ids | query_starts | ... | block_tables |

They come from the host in one copy, beside the step before, and from there to the buffer when that one is through. On
the way a token whose source is below `num_sampled`, the most that a step samples, gets the id that the last step has
sampled in that row: so the host may launch a step before it has read what it will compute.
"""

import math
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import StepShape, take_integers_for
from .batch import Batch
from .transfers import staging, upload_ahead


@dataclass(frozen=True)
class StepInputs:
    """The step inputs of a plan, by name, and what the host knows of them."""

    tensors: dict[str, torch.Tensor]
    shape: StepShape


class Room(NamedTuple):
    """What a step's inputs are padded to: contexts come first, then decodes, which are one token each."""

    num_context_tokens: int
    num_contexts: int
    num_decodes: int
    num_logits: int
    max_blocks: int  # of a sequence

    @classmethod
    def of(cls, batch: Batch) -> "Room":
        """No padding."""
        return cls(
            batch.num_context_tokens,
            batch.num_contexts,
            len(batch.decodes),
            batch.num_logits,
            max(len(request.blocks) for request in batch.requests),
        )

    @property
    def num_tokens(self) -> int:
        return self.num_context_tokens + self.num_decodes

    @property
    def num_sequences(self) -> int:
        return self.num_contexts + self.num_decodes

    def shape(self, tokens_per_block: int) -> StepShape:
        """The most that a step in this room holds. Kernels size their grids by it; what is not there ends early."""
        return StepShape(
            num_tokens=self.num_tokens,
            batch_size=self.num_sequences,
            num_contexts=self.num_contexts,
            num_context_tokens=self.num_context_tokens,
            max_query_length=max(self.num_context_tokens, 1),
            max_sequence_length=self.max_blocks * tokens_per_block,
        )


class StepBuffer:
    """Device memory for the integers of the steps that are padded to one room."""

    def __init__(self, room: Room, num_sampled: int, device: torch.device) -> None:
        """`num_sampled` is the most that a step samples."""
        self._shapes = _array_shapes(room)
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._num_sampled = num_sampled
        # Zeros are token ids for whoever reads before the first step has filled it.
        self._memory = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._take_integers = take_integers_for(device)

    def fill(self, arrays: dict[str, np.ndarray], sampled_ids: torch.Tensor | None) -> None:
        """Copy a step's integers there, once the device is through with the steps that read the last ones."""
        assert {name: array.shape for name, array in arrays.items()} == self._shapes, "arrays of another room"
        host = staging(sum(self._sizes), torch.int32, self._memory.device)
        np.concatenate([array.ravel() for array in arrays.values()], out=host.numpy())
        integers = upload_ahead(host, self._memory.device)
        self._take_integers(self._memory, integers, len(arrays["input_ids"]), sampled_ids, self._num_sampled)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The step inputs of a plan, views of the buffer."""
        pieces = self._memory.split(self._sizes)
        tensors = {name: piece.view(self._shapes[name]) for name, piece in zip(self._shapes, pieces, strict=True)}
        del tensors["token_sources"]
        return tensors


def pack(batch: Batch, device: torch.device, sampled_ids: torch.Tensor | None = None) -> StepInputs:
    """The inputs of one step of `batch`, whose pending tokens are among the `sampled_ids`."""
    num_sampled = 0 if sampled_ids is None else len(sampled_ids)
    room = Room.of(batch)
    buffer = StepBuffer(room, num_sampled, device)
    buffer.fill(to_arrays(batch, room, num_sampled), sampled_ids)
    return StepInputs(buffer.tensors(), shape_of(batch))


def to_arrays(batch: Batch, room: Room, num_sampled: int) -> dict[str, np.ndarray]:
    """The step's integers, padded to `room`, in the order of the buffer.

    Contexts of padding stand behind the real ones: the last has all tokens of padding, the others are empty. Decodes of
    padding, of one token each, stand behind all. Both have scratch block 0 for all of their blocks, so they write
    nowhere that matters.
    """
    requests, num_contexts = batch.requests, batch.num_contexts
    decoding = requests[num_contexts:]
    places = np.arange(len(requests))  # of the rows among the sequences
    places[num_contexts:] += room.num_contexts - num_contexts

    starts = np.zeros(room.num_sequences, dtype=np.int32)
    starts[places] = [row.start for row in batch.rows]
    lengths = np.zeros(room.num_sequences, dtype=np.int32)
    lengths[:num_contexts] = [row.length for row in batch.contexts]
    if room.num_context_tokens > batch.num_context_tokens:
        assert room.num_contexts > num_contexts, f"no context for the padding of {batch.num_context_tokens} in {room}"
        lengths[room.num_contexts - 1] = room.num_context_tokens - batch.num_context_tokens
    lengths[room.num_contexts :] = 1
    query_stops = lengths.cumsum()
    context_lengths = np.ones(room.num_sequences, dtype=np.int32)
    context_lengths[places] = [request.context_length for request in requests]

    # A pending token is a decode's, and a zero for the host.
    token_ids = np.zeros(room.num_tokens, dtype=np.int32)
    token_ids[: batch.num_context_tokens] = list(chain.from_iterable(row.token_ids for row in batch.contexts))
    token_sources = np.arange(num_sampled, num_sampled + room.num_tokens, dtype=np.int32)
    decodes = slice(room.num_context_tokens, room.num_context_tokens + len(decoding))
    is_pending = np.array([request.num_pending for request in decoding], dtype=bool)
    token_ids[decodes] = np.where(is_pending, 0, [request.token_ids[-1] for request in decoding])
    sampled_rows = [request.sampled_row for request in decoding]
    token_sources[decodes] = np.where(is_pending, sampled_rows, token_sources[decodes])

    num_logits = np.ones(len(requests), dtype=np.int32)
    num_logits[:num_contexts] = [row.num_logits for row in batch.contexts]
    last_token_ids = np.zeros(room.num_logits, dtype=np.int32)
    last_token_ids[: batch.num_logits] = _ranges(query_stops[places] - num_logits, num_logits)
    block_tables = np.zeros((room.num_sequences, room.max_blocks), dtype=np.int32)
    num_blocks = np.zeros(room.num_sequences, dtype=np.int32)
    num_blocks[places] = [len(request.blocks) for request in requests]
    blocks = list(chain.from_iterable([request.blocks for request in requests]))
    block_tables[np.arange(room.max_blocks) < num_blocks[:, None]] = blocks
    return {
        "input_ids": token_ids,
        "token_sources": token_sources,
        "position_ids": _ranges(starts, lengths),
        "query_starts": np.concatenate(([0], query_stops)),
        "sequence_length": starts + lengths,
        "context_lengths": context_lengths,
        "last_token_ids": last_token_ids,
        "block_tables": block_tables,
    }


def _array_shapes(room: Room) -> dict[str, tuple[int, ...]]:
    """Of what `to_arrays` gives."""
    return {
        "input_ids": (room.num_tokens,),
        "token_sources": (room.num_tokens,),
        "position_ids": (room.num_tokens,),
        "query_starts": (room.num_sequences + 1,),
        "sequence_length": (room.num_sequences,),
        "context_lengths": (room.num_sequences,),
        "last_token_ids": (room.num_logits,),
        "block_tables": (room.num_sequences, room.max_blocks),
    }


def shape_of(batch: Batch) -> StepShape:
    return StepShape(
        num_tokens=batch.num_tokens,
        batch_size=len(batch.requests),
        num_contexts=batch.num_contexts,
        num_context_tokens=batch.num_context_tokens,
        max_query_length=max(row.length for row in batch.rows),
        max_sequence_length=max(row.start + row.length for row in batch.rows),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, ..., start + length - 1 of each, one after the other."""
    stops = lengths.cumsum()
    return np.arange(stops[-1]) + np.repeat(starts - (stops - lengths), lengths)
