"""What steps are padded to, and how many prompt tokens fill one. Numbers only.

Products of many tokens are computed in tiles of 128 or 256 tokens, and on an H100 those of a 7B model take long for one
token more than a tile holds: a layer in INT8 takes 171 us for 256 tokens, 261 for 320, 308 for 512. So prompts beside
decodes come in whole tiles where others wait (scheduler.py), for which there are sizes without padding.
"""

# Padding rows cost time, graphs cost memory and capture time: fine steps where a row more is a large share of the work.
_DECODES = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32))
# Beyond 128 tokens at most a quarter of a step is padding. A longer prompt keeps the GPU busy while it is launched.
_PROMPT_TOKENS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_PROMPTS = (1, 2, 4)
# Prompts beside decodes come in any combination: coarser steps.
_MIXED_TOKENS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_MIXED_PROMPTS = 8  # an empty one costs a few programs that end at once
_MIXED_DECODES = (8, 16, 32, *range(64, 257, 32), *range(320, 1025, 64))
_TILE_TOKENS = 256
# Of a step in whole tiles, or so many prompt tokens beside more than 256 decodes. More do not make it more efficient,
# and its decodes wait longer for their next token.
_MOST_TOKENS_IN_TILES, _PROMPT_TOKENS_BESIDE_MANY = 1024, 768


def decodes_size(count: int) -> int:
    """Decodes of a step that has no prompts."""
    return _next(_DECODES, count)


def prompt_sizes(num_tokens: int, num_prompts: int) -> tuple[int, int] | None:
    """Tokens and prompts of a step without decodes; None where there are too many of either."""
    if num_tokens > _PROMPT_TOKENS[-1] or num_prompts > _PROMPTS[-1]:
        return None
    return _next(_PROMPT_TOKENS, num_tokens), _next(_PROMPTS, num_prompts)


def mixed_sizes(num_tokens: int, num_prompts: int, num_decodes: int) -> tuple[int, int, int] | None:
    """Tokens of prompts, prompts, and decodes of a step with both; None where there are too many tokens or prompts."""
    if num_tokens > _MIXED_TOKENS[-1] or num_prompts > _MIXED_PROMPTS:
        return None
    decodes = _next(_MIXED_DECODES, num_decodes)
    in_whole_tiles = -(-(decodes + num_tokens) // _TILE_TOKENS) * _TILE_TOKENS - decodes
    return min(_next(_MIXED_TOKENS, num_tokens), in_whole_tiles), _MIXED_PROMPTS, decodes


def prompt_tokens_in_whole_tiles(most_tokens: int, num_decodes: int) -> int:
    """The most prompt tokens, up to `most_tokens`, that fill tiles of a step without padding; 0: they fill none."""
    decodes = _next(_MIXED_DECODES, num_decodes) if num_decodes else 0
    beside_many = -(-decodes // _TILE_TOKENS) * _TILE_TOKENS + _PROMPT_TOKENS_BESIDE_MANY
    most_in_tiles = max(_MOST_TOKENS_IN_TILES, beside_many)
    return max(min(decodes + most_tokens, most_in_tiles) // _TILE_TOKENS * _TILE_TOKENS - decodes, 0)


def _next(sizes: tuple[int, ...], count: int) -> int:
    return next((size for size in sizes if size >= count), count)
