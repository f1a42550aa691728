"""The table of CPU kernels: those in C where they can run, else torch's. Other ops run as their reference."""

from .. import Kernel
from .attention import gpt_attention
from .integer import (
    prepare_smooth_quant_gated_mlp,
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    smooth_quant_gated_mlp,
    smooth_quant_gemm,
    weight_only_gated_mlp,
    weight_only_quant_matmul,
)
from .linear import gated_mlp, matmul, prepare_gated_mlp
from .native import native_kernels
from .norm import add_rms_norm, prepare_norm, rms_norm


def cpu_kernels() -> dict[str, Kernel]:
    return torch_kernels() | native_kernels()


def torch_kernels() -> dict[str, Kernel]:
    return {
        "rms_norm": Kernel(rms_norm, prepare=prepare_norm),
        "add_rms_norm": Kernel(add_rms_norm, prepare=prepare_norm),
        "matmul": Kernel(matmul),
        "gated_mlp": Kernel(gated_mlp, prepare=prepare_gated_mlp),
        "gpt_attention": Kernel(gpt_attention, needs_step=True),
        "weight_only_quant_matmul": Kernel(weight_only_quant_matmul, prepare=prepare_weight_only_quant_matmul),
        "weight_only_gated_mlp": Kernel(weight_only_gated_mlp, prepare=prepare_weight_only_gated_mlp),
        "smooth_quant_gemm": Kernel(smooth_quant_gemm),
        "smooth_quant_gated_mlp": Kernel(smooth_quant_gated_mlp, prepare=prepare_smooth_quant_gated_mlp),
    }
