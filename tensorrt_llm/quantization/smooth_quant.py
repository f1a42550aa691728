"""SmoothQuant [1]: int8 weights and activations, after the outliers of activations have moved into the weights.

    y[t, n] = sum over k of (x[t, k] / s[k]) * (s[k] * w[n, k])

holds for any factors s. They are chosen so that neither side has columns much larger than the others; then both sides
are rounded. Pure functions in float32, on the device of their arguments; weights are [n, k]. Knows no model, no file.

[1] https://arxiv.org/abs/2211.10438
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The search for alpha tries these. Outside of them one side keeps nearly all of its outliers.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SMALLEST_FACTOR = 1e-5
_SMALLEST_AMAX = 1e-8  # of a row of weights: a row of zeros gets a scale that can be divided by
_LARGEST = 127


def smoothing_factors(input_amax: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """s [k] = input_amax^alpha / weight_amax^(1 - alpha), for the weights [n, k] of all that read one input.

    A column without inputs or without weights moves nothing and gets 1.
    """
    weight_amax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factors = (input_amax**alpha / weight_amax ** (1 - alpha)).clamp(min=_SMALLEST_FACTOR)
    return torch.where((input_amax == 0) | (weight_amax == 0), torch.ones_like(factors), factors)


def fold_into_norm(norm: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm / factors in `dtype`, the factors that this division has had): rounding the norm changes no result.

    A weight that would round to zero keeps its size: its factor is 1.
    """
    is_lost = ((norm / factors).to(dtype) == 0) & (norm != 0)
    factors = torch.where(is_lost, torch.ones_like(factors), factors)
    stored = (norm / factors).to(dtype)
    return stored, torch.where(stored == 0, factors, norm / stored.float())


@dataclass(frozen=True)
class Int8Weight:
    """w[n, k] = weight[n, k] * scale[n]."""

    weight: torch.Tensor  # int8 [n, k]
    scale: torch.Tensor  # float32 [n]


def round_per_channel(weight: torch.Tensor) -> Int8Weight:
    """A scale for each row."""
    return _round_with(weight, weight.abs().amax(1))


def round_per_block(weight: torch.Tensor, block_rows: Sequence[int]) -> Int8Weight:
    """One scale for each run of rows; (n,) is one for the whole matrix."""
    amax = [block.abs().amax().expand(block.shape[0]) for block in weight.split(list(block_rows))]
    return _round_with(weight, torch.cat(amax))


def _round_with(weight: torch.Tensor, amax: torch.Tensor) -> Int8Weight:
    amax = amax.clamp(min=_SMALLEST_AMAX)
    steps = weight * (_LARGEST / amax)[:, None]
    return Int8Weight(steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), amax / _LARGEST)


@dataclass(frozen=True)
class Int8Linear:
    """A smoothed linear layer in both kinds of weight scales, and what calibration knows of its two ends."""

    per_block: Int8Weight
    per_channel: Int8Weight
    x_orig_quant: float  # times an input is its integer
    y_quant_orig: float  # times an integer is an output

    def y_accum_quant(self, weight: Int8Weight) -> torch.Tensor:
        """[n]: what turns a sum of products of integers into an integer output."""
        return weight.scale / (self.x_orig_quant * self.y_quant_orig)


def quantize_linear(
    weight: torch.Tensor, block_rows: Sequence[int], input_amax: float, output_amax: float
) -> Int8Linear:
    """`weight` and `input_amax` are those after smoothing. An end at which nothing was seen gets the range 1."""
    return Int8Linear(
        round_per_block(weight, block_rows),
        round_per_channel(weight),
        _LARGEST / (input_amax or 1.0),
        (output_amax or 1.0) / _LARGEST,
    )


def search_alpha(input_amax: torch.Tensor, rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    """The alpha of ALPHAS with the least squared error of the outputs of `rows` [t, k], inputs of these weights."""
    return min(ALPHAS, key=lambda alpha: smoothing_error(input_amax, rows, weights, alpha))


def smoothing_error(
    input_amax: torch.Tensor, rows: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float
) -> float:
    """The sum of squared output errors, with a scale for each row of inputs and for each output channel."""
    factors = smoothing_factors(input_amax, weights, alpha)
    rounded = _rounded(rows / factors)
    errors = (rounded @ _rounded(weight * factors).T - rows @ weight.T for weight in weights)
    return sum(error.double().square().sum().item() for error in errors)


def _rounded(matrix: torch.Tensor) -> torch.Tensor:
    rounded = round_per_channel(matrix)
    return rounded.weight * rounded.scale[:, None]
