"""The tactics that are best on a GPU, kept beside the engine for the next session on a GPU of that name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..dtype import dtype_name
from ..engine import Engine
from ..kernels import compiler_starting
from ..kernels.tactics import Tactic
from ..runtime.session import KERNEL_FOLDER, prepare_device
from ..timings import GpuTimings, MatmulTiming, read_timings, write_timings
from .candidates import Bench, Measured, measure_matmuls

# What is faster by less may be so by chance, and takes the place of the default for nothing.
_NOISE = 0.02
# One token: what a program has loaded before the kernel in front is done counts in a model, not in a chain of copies. A
# resident 4096 x 4096 takes 5.4 us in a chain where a stream takes 4.8 (INT4), and saves 1.2 us of a layer (H100).
_NOISE_OF_ONE_TOKEN = 0.15


def winner_of(measured: Measured) -> Tactic:
    """The fastest, if it is faster than the heuristic's choice by more than noise."""
    default = next(iter(measured.seconds))
    fastest = min(measured.seconds, key=measured.seconds.__getitem__)
    noise = _NOISE if measured.tokens > 1 else _NOISE_OF_ONE_TOKEN
    is_faster = measured.seconds[fastest] < (1 - noise) * measured.seconds[default]
    return fastest if is_faster else default


@dataclass(frozen=True)
class Tuning:
    """What a tuning found."""

    gpu: str
    timings: tuple[MatmulTiming, ...]

    def __str__(self) -> str:
        changed = [timing for timing in self.timings if timing.winner != timing.heuristic]
        return f"{len(self.timings)} tactics timed on {self.gpu}, {len(changed)} are not what heuristics choose"


def tune(
    engine: Engine, device: torch.device, on_measured: Callable[[Measured], None] = lambda measured: None
) -> Tuning:
    """Time all matmuls of an engine that lies in a folder, and write the winners there. Its weights are not read."""
    assert engine.path is not None, "an engine in memory has no place for timings"
    folder = engine.path.parent
    gpus = read_timings(folder)
    prepare_device(device)
    limits = engine.config.limits
    most_tokens = {"num_tokens": limits.max_num_tokens, "num_logits": limits.max_batch_size}
    with compiler_starting(device, folder / KERNEL_FOLDER):
        pass  # one kernel is compiled before there are threads that compile
    timings = []
    for measured in measure_matmuls(engine.plan, most_tokens, Bench.on(device)):
        on_measured(measured)
        timings.append(timing_of(measured))
    tuning = Tuning(torch.cuda.get_device_name(device), tuple(timings))
    write_timings(folder, gpus | {tuning.gpu: GpuTimings(f"torch {torch.__version__}", tuning.timings)})
    return tuning


def timing_of(measured: Measured) -> MatmulTiming:
    shape = measured.shape
    return MatmulTiming(
        **shape._asdict() | {"dtype": dtype_name(shape.dtype)},
        tokens=measured.tokens,
        moved_bytes=measured.moved_bytes,
        winner=str(winner_of(measured)),
        heuristic=str(next(iter(measured.seconds))),
        microseconds={str(tactic): round(seconds * 1e6, 3) for tactic, seconds in measured.seconds.items()},
    )
