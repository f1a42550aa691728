"""Tactics of matmuls of int8 by int8: kernels/cuda/smooth_quant.py has the kernels.

stream   row_tile rows of the weight a program, depth_tile columns at a time; one token, of whole words of four values
tiles    tensor cores on tiles of token_tile x row_tile, depth_tile columns at a time; any number of tokens
ring_tiles  ring_tiles.py
wgmma    tensor cores on tiles of token_tile x row_tile with warps of their own for copies (wgmma_plain.py), whose depth
         may be divided among num_splits programs, on a Hopper GPU; else tiles
"""

from .ring_tiles import ring_tiles, ring_tiles_candidates
from .tactic import MatmulShape, Tactic, cdiv, next_power_of_2
from .warpgroups import TileTimes, plain_tiles

# H100, the shapes of a 7B model at 65 to 512 tokens. All take less time than in tiles: a layer 132 -> 116 us at 256
# tokens, 211 -> 166 at 512.
_WARPGROUP_TIMES = TileTimes(
    {(128, 128): (4.4, 2.85), (128, 192): (7.8, 3.3), (256, 128): (6.8, 4.5), (256, 192): (10.3, 6.8)}, 6, 8, 0.5
)


def heuristic(shape: MatmulShape, tokens: int) -> Tactic:
    if tokens == 1 and shape.depth % 4 == 0:
        return _stream(shape, 4, 512)
    on_warpgroups = plain_tiles(shape, tokens, _WARPGROUP_TIMES)
    return on_warpgroups[0] if on_warpgroups else ring_tiles(shape, tokens) or tiles(shape, tokens)


def tiles(shape: MatmulShape, tokens: int) -> Tactic:
    """Tiles that start after the kernel before, or soon."""
    if tokens > 64 and cdiv(tokens, 128) * cdiv(shape.rows, 128) >= 128:
        # Three stages let two programs share an SM: 1.4 times as fast as four at 2048 tokens (H200).
        return Tactic("tiles", 128, 128, 128, 3, 8)
    # Bound by memory: with fewer tiles than SMs each must have more under way (the shapes of a 7B model).
    token_tile = _token_tile(tokens, 64)
    num_tiles = cdiv(tokens, token_tile) * cdiv(shape.rows, 64)
    return Tactic("tiles", token_tile, 64, 256, 3 if num_tiles >= 128 else 4, 4)


def _stream(shape: MatmulShape, row_tile: int, words: int) -> Tactic:
    """Four words of a row a lane."""
    word_tile = min(words, max(next_power_of_2(shape.depth // 4), 128))
    return Tactic("stream", row_tile=row_tile, depth_tile=4 * word_tile, num_warps=word_tile // 128)


def _token_tile(tokens: int, most: int) -> int:
    return min(max(16, next_power_of_2(tokens)), most)


# Rows, columns, stages, warps; of many tokens the tokens first.
_TILES_OF_FEW = ((32, 256, 4, 2), (64, 128, 5, 4), (64, 256, 3, 4), (64, 256, 4, 4), (64, 512, 3, 4), (128, 128, 4, 4))
_TILES_OF_MANY = (
    (64, 64, 256, 3, 4),
    (128, 64, 128, 4, 4),
    (128, 64, 256, 3, 4),
    (128, 128, 128, 3, 8),
    (128, 128, 128, 4, 8),
    (128, 256, 128, 3, 8),
    (256, 128, 128, 4, 8),
)


def candidates(shape: MatmulShape, tokens: int) -> list[Tactic]:
    """What is worth a timing, the heuristic's choice first."""
    found = [heuristic(shape, tokens)]
    if tokens == 1 and shape.depth % 4 == 0:
        found += [_stream(shape, rows, words) for rows in (2, 4, 8) for words in (256, 512, 1024)]
    elif tokens <= 64:
        found += [tiles(shape, tokens), *ring_tiles_candidates(shape, tokens)]
        found += [Tactic("tiles", _token_tile(tokens, 64), *numbers) for numbers in _TILES_OF_FEW]
    else:
        found += [tiles(shape, tokens), *(Tactic("tiles", *numbers) for numbers in _TILES_OF_MANY)]
        found += plain_tiles(shape, tokens, _WARPGROUP_TIMES)[:5]
    return list(dict.fromkeys(found))
