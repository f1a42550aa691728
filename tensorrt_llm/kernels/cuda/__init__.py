"""Triton kernels and cuBLAS calls, one op or family of ops a file; every launcher has the signature of its reference.

Nothing here knows a graph, a request or an engine. The launchers never wait for the device and size their grids
from host numbers only, so a step can be captured in a CUDA graph; no reduction uses atomics, so equal inputs give
equal bits. The tests run the same files on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1).
"""

from functools import partial

from .. import Kernel
from ..tactics import Tactics
from .attention import GptAttention
from .batch_invariant import batch_invariant_kernels
from .gated_mlp import gated_mlp, gated_mlp_by, prepare_gated_mlp
from .linear import embedding, gather_last_token, matmul, matmul_by, matmul_in_splits_by
from .norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from .smooth_quant import (
    prepare_last_smoother,
    prepare_quantize_per_token,
    prepare_smooth_quant_gated_mlp,
    quantize_per_token,
    quantize_tensor,
    smooth_quant_gated_mlp,
    smooth_quant_gated_mlp_by,
    smooth_quant_gemm,
    smooth_quant_gemm_by,
)
from .weight_only import (
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    weight_only_gated_mlp,
    weight_only_gated_mlp_by,
    weight_only_quant_matmul,
    weight_only_quant_matmul_by,
    weight_only_quant_matmul_in_splits_by,
)

__all__ = [
    "add_rms_norm",
    "cuda_kernels",
    "embedding",
    "gated_mlp",
    "gather_last_token",
    "matmul",
    "quantize_per_token",
    "quantize_tensor",
    "rms_norm",
    "smooth_quant_gated_mlp",
    "smooth_quant_gemm",
    "weight_only_gated_mlp",
    "weight_only_quant_matmul",
]


def cuda_kernels(*, batch_invariant: bool = False, tactics: Tactics | None = None) -> dict[str, Kernel]:
    """The ops with a kernel of their own on CUDA; elementwise ones and permute_columns are torch's.

    `tactics` choose how matmuls are computed; those of batch-invariant kernels are fixed.
    """
    by = tactics or Tactics()
    kernels = {
        "embedding": Kernel(embedding),
        "rms_norm": Kernel(rms_norm),
        "add_rms_norm": Kernel(add_rms_norm, adds_splits=True),
        "matmul": Kernel(partial(matmul_by, by), run_in_splits=partial(matmul_in_splits_by, by)),
        "gated_mlp": Kernel(partial(gated_mlp_by, by), prepare=prepare_gated_mlp),
        "gather_last_token": Kernel(gather_last_token, needs_step=True),
        "gpt_attention": Kernel(GptAttention(is_batch_invariant=batch_invariant), needs_step=True),
        "weight_only_quant_matmul": Kernel(
            partial(weight_only_quant_matmul_by, by),
            prepare=prepare_weight_only_quant_matmul,
            run_in_splits=partial(weight_only_quant_matmul_in_splits_by, by),
        ),
        "weight_only_gated_mlp": Kernel(partial(weight_only_gated_mlp_by, by), prepare=prepare_weight_only_gated_mlp),
        "quantize_per_token": Kernel(quantize_per_token, prepare=prepare_quantize_per_token),
        "quantize_tensor": Kernel(quantize_tensor, prepare=prepare_last_smoother),
        "rms_norm_quantize": Kernel(rms_norm_quantize, prepare=prepare_last_smoother),
        "add_rms_norm_quantize": Kernel(add_rms_norm_quantize, prepare=prepare_last_smoother),
        "smooth_quant_gemm": Kernel(partial(smooth_quant_gemm_by, by)),
        "smooth_quant_gated_mlp": Kernel(
            partial(smooth_quant_gated_mlp_by, by), prepare=prepare_smooth_quant_gated_mlp
        ),
    }
    return kernels | batch_invariant_kernels() if batch_invariant else kernels
