"""A batch as the tensors that a network reads: packed tokens, lengths, block tables.

All of a step's integers travel to the device in one copy; the tensors are views of that one buffer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels import StepShape
from .batch import Batch


@dataclass(frozen=True)
class StepInputs:
    """The step inputs of a plan, by name, and what the host knows of them."""

    tensors: dict[str, torch.Tensor]
    shape: StepShape


def pack(batch: Batch, device: torch.device) -> StepInputs:
    """The inputs of one step of `batch`."""
    arrays = _arrays(batch)
    buffer = np.concatenate([array.ravel() for array in arrays.values()])
    return StepInputs(views(torch.from_numpy(buffer).to(device), arrays), shape_of(batch))


def pack_decodes(batch: Batch, batch_size: int, max_blocks: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One token per row, padded to `batch_size` rows and tables of `max_blocks`: (all integers, the arrays in it).

    Rows of padding are sequences of one token in scratch block 0, so they write nowhere that matters.
    """
    rows, padding = batch.rows, batch_size - len(batch.rows)
    totals = [row.start + 1 for row in rows]
    tables = np.zeros((batch_size, max_blocks), dtype=np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.request.blocks)] = row.request.blocks[:max_blocks]
    arrays = {
        "input_ids": _int32([row.request.token_ids[row.start] for row in rows] + [0] * padding),
        "position_ids": _int32([row.start for row in rows] + [0] * padding),
        "query_starts": np.arange(batch_size + 1, dtype=np.int32),
        "sequence_length": _int32(totals + [1] * padding),
        "context_lengths": _int32([row.request.context_length for row in rows] + [1] * padding),
        "last_token_ids": np.arange(batch_size, dtype=np.int32),
        "block_tables": tables,
    }
    return np.concatenate([array.ravel() for array in arrays.values()]), arrays


def views(buffer: torch.Tensor, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """`buffer` cut into tensors of the arrays' shapes, in their order."""
    pieces = buffer.split([array.size for array in arrays.values()])
    return {name: piece.view(array.shape) for (name, array), piece in zip(arrays.items(), pieces, strict=True)}


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


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    rows = batch.rows
    lengths = np.array([row.length for row in rows])
    query_starts = np.concatenate(([0], lengths.cumsum()))
    logit_rows = [np.arange(end - row.num_logits, end) for row, end in zip(rows, query_starts[1:], strict=True)]
    tables = np.zeros((len(rows), max(len(row.request.blocks) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.request.blocks)] = row.request.blocks
    return {
        "input_ids": _int32([token for row in rows for token in row.token_ids]),
        "position_ids": _int32(np.concatenate([np.arange(row.start, row.start + row.length) for row in rows])),
        "query_starts": _int32(query_starts),
        "sequence_length": _int32([row.start + row.length for row in rows]),
        "context_lengths": _int32([row.request.context_length for row in rows]),
        "last_token_ids": _int32(np.concatenate(logit_rows)),
        "block_tables": tables,
    }


def _int32(values: list[int] | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
