"""Ops whose rows have the same bits in any step: one way to compute them, whatever the number of tokens.

Attention is held to splits of one size (attention.py). The integer sums of SmoothQuant are exact however they are made,
and the kernels of all other ops are so by themselves: a row belongs to one program. The cost: one token takes a tile of
64, and prompts do without cuBLAS.
"""

import torch

from .. import Kernel
from ..tactics import Tactic
from . import dense, weight_only
from .gated_mlp import prepare_gated_mlp
from .weight_only import prepare_weight_only_gated_mlp, prepare_weight_only_quant_matmul


def batch_invariant_kernels() -> dict[str, Kernel]:
    """They take the place of the kernels of the same names."""
    return {
        "matmul": Kernel(matmul),
        "gated_mlp": Kernel(gated_mlp, prepare=prepare_gated_mlp),
        "weight_only_quant_matmul": Kernel(weight_only_quant_matmul, prepare=prepare_weight_only_quant_matmul),
        "weight_only_gated_mlp": Kernel(weight_only_gated_mlp, prepare=prepare_weight_only_gated_mlp),
    }


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str) -> torch.Tensor:
    """x weight^T + bias in `dtype`; x and weight are of one dtype."""
    assert x.dtype == weight.dtype, f"batch-invariant matmul: x is {x.dtype}, weight {weight.dtype}"
    return dense.multiply(x, weight, bias, dtype, _dense_tactic(x.dtype), is_gated=False)


def gated_mlp(x: torch.Tensor, packed: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weight of `prepare_gated_mlp`."""
    return dense.multiply(x, packed, None, dtype, _dense_tactic(x.dtype), is_gated=True)


def _dense_tactic(dtype: torch.dtype) -> Tactic:
    """Float32 takes twice the shared memory."""
    return Tactic("tiles", 64, 64, 64 if dtype == torch.float32 else 128, num_stages=3, num_warps=4)


def weight_only_quant_matmul(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """x [T, k] times the weight of `prepare_weight_only_quant_matmul`, plus bias, in `dtype`."""
    return weight_only.multiply_in_tiles(x, words, scale, zero, bias, bits=bits, dtype=dtype, is_gated=False)


def weight_only_gated_mlp(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) in `dtype`, with the weight of `prepare_weight_only_gated_mlp`."""
    return weight_only.multiply_in_tiles(x, words, scale, zero, None, bits=bits, dtype=dtype, is_gated=True)
