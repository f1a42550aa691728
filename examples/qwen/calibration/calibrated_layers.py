"""A Qwen network that reads text while its linear layers are quantized: what GPTQ and AWQ have in common.

Both give, one layer at a time, what takes the place of its parameters in a quantized checkpoint. Knows no file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch

from tensorrt_llm import Engine
from tensorrt_llm.quantization import QuantizedWeight
from tensorrt_llm.quantization.calibrate import LinearVisit, visit_linears

# Linear layers that read one input are quantized as one weight, under the name of the first.
SHARED_INPUT = {
    "attention.qkv": ("attention.qkv",),
    "attention.dense": ("attention.dense",),
    "mlp.fc": ("mlp.fc", "mlp.gate"),
    "mlp.proj": ("mlp.proj",),
}
# Inputs that an error is shown on.
_INPUTS_COMPARED = 512


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight in four bits; `order`, int32 [k], says which column of the input each of its columns reads."""

    weight: QuantizedWeight
    order: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """float32 [n, k], columns as the input has them."""
        weight = self.weight.dequantize()
        return weight if self.order is None else weight[:, self.order.long().argsort()]

    def rows(self, start: int, stop: int) -> "QuantizedLinear":
        return replace(self, weight=self.weight.rows(start, stop))

    def split(self, name: str, parts: Sequence[torch.Tensor]) -> "dict[str, QuantizedLinear]":
        """The parameters of the linear layers of SHARED_INPUT[name], whose weights are `parts`."""
        ends = accumulate(len(part) for part in parts)
        return {
            f"{member}.weight": self.rows(end - len(part), end)
            for member, part, end in zip(SHARED_INPUT[name], parts, ends, strict=True)
        }


@dataclass(frozen=True)
class QuantizedLayer:
    """New parameters of a layer, by their names inside of it ("mlp.fc.weight"), and errors by names of SHARED_INPUT.

    An error is |quantized - float| / |float| of the outputs for equal inputs.
    """

    parameters: dict[str, QuantizedLinear | torch.Tensor]
    errors: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """A network of floats, and the text that it reads."""

    engine: Engine
    texts: Sequence[Sequence[int]]
    device: torch.device

    def layers(self) -> Iterator[tuple[int, Iterator[LinearVisit]]]:
        """For each layer its linear layers, at the time when their inputs are there."""
        return groupby(visit_linears(self.engine, self.texts, self.device), key=lambda linear: linear.layer)

    def parameter(self, layer: int, name: str) -> torch.Tensor:
        return self.engine.weights[f"layers.{layer}.{name}"].to(self.device)

    def bias(self, layer: int, name: str) -> torch.Tensor | None:
        has_bias = f"layers.{layer}.{name}.bias" in self.engine.weights
        return self.parameter(layer, f"{name}.bias") if has_bias else None

    def weights(self, layer: int, name: str) -> list[torch.Tensor]:
        """Of the linear layers in SHARED_INPUT[name]."""
        return [self.parameter(layer, f"{member}.weight") for member in SHARED_INPUT[name]]


def some_inputs(linear: LinearVisit) -> torch.Tensor:
    """Evenly spread over the tokens, float32 [t, k]."""
    inputs = linear.visit.reads[0]
    count = min(_INPUTS_COMPARED, len(inputs))
    chosen = torch.arange(count, device=inputs.device) * len(inputs) // count
    return inputs[chosen].float()


def relative_error(inputs: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """Of the output, of a weight and what it has become, [n, k]."""
    expected = inputs @ weight.T
    norm = expected.norm().item()
    return (inputs @ quantized.T - expected).norm().item() / norm if norm else 0.0


def check_finite(statistics: torch.Tensor, linear: LinearVisit) -> None:
    if not statistics.isfinite().all():
        raise ValueError(f"the input of {linear.path} is infinite or NaN on the calibration text, or its squares are")
