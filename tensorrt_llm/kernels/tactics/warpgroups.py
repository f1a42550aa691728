"""Tiles of products on warpgroups (kernels/cuda/warpgroups.py), in splits that run all at once, by what they may take.

A Hopper GPU has 132 SMs, and an SM one program after another.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .tactic import MatmulShape, Tactic

# Whether products of floats and of int8 by int8 on warpgroups are worth a timing: not yet, as none has run on a GPU.
TRIES_PLAIN_OPERANDS = False
# Products of fewer tokens have other ways.
MOST_TOKENS_OF_OTHERS = 64
# For splits, and for each megabyte of sums that they write and read.
_SPLITS_US, _MEGABYTE_US = 1.5, 0.3
_SMS = 132


class TileTimes(NamedTuple):
    """What tiles of one kind take."""

    # Tokens and rows of a tile: microseconds of a program, and for a thousand columns of the weight.
    microseconds: Mapping[tuple[int, int], tuple[float, float]]
    most_splits: int
    least_blocks: int  # of a split


def split_tiles(shape: MatmulShape, tokens: int, block_columns: int, times: TileTimes) -> list[Tactic]:
    """All tiles, in splits of whole blocks that run all at once, the fastest first."""
    num_blocks = -(-shape.depth // block_columns)
    found = []
    for token_tile, row_tile in times.microseconds:
        tiles = -(-tokens // token_tile) * -(-shape.rows // row_tile)
        splits = range(1, 1 + max(1, min(times.most_splits, num_blocks // times.least_blocks, _SMS // max(tiles, 1))))
        found += [Tactic("wgmma", token_tile, row_tile, num_splits=num_splits) for num_splits in splits]
    return sorted(found, key=lambda tactic: _microseconds(shape, tokens, block_columns, times, tactic))


def _microseconds(shape: MatmulShape, tokens: int, block_columns: int, times: TileTimes, tactic: Tactic) -> float:
    programs = -(-tokens // tactic.token_tile) * -(-shape.rows // tactic.row_tile) * tactic.num_splits
    blocks = -(-shape.depth // block_columns)
    columns = -(-blocks // tactic.num_splits) * block_columns
    first, for_a_thousand = times.microseconds[tactic.token_tile, tactic.row_tile]
    microseconds = -(-programs // _SMS) * (first + for_a_thousand * columns / 1000)
    if tactic.num_splits > 1:
        microseconds += _SPLITS_US + _MEGABYTE_US * tactic.num_splits * tokens * shape.rows * 8e-6
    return microseconds


def plain_tiles(shape: MatmulShape, tokens: int, times: TileTimes) -> list[Tactic]:
    """Tiles of a weight that tensor cores take as it is (kernels/cuda/wgmma_plain.py), if they are worth a timing."""
    itemsize = shape.dtype.itemsize
    if not TRIES_PLAIN_OPERANDS or tokens <= MOST_TOKENS_OF_OTHERS or shape.depth * itemsize % 16 != 0:
        return []
    return split_tiles(shape, tokens, 128 // itemsize, times)[:5]
