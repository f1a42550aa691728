"""The token with the largest logit of each row, in one kernel: what a greedy step launches behind its graph.

logits are float32 [rows, vocab], contiguous in a row. A program takes one row and one split of it; whichever program of
a row is the last to arrive compares what the splits found. A maximum has no rounding, and of equal logits the lowest id
wins, so the order of arrival changes nothing.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import torch
import triton
import triton.language as tl

from ..reference import BROKEN
from ..tactics.tactic import cdiv, next_power_of_2
from .splits import Arrivals

_BROKEN = tl.constexpr(BROKEN)


@triton.jit
def _first_of_the_largest(logits, ids):
    """(the largest, the lowest id that has it)"""
    largest = tl.max(logits, axis=0)
    return largest, tl.min(tl.where(logits == largest, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _store_token(ids_ptr, tokens_ptr, row, largest, token):
    tl.store(ids_ptr + row, token)
    tl.store(tokens_ptr + row, tl.where(tl.abs(largest) < float("inf"), token, _BROKEN))


@triton.jit
def _largest_logit(
    logits_ptr, ids_ptr, tokens_ptr, split_largest_ptr, split_token_ptr, arrivals_ptr, vocab_size, row_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_LANES: tl.constexpr,
):  # fmt: skip
    """A row of which a logit is NaN counts as one with an infinite logit."""
    row, split = tl.program_id(0), tl.program_id(1)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    for block in tl.static_range(BLOCKS):
        columns = (split * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        logits = tl.where(logits == logits, logits, float("inf"))
        ids = tl.where(logits > largest, columns, ids)
        largest = tl.maximum(logits, largest)
    best, token = _first_of_the_largest(largest, ids)
    if NUM_SPLITS == 1:
        _store_token(ids_ptr, tokens_ptr, row, best, token)
    else:
        tl.store(split_largest_ptr + row * NUM_SPLITS + split, best)
        tl.store(split_token_ptr + row * NUM_SPLITS + split, token)
        tl.debug_barrier()  # one thread counts for all: what the others have stored comes before
        if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == NUM_SPLITS - 1:
            tl.store(arrivals_ptr + row, 0)
            lanes = tl.arange(0, SPLIT_LANES)
            offsets = row * NUM_SPLITS + lanes
            best_of_splits = tl.load(split_largest_ptr + offsets, mask=lanes < NUM_SPLITS, other=float("-inf"))
            tokens = tl.load(split_token_ptr + offsets, mask=lanes < NUM_SPLITS, other=0x7FFFFFFF)
            best, token = _first_of_the_largest(best_of_splits, tokens)
            _store_token(ids_ptr, tokens_ptr, row, best, token)


class GreedyTokens:
    """For launches that come one after the other."""

    def __init__(self) -> None:
        self._arrivals = Arrivals()

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 (ids, tokens), as in reference.py."""
        rows, vocab_size = logits.shape
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        ids, tokens = torch.empty((2, rows), dtype=torch.int32, device=logits.device)
        if rows == 0:
            return ids, tokens
        # 16 KB a program for one row, which keeps 38 SMs busy at 150,000 logits; more where rows keep all busy.
        block = min(4096, next_power_of_2(vocab_size))
        blocks = 1 if rows < 64 else 4
        num_splits = cdiv(vocab_size, block * blocks)
        split_largest = torch.empty((rows, num_splits), dtype=torch.float32, device=logits.device)
        split_token = torch.empty((rows, num_splits), dtype=torch.int32, device=logits.device)
        _largest_logit[(rows, num_splits)](
            logits, ids, tokens, split_largest, split_token, self._arrivals.of(rows, logits.device), vocab_size,
            logits.stride(0), BLOCK=block, BLOCKS=blocks, NUM_SPLITS=num_splits,
            SPLIT_LANES=next_power_of_2(num_splits), num_warps=8,
        )  # fmt: skip
        return ids, tokens
