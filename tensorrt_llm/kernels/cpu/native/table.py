"""The table of kernels in C."""

import logging
from functools import partial

import torch

from ... import Kernel
from .attention import gpt_attention
from .compiled import is_supported, set_threads
from .matmul import (
    gated_mlp,
    matmul,
    prepare_gated_mlp,
    prepare_matmul,
    prepare_weight_only_gated_mlp,
    prepare_weight_only_quant_matmul,
    weight_only_gated_mlp,
    weight_only_quant_matmul,
)
from .norm import add_rms_norm, prepare_norm, rms_norm
from .pages import WeightPages

logger = logging.getLogger(__name__)


def kernels_of_processor() -> dict[str, Kernel]:
    """All of them, with as many threads as torch has now and pages of their own for weights; or none."""
    if not is_supported():
        logger.info("CPU kernels: torch's; those in C need AVX2, FMA and F16C, which this processor lacks")
        return {}
    set_threads(torch.get_num_threads())
    logger.info("CPU kernels: those in C, %d threads", torch.get_num_threads())
    place = WeightPages().copy
    return {
        "rms_norm": Kernel(rms_norm, prepare=prepare_norm),
        "add_rms_norm": Kernel(add_rms_norm, prepare=prepare_norm),
        "matmul": Kernel(matmul, prepare=partial(prepare_matmul, place=place)),
        "gated_mlp": Kernel(gated_mlp, prepare=partial(prepare_gated_mlp, place=place)),
        "gpt_attention": Kernel(gpt_attention, needs_step=True),
        "weight_only_quant_matmul": Kernel(
            weight_only_quant_matmul, prepare=partial(prepare_weight_only_quant_matmul, place=place)
        ),
        "weight_only_gated_mlp": Kernel(
            weight_only_gated_mlp, prepare=partial(prepare_weight_only_gated_mlp, place=place)
        ),
    }
