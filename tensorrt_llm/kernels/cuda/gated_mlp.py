"""The gated MLP's first half: silu(x fc^T) * (x gate^T).

fc and gate are packed into one weight [2n, k] (fc rows, then gate rows), so that cuBLAS reads x once and runs one
matmul [tokens, k] -> [tokens, 2n]. One Triton kernel then makes [tokens, n] of the two halves: float32 math, one
rounding. The packing belongs to this kernel; the engine file keeps fc and gate apart.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...dtype import torch_dtype


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor]:
    """The packed weight [2n, k] of fc [n, k] and gate [n, k]."""
    if fc.shape != gate.shape:
        raise ValueError(f"gated_mlp: fc is {tuple(fc.shape)} but gate is {tuple(gate.shape)}, they must be equal")
    return (torch.cat((fc, gate)),)


@triton.jit
def _silu_mul(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    activated = tl.load(x_ptr + row * 2 * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    linear = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    silu = activated / (1.0 + tl.exp(-activated))
    tl.store(out_ptr + row * WIDTH + columns, silu * linear, mask=mask)


def silu_mul(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(left half) * right half of x [tokens, 2n], in `dtype`."""
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous() and x.shape[1] == 2 * width, f"silu_mul: x is {tuple(x.shape)}, wanted [tokens, 2n]"
    out = torch.empty((rows, width), dtype=torch_dtype(dtype), device=x.device)
    if rows:
        # 1024 columns on 4 warps are 8 values a lane: one 128-bit load of each half in 16-bit dtypes.
        block = min(1024, triton.next_power_of_2(width))
        _silu_mul[(rows, triton.cdiv(width, block))](x, out, WIDTH=width, BLOCK=block, num_warps=4)
    return out


def gated_mlp(x: torch.Tensor, packed: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weight of `prepare_gated_mlp`."""
    return silu_mul(F.linear(x, packed), dtype=dtype)
