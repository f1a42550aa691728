"""CUDA graphs of functions that read and write tensors at fixed addresses; what the graphs allocate they share.

Replayed one after the other, graphs may use the same memory for what they compute. A graph that owned its result would
keep it from the others for good: logits of 256 sequences are 150 MB, and there are dozens of graphs. So nobody owns a
result. It lies in the graphs' memory, like all that led to it, and is there from a replay until the next one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Captured(NamedTuple):
    replay: Callable[[], None]
    result: torch.Tensor  # what a replay computes, until another graph of the pool is replayed


class CudaGraphPool:
    """The graphs of one device, which share the memory that they allocate."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # the stream on which the device works is none to capture from

    def capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        """`run` as a graph. It must have run before: what it compiles or sets up once cannot be captured.

        The device goes on with what it was given: torch.cuda.graph would wait for it, and have it wait.
        """
        try:
            return self._capture(run)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # while it captures, torch gives back nothing of what it keeps for later
            return self._capture(run)

    def _capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # a pool ends with the first graph if that is its only one
                raise
            finally:
                graph.capture_end()
        return Captured(graph.replay, _without_ownership(result, graph, self._device))


class _Address:
    """Says where a float32 tensor lies, in the form that torch and others agree on.

    Who has a view of it holds the graph as well, or the memory could be given back under the view.
    """

    def __init__(self, tensor: torch.Tensor, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "only results of this kind were needed"
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _without_ownership(tensor: torch.Tensor, graph: torch.cuda.CUDAGraph, device: torch.device) -> torch.Tensor:
    """The same memory, which torch's allocator may give to others once `tensor` is gone."""
    view = torch.as_tensor(_Address(tensor, graph), device=device)
    assert view.data_ptr() == tensor.data_ptr(), "a copy would never change"
    return view
