"""The rate at which a device reads memory, which the memory roofline of decoding is made of."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

# Far more than any cache holds.
_BYTES_TO_READ = {"cuda": 4 * 2**30, "cpu": 2**30}


def measure_read_rate(device: torch.device, repeats: int = 10, num_bytes: int | None = None) -> float:
    """Bytes per second of the fastest way to read that is known here, its median."""
    data = torch.ones((num_bytes or _BYTES_TO_READ[device.type]) // 4, device=device)
    if device.type == "cpu":
        seconds = _seconds_on_cpu(data.sum, repeats)  # on all threads of torch
    else:
        from .read_kernel import LAUNCHES, sum_blocks  # imports triton

        with torch.cuda.device(device):
            seconds = min(_seconds_on_cuda(partial(sum_blocks, data, launch), repeats) for launch in LAUNCHES)
    return data.nbytes / seconds


def _seconds_on_cpu(read: Callable[[], object], repeats: int) -> float:
    def run() -> float:
        started = time.perf_counter()
        read()
        return time.perf_counter() - started

    return median([run() for _ in range(repeats + 1)][1:])


def _seconds_on_cuda(read: Callable[[], object], repeats: int) -> float:
    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return median([run() for _ in range(repeats + 2)][2:])
