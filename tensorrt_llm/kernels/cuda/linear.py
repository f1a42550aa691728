"""Matmul, and the row gathers: embedding lookup and the choice of the tokens that get logits.

    matmul(x, weight, bias) = x weight^T + bias   x [tokens, k], weight [n, k], bias [n] -> [tokens, n]

A few tokens are dense.py's, more are cuBLAS's if no tactic says otherwise. It accumulates in float32; whether it may
reduce partial sums in 16 bits, or multiply float32 as TF32, are switches of the process (torch.backends.cuda.matmul),
which this file does not touch.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import logging
from functools import cache, partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...dtype import torch_dtype
from ..step import StepShape
from ..tactics import Tactics
from ..tactics.tactic import cdiv, next_power_of_2
from . import dense, wgmma_plain
from .overlap import has_dependent_launch, start_next
from .splits import arrivals_of

logger = logging.getLogger(__name__)


def _matmul_by(
    leaves_splits: bool,
    tactics: Tactics,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
) -> torch.Tensor:
    """x weight^T + bias in `dtype`; float32 results of 16-bit inputs come straight from the float32 accumulator.

    With `leaves_splits` float32 sums of each split [splits, T, n], where programs share the depth and there is no bias.
    """
    tactic = dense.choose(tactics, "matmul", x, weight)
    if tactic.way == "library":
        return library_matmul(x, weight, bias, dtype=dtype)
    if leaves_splits and bias is None and tactic.way == "wgmma" and wgmma_plain.splits_of(x, tactic) > 1:
        return wgmma_plain.sums_of_splits(x, weight, tactic)
    return dense.multiply(x, weight, bias, dtype, tactic, is_gated=False, arrivals=arrivals_of(tactics))


matmul_by = partial(_matmul_by, False)
matmul_in_splits_by = partial(_matmul_by, True)
matmul = partial(matmul_by, Tactics())


def library_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, dtype: str) -> torch.Tensor:
    """`matmul` through cuBLAS, also for a weight that a kernel of the same step has written."""
    out_dtype = torch_dtype(dtype)
    if x.dtype == weight.dtype == out_dtype:
        return F.linear(x, weight, bias)
    if x.dtype == weight.dtype and out_dtype == torch.float32 and x.is_cuda:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return out if bias is None else out.add_(bias)
    _report_upcast(x.device.type, x.dtype, weight.dtype, out_dtype)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(out_dtype)


@cache
def _report_upcast(device: str, x: torch.dtype, weight: torch.dtype, out: torch.dtype) -> None:
    """Say once per combination that a matmul copies its operands to float32 first."""
    logger.warning("matmul %s x %s -> %s on %s has no direct kernel: both are cast to float32", x, weight, out, device)


@triton.jit
def _embedding(
    ids_ptr, weight_ptr, out_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    start_next(OVERLAP)
    token = tl.program_id(0)
    row = tl.load(ids_ptr + token).to(tl.int64) * HIDDEN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(weight_ptr + row + columns, mask=columns < HIDDEN)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + columns, values, mask=columns < HIDDEN)


def embedding(ids: torch.Tensor, weight: torch.Tensor, *, dtype: str | None = None) -> torch.Tensor:
    """Rows of weight [vocabulary, hidden] at ids [tokens], in its dtype or in another."""
    tokens, hidden = len(ids), weight.shape[1]
    out = torch.empty((tokens, hidden), dtype=torch_dtype(dtype) if dtype else weight.dtype, device=weight.device)
    if tokens:
        block = min(next_power_of_2(hidden), 1024)
        # Launched as usual: it is the first of a step, whose inputs kernels behind it read before they wait.
        _embedding[(tokens, cdiv(hidden, block))](
            ids, weight, out, HIDDEN=hidden, BLOCK=block, OVERLAP=has_dependent_launch(weight.device), num_warps=4
        )
    return out


def gather_last_token(x: torch.Tensor, last_token_ids: torch.Tensor, *, step: StepShape) -> torch.Tensor:
    """Rows of x [tokens, hidden] whose logits are wanted: in a step of decodes all, as they are."""
    if step.num_contexts == 0:
        assert len(x) == len(last_token_ids), f"{len(last_token_ids)} rows of {len(x)} decodes"
        return x
    return x.index_select(0, last_token_ids)
