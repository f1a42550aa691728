"""Copies between host and device for which nobody waits.

A GPU copies by itself only from and to pinned memory. torch's allocator of pinned memory hands none out again before
the copies from and to it are through, so new staging memory for every copy is safe, and costs microseconds.

`upload` queues up behind what the device was given so far. What every step needs goes beside it, a stream for each
direction: between two steps of some milliseconds, copies that queue up would cost some microseconds each.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch


def staging(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory to copy from or to, for one copy."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers on the device."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def upload_ahead(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Staged numbers on the device, copied while it works on what it was given before."""
    if device.type == "cpu":
        return host
    stream, reader = _stream_up(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copy = host.to(device, non_blocking=True)
    reader.wait_stream(stream)
    copy.record_stream(reader)
    return copy


@cache
def _stream_up(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def _stream_down(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Download:
    """A tensor on its way to the host, beside what the device is given later. On the CPU it is there.

    Nobody may write to the tensor any more; a graph's result, which every replay writes, is none to download.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            stream = _stream_down(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host.copy_(tensor, non_blocking=True)
                self._event = stream.record_event()
            tensor.record_stream(stream)

    def wait(self) -> list[Any]:
        """The numbers, as soon as they are there."""
        if self._event:
            self._event.synchronize()
        numbers: list[Any] = self._host.tolist()
        return numbers
