"""What products on warpgroups share (wgmma_tiles.py, wgmma_plain.py): who owns what, and how sums reach the output.

A program has two or three consumers, warpgroups with 64 rows of the weight each and all of its tokens, and a producer
of one warp. When the last product is done, sums [rows, tokens] pass through shared memory that held x, a piece of the
tokens at a time, so that a lane then has neighbouring rows of a token, which lie side by side in the output.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# The arguments of a kernel are Triton's values, for which Python has no types.

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .epilogue import gated

ROWS = gl.constexpr(64)  # of a consumer
PIECE = gl.constexpr(64)  # tokens whose sums pass through shared memory together

# Registers of a lane, by the number of consumers: of any at the launch, of a worker in its partition. The first
# consumer has what is left, 232 and 160.
LAUNCH_REGISTERS = {2: 168, 3: 128}


@cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether `device` has the instructions: only Hopper does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@gluon.constexpr_function
def by_row(is_gated):
    """Layout of sums [PIECE, ROWS] in which a lane writes 16 bytes of float16."""
    width = 16 if is_gated else 8
    return gl.BlockedLayout([1, width], [32 * width // ROWS.value, ROWS.value // width], [4, 1], [1, 0])


@gluon.jit
def staging_of(ring, INDEX: gl.constexpr, CONSUMERS: gl.constexpr, DTYPE: gl.constexpr):
    """Room for [PIECE, ROWS] sums of consumer INDEX where x was."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])  # eight rows of four pairs of tokens a warp
    return ring._reinterpret(DTYPE, [CONSUMERS, PIECE, ROWS], layout).index(INDEX)


@gluon.jit
def pieces_of(sums, COUNT: gl.constexpr):
    """Sums of COUNT pieces of the tokens, in order."""
    if COUNT == 1:
        pieces = (sums,)
    else:
        halves = gl.permute(gl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), [0, 2, 1])
        first, second = gl.split(halves)
        pieces = pieces_of(first, COUNT // 2) + pieces_of(second, COUNT // 2)
    return pieces


@gluon.jit
def store_outputs(sums, out_ptr, first_token, first_row, tokens, num_rows, IS_GATED: gl.constexpr):
    """Gate sums [tokens, rows], or not, and write them."""
    width = num_rows
    outputs = sums
    if IS_GATED:
        outputs = gated(gl.reshape(sums, [sums.shape[0], sums.shape[1] // 2, 2]))
        first_row = first_row // 2
        width = num_rows // 2
    layout: gl.constexpr = outputs.type.layout
    token_ids = first_token + gl.arange(0, outputs.shape[0], gl.SliceLayout(1, layout))
    columns = first_row + gl.arange(0, outputs.shape[1], gl.SliceLayout(0, layout))
    mask = (token_ids < tokens)[:, None] & (columns < width)[None, :]
    gl.store(out_ptr + (token_ids.to(gl.int64) * width)[:, None] + columns[None, :], outputs, mask=mask)
