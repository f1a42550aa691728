"""What goes through the linear layers of a network while it reads text: the common idea of all calibration.

The engine is one of floats, built without fusing, so that every linear layer is a matmul node of its own. It is walked
node by node: one pass sees everything, with a few tensors in memory. Knows no checkpoint and no file.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..dtype import torch_dtype
from ..engine import Engine
from ..runtime.walk import Visit, walk

_LAYER_WEIGHT = re.compile(r"layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class LinearVisit:
    """A linear layer at the time when its input is there: `visit.reads[0]`, [tokens, k]."""

    layer: int
    name: str  # inside of its layer, "attention.qkv"
    visit: Visit

    @property
    def path(self) -> str:
        return f"layers.{self.layer}.{self.name}"


def visit_linears(engine: Engine, texts: Sequence[Sequence[int]], device: torch.device) -> Iterator[LinearVisit]:
    """Every matmul of the layers, in the network's order; what comes after the last one is neither read nor run."""
    left = sum(_layer_weight(node.op, node.inputs) is not None for node in engine.plan.nodes)
    assert left, "the network has no matmul of its own: it was fused"
    for visit in walk(engine, texts, device):
        match = _layer_weight(visit.node.op, visit.node.inputs)
        if match:
            yield LinearVisit(int(match[1]), match[2], visit)
            left -= 1
            if not left:
                return


def _layer_weight(op: str, operands: tuple[str, ...]) -> re.Match[str] | None:
    return _LAYER_WEIGHT.fullmatch(operands[1]) if op == "matmul" else None


@dataclass(frozen=True)
class Observation:
    """Both ends of a linear layer over all tokens, on the CPU."""

    input_amax: torch.Tensor  # float32 [k]
    output_amax: float
    input_rows: torch.Tensor  # float32 [t, k]: some of the inputs, evenly spread


def observe_layers(
    engine: Engine, texts: Sequence[Sequence[int]], device: torch.device, *, dtype: str, rows_kept: int = 0
) -> Iterator[dict[str, Observation]]:
    """For each layer in turn what was seen of its linear layers, by their names inside of it.

    An activation that `dtype` cannot hold is a ValueError that names it.
    """
    linears = visit_linears(engine, texts, device)
    for _, members in groupby(linears, key=lambda linear: linear.layer):
        yield {linear.name: _observe(linear, dtype, rows_kept) for linear in members}


def _observe(linear: LinearVisit, dtype: str, rows_kept: int) -> Observation:
    inputs, outputs = linear.visit.reads[0], linear.visit.results[0]
    input_amax, output_amax = _amax_of_columns(inputs), _amax_of_columns(outputs).amax().item()
    _check_fits(f"the input of {linear.path}", input_amax.amax().item(), dtype)
    _check_fits(f"the output of {linear.path}", output_amax, dtype)
    count = min(rows_kept, len(inputs))
    chosen = torch.arange(count, device=inputs.device) * len(inputs) // max(count, 1)
    return Observation(input_amax.float().cpu(), output_amax, inputs[chosen].float().cpu())


def _amax_of_columns(x: torch.Tensor) -> torch.Tensor:
    """Without a copy of x, which is large."""
    low, high = x.aminmax(dim=0)
    return torch.maximum(high, -low)


def _check_fits(what: str, amax: float, dtype: str) -> None:
    largest = torch.finfo(torch_dtype(dtype)).max
    if not amax <= largest:  # NaN is not, either
        found = f"reaches {amax:g}" if math.isfinite(amax) else f"is {amax}"
        raise ValueError(
            f"{what} {found} on the calibration text, expected what {dtype} holds (at most {largest:g}); "
            f"use bfloat16 or float32"
        )
