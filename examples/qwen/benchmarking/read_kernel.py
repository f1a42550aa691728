"""Reads memory and does next to nothing else: one sum of every block of a vector, x float32 [blocks * block size]."""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Launch(NamedTuple):
    block: int  # elements of a program
    num_warps: int


# A thread has 4 to 16 loads of 16 bytes in flight. Which is the fastest depends on the GPU, by a few per cent.
LAUNCHES = (Launch(2048, 4), Launch(4096, 4), Launch(8192, 4), Launch(8192, 8), Launch(16384, 8), Launch(16384, 16))


@triton.jit
def _sum_block(x_ptr, out_ptr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    values = tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + block, tl.sum(values, axis=0))


def sum_blocks(x: torch.Tensor, launch: Launch) -> torch.Tensor:
    """float32 [blocks]."""
    assert x.numel() % launch.block == 0, f"sum_blocks: {x.numel()} elements are no whole blocks of {launch.block}"
    out = torch.empty(x.numel() // launch.block, device=x.device)
    _sum_block[(len(out),)](x, out, BLOCK=launch.block, num_warps=launch.num_warps)
    return out
