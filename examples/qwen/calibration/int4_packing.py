"""Linear layers of four bits in the layouts that published tools read: AutoGPTQ's "gptq" (v1) and AutoAWQ's "gemm".

What is written here, checkpoint/gptq_format.py and awq_format.py read; they explain the layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tensorrt_llm.quantization.quantize import pack_int4, unpack_int4

from .calibrated_layers import QuantizedLinear

PER_WORD = 8  # integers of four bits in an int32
# From the low end of a word, which of eight neighbouring outputs AutoAWQ puts there.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


def pack_gptq(linear: QuantizedLinear) -> Tensors:
    """qweight int32 [k / 8, n], qzeros int32 [groups, n / 8] less one, scales [groups, n], g_idx int32 [k]."""
    weight, packed = linear.weight, linear.weight.weight
    groups = torch.arange(weight.shape[1], dtype=torch.int32, device=packed.device) // weight.group_size
    if linear.order is not None:
        place = linear.order.long().argsort()
        packed, groups = pack_int4(unpack_int4(packed)[:, place]), groups[place]
    return {
        "qweight": _words(packed).T,
        "qzeros": _words(pack_int4(_zeros(linear).T - 1)),
        "scales": weight.scale.T,
        "g_idx": groups,
    }


def pack_awq(linear: QuantizedLinear) -> Tensors:
    """qweight int32 [k, n / 8], qzeros int32 [groups, n / 8], scales [groups, n]."""
    assert linear.order is None, "the format has no g_idx"
    return {
        "qweight": _words(pack_int4(_interleaved(unpack_int4(linear.weight.weight).T))),
        "qzeros": _words(pack_int4(_interleaved(_zeros(linear).T))),
        "scales": linear.weight.scale.T,
    }


def _zeros(linear: QuantizedLinear) -> torch.Tensor:
    """int8 [n, groups]: 0 is the middle of the integers."""
    weight = linear.weight
    return torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero.to(torch.int8)


def _interleaved(integers: torch.Tensor) -> torch.Tensor:
    return integers.unflatten(1, (-1, PER_WORD))[:, :, _AWQ_ORDER].flatten(1)


def _words(packed: torch.Tensor) -> torch.Tensor:
    """Two integers to a byte, [rows, bytes], as int32: little-endian, like every machine that torch runs on."""
    return packed.flatten().view(torch.int32).unflatten(0, (len(packed), -1))


@dataclass(frozen=True)
class Int4Format:
    """How the tensors lie, and what says so."""

    pack: Callable[[QuantizedLinear], Tensors]
    file: str  # where the tool itself looks for `facts`
    facts: dict[str, Any]  # what goes there
    quantization_config: dict[str, Any]  # the same for config.json


def gptq_format(group_size: int, *, desc_act: bool, symmetric: bool) -> Int4Format:
    """`group_size` as the tools write it, -1 for one group per output."""
    facts = {
        "bits": 4,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": desc_act,
        "static_groups": not desc_act,
        "sym": symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    return Int4Format(pack_gptq, "quantize_config.json", facts, facts)


def awq_format(group_size: int) -> Int4Format:
    facts = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Int4Format(
        pack_awq,
        "quant_config.json",
        facts | {"modules_to_not_convert": None},
        config | {"modules_to_not_convert": None},
    )
