"""Programmatic dependent launch: the programs of a kernel start while the kernel before it still runs.

A kernel calls `start_next()` first of all, which lets the programs of the next kernel fill the multiprocessors that
this one leaves idle; it then may read what no kernel of a step writes, such as weights, step inputs, and keys and
values of earlier steps, as it may run ahead of several kernels, back to the last that was launched as usual; and it
calls `wait_for_previous()` before it reads anything else or writes at all. That wait is for the whole kernel before it,
its results included. A kernel that is launched with `overlapping` must wait. Others are launched as usual, after the
end of the one before; they need not wait, and may call `start_next`.

It is for kernels of many short programs (weights streamed for one token), for those that take a microsecond or two in
all (norms, RoPE, sums), and for those that have something to read meanwhile (ring_tiles.py). Others with long programs,
tiles of tensor cores that read nothing before the wait, gain 1 to 3 % of a step by it, or lose: those that come early
gather on the few multiprocessors that are free first, and the others then idle. Of ten layers of a 7B model (H100),
8 tokens take 6.7 % longer with such early tiles of int8 and 2.7 % longer with float16, but 3.3 % less with int4; 32
tokens take 2.3 to 3.4 % less time in all three. Attention starts early only where a program holds its split of one of a
few sequences: for a short one INT8 takes half a percent less time, for one of 1050 tokens INT4 takes 1.3 % less and
others as long as before; for 8 and 16 sequences it takes longer, or as long.

Only NVIDIA's compute capability 9.0 and later has it. Elsewhere, and in Triton's interpreter, both calls are nothing.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """The next kernel's programs may come."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """The previous kernel is done and what it wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def overlapping(device: torch.device, is_early: bool = True) -> dict[str, Any]:
    """The arguments with which a kernel of this package is launched on `device`, early if the device can."""
    return {"OVERLAP": True, "launch_pdl": True} if is_early and has_dependent_launch(device) else {"OVERLAP": False}


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on `device` can start early, and let the next one do so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
