"""AWQ of a network, layer by layer, with the inputs of the network of floats.

In each half of a layer the weights that read the norm are stretched by some s, and the norm's weight is divided by it.
The last rows of what they make feed the half's other weight channel by channel, as values (where there is one head of
them for each of queries) or as the linear branch of the MLP: they are divided by the s of that weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tensorrt_llm.quantization import QuantizedWeight
from tensorrt_llm.quantization.awq import InputMoments, divide_rows, largest_divisors, quantize_awq, search_stretch
from tensorrt_llm.quantization.calibrate import LinearVisit
from tensorrt_llm.quantization.smooth_quant import fold_into_norm

from .calibrated_layers import (
    SHARED_INPUT,
    Calibration,
    QuantizedLayer,
    QuantizedLinear,
    check_finite,
    relative_error,
    some_inputs,
)


@dataclass(frozen=True)
class _Half:
    """A norm, the weights that read it, and the weight that reads what these make."""

    norm: str
    first: str  # a name of SHARED_INPUT
    second: str
    rows_per_channel: (
        int  # of the first, for each input of the second, where its last rows feed that channel by channel
    )


_HALVES = (
    _Half("ln_1", "attention.qkv", "attention.dense", rows_per_channel=3),
    _Half("ln_2", "mlp.fc", "mlp.proj", rows_per_channel=2),
)


@dataclass(frozen=True)
class _Input:
    """What was seen of the input of a weight."""

    moments: InputMoments
    some: torch.Tensor  # [t, k]


@dataclass(frozen=True)
class Awq:
    """group_size 0 is one group per row."""

    group_size: int
    dtype: torch.dtype  # of scales and norms

    def layers(self, calibration: Calibration) -> Iterator[QuantizedLayer]:
        for layer, linears in calibration.layers():
            inputs = {linear.name: self._look_at(linear) for linear in linears if linear.name in SHARED_INPUT}
            attention, mlp = (self._quantize_half(calibration, layer, half, inputs) for half in _HALVES)
            yield QuantizedLayer(attention.parameters | mlp.parameters, attention.errors | mlp.errors)

    def _look_at(self, linear: LinearVisit) -> _Input:
        inputs = linear.visit.reads[0]
        moments = InputMoments.of(inputs, self.group_size or inputs.shape[1])
        check_finite(moments.products, linear)
        return _Input(moments, some_inputs(linear))

    def _quantize_half(
        self, calibration: Calibration, layer: int, half: _Half, inputs: dict[str, _Input]
    ) -> QuantizedLayer:
        parts, (reader,) = calibration.weights(layer, half.first), calibration.weights(layer, half.second)
        weight, channels = torch.cat(parts), reader.shape[1]
        norm, stretch = fold_into_norm(
            calibration.parameter(layer, f"{half.norm}.weight"), self._search(weight, inputs[half.first]), self.dtype
        )
        quantized, error = self._round(weight, inputs[half.first], stretch)
        bias = calibration.bias(layer, half.first)

        # With fewer heads of values than of queries a row feeds many channels: the second weight stays as it is.
        reader_stretch = torch.ones(channels, device=reader.device)
        if len(weight) == half.rows_per_channel * channels:
            border = len(weight) - channels
            others, feeding = quantized.rows(0, border), quantized.rows(border, len(weight))
            reader_stretch = self._search(reader, inputs[half.second], largest_divisors(feeding))
            feeding = divide_rows(feeding, reader_stretch, self.dtype)
            quantized = QuantizedWeight.stacked([others, feeding])
            if bias is not None:
                bias = torch.cat([bias[:border], bias[border:] / reader_stretch])
        quantized_reader, reader_error = self._round(reader, inputs[half.second], reader_stretch)
        return QuantizedLayer(
            {
                f"{half.norm}.weight": norm,
                **QuantizedLinear(quantized).split(half.first, parts),
                **({} if bias is None else {f"{half.first}.bias": bias}),
                **QuantizedLinear(quantized_reader).split(half.second, [reader]),
            },
            {half.first: error, half.second: reader_error},
        )

    def _search(self, weight: torch.Tensor, seen: _Input, largest: torch.Tensor | None = None) -> torch.Tensor:
        group_size = self.group_size or weight.shape[1]
        return search_stretch(weight, seen.moments, group_size, scale_dtype=self.dtype, largest=largest)

    def _round(self, weight: torch.Tensor, seen: _Input, stretch: torch.Tensor) -> tuple[QuantizedWeight, float]:
        """The stretched weight in four bits, and the error of its output."""
        group_size = self.group_size or weight.shape[1]
        moments = seen.moments.divided(stretch)
        quantized = quantize_awq(weight * stretch, moments, group_size, scale_dtype=self.dtype)
        return quantized, relative_error(seen.some, weight, quantized.dequantize() / stretch)
