"""Steps as CUDA graphs, captured at the first use of their bucket: decodes, and prompts of few tokens.

A step launches some hundred kernels. Where they take microseconds each, launching them one by one from Python takes
longer than they do; a graph launches them as one. A graph computes one shape, so a batch is padded to the next bucket:

    decodes    batch size from a table, blocks of the longest sequence in powers of _CONTEXT_STEP
    prompts    tokens and sequences from tables; one sequence more, in the scratch block, holds the padding

Whatever changes from step to step lies in one buffer that is filled before each replay. Mixed steps, long prompts and
logits of whole prompts are not for graphs.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..kernels import StepShape
from ..limits import Limits
from .batch import Batch
from .step_inputs import Room, StepBuffer, StepInputs, to_arrays

logger = logging.getLogger(__name__)

# Padding rows cost time, graphs cost memory and capture time: fine steps where a row more is a large share of the work.
_BATCH_SIZES = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32))
# The attention grid holds a program for each split of the longest context that a graph allows, used or not.
_CONTEXT_STEP = 4
# Beyond 128 tokens at most a quarter of a step is padding. A longer prompt keeps the GPU busy while it is launched.
_PROMPT_TOKENS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_PROMPTS = (1, 2, 4)


class Bucket(NamedTuple):
    """A shape that a graph is captured for: every sequence is a prompt or a piece of one, or every one is a decode."""

    room: Room
    is_context: bool

    def shape(self, tokens_per_block: int) -> StepShape:
        """The most that a step of this bucket holds. Kernels size their grids by it; what is not there ends early."""
        room = self.room
        return StepShape(
            num_tokens=room.num_tokens,
            batch_size=room.num_sequences,
            num_contexts=room.num_sequences if self.is_context else 0,
            num_context_tokens=room.num_tokens if self.is_context else 0,
            max_query_length=room.num_tokens if self.is_context else 1,
            max_sequence_length=room.max_blocks * tokens_per_block,
        )


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffer: StepBuffer
    logits: torch.Tensor


class StepGraphs:
    """Replays `run(inputs) -> logits`; what the graphs allocate they share."""

    def __init__(self, run: Callable[[StepInputs], torch.Tensor], limits: Limits, device: torch.device) -> None:
        self._run = run
        self._limits = limits
        self._device = device
        self._graphs: dict[Bucket, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, batch: Batch, bucket: Bucket, sampled_ids: torch.Tensor | None) -> torch.Tensor:
        """What the batch's rows give, until the next call overwrites it."""
        arrays = to_arrays(batch, bucket.room, self._limits.max_batch_size)
        graph = self._graphs.get(bucket)
        buffer = graph.buffer if graph else StepBuffer(arrays, self._limits.max_batch_size, self._device)
        buffer.fill(arrays, sampled_ids)
        if graph is None:
            graph = self._graphs[bucket] = self._capture(bucket, buffer)
        graph.graph.replay()
        return graph.logits[: batch.num_logits]

    def _capture(self, bucket: Bucket, buffer: StepBuffer) -> _Graph:
        started = time.perf_counter()
        shape = bucket.shape(self._limits.tokens_per_block)
        # A run outside the capture compiles kernels and lets cuBLAS take its workspace; it writes what the replay
        # will write again.
        self._run(StepInputs(buffer.tensors(), shape))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(StepInputs(buffer.tensors(), shape))
        kind = "prompt tokens" if bucket.is_context else "decodes"
        logger.info(
            "captured a graph of %d %s in %.0f ms, %d graphs now",
            bucket.room.num_tokens,
            kind,
            1000 * (time.perf_counter() - started),
            len(self._graphs) + 1,
        )
        return _Graph(graph, buffer, logits)


def bucket_for(batch: Batch, limits: Limits) -> Bucket | None:
    """The smallest bucket that holds the batch; None: it is not for graphs."""
    if batch.num_contexts == 0:
        return _decode_bucket(batch, limits)
    has_decodes = batch.num_contexts < len(batch.rows)
    is_small = batch.num_tokens <= _PROMPT_TOKENS[-1] and len(batch.rows) <= _PROMPTS[-1]
    has_whole_logits = batch.num_logits > len(batch.rows)
    return None if has_decodes or has_whole_logits or not is_small else _prompt_bucket(batch, limits)


def _decode_bucket(batch: Batch, limits: Limits) -> Bucket:
    rows = len(batch.rows)
    batch_size = min(_next(_BATCH_SIZES, rows), max(limits.max_batch_size, rows))
    needed = max(row.start for row in batch.rows) // limits.tokens_per_block + 1
    max_blocks = 1
    while max_blocks < needed:
        max_blocks *= _CONTEXT_STEP
    room = Room(batch_size, batch_size, batch_size, min(max_blocks, limits.max_blocks_per_seq))
    return Bucket(room, is_context=False)


def _prompt_bucket(batch: Batch, limits: Limits) -> Bucket:
    num_tokens = min(_next(_PROMPT_TOKENS, batch.num_tokens), max(limits.max_num_tokens, batch.num_tokens))
    num_prompts = _next(_PROMPTS, len(batch.rows))
    # Prompts read their blocks one after the other: wide tables cost bytes of a copy, not a program each. The padding
    # may be longer than any sequence.
    max_blocks = max(limits.max_blocks_per_seq, -(-num_tokens // limits.tokens_per_block))
    room = Room(num_tokens, num_prompts + 1, num_prompts, max_blocks)
    return Bucket(room, is_context=True)


def _next(sizes: tuple[int, ...], count: int) -> int:
    return next((size for size in sizes if size >= count), count)
