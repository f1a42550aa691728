"""The table of kernels in C, for processors with AVX2, FMA and F16C; it is empty where they were not built or cannot run.

`pip install .` builds them if there is a compiler. Built for AVX2 only: one token is bound by memory, which these
instructions already reach.
"""

import importlib.util
import logging
from functools import partial

import torch

from ... import Kernel

logger = logging.getLogger(__name__)


def native_kernels() -> dict[str, Kernel]:
    """Kernels that share a pool of as many threads as torch has now."""
    if importlib.util.find_spec(f"{__name__}.compiled") is None:
        logger.info("CPU kernels: torch's, as the faster ones in C are not built; pip install . builds them with gcc")
        return {}
    from . import attention, compiled, matmul, norm
    from .pages import WeightPages

    if not compiled.is_supported():
        logger.info("CPU kernels: torch's, as this processor lacks AVX2, FMA or F16C")
        return {}
    compiled.set_threads(torch.get_num_threads())
    logger.info("CPU kernels: those in C, with %d threads", torch.get_num_threads())
    place = WeightPages().copy
    return {
        "rms_norm": Kernel(norm.rms_norm, prepare=norm.prepare_norm),
        "add_rms_norm": Kernel(norm.add_rms_norm, prepare=norm.prepare_norm),
        "matmul": Kernel(matmul.matmul, prepare=partial(matmul.prepare_matmul, place=place)),
        "gated_mlp": Kernel(matmul.gated_mlp, prepare=partial(matmul.prepare_gated_mlp, place=place)),
        "gpt_attention": Kernel(attention.gpt_attention, needs_step=True),
        "weight_only_quant_matmul": Kernel(
            matmul.weight_only_quant_matmul, prepare=partial(matmul.prepare_weight_only_quant_matmul, place=place)
        ),
        "weight_only_gated_mlp": Kernel(
            matmul.weight_only_gated_mlp, prepare=partial(matmul.prepare_weight_only_gated_mlp, place=place)
        ),
    }
