"""Copies between host and device for which nobody waits: they queue up behind what the device was given so far.

A GPU copies by itself only from and to pinned memory. torch's allocator of pinned memory hands none out again before
the copies from and to it are through, so new staging memory for every copy is safe, and costs microseconds.
"""

from collections.abc import Sequence
from typing import Any

import torch


def staging(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory to copy from or to, for one copy."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers on the device."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host. On the CPU it is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Any]:
        """The numbers, as soon as they are there."""
        if self._event:
            self._event.synchronize()
        numbers: list[Any] = self._host.tolist()
        return numbers
