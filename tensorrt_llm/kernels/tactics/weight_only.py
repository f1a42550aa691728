"""Tactics of matmuls with a weight of 8 or 4 bits: kernels/cuda/weight_only.py has the kernels and the layout.

stream   row_tile rows of the weight a program, depth_tile columns at a time; one token, of an even number of values
resident all of the weight in registers at once, in float16 on a GPU that can start it early; else a stream
ring     row_tile rows at a time, num_tiles of them a program, through a ring of num_stages in shared memory; in float16
         where a GPU can start it early; else a stream
tiles    tensor cores on tiles of token_tile x row_tile, a block of the layout at a time, whose depth may be divided
         among num_splits programs; any number of tokens
ring_tiles  ring_tiles.py
wgmma    tensor cores on tiles of token_tile x row_tile with warps of their own for copies (wgmma_tiles.py), in float16
         or bfloat16 on a Hopper GPU; else tiles
widened  the weight widened to x's dtype, then cuBLAS; the only way for float32
"""

from dataclasses import replace

import torch

from .ring_tiles import ring_tiles, ring_tiles_candidates
from .tactic import SHARED_BYTES, MatmulShape, Tactic, cdiv, next_power_of_2, plane_size, whole_splits
from .warpgroups import TileTimes, split_tiles

WIDENED = Tactic("widened")
# Unpacking a weight again for each 64 tokens then costs what widening it once does. By bits.
_MOST_TOKENS_UNPACKED = {8: 512, 4: 448}
# Beyond this tiles are not worth a timing, below that widening is not.
_MOST_TOKENS_TIMED, _LEAST_TOKENS_WIDENED = 512, 32


def block_size(shape: MatmulShape) -> int:
    """Columns of a block of the layout."""
    return 16 // shape.bits * plane_size(shape.depth, shape.num_groups)


def heuristic(shape: MatmulShape, tokens: int) -> Tactic:
    """By times at the shapes of a 7B model on an H100: tools/kernel_bench.py, and ten layers in a row."""
    if 64 < tokens <= _MOST_TOKENS_OF_WARPGROUPS and _fits_warpgroups(shape):
        return _warpgroups(shape, tokens)[0]
    return without_warpgroups(shape, tokens)


def without_warpgroups(shape: MatmulShape, tokens: int) -> Tactic:
    """The heuristic on a GPU that has no instructions for warpgroups, or where operands do not lie as these want it."""
    if tokens > _MOST_TOKENS_UNPACKED[shape.bits] or shape.dtype == torch.float32:
        return WIDENED
    is_int4 = shape.bits == 4
    if tokens == 1 and shape.depth % 2 == 0:
        ring = _ring(shape, *_RINGS[0])
        if is_int4 and _fits_ring(shape, ring):
            return ring
        return replace(stream(shape), way="resident") if _fits_registers(shape) else stream(shape)
    return ring_tiles(shape, tokens) or tiles(shape, tokens)


def tiles(shape: MatmulShape, tokens: int) -> Tactic:
    """Tiles of few or many tokens that start after the kernel before, or soon."""
    is_int4 = shape.bits == 4
    if tokens <= 8:
        # Tiles of 32 rows are too few for wgmma, so that a dot does not wait for the one before.
        return _tiles(shape, tokens, 8, 32, 5, 2, wanted_programs=768 if is_int4 else 528, most_splits=4)
    token_tile = min(next_power_of_2(tokens), 64)
    if is_int4:
        return _tiles(shape, tokens, token_tile, 64, 3, 4, wanted_programs=264, most_splits=4)
    if tokens > 64:
        return _tiles(shape, tokens, 64, 128, 3, 8, wanted_programs=264, most_splits=4)
    if token_tile == 64:
        # With three stages more programs share an SM, if there are that many: 39 us instead of 52 for 22016 rows.
        num_stages = 3 if shape.rows >= 264 * 64 else 4
        return _tiles(shape, tokens, 64, 64, num_stages, 4, wanted_programs=264, most_splits=4)
    return _tiles(shape, tokens, token_tile, 64, 5, 4, wanted_programs=384, most_splits=4)


# Two programs of 16 rows on each of 132 SMs, and bytes of a row that leave their registers room.
_MOST_ROWS_RESIDENT, _MOST_BYTES_RESIDENT = 2 * 16 * 132, 4096


def _fits_registers(shape: MatmulShape) -> bool:
    """The output projection of a 7B model does in int8: ten layers take 1 % less time with it (H100)."""
    return (
        shape.dtype == torch.float16
        and plane_size(shape.depth, shape.num_groups) == 64
        and shape.rows <= _MOST_ROWS_RESIDENT
        and shape.depth * shape.bits // 8 <= _MOST_BYTES_RESIDENT
    )


# Rows of a tile, stages, warps, programs for each SM (None: a tile is a program). Of ten layers of a 7B model in int4
# the products of one token take 19 % less time with the first than as streams; int8, where streams read as fast as the
# memory gives, loses 4 % of all (H100).
_RINGS = ((16, 2, 4, None), (16, 4, 8, 2), (16, 3, 4, 2), (8, 4, 4, 4))
_MOST_TILES_OF_A_RING = 16  # whose sums wait in shared memory


def _fits_ring(shape: MatmulShape, ring: Tactic) -> bool:
    return (
        shape.dtype == torch.float16
        and plane_size(shape.depth, shape.num_groups) == 64
        and shape.rows % 16 == 0
        and _ring_bytes(shape, ring) <= SHARED_BYTES
    )


# With what splits take (warpgroups.py), this says within 10 % what the products of a 7B model take for 128 to 1024
# tokens, in int8 and int4 (H100, with programs on most of its 132 SMs).
_WARPGROUP_TIMES = TileTimes({(128, 128): (2.2, 5.9), (128, 192): (5.0, 7.8), (256, 128): (3.4, 10.6)}, 3, 4, 0.3)
# The products of a layer in int8 take 577 us for 1024 tokens and 2577 for 4096; 787 and 2764 with widened weights. From
# somewhere beyond that on, cuBLAS makes up for the widening.
_MOST_TOKENS_OF_WARPGROUPS = 4096


def _fits_warpgroups(shape: MatmulShape) -> bool:
    is_plain = shape.num_groups == 1 and not shape.has_zero
    return (
        (shape.dtype == torch.float16 or (shape.dtype == torch.bfloat16 and is_plain))
        and plane_size(shape.depth, shape.num_groups) == 64
        and shape.depth % 8 == 0
    )


def _warpgroups(shape: MatmulShape, tokens: int) -> list[Tactic]:
    """The fastest first, by what they may take."""
    return split_tiles(shape, tokens, block_size(shape), _WARPGROUP_TIMES)


def _ring(shape: MatmulShape, row_tile: int, num_stages: int, num_warps: int, programs_per_sm: int | None) -> Tactic:
    num_tiles = 1
    if programs_per_sm:
        tiles = cdiv(shape.rows, row_tile)
        num_tiles = min(cdiv(tiles, 132 * programs_per_sm), _MOST_TILES_OF_A_RING)
    return Tactic("ring", row_tile=row_tile, num_stages=num_stages, num_warps=num_warps, num_tiles=num_tiles)


def _ring_bytes(shape: MatmulShape, ring: Tactic) -> int:
    """Shared memory of words, scales in float32 and zero points for each plane, of x and of sums, at most."""
    rows, planes = 8 * ring.row_tile, 16 // shape.bits
    stage = rows * (128 + planes * (4 + 2 * shape.has_zero) * (shape.num_groups > 1))
    x_parts = 8 * planes * cdiv(shape.depth, 8 * block_size(shape))
    return ring.num_stages * stage + x_parts * (128 + 4) + next_power_of_2(ring.num_tiles) * rows * 4


def stream(shape: MatmulShape) -> Tactic:
    """The stream of the heuristic."""
    return _stream(shape, 8 if shape.depth * shape.bits <= 16384 else 4, 1)


def _stream(shape: MatmulShape, row_tile: int, share: float) -> Tactic:
    """Pieces of rows that keep most loads in flight (perf_notes.md), times `share`; eight words of a row a lane."""
    plane, columns = plane_size(shape.depth, shape.num_groups), block_size(shape)
    block_tile = min(int(128 * share) * shape.bits // plane, next_power_of_2(cdiv(shape.depth, columns)))
    return Tactic(
        "stream", row_tile=row_tile, depth_tile=block_tile * columns, num_warps=max(1, block_tile * plane // 256)
    )


def _tiles(
    shape: MatmulShape,
    tokens: int,
    token_tile: int,
    row_tile: int,
    num_stages: int,
    num_warps: int,
    wanted_programs: int,
    most_splits: int = 16,
) -> Tactic:
    """Where rows are too few for the programs that are wanted, each is divided into pieces of four blocks or more."""
    tiles = cdiv(tokens, token_tile) * cdiv(shape.rows, row_tile)
    num_blocks = cdiv(shape.depth, block_size(shape))
    num_splits = max(1, min(wanted_programs // max(tiles, 1), num_blocks // 4, most_splits))
    return Tactic("tiles", token_tile, row_tile, 0, num_stages, num_warps, whole_splits(num_blocks, num_splits))


_MOST_PIECES = 32  # of a program that streams
# Rows, stages, warps, programs that are wanted.
_TILES_OF_FEW = ((32, 5, 2, 528), (32, 5, 2, 1056), (32, 4, 4, 528), (64, 4, 4, 528), (64, 4, 4, 264), (32, 6, 2, 264))
_TILES_OF_MANY = (
    (64, 3, 4, 264),
    (64, 3, 4, 528),
    (64, 5, 4, 528),
    (64, 4, 4, 264),
    (32, 4, 2, 528),
    (128, 3, 8, 264),
    (128, 3, 4, 264),
)


def candidates(shape: MatmulShape, tokens: int) -> list[Tactic]:
    """What is worth a timing, the heuristic's choice first."""
    found = [heuristic(shape, tokens)]
    if shape.dtype == torch.float32:
        return found
    if tokens == 1 and shape.depth % 2 == 0:
        found.append(stream(shape))
        found += [ring for ring in (_ring(shape, *numbers) for numbers in _RINGS) if _fits_ring(shape, ring)]
        streams = [_stream(shape, rows, share) for rows in (2, 4, 8) for share in (0.5, 1, 2)]
        # Pieces of rows are unrolled: more of them compile for seconds, and spill.
        found += [
            tactic for tactic in streams if tactic.row_tile * cdiv(shape.depth, tactic.depth_tile) <= _MOST_PIECES
        ]
    if tokens > 1:
        found.append(tiles(shape, tokens) if tokens <= 64 else without_warpgroups(shape, tokens))
        found += ring_tiles_candidates(shape, tokens)
    if tokens <= 8:
        found += [_tiles(shape, tokens, 8, *numbers) for numbers in _TILES_OF_FEW[: 2 if tokens == 1 else None]]
    elif tokens <= _MOST_TOKENS_TIMED:
        token_tile = min(next_power_of_2(tokens), 64)
        found += [
            _tiles(shape, tokens, token_tile, rows, stages, warps, programs)
            for rows, stages, warps, programs in _TILES_OF_MANY
            # More than 32 sums a lane spill, and tiles of 32 rows, which are too few for wgmma, already do with them.
            if token_tile * rows // (32 * warps) <= 32 and (rows >= 64 or token_tile <= 32)
        ]
        if tokens > 64 and shape.num_groups == 1:
            # Sums of a whole row need no others beside them for a group.
            found += [_tiles(shape, tokens, 128, *numbers, 264) for numbers in ((64, 2, 4), (128, 2, 8), (128, 3, 8))]
    if tokens > 64 and _fits_warpgroups(shape):
        found += _warpgroups(shape, tokens)[:5]
    if tokens >= _LEAST_TOKENS_WIDENED:
        found.append(WIDENED)
    return list(dict.fromkeys(found))
