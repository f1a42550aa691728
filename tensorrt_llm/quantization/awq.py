"""AWQ: columns of a weight that meet large inputs are stretched before it is rounded, so that their steps are finer.

    W x = (W diag(s)) (x / s),    s = mean|x|^alpha, up to a common factor

The division belongs into what makes x, a norm's weight or rows of the weight before, so that a model runs as before.
alpha, and how far each group is clipped, are chosen by what rounding costs the output [1]. Everything is float32, on
any device.

[1] Lin et al., https://arxiv.org/abs/2306.00978
"""

from dataclasses import dataclass

import torch

from .grid import largest_divisor, search_grid, storable
from .quantize import QuantizedWeight, pack_int4

# Mean KL of the bundled checkpoint as in gptq.py: 0.84; 0.83 with twice as many, 1.01 with alpha 0 alone; 1.02 without
# clipping, 0.95 with gptq.py's clipping.
_ALPHAS = tuple(step / 20 for step in range(20))
# Columns whose errors are seen together. The whole of x x^T chose no better stretch, and takes k / 128 times as long.
_LARGEST_BLOCK = 128
# Inputs that are cast to float32 at a time.
_INPUTS_AT_ONCE = 4096
# A channel that was never used is not shrunk without end: it counts as this share of the mean.
_LEAST_MAGNITUDE = 1e-3


@dataclass(frozen=True)
class InputMoments:
    """What is known of the input of a weight."""

    magnitude: torch.Tensor  # mean |x|, [k]
    products: torch.Tensor  # mean x x^T within blocks of neighbouring columns, [k / block, block, block]

    @classmethod
    def of(cls, inputs: torch.Tensor, group_size: int) -> "InputMoments":
        """Of inputs [tokens, k]; a block never reaches over the border of a group."""
        tokens, columns = inputs.shape
        block = largest_divisor(group_size, _LARGEST_BLOCK)
        magnitude = torch.zeros(columns, device=inputs.device)
        products = torch.zeros((columns // block, block, block), device=inputs.device)
        for part in inputs.split(_INPUTS_AT_ONCE):
            rows = part.float()
            magnitude += rows.abs().sum(0)
            blocks = rows.unflatten(1, (-1, block)).permute(1, 2, 0)  # [k / block, block, rows]
            products += blocks @ blocks.mT
        return cls(magnitude / tokens, products / tokens)

    def divided(self, stretch: torch.Tensor) -> "InputMoments":
        """Of x / stretch."""
        blocks = stretch.view(len(self.products), -1)
        return InputMoments(self.magnitude / stretch, self.products / (blocks[:, :, None] * blocks[:, None]))

    def cost(self, difference: torch.Tensor) -> torch.Tensor:
        """The mean squared error of the output that an error [n, groups, size] of the weight makes, [n, groups]."""
        groups = difference.shape[1]
        blocks = difference.flatten(1).unflatten(1, (len(self.products), -1)).transpose(0, 1)  # [k / block, n, block]
        costs = (blocks @ self.products).mul_(blocks).sum(-1)
        return costs.T.unflatten(1, (groups, -1)).sum(-1)


def search_stretch(
    weight: torch.Tensor,
    inputs: InputMoments,
    group_size: int,
    *,
    scale_dtype: torch.dtype,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """s [k] with which rounding costs least, before clipping; at most `largest` [k]."""
    candidates = [_stretch(inputs.magnitude, alpha, largest) for alpha in _ALPHAS]
    costs = []
    for stretch in candidates:
        cost_of = inputs.divided(stretch).cost
        _, cost = search_grid(weight * stretch, group_size, cost_of, scale_dtype=scale_dtype, clip_ratios=(1.0,))
        costs.append(cost)
    return candidates[costs.index(min(costs))]


def _stretch(magnitude: torch.Tensor, alpha: float, largest: torch.Tensor | None) -> torch.Tensor:
    mean = magnitude.mean()
    if mean == 0:
        return torch.ones_like(magnitude)
    stretch = (magnitude / mean).clamp(min=_LEAST_MAGNITUDE) ** alpha
    stretch = stretch / (stretch.amax() * stretch.amin()).sqrt()
    return stretch if largest is None else torch.minimum(stretch, largest)


def quantize_awq(
    weight: torch.Tensor, inputs: InputMoments, group_size: int, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """`weight` [n, k], stretched already, in four bits with zero points, each group clipped as costs least."""
    grid, _ = search_grid(weight, group_size, inputs.cost, scale_dtype=scale_dtype)
    groups = weight.float().unflatten(1, (-1, group_size))
    integers = grid.spread().integers(groups).to(torch.int8).flatten(1)
    return QuantizedWeight(4, pack_int4(integers), grid.scale, grid.zero.to(torch.int16))


def divide_rows(weight: QuantizedWeight, stretch: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
    """A quantized weight whose outputs are divided by `stretch` [n]: the integers stay."""
    scale = storable(weight.scale / stretch[:, None], scale_dtype)
    return QuantizedWeight(weight.bits, weight.weight, scale, weight.zero)


def largest_divisors(weight: QuantizedWeight) -> torch.Tensor:
    """By how much each row can be divided and still have scales that float16 holds, [n]."""
    return weight.scale.abs().amin(1) / torch.finfo(torch.float16).smallest_normal
