"""Opens a checkpoint whose linear layers are quantized: which format it is, how its layers are stored, rows of them.

Formats: AutoGPTQ and GPTQModel, AutoAWQ "gemm", compressed-tensors "pack-quantized", and ammo's AWQ state dict. What is
not quantized in it is read as from any HF checkpoint. Knows no model: which layers there should be is weight.py's
business.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorrt_llm.quantization import QuantizedWeight
from tensorrt_llm.quantization.layers import WeightOnlyLayout

from .ammo_format import is_ammo, read_ammo
from .awq_format import read_awq
from .compressed_tensors_format import read_compressed_tensors
from .gptq_format import read_gptq
from .hf_checkpoint import HfCheckpoint, TensorInfo
from .packed_linear import PackedLinear
from .quantization_facts import Facts

_FORMATS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed_tensors}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint and its quantized layers, by the name of the module in the HF model."""

    files: HfCheckpoint
    quant_algo: str
    layout: WeightOnlyLayout
    linears: dict[str, PackedLinear]

    @property
    def quantizes_lm_head(self) -> bool:
        return "lm_head" in self.linears

    @property
    def dtype(self) -> str:
        """What `tensors` calls the dtype of a quantized weight."""
        return f"int{self.layout.bits}"

    def tensors(self) -> dict[str, TensorInfo]:
        """As the unquantized checkpoint would list them: a quantized layer is its weight."""
        found = self.files.tensors()
        for linear in self.linears.values():
            file = found[linear.tensors[0]].file
            for name in linear.tensors:
                del found[name]
            found[f"{linear.name}.weight"] = TensorInfo(linear.shape, self.dtype, file)
        return found

    def read_rows(self, module: str, start: int, stop: int) -> QuantizedWeight:
        """Rows start to stop of a layer's weight in this checkpoint's layout, columns sorted by group."""
        weight = self.linears[module].rows(start, stop)
        if self.layout.zero and weight.zero is None:
            return replace(weight, zero=torch.zeros_like(weight.scale, dtype=torch.int16))
        return weight


def open_quantized_checkpoint(path: str | Path) -> QuantizedCheckpoint:
    """The checkpoint in a folder, or in one file whose folder holds what describes it (ammo's .pt needs nothing).

    Reads headers, zero points and groups; a format that is not supported, or a file that contradicts what is said of
    it, is a ValueError.
    """
    path = Path(path)
    if path.is_file():
        files = HfCheckpoint(path)
        facts = None if is_ammo(files) else Facts.of(path.parent)
    elif path.is_dir():
        facts = Facts.of(path)
        files = HfCheckpoint(path, _stems(facts))
    else:
        raise ValueError(f"{path}: no such file or folder, expected a quantized checkpoint")
    if facts is None:
        quant_algo, linears = read_ammo(files)
    else:
        method = facts.choose("quant_method", among=tuple(_FORMATS))
        quant_algo, linears = _FORMATS[method](files, facts)
    if not linears:
        raise ValueError(f"{path}: holds no quantized linear layers, expected those of a {quant_algo} checkpoint")
    return QuantizedCheckpoint(files, quant_algo, _layout(linears), {linear.name: linear for linear in linears})


def _layout(linears: list[PackedLinear]) -> WeightOnlyLayout:
    """What a layer needs that can hold any of these."""
    first = linears[0]
    for other in linears:
        if other.group_size != first.group_size:
            raise ValueError(
                f"{other.name} has groups of {other.group_size}, expected {first.group_size} as {first.name} has"
            )
    return WeightOnlyLayout(
        bits=first.bits,
        group_size=first.group_size,
        zero=any(linear.has_zero for linear in linears),
        pre_quant_scale=any(linear.pre_quant_scale is not None for linear in linears),
        act_order=any(linear.order is not None for linear in linears),
    )


def _stems(facts: Facts) -> tuple[str, ...]:
    """The names that AutoGPTQ gives its shards, where it does not call them "model"."""
    stems = []
    for content in facts.objects.values():
        named = content.get("model_file_base_name")
        # A file of the same folder: a path could lead anywhere.
        if named is not None and (not isinstance(named, str) or not named or Path(named).name != named):
            raise facts.error("model_file_base_name", named, "expected the name of a file without its suffix")
        stems.append(named or f"gptq_model-{_number(content, 'bits')}bit-{_number(content, 'group_size')}g")
    return tuple(stems)


def _number(content: dict[str, Any], key: str) -> int:
    value = content.get(key)
    return value if isinstance(value, int) else 0
