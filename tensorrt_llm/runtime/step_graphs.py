"""Steps as graphs, captured when their shape comes: decodes, prompts of few tokens, and both beside each other.

A step launches some hundred kernels. Where they take microseconds each, launching them one by one from Python takes
longer than they do; a graph launches them as one. A graph computes one shape, so a batch is padded to the next room:

    decodes    batch size by step_sizes.py, blocks of the longest sequence in powers of _CONTEXT_STEP
    prompts    tokens and sequences by step_sizes.py; one sequence more, in the scratch block, holds the padding
    mixed      tokens, sequences and decodes by step_sizes.py, and one sequence of padding behind the prompts

    mixed:  | prompt | prompt | empty ... | padding || decode | decode ... | padding, one token each |

Whatever changes from step to step lies in one buffer that is filled before each replay. A step whose graph is not there
is padded all the same, so what it computes does not depend on which graphs there are. Long prompts, many prompts and
logits of whole prompts are not for graphs.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..limits import Limits
from .batch import Batch
from .cuda_graph import Captured
from .executor import InFrontOf
from .step_inputs import Room, StepBuffer, StepInputs, to_arrays
from .step_sizes import decodes_size, mixed_sizes, prompt_sizes

logger = logging.getLogger(__name__)

# The attention grid holds a program for each split of the longest context that a graph allows, used or not.
_CONTEXT_STEP = 4
# 1000 requests of a chat's lengths, 256 at a time, meet some dozens of rooms in 300 to 400 mixed steps.
_MOST_MIXED_GRAPHS = 64
# A prompt's step is captured in three graphs, of a layer, of some five, and of the rest: somebody waits for it, and
# each is launched while the one in front of it is computed. Other steps are launched while the step before is computed.
_FIRST_NODES_OF_PIECES = (8, 48)


class _Graph(NamedTuple):
    buffer: StepBuffer
    captured: Captured


class GraphPool(Protocol):
    """Where graphs are captured: cuda_graph.CudaGraphPool."""

    def capture(self, run: Callable[[], torch.Tensor]) -> Captured: ...

    def cut(self) -> None: ...


class StepGraphs:
    """`run(inputs) -> logits`, replayed where a graph was captured of it.

    `run` also takes what to call in front of which nodes, as the executor does.

    Decodes follow each other in the same room, and after a short prompt somebody waits for the first token: they are
    captured behind the first run. Mixed steps are captured and replayed when their room comes for the second time, as
    many of them as there is room for; a step that is launched kernel by kernel is slow, and not wrong.
    """

    def __init__(
        self,
        run: Callable[[StepInputs, InFrontOf], torch.Tensor],
        pool: GraphPool,
        limits: Limits,
        device: torch.device,
    ) -> None:
        self._run = run
        self._pool = pool
        self._limits = limits
        self._device = device
        self._graphs: dict[Room, _Graph] = {}
        self._seen: set[Room] = set()  # mixed rooms that have come

    def logits(self, batch: Batch, room: Room, sampled_ids: torch.Tensor | None) -> torch.Tensor:
        """What the batch's rows give, until the next call overwrites it."""
        graph = self._graphs.get(room) or self._capture_if_due(room)
        buffer = graph.buffer if graph else self._new_buffer(room)
        buffer.fill(to_arrays(batch, room, self._limits.max_batch_size), sampled_ids)
        if graph:
            graph.captured.replay()
            return graph.captured.result[: batch.num_logits]
        # This run compiles kernels and makes what they keep, so it comes before a capture in any case.
        logits = self._run_in(room, buffer)
        if not _is_mixed(room):
            self._capture(room, buffer)
        return logits[: batch.num_logits]

    def capture_seen(self) -> None:
        """Capture now what would be captured when it comes again."""
        for room in self._seen:
            if room not in self._graphs and self._num_mixed_graphs < _MOST_MIXED_GRAPHS:
                self._capture(room, self._new_buffer(room))

    def _new_buffer(self, room: Room) -> StepBuffer:
        return StepBuffer(room, self._limits.max_batch_size, self._device)

    def _run_in(self, room: Room, buffer: StepBuffer, in_front_of: InFrontOf = None) -> torch.Tensor:
        return self._run(StepInputs(buffer.tensors(), room.shape(self._limits.tokens_per_block)), in_front_of)

    def _capture_if_due(self, room: Room) -> _Graph | None:
        """The new graph of a mixed room that has come before."""
        if not _is_mixed(room):
            return None
        if room not in self._seen:
            self._seen.add(room)
            return None
        if self._num_mixed_graphs == _MOST_MIXED_GRAPHS:
            return None
        return self._capture(room, self._new_buffer(room))

    @property
    def _num_mixed_graphs(self) -> int:
        return sum(map(_is_mixed, self._graphs))

    def _capture(self, room: Room, buffer: StepBuffer) -> _Graph:
        started = time.perf_counter()
        cuts = None if room.num_decodes else dict.fromkeys(_FIRST_NODES_OF_PIECES, self._pool.cut)
        captured = self._pool.capture(lambda: self._run_in(room, buffer, cuts))
        graph = self._graphs[room] = _Graph(buffer, captured)
        logger.info(
            "captured a graph of %d prompt tokens and %d decodes in %.0f ms, %d graphs now",
            room.num_context_tokens,
            room.num_decodes,
            1000 * (time.perf_counter() - started),
            len(self._graphs),
        )
        return graph


def room_for(batch: Batch, limits: Limits) -> Room | None:
    """The smallest room with a graph that holds the batch; None: it is not for graphs."""
    if batch.num_logits > len(batch.rows):
        return None
    if not batch.num_contexts:
        return _decode_room(batch, limits)
    if batch.decodes:
        return _mixed_room(batch, limits)
    return _prompt_room(batch, limits)


def _decode_room(batch: Batch, limits: Limits) -> Room:
    rows = len(batch.rows)
    batch_size = min(decodes_size(rows), max(limits.max_batch_size, rows))
    return Room(0, 0, batch_size, batch_size, _table_width(batch, limits))


def _prompt_room(batch: Batch, limits: Limits) -> Room | None:
    sizes = prompt_sizes(batch.num_tokens, len(batch.rows))
    if sizes is None:
        return None
    num_tokens = min(sizes[0], max(limits.max_num_tokens, batch.num_tokens))
    num_prompts = sizes[1]
    # Prompts read their blocks one after the other: wide tables cost bytes of a copy, not a program each.
    max_blocks = max(limits.max_blocks_per_seq, _blocks_of_padding(num_tokens, limits))
    return Room(num_tokens, num_prompts + 1, 0, num_prompts, max_blocks)


def _mixed_room(batch: Batch, limits: Limits) -> Room | None:
    """It may hold more tokens and sequences than a step: padding has neither blocks nor logits."""
    sizes = mixed_sizes(batch.num_context_tokens, batch.num_contexts, len(batch.decodes))
    if sizes is None:
        return None
    num_tokens, num_prompts, num_decodes = sizes
    num_logits = min(num_prompts + num_decodes, max(limits.max_batch_size, batch.num_logits))
    max_blocks = max(_table_width(batch, limits), _blocks_of_padding(num_tokens, limits))
    return Room(num_tokens, num_prompts + 1, num_decodes, num_logits, max_blocks)


def _is_mixed(room: Room) -> bool:
    return room.num_contexts > 0 and room.num_decodes > 0


def _table_width(batch: Batch, limits: Limits) -> int:
    """Blocks of the longest sequence, with few steps between one and the most there can be."""
    longest = max(len(request.blocks) for request in batch.requests)
    max_blocks = 1
    while max_blocks < longest:
        max_blocks *= _CONTEXT_STEP
    return min(max_blocks, limits.max_blocks_per_seq)


def _blocks_of_padding(num_tokens: int, limits: Limits) -> int:
    """Padding is one sequence, which may be longer than any that is served."""
    return -(-num_tokens // limits.tokens_per_block)
