"""The table of CPU kernels; ops that are not here run as their reference."""

from .. import Kernel
from .attention import gpt_attention
from .linear import gated_mlp, matmul, prepare_gated_mlp, prepare_matmul
from .norm import add_rms_norm, prepare_norm, rms_norm


def cpu_kernels() -> dict[str, Kernel]:
    return {
        "rms_norm": Kernel(rms_norm, prepare=prepare_norm),
        "add_rms_norm": Kernel(add_rms_norm, prepare=prepare_norm),
        "matmul": Kernel(matmul, prepare=prepare_matmul),
        "gated_mlp": Kernel(gated_mlp, prepare=prepare_gated_mlp),
        "gpt_attention": Kernel(gpt_attention, needs_step=True),
    }
