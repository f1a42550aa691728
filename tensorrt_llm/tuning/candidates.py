"""Every candidate of every matmul of a plan: compiled, held against the reference, timed. Chooses nothing."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..kernels import Kernel, compile_errors, kernels_for
from ..kernels.tactics import BUCKETS, LIBRARY, MatmulShape, Tactic, Tactics, bucket_of, candidates
from ..plan import Plan
from ..runtime.stored_tactics import matmuls_of, specs_of
from .cold_timing import Op, chain_of, copies_for, time_in_turns
from .random_call import Operands, RandomCall, relative_error

logger = logging.getLogger(__name__)

# The compiler holds Python's lock for a tenth to a fifth of its time: more threads would only wait for each other.
_MOST_THREADS = 24


@dataclass(frozen=True)
class Bench:
    """Where candidates run and how they are timed."""

    device: torch.device
    kernels: Callable[[Tactics], Mapping[str, Kernel]]
    candidates: Callable[[MatmulShape, int], list[Tactic]]
    time: Callable[[Sequence[Sequence[Op]]], list[float]]
    misfits: tuple[type[Exception], ...] = ()  # what a tactic raises that does not fit on the device

    @classmethod
    def on(cls, device: torch.device) -> "Bench":
        """The kernels of a device. A CPU has one for each op, which stands here as the library's."""
        return cls(
            device,
            kernels=lambda tactics: kernels_for(device, tactics=tactics),
            candidates=candidates if device.type == "cuda" else lambda shape, tokens: [LIBRARY],
            time=partial(time_in_turns, device=device),
            misfits=compile_errors(device),
        )


@dataclass(frozen=True)
class Measured:
    """The candidates of one matmul at one number of tokens, the heuristic's choice first."""

    name: str  # of the first node that is such a matmul
    shape: MatmulShape
    tokens: int
    moved_bytes: int
    seconds: dict[Tactic, float]

    @property
    def operations(self) -> int:
        return 2 * self.tokens * self.shape.rows * self.shape.depth


class _Trial:
    """One matmul with its operands, and the candidates for each number of tokens."""

    def __init__(
        self, name: str, shape: MatmulShape, call: RandomCall, tactics: Mapping[int, list[Tactic]], bench: Bench
    ) -> None:
        self.name = name
        self.shape = shape
        self.call = call
        self.tactics = tactics
        self._bench = bench
        self.weights = call.prepared(bench.kernels(Tactics())[call.op])

    def op(self, tactic: Tactic, tokens: int, weights: Operands) -> Callable[[], torch.Tensor]:
        """The matmul as an engine calls it that has this tactic stored for these tokens."""
        kernel = self._bench.kernels(Tactics({(self.shape, tokens): tactic}))[self.call.op]
        return partial(self.call.run, kernel, tokens, weights)

    def by_kernel(self) -> list[list[tuple[Tactic, int]]]:
        """All candidates, those together that share kernels: others in the number of tokens, or of splits."""
        groups: dict[Tactic, list[tuple[Tactic, int]]] = {}
        for tokens, tactics in self.tactics.items():
            for tactic in tactics:
                groups.setdefault(replace(tactic, num_splits=0), []).append((tactic, tokens))
        return list(groups.values())

    def measure(self, unfit: Mapping[Tactic, str]) -> Iterator[Measured]:
        """Right candidates are timed on copies of the weights; wrong ones are named in the log, and left out."""
        copies = [self.weights]
        for _ in range(copies_for(self.call.weight_bytes, self._bench.device) - 1):
            copies.append(tuple(map(_copy_of, self.weights)))
        wanted = self.call.wanted()
        for tokens, tactics in self.tactics.items():
            fit = [tactic for tactic in tactics if tactic not in unfit]
            right = [tactic for tactic in fit if self._is_right(tactic, tokens, wanted[:tokens])]
            if tactics[0] not in right:
                why = unfit.get(tactics[0], "it is wrong")
                raise ValueError(f"{self.name}, {tokens} tokens: the default tactic {tactics[0]} cannot be used: {why}")
            ops = ([self.op(tactic, tokens, copy) for copy in copies] for tactic in right)
            seconds = self._bench.time([chain_of(same, self.call.weight_bytes) for same in ops])
            yield Measured(
                self.name, self.shape, tokens, self.call.moved_bytes(tokens), dict(zip(right, seconds, strict=True))
            )

    def _is_right(self, tactic: Tactic, tokens: int, wanted: torch.Tensor) -> bool:
        # The allocator hands out again what was freed last: what a kernel forgets to write stays NaN.
        torch.full(wanted.shape, float("nan"), dtype=self.call.out_dtype, device=wanted.device)
        error = relative_error(self.op(tactic, tokens, self.weights)(), wanted)
        if not error <= self.call.tolerance:
            logger.warning("%s, %d tokens: %s is wrong by %.1e, and left out", self.name, tokens, tactic, error)
        return error <= self.call.tolerance


def _copy_of(weight: object) -> Any:
    """What is no tensor, as the CPU's kernels in C have it, holds its weight where it is."""
    return weight.clone() if isinstance(weight, torch.Tensor) else weight


@torch.inference_mode()
def measure_matmuls(
    plan: Plan, most_tokens: Mapping[str, int], bench: Bench, only: Collection[int] = BUCKETS
) -> Iterator[Measured]:
    """Matmul by matmul, bucket by bucket of `only`.

    `most_tokens` says how large the symbolic dims of the plan become ("num_tokens", "num_logits").
    """
    trials = list(_trials(plan, most_tokens, bench, only))
    started = time.perf_counter()
    unfit = _compile(trials, bench)
    logger.info("candidates compiled in %.1f s", time.perf_counter() - started)
    for trial in trials:
        yield from trial.measure(unfit[trial])


def _trials(plan: Plan, most_tokens: Mapping[str, int], bench: Bench, only: Collection[int]) -> Iterator[_Trial]:
    specs, weight_names = specs_of(plan), frozenset(spec.name for spec in plan.weights)
    for shape, node in matmuls_of(plan).items():
        most = most_tokens[str(node.outputs[0].shape[0])]
        buckets = [bucket for bucket in BUCKETS if bucket in only and bucket <= bucket_of(most)]
        if not buckets:
            continue
        call = RandomCall(node, specs, weight_names, buckets[-1], bench.device)
        tactics = {bucket: bench.candidates(shape, bucket) for bucket in buckets}
        yield _Trial(node.outputs[0].name.rpartition(".")[0], shape, call, tactics, bench)


def _compile(trials: Sequence[_Trial], bench: Bench) -> dict[_Trial, dict[Tactic, str]]:
    """Run every candidate once, on threads, as the compiler lets others run; for each trial what fails, and why."""

    def enter() -> None:
        if bench.device.type == "cuda":
            torch.cuda.set_device(bench.device)
            torch.zeros(1, device=bench.device)  # makes the device's context that of this thread

    unfit: dict[_Trial, dict[Tactic, str]] = {trial: {} for trial in trials}

    def run_group(trial: _Trial, group: list[tuple[Tactic, int]]) -> None:
        for tactic, tokens in group:
            try:
                with torch.inference_mode():
                    trial.op(tactic, tokens, trial.weights)()
            except bench.misfits as error:
                logger.warning("%s: %s does not fit on %s: %s", trial.name, tactic, bench.device, error)
                unfit[trial][tactic] = str(error)

    workers = min(os.cpu_count() or 1, _MOST_THREADS) if bench.device.type == "cuda" else 1
    with ThreadPoolExecutor(workers, initializer=enter) as pool:
        runs = [pool.submit(run_group, trial, group) for trial in trials for group in trial.by_kernel()]
        for run in runs:
            run.result()
    return unfit
