"""Matmuls by matmul.c and int4.c: weights as floats, or in 8 or 4 bits that are widened on the way.

A weight stays as the engine file has it, row by row; where its columns, or those of a group, are no multiple of 64,
they are filled up with zeros. What can be known when it is loaded is put into a `Product`: a step has 97 matmuls in 24
layers, and Python's part of each counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from struct import pack

import torch
from torch.nn.functional import pad

from ....dtype import torch_dtype
from ...quantized_reference import split_optional
from .compiled import multiply
from .launch import FLOATS, INT4, INT8, address, round_up

Place = Callable[[torch.Tensor], torch.Tensor]
Operands = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # weight, scale, zero as in matmul.h

_COLUMNS_AT_ONCE = 64
_NONE: Operands = (None, None, None)


@dataclass(frozen=True, slots=True)
class Product:
    """All of `struct product` but x and y, and the tensors whose addresses it holds."""

    rows: int
    columns: int
    dtype: torch.dtype  # of y
    recipe: bytes
    tensors: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(
        cls,
        weight_format: int,
        dtype: str,
        columns: int,
        weight: Operands,
        gate: Operands = _NONE,
        bias: torch.Tensor | None = None,
    ) -> "Product":
        stored, scale, zero = weight
        assert stored is not None
        groups = 1 if scale is None else scale.shape[1]
        rows, group_columns = len(stored), columns // groups
        tensors = (*weight, *gate, bias)
        # The kernel would read beyond what is too small: an engine file may have been edited.
        for tensor, shape in ((scale, (rows, groups)), (zero, (rows, groups)), (bias, (rows,))):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"a weight of {rows} rows in {groups} groups has {list(tensor.shape)}, not {list(shape)}"
                )
        for other, own in zip(gate, weight, strict=True) if gate[0] is not None else ():
            if (other is None) != (own is None) or (
                other is not None and own is not None and (other.shape, other.dtype) != (own.shape, own.dtype)
            ):
                raise ValueError("fc and gate differ in shape or dtype")
        sizes = (weight_format, rows, groups, group_columns, round_up(group_columns, _COLUMNS_AT_ONCE))
        recipe = pack("12N", *sizes, *map(address, tensors))
        return cls(rows, columns, torch_dtype(dtype), recipe, tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens, columns = x.shape
        if columns != self.columns:
            raise ValueError(f"x has {columns} columns, but the weight has {self.columns}")
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((tokens, self.rows), dtype=self.dtype)
        multiply(self.recipe, tokens, x.data_ptr(), FLOATS[x.dtype], y.data_ptr(), FLOATS[self.dtype])
        return y


def matmul(x: torch.Tensor, product: Product, *, dtype: str) -> torch.Tensor:
    """x [T, k] -> [T, n]."""
    return product(x)


def gated_mlp(x: torch.Tensor, product: Product, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T), rounded once."""
    return product(x)


def weight_only_quant_matmul(
    x: torch.Tensor, product: Product, *, bits: int, has_zero: bool, dtype: str
) -> torch.Tensor:
    """x [T, k] -> [T, n]."""
    return product(x)


def weight_only_gated_mlp(x: torch.Tensor, product: Product, *, bits: int, has_zero: bool, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T), rounded once."""
    return product(x)


def prepare_matmul(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str, place: Place
) -> tuple[Product]:
    float_weight = _float_weight(weight, place)
    wide_bias = None if bias is None else bias.float().contiguous()
    return (Product.of(FLOATS[weight.dtype], dtype, weight.shape[1], float_weight, bias=wide_bias),)


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str, place: Place) -> tuple[Product]:
    branches = _float_weight(fc, place), _float_weight(gate, place)
    return (Product.of(FLOATS[fc.dtype], dtype, fc.shape[1], *branches),)


def prepare_weight_only_quant_matmul(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *zero_and_bias: torch.Tensor,
    bits: int,
    has_zero: bool,
    dtype: str,
    place: Place,
) -> tuple[Product]:
    zero, bias = split_optional(zero_and_bias, has_zero)
    wide_bias = None if bias is None else bias.float().contiguous()
    operands = _integer_weight(weight, scale, zero, bits, place)
    return (Product.of(_format_of(bits), dtype, weight.shape[1] * 8 // bits, operands, bias=wide_bias),)


def prepare_weight_only_gated_mlp(
    *weights: torch.Tensor, bits: int, has_zero: bool, dtype: str, place: Place
) -> tuple[Product]:
    """`weights` are weight, scale and perhaps zero of fc, then those of gate."""
    half = len(weights) // 2
    fc, gate = (
        _integer_weight(branch[0], branch[1], branch[2] if has_zero else None, bits, place)
        for branch in (weights[:half], weights[half:])
    )
    return (Product.of(_format_of(bits), dtype, weights[0].shape[1] * 8 // bits, fc, gate),)


def _format_of(bits: int) -> int:
    return INT4 if bits == 4 else INT8


def _float_weight(weight: torch.Tensor, place: Place) -> Operands:
    if weight.dim() != 2:
        raise ValueError(f"a weight is {list(weight.shape)}, expected two dimensions")
    return place(_filled_up(weight[:, None], 1)), None, None


def _integer_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, place: Place
) -> Operands:
    if weight.dtype != (torch.uint8 if bits == 4 else torch.int8) or weight.dim() != 2 or scale.dim() != 2:
        raise ValueError(f"a weight of {bits} bits is {weight.dtype} {list(weight.shape)}, scales {list(scale.shape)}")
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    # From the integers as they are stored: nibbles are q + 8.
    stored_zero = None if zero is None else place(zero.float() + (8 if bits == 4 else 0))
    return place(_filled_up(grouped, 8 // bits)), place(scale.float()), stored_zero


def _filled_up(grouped: torch.Tensor, packing: int) -> torch.Tensor:
    """[n, groups, columns], zeros at the end of each group; `packing` columns share an element."""
    columns = grouped.shape[-1] * packing
    return pad(grouped, (0, (round_up(columns, _COLUMNS_AT_ONCE) - columns) // packing))
