"""The steps that groups of a weight are rounded to in four bits: a scale and a zero point for each, found by search.

What an error costs, the caller says: that is where GPTQ and AWQ differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

LOWEST, HIGHEST = -8, 7
# The search tries these shares of a group's range.
CLIP_RATIOS = tuple(1 - 0.05 * step for step in range(9))
# Searching needs a few float32 copies of what it works on: this many elements at a time.
_ELEMENTS_AT_ONCE = 1 << 22

# From differences rounded - weight [n, groups, size], which it may write into, to what they cost [n, groups].
Cost = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """The integer q stands for (q - zero) * scale; both are float32 and of one shape, [n, groups] of a whole weight."""

    scale: torch.Tensor
    zero: torch.Tensor

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest steps, in float32; `weight` has the grid's shape, or broadcasts against it."""
        return (weight / self.scale + self.zero).round_().clamp_(LOWEST, HIGHEST)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        return (integers - self.zero) * self.scale

    def spread(self) -> "Grid":
        """For weights [n, groups, size]."""
        return Grid(self.scale[..., None], self.zero[..., None])

    def of_groups(self) -> "list[Grid]":
        """The steps [n] of each group."""
        return [Grid(*pair) for pair in zip(self.scale.T.contiguous(), self.zero.T.contiguous(), strict=True)]


def largest_divisor(count: int, limit: int) -> int:
    """The most columns, up to `limit`, that a group of `count` divides into."""
    return next(divisor for divisor in range(min(count, limit), 0, -1) if count % divisor == 0)


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 scales rounded to what `dtype` and float16 can hold; they may be divided by."""
    smallest = torch.finfo(torch.float16).smallest_normal
    divisible = torch.where(scale.abs() < smallest, smallest, scale)
    return divisible.to(torch.float16 if dtype == torch.float32 else dtype).float()


def search_grid(
    weight: torch.Tensor,
    group_size: int,
    cost: Cost,
    *,
    scale_dtype: torch.dtype,
    symmetric: bool = False,
    lowest_zero: int = LOWEST,
    clip_ratios: tuple[float, ...] = CLIP_RATIOS,
) -> tuple[Grid, float]:
    """For each group of `weight` [n, k] the grid of least cost, and what all of them cost.

    Zero points lie between `lowest_zero` and 7; with `symmetric` they are all 0.
    """
    parts = []
    total = 0.0
    for rows in weight.split(max(1, _ELEMENTS_AT_ONCE // weight.shape[1])):
        groups = rows.float().unflatten(1, (-1, group_size))
        grids = (
            _symmetric_grids(groups, clip_ratios, scale_dtype)
            if symmetric
            else _grids(groups, clip_ratios, lowest_zero, scale_dtype)
        )
        grid, costs = _cheapest(groups, grids, cost)
        parts.append(grid)
        total += costs.double().sum().item()
    return Grid(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts])), total


def _symmetric_grids(groups: torch.Tensor, clip_ratios: tuple[float, ...], dtype: torch.dtype) -> list[Grid]:
    """The first clips nothing. A negative scale lets the extra step below zero serve the largest magnitude."""
    amax = groups.abs().amax(-1)
    scales = [amax / HIGHEST] + [amax / LOWEST * (ratio * sign) for ratio in clip_ratios for sign in (1, -1)]
    return [Grid(storable(scale, dtype), torch.zeros_like(scale)) for scale in scales]


def _grids(groups: torch.Tensor, clip_ratios: tuple[float, ...], lowest_zero: int, dtype: torch.dtype) -> list[Grid]:
    """The range of a grid always holds zero."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    grids = []
    for ratio in clip_ratios:
        scale = storable((high - low) * (ratio / (HIGHEST - LOWEST)), dtype)
        zero = (LOWEST - low * ratio / scale).round().clamp(lowest_zero, HIGHEST)
        grids.append(Grid(scale, zero))
    return grids


def _cheapest(groups: torch.Tensor, grids: list[Grid], cost: Cost) -> tuple[Grid, torch.Tensor]:
    best, least = grids[0], _cost_of(groups, grids[0], cost)
    for grid in grids[1:]:
        found = _cost_of(groups, grid, cost)
        is_better = found < least
        least = torch.where(is_better, found, least)
        best = Grid(torch.where(is_better, grid.scale, best.scale), torch.where(is_better, grid.zero, best.zero))
    return best, least


def _cost_of(groups: torch.Tensor, grid: Grid, cost: Cost) -> torch.Tensor:
    steps = grid.spread()
    return cost(steps.values(steps.integers(groups)).sub_(groups))
