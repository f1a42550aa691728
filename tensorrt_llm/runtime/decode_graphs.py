"""Decode steps as CUDA graphs: one graph per bucket of batch size and context length, captured at its first use.

A step of one token per sequence launches some hundred kernels that each take microseconds; a graph launches them as
one. Whatever changes from step to step lies in one buffer that is overwritten before each replay.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..kernels import StepShape
from ..limits import Limits
from .batch import Batch
from .step_inputs import StepInputs, pack_decodes, views

# Padding rows cost time, graphs cost memory and capture time: fine steps where a row more is a large share of the work.
_BATCH_SIZES = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32))
# The attention grid holds a program for each split of the longest context that a graph allows, used or not.
_CONTEXT_STEP = 4


class _Bucket(NamedTuple):
    batch_size: int
    max_blocks: int


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor  # int32, all step inputs
    staging: torch.Tensor  # the same in pinned host memory
    logits: torch.Tensor


class DecodeGraphs:
    """Replays `run(inputs) -> logits` for batches of decodes; what the graphs allocate they share."""

    def __init__(self, run: Callable[[StepInputs], torch.Tensor], limits: Limits, device: torch.device) -> None:
        self._run = run
        self._limits = limits
        self._device = device
        self._graphs: dict[_Bucket, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the batch's rows, valid until the next call."""
        bucket = bucket_for(batch, self._limits)
        integers, arrays = pack_decodes(batch, *bucket)
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._capture(bucket, integers, arrays)
        # The last replay has read the staging memory: its logits were sampled on the host before this call.
        graph.staging.numpy()[:] = integers
        graph.buffer.copy_(graph.staging, non_blocking=True)
        graph.graph.replay()
        return graph.logits[: len(batch.rows)]

    def _capture(self, bucket: _Bucket, integers: np.ndarray, arrays: dict[str, np.ndarray]) -> _Graph:
        staging = torch.from_numpy(integers).clone().pin_memory()
        buffer = staging.to(self._device)
        inputs = StepInputs(
            views(buffer, arrays),
            StepShape(
                num_tokens=bucket.batch_size,
                batch_size=bucket.batch_size,
                num_contexts=0,
                num_context_tokens=0,
                max_query_length=1,
                max_sequence_length=bucket.max_blocks * self._limits.tokens_per_block,
            ),
        )
        # A run outside the capture compiles kernels and lets cuBLAS take its workspace; it writes what the replay
        # will write again.
        self._run(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(inputs)
        return _Graph(graph, buffer, staging, logits)


def bucket_for(batch: Batch, limits: Limits) -> _Bucket:
    """The smallest bucket that holds the batch: sizes from a table, blocks in powers of _CONTEXT_STEP."""
    rows = len(batch.rows)
    batch_size = next((size for size in _BATCH_SIZES if size >= rows), rows)
    needed = max(row.start // limits.tokens_per_block + 1 for row in batch.rows)
    max_blocks = 1
    while max_blocks < needed:
        max_blocks *= _CONTEXT_STEP
    return _Bucket(min(batch_size, max(limits.max_batch_size, rows)), min(max_blocks, limits.max_blocks_per_seq))
