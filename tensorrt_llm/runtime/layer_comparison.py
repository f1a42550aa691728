"""Where an engine leaves its own float32 reference: the same prompt through both, tensor by marked tensor.

The reference interprets the engine's plan and weights in float32 with the plain kernels, so what differs is what the
dtype and the kernels add; a port that maps weights wrongly agrees here and differs from Hugging Face.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine import Engine
from .batch import Batch, Row
from .request import Request, SamplingConfig, check_prompt
from .session import Session

# Relative error (Frobenius) that rounding explains: some roundings per layer, each half a unit in the last place,
# growing with the square root of the number of layers. A wrong kernel is off by far more.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Summary:
    """Three numbers that tell a tensor from another."""

    mean: float
    sum: float
    max_abs: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Summary":
        wide = tensor.double()
        return cls(wide.mean().item(), wide.sum().item(), wide.abs().max().item())


@dataclass(frozen=True)
class LayerComparison:
    """One marked tensor in both runs. `relative_error` is |engine - reference| / |reference|, Frobenius norms."""

    name: str
    shape: tuple[int, ...]
    engine: Summary
    reference: Summary
    relative_error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.relative_error <= self.tolerance  # false for NaN as well


def compare_layers(engine: Engine, prompt_ids: Sequence[int], device: str | None = None) -> list[LayerComparison]:
    """All marked tensors of the prompt's prefill, in network order."""
    check_prompt(prompt_ids, engine.config.limits, engine.config.vocab_size, "the prompt")
    tolerance = _TOLERANCES[engine.config.precision]
    found = _run(engine, prompt_ids, device, reference=False)
    expected = _run(engine, prompt_ids, device, reference=True)
    return [
        LayerComparison(
            name=name,
            shape=tuple(value.shape),
            engine=Summary.of(value),
            reference=Summary.of(expected[name]),
            relative_error=_relative_error(value.double(), expected[name].double()),
            tolerance=tolerance,
        )
        for name, value in found.items()
    ]


def _run(engine: Engine, prompt_ids: Sequence[int], device: str | None, reference: bool) -> dict[str, torch.Tensor]:
    session = Session(engine, device, kv_cache_tokens=len(prompt_ids), reference=reference, use_cuda_graphs=False)
    request = Request(0, list(prompt_ids), SamplingConfig().for_sequence(0, 1))
    request.blocks = list(range(1, session.num_blocks))  # block 0 is scratch
    # With logits of every token, as the last layer computes no other rows than those that have some.
    values = session.run_marked(Batch((Row(request, start=0, length=len(prompt_ids), num_logits=len(prompt_ids)),)))
    return {name: value.cpu() for name, value in values.items()}


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.norm().item()
    error = (found - expected).norm().item()
    return error / norm if norm else error
