"""The gated MLP's first half: silu(x fc^T) * (x gate^T).

Rows of fc and gate take turns in one weight [2n, k], so that x is read once, and both factors of a product come out
side by side (epilogue.py). For a few tokens, and on Hopper for some hundreds, one kernel does it all (dense.py); for
more, cuBLAS makes [tokens, 2n] in x's dtype, and a Triton kernel [tokens, n] of that: float32 math, one rounding. The
packing belongs to these kernels; the engine file keeps fc and gate apart.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...dtype import torch_dtype
from ..tactics import Tactics
from ..tactics.tactic import cdiv, next_power_of_2
from . import dense
from .epilogue import interleaved
from .overlap import overlapping, start_next, wait_for_previous
from .splits import arrivals_of


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor]:
    """The packed weight [2n, k] of fc [n, k] and gate [n, k]."""
    if fc.shape != gate.shape:
        raise ValueError(f"gated_mlp: fc is {tuple(fc.shape)} but gate is {tuple(gate.shape)}, they must be equal")
    return (interleaved(fc, gate),)


@triton.jit
def _silu_mul(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    both = first * 2 + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(x_ptr + row * 2 * WIDTH + both, mask=both < 2 * WIDTH, other=0.0).to(tl.float32)
    activated, linear = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    silu = activated / (1.0 + tl.exp(-activated))
    columns = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * WIDTH + columns, silu * linear, mask=columns < WIDTH)


def silu_mul(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(even columns) * odd columns of x [tokens, 2n], in `dtype`."""
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous() and x.shape[1] == 2 * width, f"silu_mul: x is {tuple(x.shape)}, wanted [tokens, 2n]"
    out = torch.empty((rows, width), dtype=torch_dtype(dtype), device=x.device)
    if rows:
        # 1024 columns on 4 warps are 16 values a lane: two 128-bit loads in 16-bit dtypes.
        block = min(1024, next_power_of_2(width))
        _silu_mul[(rows, cdiv(width, block))](x, out, WIDTH=width, BLOCK=block, num_warps=4, **overlapping(x.device))
    return out


def gated_mlp_by(tactics: Tactics, x: torch.Tensor, packed: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weight of `prepare_gated_mlp`."""
    tactic = dense.choose(tactics, "gated_mlp", x, packed)
    if tactic.way == "library":
        return silu_mul(F.linear(x, packed), dtype=dtype)
    return dense.multiply(x, packed, None, dtype, tactic, is_gated=True, arrivals=arrivals_of(tactics))


gated_mlp = partial(gated_mlp_by, Tactics())
