"""RMS norm by norm.c."""

import torch

from ....dtype import torch_dtype
from .compiled import normalize
from .launch import FLOATS, rows_of


def prepare_norm(weight: torch.Tensor, *, eps: float, dtype: str) -> tuple[torch.Tensor]:
    """The weight in float32, which the op computes in."""
    if weight.dim() != 1:
        raise ValueError(f"the weight of a norm is {list(weight.shape)}, expected one dimension")
    return (weight.float().contiguous(),)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str) -> torch.Tensor:
    """x [T, hidden] of any dtype, weight float32 [hidden]."""
    x = rows_of(x, weight.shape[0])
    y = torch.empty(x.shape, dtype=torch_dtype(dtype))
    tokens, hidden = x.shape
    normalize(
        eps, tokens, hidden, x.data_ptr(), FLOATS[x.dtype], 0, 0, 0, weight.data_ptr(), y.data_ptr(),
        FLOATS[y.dtype],
    )  # fmt: skip
    return y


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [T, hidden] is the residual; y of any dtype joins it in float32."""
    x, y = rows_of(x, weight.shape[0]), rows_of(y, weight.shape[0])
    if x.shape != y.shape:
        raise ValueError(f"x is {list(x.shape)} but y is {list(y.shape)}")
    tokens, hidden = x.shape
    residual, normed = torch.empty(x.shape), torch.empty(x.shape, dtype=torch_dtype(dtype))
    normalize(
        eps, tokens, hidden, x.data_ptr(), FLOATS[x.dtype], y.data_ptr(), FLOATS[y.dtype],
        residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), FLOATS[normed.dtype],
    )  # fmt: skip
    return residual, normed
