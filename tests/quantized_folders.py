"""Writes quantized Qwen checkpoints as their tools publish them, and reads single elements of them back. Any test may
use it; it shares nothing with the reader in examples/qwen.

A folder is made from a plain checkpoint: every linear layer of the layers is rounded to integers with zero points and
scales of groups, then packed. `dequantized` undoes that one element at a time, from the files alone.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LINEARS = (
    *("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
_SMALLEST_ZERO = 1  # AutoGPTQ's v1 cannot store 0


@dataclass(frozen=True)
class Rounded:
    """A weight [n, k] as integers counted from 0; g_idx [k] says which group a column is in."""

    integers: torch.Tensor  # int64 [n, k]
    zero: torch.Tensor  # int64 [n, groups]
    scale: torch.Tensor  # float16 [n, groups]
    g_idx: torch.Tensor  # int64 [k]
    bits: int

    @property
    def weight(self) -> torch.Tensor:
        """float32 [n, k]."""
        return (self.integers - self.zero[:, self.g_idx]).float() * self.scale.float()[:, self.g_idx]


def round_weight(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, g_idx: torch.Tensor) -> Rounded:
    """To the nearest integers between the extremes of each group."""
    largest, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = int(g_idx.max()) + 1
    members = torch.stack([weight.float()[:, g_idx == group] for group in range(groups)], dim=1)
    if symmetric:
        scale = (members.abs().amax(-1) / (middle - 1)).half()
        zero = torch.full(scale.shape, middle)
    else:
        low, high = members.amin(-1).clamp(max=0), members.amax(-1).clamp(min=0)
        scale = ((high - low) / largest).half()
        zero = (-low / scale.float()).round().long().clamp(_SMALLEST_ZERO, largest)
    integers = (weight.float() / scale.float()[:, g_idx]).round().long() + zero[:, g_idx]
    return Rounded(integers.clamp(0, largest), zero, scale, g_idx, bits)


def runs(columns: int, group_size: int) -> torch.Tensor:
    """g_idx of groups that are runs of columns."""
    return torch.arange(columns) // (group_size if group_size > 0 else columns)


def shuffled(columns: int, group_size: int, seed: int) -> torch.Tensor:
    """g_idx of act-order: groups of equal size anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return runs(columns, group_size)[torch.randperm(columns, generator=generator)]


def words_of(rows: list[list[int]], bits: int) -> torch.Tensor:
    """int32 [..., w] of rows of integers, the first of each word in its lowest bits."""
    per_word = 32 // bits
    packed = []
    for row in rows:
        assert len(row) % per_word == 0
        words = []
        for first in range(0, len(row), per_word):
            word = sum(value << (bits * place) for place, value in enumerate(row[first : first + per_word]))
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def integer_at(words: torch.Tensor, row: int, place: int, bits: int) -> int:
    """The integer at `place` in a row of words, from the low end."""
    word, shift = divmod(place * bits, 32)
    return (int(words[row, word]) % 2**32 >> shift) % 2**bits


# ---- how each format stores a layer ----


def gptq(rounded: Rounded, version: int = 1) -> Tensors:
    less = 2 - version
    return {
        "qweight": words_of(rounded.integers.tolist(), rounded.bits).T.contiguous(),
        "qzeros": words_of((rounded.zero.T - less).tolist(), rounded.bits),
        "scales": rounded.scale.T.contiguous(),
        "g_idx": rounded.g_idx.int(),
    }


def gptq_by_gptqmodel(rounded: Rounded) -> Tensors:
    """v1 by GPTQModel, where all integers of a word are made one less at once."""
    tensors = gptq(rounded, version=2)
    ones = sum(1 << shift for shift in range(0, 32, rounded.bits))
    tensors["qzeros"] = tensors["qzeros"] - torch.tensor(ones, dtype=torch.int32)
    return tensors


def awq(rounded: Rounded) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def interleaved(rows: list[list[int]]) -> list[list[int]]:
        return [[row[first + place] for first in range(0, len(row), 8) for place in order] for row in rows]

    return {
        "qweight": words_of(interleaved(rounded.integers.T.tolist()), 4),
        "qzeros": words_of(interleaved(rounded.zero.T.tolist()), 4),
        "scales": rounded.scale.T.contiguous(),
    }


def compressed(rounded: Rounded, symmetric: bool, act_order: bool, packs_zeros: bool = True) -> Tensors:
    tensors = {
        "weight_packed": words_of(rounded.integers.tolist(), rounded.bits),
        "weight_scale": rounded.scale,
        "weight_shape": torch.tensor(rounded.integers.shape),
    }
    if not symmetric and packs_zeros:
        tensors["weight_zero_point"] = words_of(rounded.zero.T.tolist(), rounded.bits).T.contiguous()
    elif not symmetric:
        tensors["weight_zero_point"] = (rounded.zero - 2 ** (rounded.bits - 1)).to(torch.int8)
    if act_order:
        tensors["weight_g_idx"] = rounded.g_idx.int()
    return tensors


# ---- one element at a time ----


def gptq_element(tensors: Tensors, n: int, k: int, bits: int, less: int) -> float:
    group = int(tensors["g_idx"][k])
    q = integer_at(tensors["qweight"].T, n, k, bits)
    zero = integer_at(tensors["qzeros"], group, n, bits) + less
    return (q - zero) * float(tensors["scales"][group, n])


def awq_element(tensors: Tensors, n: int, k: int, group_size: int) -> float:
    place = n // 8 * 8 + (0, 4, 1, 5, 2, 6, 3, 7)[n % 8]
    q = integer_at(tensors["qweight"], k, place, 4)
    zero = integer_at(tensors["qzeros"], k // group_size, place, 4)
    return (q - zero) * float(tensors["scales"][k // group_size, n])


def compressed_element(tensors: Tensors, n: int, k: int, bits: int, group_size: int) -> float:
    group = int(tensors["weight_g_idx"][k]) if "weight_g_idx" in tensors else k // group_size
    zero = 2 ** (bits - 1)
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        zero = zero + int(stored[n, group]) if stored.dtype == torch.int8 else integer_at(stored.T, group, n, bits)
    return (integer_at(tensors["weight_packed"], n, k, bits) - zero) * float(tensors["weight_scale"][n, group])


def dequantize_elements(rows: int, columns: int, element: Callable[[int, int], float]) -> torch.Tensor:
    return torch.tensor([[element(n, k) for k in range(columns)] for n in range(rows)], dtype=torch.float32)


# ---- folders ----


@dataclass(frozen=True)
class Scheme:
    """How a folder is quantized."""

    method: str  # gptq, awq or compressed-tensors
    bits: int = 4
    group_size: int = 16  # -1: one group per row
    symmetric: bool = False
    act_order: bool = False
    version: int = 1  # of gptq
    by_gptqmodel: bool = False
    packs_zeros: bool = True  # of compressed-tensors
    smallest_zero: int = _SMALLEST_ZERO

    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        if self.method == "gptq":
            return {
                "bits": self.bits,
                "group_size": self.group_size,
                "damp_percent": 0.01,
                "desc_act": self.act_order,
                "static_groups": False,
                "sym": self.symmetric,
                "true_sequential": True,
                "model_name_or_path": None,
                "model_file_base_name": "model",
                "quant_method": "gptq",
                "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            } | ({"meta": {"quantizer": ["gptqmodel:1.4.0"]}} if self.by_gptqmodel else {})
        if self.method == "awq":
            return {
                "bits": 4,
                "group_size": self.group_size,
                "modules_to_not_convert": None,
                "quant_method": "awq",
                "version": "gemm",
                "zero_point": True,
            }
        weights = {
            "actorder": "group" if self.act_order else None,
            "block_structure": None,
            "dynamic": False,
            "group_size": self.group_size if self.group_size > 0 else None,
            "num_bits": self.bits,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "group" if self.group_size > 0 else "channel",
            "symmetric": self.symmetric,
            "type": "int",
        }
        group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
        return {
            "config_groups": {"group_0": group},
            "format": "pack-quantized",
            "global_compression_ratio": 1.8,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    def tensors(self, rounded: Rounded) -> Tensors:
        if self.method == "gptq":
            return gptq_by_gptqmodel(rounded) if self.by_gptqmodel else gptq(rounded, self.version)
        if self.method == "awq":
            return awq(rounded)
        return compressed(rounded, self.symmetric, self.act_order, self.packs_zeros)

    def dequantized(self, tensors: Tensors, shape: tuple[int, int]) -> torch.Tensor:
        """The weight that these tensors stand for, float32 [n, k], one element at a time."""
        rows, columns = shape
        group_size = self.group_size if self.group_size > 0 else columns
        if self.by_gptqmodel:
            ones = sum(1 << shift for shift in range(0, 32, self.bits))
            words = [[(word + ones + 2**31) % 2**32 - 2**31 for word in row] for row in tensors["qzeros"].tolist()]
            tensors = tensors | {"qzeros": torch.tensor(words, dtype=torch.int32)}
        element: dict[str, Callable[[int, int], float]] = {
            "gptq": lambda n, k: gptq_element(
                tensors, n, k, self.bits, int(self.version == 1 and not self.by_gptqmodel)
            ),
            "awq": lambda n, k: awq_element(tensors, n, k, group_size),
            "compressed-tensors": lambda n, k: compressed_element(tensors, n, k, self.bits, group_size),
        }
        return dequantize_elements(rows, columns, element[self.method])


def linears_of(tensors: Tensors) -> list[str]:
    """The linear layers of a plain checkpoint's layers."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return [name for name in names if name.endswith(LINEARS)]


def write_quantized(
    plain: Path,
    folder: Path,
    scheme: Scheme,
    *,
    ordered: tuple[str, ...] = LINEARS,
    also: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Rounded]:
    """Quantize the checkpoint in `plain` into `folder`; `changes` are made to quantization_config.

    With act-order the layers whose names end as in `ordered` get it. Layers in `also` are quantized besides.
    """
    tensors = load_file(plain / "model.safetensors")
    rounded: dict[str, Rounded] = {}
    for name in (*linears_of(tensors), *also):
        weight = tensors.pop(f"{name}.weight")
        columns = weight.shape[1]
        g_idx = runs(columns, scheme.group_size)
        if scheme.act_order and name.endswith(ordered):
            # q, k and v become one weight, so they share an order.
            g_idx = shuffled(columns, scheme.group_size, zlib.crc32(re.sub("[qkv]_proj", "qkv", name).encode()))
        made = round_weight(weight, scheme.bits, scheme.group_size, scheme.symmetric, g_idx)
        if scheme.smallest_zero < _SMALLEST_ZERO:
            made = replace(made, zero=made.zero.clone())
            made.zero[::3, ::2] = scheme.smallest_zero
        rounded[name] = made
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in scheme.tensors(made).items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config() | changes}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return rounded


def write_ammo(plain: Path, file: Path, group_size: int, also: tuple[str, ...] = ()) -> Tensors:
    """An AWQ state dict of ammo: pre-scaled weights, the largest magnitude of each group, scales of inputs."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(plain / "model.safetensors")
    for name in (*linears_of(tensors), *also):
        weight = tensors[f"{name}.weight"].float()
        scale = (0.5 + torch.rand(weight.shape[1], generator=generator)).half()
        weight = (weight / scale.float()).half()
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.input_quantizer._pre_quant_scale"] = scale
        tensors[f"{name}.weight_quantizer._amax"] = weight.unflatten(1, (-1, group_size)).abs().amax(-1).reshape(-1, 1)
    torch.save(tensors, file)
    return tensors


def write_dequantized(plain: Path, folder: Path, weights: Tensors) -> Path:
    """The checkpoint in `plain` with these weights, float32, as a plain folder."""
    tensors = load_file(plain / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((plain / "config.json").read_text())
    replaced = {f"{name}.weight": weight.contiguous() for name, weight in weights.items()}
    assert replaced.keys() <= tensors.keys()
    save_file({name: tensor.float() for name, tensor in (tensors | replaced).items()}, folder / "model.safetensors")
    return folder
