"""A linear layer of a quantized checkpoint, read as rows of a QuantizedWeight; what the formats have in common.

Formats differ in names, in the order of integers inside 32-bit words and in what a zero point means. A format gives a
PackedLinear per layer, whose `read` hides all of that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tensorrt_llm.quantization import QuantizedWeight
from tensorrt_llm.quantization.quantize import pack_int4

from .hf_checkpoint import READABLE_DTYPES, HfCheckpoint, TensorInfo

WORD_BITS = 32
WORDS = ("int32",)
SCALES = READABLE_DTYPES
# Rows are unpacked in runs: a few copies of so many elements are in memory, whatever the size of the layer.
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class StoredRows:
    """Rows of a weight with its columns as stored. Integers and zero points count from 0: 8 or 128 is in the middle."""

    integers: torch.Tensor  # uint8 [n, k]
    scale: torch.Tensor  # any floating dtype [n, groups]
    zero: torch.Tensor | None = None  # int32 [n, groups]; None where all are in the middle


@dataclass(frozen=True)
class PackedLinear:
    """What a quantized checkpoint holds of one linear layer, and how to read rows of it."""

    name: str  # of the module in the HF model
    shape: tuple[int, int]  # [out, in] of its weight
    bits: int
    group_size: int  # 0: one group per row
    tensors: tuple[str, ...]  # all that it is stored in
    scales: str  # the one of them that scales are made of
    read: Callable[[int, int], StoredRows]  # of a run of rows
    has_zero: bool = False
    order: torch.Tensor | None = None  # int32 [in]: columns sorted by group, where groups are not runs of columns
    pre_quant_scale: torch.Tensor | None = None  # float32 [in]: multiplies the input first

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows start to stop, their columns sorted by group."""
        count = max(1, _ELEMENTS_AT_ONCE // self.shape[1])
        firsts = range(start, stop, count) or (start,)
        return QuantizedWeight.stacked([self._run(first, min(first + count, stop)) for first in firsts])

    def _run(self, start: int, stop: int) -> QuantizedWeight:
        stored = self.read(start, stop)
        scale = stored.scale.float().contiguous()
        bad = ~scale.isfinite() | (scale == 0)
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{self.scales}: the quantization scale of output {start + row} and group {group} is "
                f"{scale[row, group].item()}, expected finite numbers other than zero"
            )
        integers = stored.integers if self.order is None else stored.integers[:, self.order.long()]
        middle = 1 << (self.bits - 1)
        # Flipping the highest bit subtracts the middle.
        signed = (integers ^ middle).view(torch.int8) if self.bits == 8 else integers.to(torch.int8) - middle
        weight = signed.contiguous() if self.bits == 8 else pack_int4(signed)
        zero = None if stored.zero is None else (stored.zero - middle).to(torch.int16).contiguous()
        return QuantizedWeight(self.bits, weight, scale, zero)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., w] -> uint8 [..., w * 32 / bits]: the integers in each word from its low end."""
    octets = words.contiguous().view(torch.uint8)  # little-endian, like every machine that torch runs on
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def pack_count(bits: int) -> int:
    """Integers in one word."""
    return WORD_BITS // bits


def groups_of(columns: int, group_size: int, name: str) -> int:
    """How many groups a row has; a size that does not divide is a ValueError."""
    if group_size and columns % group_size:
        raise ValueError(f"{name}: has {columns} input columns, expected a multiple of the group size {group_size}")
    return columns // group_size if group_size else 1


def column_order(g_idx: torch.Tensor, name: str, groups: int) -> torch.Tensor | None:
    """Columns sorted by the group that `g_idx` gives each, int32; None where groups are runs of columns already."""
    columns = len(g_idx)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(
            f"{name}: groups are numbered {int(g_idx.min())} to {int(g_idx.max())}, expected 0 to {groups - 1}"
        )
    counts = g_idx.bincount(minlength=groups)
    wrong = (counts != columns // groups).nonzero().flatten()
    if len(wrong):
        raise ValueError(
            f"{name}: group {int(wrong[0])} has {int(counts[wrong[0]])} columns, expected {columns // groups} in "
            f"each of {groups} groups"
        )
    order = g_idx.argsort(stable=True).to(torch.int32)
    return None if torch.equal(order, torch.arange(columns, dtype=torch.int32)) else order


class Headers:
    """What the headers say of a checkpoint's tensors, held against what a format expects."""

    def __init__(self, files: HfCheckpoint) -> None:
        self.infos = files.tensors()
        self._directory = files.directory

    def modules(self, suffix: str) -> list[str]:
        """The modules that have a tensor called `suffix`."""
        return sorted(name.removesuffix(f".{suffix}") for name in self.infos if name.endswith(f".{suffix}"))

    def matrix(self, name: str, dtypes: tuple[str, ...], what: str) -> tuple[int, int]:
        """The shape of a matrix of one of `dtypes`."""
        info = self._find(name, what)
        if len(info.shape) != 2 or info.dtype not in dtypes or 0 in info.shape:
            raise ValueError(
                f"{info.file}: {name} is {info.dtype} {list(info.shape)}, expected a matrix of {' or '.join(dtypes)}: "
                f"{what}"
            )
        return info.shape[0], info.shape[1]

    def check(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], what: str) -> None:
        """Refuse a tensor that is missing, or of another dtype or shape; `what` says where these follow from."""
        info = self._find(name, what)
        if info.dtype not in dtypes or info.shape != shape:
            raise ValueError(
                f"{info.file}: {name} is {info.dtype} {list(info.shape)}, expected {' or '.join(dtypes)} "
                f"{list(shape)}: {what}"
            )

    def _find(self, name: str, what: str) -> TensorInfo:
        if name not in self.infos:
            raise ValueError(f"{self._directory}: has no tensor {name}, expected with {what}")
        return self.infos[name]
