"""Triton kernels and cuBLAS calls, one op or family of ops a file; every launcher has the signature of its reference.

Nothing here knows a graph, a request or an engine. The launchers never wait for the device and size their grids
from host numbers only, so a step can be captured in a CUDA graph; no reduction uses atomics, so equal inputs give
equal bits. The tests run the same files on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1).
"""

from .. import Kernel
from .attention import GptAttention
from .batch_invariant import batch_invariant_kernels
from .gated_mlp import gated_mlp, prepare_gated_mlp
from .linear import embedding, gather_last_token, matmul
from .norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from .smooth_quant import (
    prepare_smooth_quant_gated_mlp,
    quantize_per_token,
    quantize_tensor,
    smooth_quant_gated_mlp,
    smooth_quant_gemm,
)
from .weight_only import (
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    weight_only_gated_mlp,
    weight_only_quant_matmul,
)


def cuda_kernels(*, batch_invariant: bool = False) -> dict[str, Kernel]:
    """The ops with a kernel of their own on CUDA; elementwise ones and permute_columns are torch's."""
    kernels = {
        "embedding": Kernel(embedding),
        "rms_norm": Kernel(rms_norm),
        "add_rms_norm": Kernel(add_rms_norm),
        "matmul": Kernel(matmul),
        "gated_mlp": Kernel(gated_mlp, prepare=prepare_gated_mlp),
        "gather_last_token": Kernel(gather_last_token),
        "gpt_attention": Kernel(GptAttention(is_batch_invariant=batch_invariant), needs_step=True),
        "weight_only_quant_matmul": Kernel(weight_only_quant_matmul, prepare=prepare_weight_only_quant_matmul),
        "weight_only_gated_mlp": Kernel(weight_only_gated_mlp, prepare=prepare_weight_only_gated_mlp),
        "quantize_per_token": Kernel(quantize_per_token),
        "quantize_tensor": Kernel(quantize_tensor),
        "rms_norm_quantize": Kernel(rms_norm_quantize),
        "add_rms_norm_quantize": Kernel(add_rms_norm_quantize),
        "smooth_quant_gemm": Kernel(smooth_quant_gemm),
        "smooth_quant_gated_mlp": Kernel(smooth_quant_gated_mlp, prepare=prepare_smooth_quant_gated_mlp),
    }
    return kernels | batch_invariant_kernels() if batch_invariant else kernels
