"""GPTQ of a network, layer by layer: each weight is made for the inputs that the quantized weights before it give."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tensorrt_llm.quantization.calibrate import LinearVisit
from tensorrt_llm.quantization.gptq import hessian_of, quantize_gptq

from .calibrated_layers import (
    SHARED_INPUT,
    Calibration,
    QuantizedLayer,
    QuantizedLinear,
    check_finite,
    relative_error,
    some_inputs,
)

# Outputs that are computed again at a time.
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Gptq:
    """group_size 0 is one group per row; quantization/gptq.py explains the rest."""

    group_size: int
    desc_act: bool
    symmetric: bool
    scale_dtype: torch.dtype

    def layers(self, calibration: Calibration) -> Iterator[QuantizedLayer]:
        for layer, linears in calibration.layers():
            parameters: dict[str, QuantizedLinear] = {}
            errors = {}
            for linear in linears:
                if linear.name in SHARED_INPUT:
                    weights = calibration.weights(layer, linear.name)
                    made = self._quantize(torch.cat(weights), linear)
                    errors[linear.name] = relative_error(some_inputs(linear), torch.cat(weights), made.dequantize())
                    parameters |= made.split(linear.name, weights)
                _replace_output(linear, parameters[f"{linear.name}.weight"].dequantize(), calibration)
            yield QuantizedLayer({**parameters}, errors)

    def _quantize(self, weight: torch.Tensor, linear: LinearVisit) -> QuantizedLinear:
        hessian = hessian_of(linear.visit.reads[0])
        check_finite(hessian, linear)
        weight_and_order = quantize_gptq(
            weight,
            hessian,
            self.group_size,
            desc_act=self.desc_act,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
        )
        return QuantizedLinear(*weight_and_order)


def _replace_output(linear: LinearVisit, weight: torch.Tensor, calibration: Calibration) -> None:
    """Let the rest of the network read what `weight` makes of the input."""
    inputs, outputs = linear.visit.reads[0], linear.visit.results[0]
    for rows, made in zip(inputs.split(_ROWS_AT_ONCE), outputs.split(_ROWS_AT_ONCE), strict=True):
        torch.mm(rows, weight.T, out=made)
    bias = calibration.bias(linear.layer, linear.name)
    if bias is not None:
        outputs += bias
