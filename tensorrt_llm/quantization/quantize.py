"""Weights to quantized weights, by rounding to the nearest step. Pure functions in float32 on any device.

    w[n, k] = (q[n, k] - zero[n, k // group_size]) * scale[n, k // group_size]

q is a signed integer of 8 or 4 bits; without `zero` the grid is symmetric. One group of a whole row is "per channel".
Int4 lies two to a byte along k, the even k in the low nibble, as q + 8 (offset binary).
"""

import math
from dataclasses import dataclass

import torch

BITS = (4, 8)
# Searching needs a few float32 copies of what it works on: this many elements at a time.
_ELEMENTS_AT_ONCE = 1 << 23
# The clipping search tries these shares of the largest magnitude...
_CLIP_RATIOS = tuple(1 - 0.05 * step for step in range(9))
# ...and takes the least sum of cubed errors. Squared errors clip more than outputs bear. int4 of the bundled
# checkpoint, mean KL in 1e-3 nats with one scale per row / groups of 128 / of 64: no clipping 2.4 / 1.8 / 1.6, squares
# 4.0 / 2.0 / 1.2, cubes 1.7 / 1.5 / 1.2, fourth powers 1.8 / 1.3 / 1.2; int8 gains nothing: 0.008 either way.
_ERROR_POWER = 3


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [n, k] in `bits` bits; the formula stands at the top of this file."""

    bits: int
    weight: torch.Tensor  # 8 bits: int8 [n, k]; 4 bits: uint8 [n, k / 2]
    scale: torch.Tensor  # float32 [n, k / group_size]
    zero: torch.Tensor | None = None  # int16 like scale

    def __post_init__(self) -> None:
        expected = torch.int8 if self.bits == 8 else torch.uint8
        assert self.bits in BITS and self.weight.dtype == expected and self.scale.dtype == torch.float32
        assert self.zero is None or (self.zero.shape == self.scale.shape and self.zero.dtype == torch.int16)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns * 8 // self.bits

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    def dequantize(self) -> torch.Tensor:
        """float32 [n, k]."""
        return dequantize(self.weight, self.scale, self.zero, bits=self.bits)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        zero = None if self.zero is None else self.zero[start:stop]
        return QuantizedWeight(self.bits, self.weight[start:stop], self.scale[start:stop], zero)

    def columns(self, start: int, stop: int) -> "QuantizedWeight":
        """Some columns (an even number, for int4); where they cut a group, all groups become as small as its parts."""
        packing = 8 // self.bits
        weight = self.weight[:, start // packing : stop // packing].contiguous()
        if self.scale.shape[1] == 1:
            return QuantizedWeight(self.bits, weight, self.scale, self.zero)
        group_size = math.gcd(self.group_size, start, stop)
        finer = self.regrouped(group_size)
        groups = slice(start // group_size, stop // group_size)
        zero = None if finer.zero is None else finer.zero[:, groups].contiguous()
        return QuantizedWeight(self.bits, weight, finer.scale[:, groups].contiguous(), zero)

    def regrouped(self, group_size: int) -> "QuantizedWeight":
        """The same numbers in smaller groups: scales and zeros are repeated."""
        times = self.group_size // group_size
        assert times * group_size == self.group_size, (self.group_size, group_size)
        zero = None if self.zero is None else self.zero.repeat_interleave(times, dim=1)
        return QuantizedWeight(self.bits, self.weight, self.scale.repeat_interleave(times, dim=1), zero)

    @staticmethod
    def stacked(parts: "list[QuantizedWeight]") -> "QuantizedWeight":
        """Parts of equal columns, groups and bits below each other."""
        if len(parts) == 1:
            return parts[0]
        zeros = [part.zero for part in parts if part.zero is not None]
        return QuantizedWeight(
            parts[0].bits,
            torch.cat([part.weight for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
        )


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """int8 [n, k] of values -8..7 -> uint8 [n, k / 2]."""
    unsigned = (q + 8).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, k / 2] -> int8 [n, k] of values -8..7."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8


def integers_of(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The signed integers [n, k], int8, of a stored weight."""
    return unpack_int4(weight) if bits == 4 else weight


def dequantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, *, bits: int) -> torch.Tensor:
    """The matrix that a stored weight stands for, in the scale's dtype, [n, k]."""
    groups = integers_of(weight, bits).to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        groups = groups - zero[..., None]
    return (groups * scale[..., None]).flatten(1)


def quantize_weight(
    weight: torch.Tensor, bits: int, group_size: int = 0, clip: str | None = None, *, positive_scales: bool = False
) -> QuantizedWeight:
    """Round `weight` [n, k] of any floating dtype to symmetric steps; group_size 0 is one group per row.

    `clip` chooses the scale of each group: "amax" maps the largest magnitude to the largest integer; "search" tries
    smaller scales too, of both signs unless `positive_scales`. By default int4 searches and int8 does not.
    """
    rows, columns = weight.shape
    group_size = group_size or columns
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide the {columns} columns of the weight")
    if bits == 4 and columns % 2:
        raise ValueError(f"the weight has {columns} columns, expected an even number for int4")
    clip = clip or ("search" if bits == 4 else "amax")
    assert clip in ("amax", "search"), clip
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // columns)
    scales, integers = [], []
    for part in weight.split(rows_at_once):
        groups = part.float().unflatten(1, (-1, group_size))
        signs = (1,) if positive_scales else (1, -1)
        scale = _searched_scale(groups, bits, signs) if clip == "search" else _scale_of(groups, bits)
        q = _round(groups, scale, bits).to(torch.int8).flatten(1)
        integers.append(pack_int4(q) if bits == 4 else q)
        scales.append(scale)
    return QuantizedWeight(bits, torch.cat(integers), torch.cat(scales))


def _largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _scale_of(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """amax / (2^(bits - 1) - 1) of groups [n, g, size] -> [n, g]."""
    return _storable(groups.abs().amax(-1) / _largest(bits), groups.shape[1] > 1)


def _storable(scale: torch.Tensor, is_grouped: bool) -> torch.Tensor:
    """Scales that may be divided by, and, where there are many, that a kernel may hold in float16."""
    smallest = torch.finfo(torch.float16).smallest_normal if is_grouped else torch.finfo(torch.float32).smallest_normal
    divisible = torch.where(scale.abs() < smallest, torch.full_like(scale, smallest), scale)
    return divisible.half().float() if is_grouped else divisible


def _round(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (groups / scale[..., None]).round().clamp(-_largest(bits) - 1, _largest(bits))


def _searched_scale(groups: torch.Tensor, bits: int, signs: tuple[int, ...]) -> torch.Tensor:
    """The scale of least error among shares of amax / (largest + 1), in these signs.

    The grid has one step more below zero than above: a negative scale turns it around, so that the largest magnitude
    of either sign can take the extra step.
    """
    whole = groups.abs().amax(-1) / (_largest(bits) + 1)
    best_scale = _scale_of(groups, bits)
    best_error = _error(groups, best_scale, bits)
    for ratio in _CLIP_RATIOS:
        for sign in signs:
            scale = _storable(whole * (ratio * sign), groups.shape[1] > 1)
            error = _error(groups, scale, bits)
            is_better = error < best_error
            best_scale = torch.where(is_better, scale, best_scale)
            best_error = torch.where(is_better, error, best_error)
    return best_scale


def _error(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    rounded = _round(groups, scale, bits).mul_(scale[..., None])
    return rounded.sub_(groups).abs_().pow_(_ERROR_POWER).sum(-1)
