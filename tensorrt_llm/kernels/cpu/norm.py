"""RMS norm on the CPU: torch's fused op, on float32."""

import torch

from ...dtype import torch_dtype


def prepare_norm(weight: torch.Tensor, *, eps: float, dtype: str) -> tuple[torch.Tensor]:
    """The weight in float32, which the op computes in."""
    return (weight.float(),)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str) -> torch.Tensor:
    """x [T, hidden] of any dtype, weight float32 [hidden]."""
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, eps).to(torch_dtype(dtype))


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [T, hidden] is the residual; y of any dtype joins it in float32."""
    residual = x + y
    return residual, rms_norm(residual, weight, eps=eps, dtype=dtype)
