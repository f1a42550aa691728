"""The integers of a step, from where the host left them to where its kernels read them, with what was sampled last."""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl

from ..tactics.tactic import cdiv


@triton.jit(do_not_specialize=["size", "num_tokens", "num_sampled"])
def _take_integers(memory_ptr, integers_ptr, sampled_ptr, size, num_tokens, num_sampled, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(integers_ptr + places, mask=places < size, other=0)
    sources = tl.load(integers_ptr + num_tokens + places, mask=places < num_tokens, other=num_sampled)
    is_sampled = sources < num_sampled
    sampled = tl.load(sampled_ptr + sources, mask=is_sampled, other=0)
    tl.store(memory_ptr + places, tl.where(is_sampled, sampled, values), mask=places < size)


def take_integers(
    memory: torch.Tensor, integers: torch.Tensor, num_tokens: int, sampled_ids: torch.Tensor | None, num_sampled: int
) -> None:
    """As in reference.py."""
    sampled = integers if sampled_ids is None else sampled_ids
    assert memory.dtype == integers.dtype == sampled.dtype == torch.int32 and memory.shape == integers.shape
    _take_integers[(cdiv(len(memory), 1024),)](
        memory, integers, sampled, len(memory), num_tokens, 0 if sampled_ids is None else num_sampled, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
