"""Quantization: how a model is quantized (QuantMode), and pure functions from weights to quantized weights.

`layers` and `functional` describe quantized networks; they are imported by name, so that an engine can be read without.
"""

from .mode import QuantMode
from .quantize import QuantizedWeight, quantize_weight

__all__ = ["QuantMode", "QuantizedWeight", "quantize_weight"]
