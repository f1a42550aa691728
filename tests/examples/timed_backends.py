"""A backend on a clock that it moves itself, and figures made of plain numbers, for the tests of benchmark.py."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarking.figures import Figures, Percentiles
from benchmarking.workload import Shape
from step_bytes import StepBytes

from tensorrt_llm.runtime import SamplingConfig


class TimedBackend:
    """Takes one second for all prompts and a quarter for every further token, batch after batch."""

    kind = "trt_llm"
    name = "timed"
    device = torch.device("cpu")
    vocab_size = 11
    step_bytes = StepBytes(weights=1000, per_sequence=10, per_cached_token=2)

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, int, int]] = []  # what for, prompts, longest answer

    def clock(self) -> float:
        return self.now

    def serve(
        self, prompts: Any, output_lens: Sequence[int], batch_size: int, on_tokens: Callable[[Sequence[int]], None]
    ) -> None:
        self.calls.append(("serve", len(prompts), max(output_lens)))
        for start in range(0, len(prompts), batch_size):
            positions = range(len(prompts))[start : start + batch_size]
            for step in range(max(output_lens[position] for position in positions)):
                self.now += 0.25 if step else 1.0
                on_tokens([position for position in positions if output_lens[position] > step])

    def warm_up(self, prompts: Any, output_lens: Sequence[int], batch_size: int) -> None:
        self.calls.append(("warm up", len(prompts), max(output_lens)))

    def generate(self, prompts: Any, sampling: SamplingConfig) -> list[list[int]]:
        raise NotImplementedError

    def logits(self, ids: list[int]) -> torch.Tensor:
        raise NotImplementedError


def make_figures(**changes: Any) -> Figures:
    """A batch of 2 prompts, 8 tokens in and 5 out, in 2 seconds of which 1 goes to the first tokens."""
    facts: dict[str, Any] = {
        "backend": "trt_llm",
        "name": "trt_llm float16",
        "workload": "8 in, 5 out",
        "shape": Shape(2, 8, 5),
        "batch_size": 2,
        "num_requests": 2,
        "input_tokens": 16,
        "output_tokens": 10,
        "run_seconds": (2.0,),
        "one_token_seconds": 1.0,
        "first_token": Percentiles(1.0, 1.0),
        "between_tokens": Percentiles(0.25, 0.25),
        "step_bytes": 100.0,
        "read_bytes_per_second": 1000.0,
        "peak_device_bytes": None,
        "ready_seconds": None,
    }
    return Figures(**facts | changes)


def make_dataset_figures(**changes: Any) -> Figures:
    """10 requests of a dataset."""
    facts: dict[str, Any] = {
        "workload": "lengths",
        "shape": None,
        "num_requests": 10,
        "step_bytes": None,
    }
    return make_figures(**facts | changes)
