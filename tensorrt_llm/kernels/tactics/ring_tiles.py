"""Tactics of kernels/cuda/ring_tiles.py, which multiplies a few tokens by a weight of any kind.

ring_tiles  tensor cores on tiles of token_tile x row_tile, depth_tile columns at a time through a ring of num_stages,
            the depth divided among num_splits programs; on a GPU that can start it early

Which numbers are best follows from how the weight is stored, and from the number of tokens.
"""

from collections.abc import Iterator

import torch

from .tactic import SHARED_BYTES, MatmulShape, Tactic, cdiv, next_power_of_2, plane_size, whole_splits

_MOST_SPLITS = 8
# A kind of weight -> tokens at most -> rows, stages, warps, programs that are wanted. Of ten layers of a 7B model on an
# H100, 8, 16 and 32 tokens take so much less time with these than with tiles that start late:
_BEST = {
    "float": {8: (32, 6, 2, 396), 16: (32, 6, 2, 396)},  # 6.3, 4.4 %; none at 32
    "integer": {8: (32, 6, 2, 396), 16: (64, 4, 4, 132), 32: (64, 4, 4, 132)},  # 9.3, 2.9, 2.2 %
    "int8": {8: (32, 6, 2, 396), 16: (64, 3, 4, 264), 32: (64, 3, 4, 264)},  # 8.2, 10.7, 3.5 %
    "int4": {8: (32, 4, 2, 792), 16: (64, 4, 4, 264)},  # 12.2, 11.9 %; none at 32
}
_COLUMNS = {"float": 128, "integer": 256, "int8": 256, "int4": 256}  # of a stage
# Worth a timing.
_NUMBERS = ((32, 6, 2, 396), (32, 4, 2, 792), (64, 4, 4, 132), (64, 4, 4, 264), (64, 3, 4, 264))
_MOST_TOKENS_TIMED = 64


def ring_tiles(shape: MatmulShape, tokens: int) -> Tactic | None:
    """The best there is for so many tokens, if it is better than other ways."""
    best = next((numbers for most, numbers in _BEST[_kind(shape)].items() if 1 < tokens <= most), None)
    if best is None or not _fits(shape):
        return None
    tactic = _tactic(shape, tokens, *best)
    return tactic if _shared_bytes(shape, tactic) <= SHARED_BYTES else None


def ring_tiles_candidates(shape: MatmulShape, tokens: int) -> Iterator[Tactic]:
    """What is worth a timing."""
    if 1 < tokens <= _MOST_TOKENS_TIMED and _fits(shape):
        for numbers in _NUMBERS:
            tactic = _tactic(shape, tokens, *numbers)
            if _shared_bytes(shape, tactic) <= SHARED_BYTES:
                yield tactic


def _kind(shape: MatmulShape) -> str:
    if shape.dtype == torch.int8:
        return "integer"
    return f"int{shape.bits}" if shape.bits else "float"


def _fits(shape: MatmulShape) -> bool:
    """Rows are copied in pieces of 16 bytes, scales of groups 4 bytes at a time, zero points not at all."""
    if _kind(shape) in ("float", "integer"):
        return shape.dtype != torch.float32 and shape.depth * shape.dtype.itemsize % 16 == 0
    return (
        shape.dtype == torch.float16
        and not shape.has_zero
        and plane_size(shape.depth, shape.num_groups) == 64
        and (shape.num_groups == 1 or shape.rows % 16 == 0)
        and shape.depth % 8 == 0
    )


def _tactic(
    shape: MatmulShape, tokens: int, row_tile: int, num_stages: int, num_warps: int, wanted_programs: int
) -> Tactic:
    """Where rows are too few for the programs that are wanted, each is divided into pieces of two stages or more."""
    columns = _COLUMNS[_kind(shape)]
    num_steps = cdiv(shape.depth, columns)
    num_splits = max(1, min(round(wanted_programs / cdiv(shape.rows, row_tile)), num_steps // 2, _MOST_SPLITS))
    token_tile = max(8, next_power_of_2(tokens))
    num_splits = whole_splits(num_steps, num_splits)
    return Tactic("ring_tiles", token_tile, row_tile, columns, num_stages, num_warps, num_splits)


def _shared_bytes(shape: MatmulShape, tactic: Tactic) -> int:
    """Of the stages: weight, x, and scales of groups in float32."""
    weight_bytes = tactic.row_tile * tactic.depth_tile * (shape.bits or 8 * shape.dtype.itemsize) // 8
    x_bytes = tactic.token_tile * tactic.depth_tile * shape.dtype.itemsize
    scale_bytes = 4 * tactic.row_tile * tactic.depth_tile // 64 if shape.num_groups > 1 else 0
    return tactic.num_stages * (weight_bytes + x_bytes + scale_bytes)
