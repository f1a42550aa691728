"""What is chosen, and for what: a tactic is one way to launch a matmul, a shape is all that the choice may depend on.

Knows no kernel: the numbers mean something to the launchers of kernels/cuda only.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


class MatmulShape(NamedTuple):
    """A matmul as tactics see it: the op, and the prepared weight [rows, depth] with its format."""

    op: str
    rows: int  # of fc and gate together in a gated MLP
    depth: int
    dtype: torch.dtype  # of x
    bits: int = 0  # of a weight of integers; 0: it is of x's dtype
    num_groups: int = 1  # groups of columns that have scales of their own
    has_zero: bool = False

    @property
    def is_gated(self) -> bool:
        return self.op.endswith("gated_mlp")


@dataclass(frozen=True)
class Tactic:
    """The way, and the numbers of its launch; a way has no use for a number that is 0."""

    way: str
    token_tile: int = 0
    row_tile: int = 0
    depth_tile: int = 0  # columns of the weight that a program takes at a time
    num_stages: int = 0
    num_warps: int = 0
    num_splits: int = 0  # programs that share the depth of a tile, whose sums are added
    num_tiles: int = 0  # tiles that a program takes one after another

    def __str__(self) -> str:
        """Names it among an op's candidates; timings are stored under it."""
        tiles = "x".join(str(tile) for tile in (self.token_tile, self.row_tile, self.depth_tile) if tile)
        counts = (
            (self.num_stages, "stages"),
            (self.num_warps, "warps"),
            (self.num_splits, "splits"),
            (self.num_tiles, "tiles"),
        )
        numbers = [tiles, *(f"{count} {name}" for count, name in counts if count)]
        return f"{self.way} {', '.join(numbers)}" if tiles else self.way


LIBRARY = Tactic("library")  # cuBLAS


# What a program may use of an SM's shared memory, on Hopper.
SHARED_BYTES = 227 * 1024


# On the host Triton's functions of these names take 3.5 us a call (Triton 3.6), these 0.1 us. A step that is launched
# kernel by kernel makes some thousand calls.
def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def whole_splits(num_blocks: int, num_splits: int) -> int:
    """What is left of `num_splits` when each has the same number of whole blocks, but for the last: none is empty."""
    return cdiv(num_blocks, cdiv(num_blocks, num_splits))


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def plane_size(depth: int, num_groups: int) -> int:
    """PLANE of the layout of weight-only words: 64 integers, or the largest of 32 and 16 that divides a group."""
    return 64 if num_groups == 1 else math.gcd(64, depth // num_groups)
