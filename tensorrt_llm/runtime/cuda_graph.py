"""CUDA graphs of functions that read and write tensors at fixed addresses; what the graphs allocate they share.

Replayed one after the other, graphs may use the same memory for what they compute. A graph that owned its result would
keep it from the others for good: logits of 256 sequences are 150 MB, and there are dozens of graphs. So nobody owns a
result. It lies in the graphs' memory, like all that led to it, and is there from a replay until the next one.

A graph is launched as a whole: the device does not begin before the host is through with all of its kernels, in 2 to 3
us for each. Where somebody waits, a function is better captured as a few graphs, each launched while the one in front
of it is computed.
"""

from collections.abc import Callable
from functools import partial
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
        self._in_work: list[torch.cuda.CUDAGraph] = []  # what is being captured, in order

    def capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        """`run` as a graph, or as several if it calls `cut`.

        It must have run before: what it compiles or sets up once cannot be captured. The device goes on with what it
        was given: torch.cuda.graph would wait for it, and have it wait.
        """
        try:
            return self._capture(run)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # while it captures, torch gives back nothing of what it keeps for later
            return self._capture(run)

    def cut(self) -> None:
        """For the function that is being captured: what it does from now on is another graph, replayed behind."""
        self._in_work[-1].capture_end()
        self._begin()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._in_work.append(graph)

    def _capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        self._in_work = []
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                result = run()
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # a pool ends with the first graph if that is its only one
                raise
            finally:
                self._in_work[-1].capture_end()
                graphs, self._in_work = tuple(self._in_work), []
        return Captured(partial(_replay, graphs), _without_ownership(result, graphs, self._device))


def _replay(graphs: tuple[torch.cuda.CUDAGraph, ...]) -> None:
    for graph in graphs:
        graph.replay()


class _Address:
    """Says where a float32 tensor lies, in the form that torch and others agree on.

    Who has a view of it holds the graphs as well, or the memory could be given back under the view.
    """

    def __init__(self, tensor: torch.Tensor, graphs: tuple[torch.cuda.CUDAGraph, ...]) -> None:
        self._graphs = graphs
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "only results of this kind were needed"
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _without_ownership(
    tensor: torch.Tensor, graphs: tuple[torch.cuda.CUDAGraph, ...], device: torch.device
) -> torch.Tensor:
    """The same memory, which torch's allocator may give to others once `tensor` is gone."""
    view = torch.as_tensor(_Address(tensor, graphs), device=device)
    assert view.data_ptr() == tensor.data_ptr(), "a copy would never change"
    return view
