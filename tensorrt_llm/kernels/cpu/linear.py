"""Matmuls on the CPU through torch.

float32 and bfloat16 go to MKL and oneDNN as they are. float16 has no fast kernel for more than one row: 2048 x 5504
takes 9.3 ms at 8 rows where float32 takes 6.8 (one Zen 4 core, torch 2.13, F.linear), so there the weight is widened
on the way. One row in float16 is the fastest of all, 1.0 ms, and is summed in float32.
"""

import torch
from torch.nn.functional import linear, silu

from ...dtype import torch_dtype


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str) -> torch.Tensor:
    """x [T, k], weight [n, k], bias [n] -> [T, n], summed in float32 and rounded once."""
    if dtype == "float32" and weight.dtype != torch.float32:
        return _wide_linear(x, weight, bias)
    return _linear(x, weight, bias).to(torch_dtype(dtype))


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor]:
    """One matrix [2 n, k], so that one matmul makes both branches."""
    return (torch.cat((fc, gate)),)


def gated_mlp(x: torch.Tensor, branches: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) of x [T, k] and branches [2 n, k] -> [T, n]."""
    activated, linear_branch = _linear(x, branches, None).float().chunk(2, dim=1)
    return (silu(activated) * linear_branch).to(torch_dtype(dtype))


# Widened rows of one piece stay in the cache: a float16 lm_head of 151936 x 2048 takes 56 ms at one row, where a
# float32 copy, twice as large, takes 79; pieces of 4096 rows take 445 (two Zen 4 cores, torch 2.13).
_ROWS_WIDENED_AT_ONCE = 512


def _wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A float32 result (logits) of 16-bit operands, piece by piece of the weight's rows."""
    x = x.float()
    pieces = [linear(x, piece.float()) for piece in weight.split(_ROWS_WIDENED_AT_ONCE)]
    y = torch.cat(pieces, dim=1)
    return y if bias is None else y + bias.float()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.dtype == torch.float16 and x.shape[0] > 1:
        return linear(x.float(), weight.float(), None if bias is None else bias.float())
    return linear(x.to(weight.dtype), weight, bias)
