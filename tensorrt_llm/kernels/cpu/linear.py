"""Matmuls on the CPU through torch.

float32 and bfloat16 go to MKL and oneDNN as they are. float16 has no fast kernel for more than one row: 2048 x 5504
takes 9.3 ms at 8 rows where float32 takes 6.8 (one Zen 4 core, torch 2.13, F.linear), so there the weight is widened
on the way. One row in float16 is the fastest of all, 1.0 ms, and is summed in float32.
"""

import torch
from torch.nn.functional import linear, silu

from ...dtype import torch_dtype


def prepare_matmul(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights as they are; for a float32 result (logits) of 16-bit operands they are held in float32."""
    if dtype == "float32":
        return weight.float(), None if bias is None else bias.float()
    return weight, bias


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str) -> torch.Tensor:
    """x [T, k], weight [n, k], bias [n] -> [T, n], summed in float32 and rounded once."""
    return _linear(x, weight, bias).to(torch_dtype(dtype))


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor]:
    """One matrix [2 n, k], so that one matmul makes both branches."""
    return (torch.cat((fc, gate)),)


def gated_mlp(x: torch.Tensor, branches: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) of x [T, k] and branches [2 n, k] -> [T, n]."""
    activated, linear_branch = _linear(x, branches, None).float().chunk(2, dim=1)
    return (silu(activated) * linear_branch).to(torch_dtype(dtype))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.dtype == torch.float16 and x.shape[0] > 1:
        return linear(x.float(), weight.float(), None if bias is None else bias.float())
    return linear(x.to(weight.dtype), weight, bias)
