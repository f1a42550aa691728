"""Matmul, and the row gathers: embedding lookup and the choice of the tokens that get logits.

    matmul(x, weight, bias) = x weight^T + bias   x [tokens, k], weight [n, k], bias [n] -> [tokens, n]

A few tokens are dense.py's, more are cuBLAS's if no tactic says otherwise. It accumulates in float32; whether it may
reduce partial sums in 16 bits, or multiply float32 as TF32, are switches of the process (torch.backends.cuda.matmul),
which this file does not touch.
"""

import logging
from functools import cache, partial

import torch
import torch.nn.functional as F

from ...dtype import torch_dtype
from ..tactics import Tactics
from . import dense
from .splits import arrivals_of

logger = logging.getLogger(__name__)


def matmul_by(
    tactics: Tactics, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str
) -> torch.Tensor:
    """x weight^T + bias in `dtype`; float32 results of 16-bit inputs come straight from the float32 accumulator."""
    tactic = dense.choose(tactics, "matmul", x, weight)
    if tactic.way == "library":
        return library_matmul(x, weight, bias, dtype=dtype)
    return dense.multiply(x, weight, bias, dtype, tactic, is_gated=False, arrivals=arrivals_of(tactics))


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


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of weight [vocabulary, hidden] at ids [tokens]."""
    return weight.index_select(0, ids)


def gather_last_token(x: torch.Tensor, last_token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of x [tokens, hidden] whose logits are wanted."""
    return x.index_select(0, last_token_ids)
