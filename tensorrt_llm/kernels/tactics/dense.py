"""Tactics of matmuls with a weight of floats: kernels/cuda/dense.py has the kernels.

stream   row_tile rows of the weight a program, depth_tile columns at a time; one token only
tiles    tensor cores on tiles of token_tile x row_tile, depth_tile columns at a time; any number of tokens
ring_tiles  ring_tiles.py
wgmma    tensor cores on tiles of token_tile x row_tile with warps of their own for copies (wgmma_plain.py), whose depth
         may be divided among num_splits programs, in float16 or bfloat16 on a Hopper GPU; else library
library  cuBLAS, and a kernel for SiLU behind it
"""

import torch

from .ring_tiles import ring_tiles, ring_tiles_candidates
from .tactic import LIBRARY, SHARED_BYTES, MatmulShape, Tactic, next_power_of_2
from .warpgroups import MOST_TOKENS_OF_OTHERS, TileTimes, plain_tiles

# At 64 tokens tiles take 67 us for 22016 x 4096 and 441 for the logits, cuBLAS 74 and 461, but for fewer rows cuBLAS is
# ahead (H100). At 32 tokens it is behind by 2 to 12 % (H200, the shapes of a 7B model).
_MOST_TOKENS_IN_TILES, _MANY_ROWS = 32, 16384
# H100, 65 to 512 tokens. Up to 256 the kernel of a gated MLP takes 70 to 79 us for 22016 x 4096, cuBLAS and the kernel
# behind it 72 to 102; elsewhere cuBLAS is ahead, or about as fast.
_WARPGROUP_TIMES = TileTimes(
    {(128, 128): (3.5, 5.6), (128, 192): (9.0, 6.95), (256, 128): (8.4, 8.95), (256, 192): (13.9, 13.5)}, 6, 8, 0.5
)
_MOST_TOKENS_GATED = 256
# Tiles are worth a timing up to here.
_MOST_TOKENS_TIMED = 128


def heuristic(shape: MatmulShape, tokens: int) -> Tactic:
    if tokens == 1:
        return _stream(shape)
    if shape.dtype == torch.float32:
        return LIBRARY
    if tokens > MOST_TOKENS_OF_OTHERS:
        is_ahead = shape.op == "gated_mlp" and tokens <= _MOST_TOKENS_GATED
        on_warpgroups = plain_tiles(shape, tokens, _WARPGROUP_TIMES) if is_ahead else []
        return on_warpgroups[0] if on_warpgroups else LIBRARY
    return ring_tiles(shape, tokens) or tiles(shape, tokens)


def tiles(shape: MatmulShape, tokens: int) -> Tactic:
    """Of 2 to 64 tokens, in tiles that start after the kernel before, or soon."""
    if tokens > _MOST_TOKENS_IN_TILES:
        return Tactic("tiles", 64, 64, 128, 5, 4) if shape.rows >= _MANY_ROWS else LIBRARY
    token_tile = max(16, next_power_of_2(tokens))
    # Where rows make fewer tiles than there are SMs, each program must have more under way.
    return Tactic("tiles", token_tile, 64, 128, 3 if shape.rows >= 132 * 64 or token_tile > 32 else 5, 4)


def _stream(shape: MatmulShape) -> Tactic:
    # Whole rows at once where they fit into registers: 64 bytes a lane are then in flight for each two rows. H200, of
    # 4.6 TB/s: 12288 x 4096 4.1, 4096 x 4096 3.8, 22016 x 4096 4.3, 151936 x 4096 4.6, 4096 x 11008 4.2 TB/s.
    itemsize = shape.dtype.itemsize
    if shape.depth * itemsize <= 8192:
        return Tactic("stream", row_tile=8, depth_tile=next_power_of_2(shape.depth), num_warps=8)
    return Tactic("stream", row_tile=4, depth_tile=4096 // itemsize, num_warps=4)


# Rows, columns in float16, warps: 32 to 128 weights a lane.
_STREAMS = ((2, 2048, 2), (2, 4096, 4), (4, 2048, 4), (4, 4096, 4), (4, 4096, 8), (8, 2048, 8), (8, 4096, 8))
# Rows, columns, stages, warps. Tiles of 32 rows are too few for wgmma; many tokens give their lanes too many sums.
_TILES = ((32, 128, 5, 2), (64, 64, 6, 4), (64, 128, 3, 4), (64, 128, 5, 4), (64, 256, 3, 4), (128, 64, 4, 4))


def candidates(shape: MatmulShape, tokens: int) -> list[Tactic]:
    """What is worth a timing, the heuristic's choice first."""
    found = [heuristic(shape, tokens)]
    if tokens == 1:
        most_columns = next_power_of_2(shape.depth)
        for rows, columns, warps in _STREAMS:
            depth_tile = min(columns * 2 // shape.dtype.itemsize, most_columns)
            found.append(Tactic("stream", row_tile=rows, depth_tile=depth_tile, num_warps=warps))
    elif tokens <= _MOST_TOKENS_TIMED and shape.dtype != torch.float32:
        token_tile = max(16, next_power_of_2(tokens))
        found += [tiles(shape, tokens), *ring_tiles_candidates(shape, tokens)]
        found += [
            Tactic("tiles", token_tile, rows, columns, stages, warps)
            for rows, columns, stages, warps in _TILES
            if stages * (token_tile + rows) * columns * shape.dtype.itemsize <= SHARED_BYTES
            and (rows >= 64 or token_tile <= 32)
        ]
    if shape.dtype != torch.float32:
        found += plain_tiles(shape, tokens, _WARPGROUP_TIMES)[:5]
    return list(dict.fromkeys([*found, LIBRARY]))
