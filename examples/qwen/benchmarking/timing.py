"""Runs of a backend against the clock: warm-up, repeats, and when each request got each of its tokens.

A token's time is that at which the host has it. The time to a first token counts from the moment when all requests of a
run are there, waiting included; the time between tokens is that between two tokens of one request.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from backends import Backend

from .figures import Figures, Percentiles
from .workload import Workload


class Runs(NamedTuple):
    warm_up: int  # runs that are not counted, before those that are
    repeats: int


@dataclass(frozen=True)
class Trace:
    """One run, in seconds from its start."""

    arrivals: list[list[float]]  # of each request, a time for each token
    seconds: float

    @property
    def first(self) -> list[float]:
        return [times[0] for times in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        return [after - before for times in self.arrivals for before, after in pairwise(times)]


def measure(
    backend: Backend, workload: Workload, batch_size: int, runs: Runs, ready_seconds: float | None = None
) -> Figures:
    """Serve `workload` again and again, `batch_size` requests at a time."""
    shape = workload.shape
    if backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backend.device)
    one_token = repeat(backend, workload.asking_for(1), batch_size, runs)
    traces = repeat(backend, workload, batch_size, runs)
    gaps = [gap for run in traces for gap in run.gaps]
    return Figures(
        backend=backend.kind,
        name=backend.name,
        workload=workload.name,
        shape=shape,
        batch_size=batch_size,
        num_requests=len(workload.prompts),
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        run_seconds=tuple(run.seconds for run in traces),
        one_token_seconds=median(run.seconds for run in one_token),
        first_token=Percentiles.of([seconds for run in traces for seconds in run.first]),
        between_tokens=Percentiles.of(gaps) if gaps else None,
        # The context grows from input_len by one a step; each step reads what is cached and writes one token more.
        step_bytes=backend.step_bytes.of(batch_size, shape.input_len + shape.output_len / 2) if shape else None,
        read_bytes_per_second=None,
        peak_device_bytes=peak_device_bytes(backend.device),
        ready_seconds=ready_seconds,
    )


def repeat(backend: Backend, workload: Workload, batch_size: int, runs: Runs) -> Sequence[Trace]:
    for _ in range(runs.warm_up):
        backend.warm_up(workload.prompts, workload.output_lens, batch_size)
    return [trace(backend, workload, batch_size) for _ in range(runs.repeats)]


def trace(backend: Backend, workload: Workload, batch_size: int) -> Trace:
    arrivals: list[list[float]] = [[] for _ in workload.prompts]

    def note(positions: Sequence[int]) -> None:
        now = time.perf_counter() - started
        for position in positions:
            arrivals[position].append(now)

    synchronize(backend.device)
    started = time.perf_counter()
    backend.serve(workload.prompts, workload.output_lens, batch_size, note)
    synchronize(backend.device)
    seconds = time.perf_counter() - started
    assert list(map(len, arrivals)) == workload.output_lens, "a run that ended early measures something else"
    return Trace(arrivals, seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_device_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
