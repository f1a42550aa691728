"""Tiles of products on warpgroups (kernels/cuda/warpgroups.py), in splits that run all at once, by what they may take.

A Hopper GPU has 132 SMs, and an SM one program after another. No product takes less than its weight does from memory.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .tactic import MatmulShape, Tactic, cdiv

# Products of so many tokens and fewer have other ways.
MOST_TOKENS_OF_OTHERS = 64
# What a kernel takes beside its reading, and for each megabyte of a cold weight; for adding the sums of splits.
_KERNEL_US, _WEIGHT_MEGABYTE_US, _SPLITS_US = 3.0, 1 / 2.62, 1.5
_SMS = 132


class TileTimes(NamedTuple):
    """What tiles of one kind take."""

    # Tokens and rows of a tile: microseconds of a program, and for a thousand columns of the weight.
    microseconds: Mapping[tuple[int, int], tuple[float, float]]
    most_splits: int
    least_blocks: int  # of a split
    megabyte_us: float  # of sums that splits write, and others read


def split_tiles(shape: MatmulShape, tokens: int, block_columns: int, times: TileTimes) -> list[Tactic]:
    """All tiles, and splits of whole blocks as far as all programs run at once, the fastest first."""
    num_blocks = cdiv(shape.depth, block_columns)
    found = []
    for token_tile, row_tile in times.microseconds:
        tiles = cdiv(tokens, token_tile) * cdiv(shape.rows, row_tile)
        splits = range(1, 1 + max(1, min(times.most_splits, num_blocks // times.least_blocks, _SMS // max(tiles, 1))))
        found += [Tactic("wgmma", token_tile, row_tile, num_splits=num_splits) for num_splits in splits]
    return sorted(found, key=lambda tactic: _microseconds(shape, tokens, block_columns, times, tactic))


def _microseconds(
    shape: MatmulShape, tokens: int, block_columns: int, times: TileTimes, tactic: Tactic
) -> tuple[float, float]:
    """Of the product, and, where memory bounds it, of its programs alone."""
    programs = cdiv(tokens, tactic.token_tile) * cdiv(shape.rows, tactic.row_tile) * tactic.num_splits
    columns = cdiv(cdiv(shape.depth, block_columns), tactic.num_splits) * block_columns
    first, for_a_thousand = times.microseconds[tactic.token_tile, tactic.row_tile]
    of_programs = cdiv(programs, _SMS) * (first + for_a_thousand * columns / 1000)
    weight_megabytes = shape.rows * shape.depth * (shape.bits or 8 * shape.dtype.itemsize) / 8e6
    microseconds = max(of_programs, _KERNEL_US + _WEIGHT_MEGABYTE_US * weight_megabytes)
    if tactic.num_splits > 1:
        microseconds += _SPLITS_US + times.megabyte_us * tactic.num_splits * tokens * shape.rows * 8e-6
    return microseconds, of_programs


def plain_tiles(shape: MatmulShape, tokens: int, times: TileTimes) -> list[Tactic]:
    """Tiles of a weight that tensor cores take as it is (kernels/cuda/wgmma_plain.py), the fastest first."""
    itemsize = shape.dtype.itemsize
    if tokens <= MOST_TOKENS_OF_OTHERS or shape.depth * itemsize % 16 != 0:
        return []
    return split_tiles(shape, tokens, 128 // itemsize, times)
