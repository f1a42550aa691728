"""Matmuls by matmul.c: float weights, and weights of 8 or 4 bits that are widened on the way. Nothing is rounded but the
result.

A weight stays as the engine file has it, row by row; where its columns, or those of a group, are no multiple of 64, they
are filled up with zeros.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from ....dtype import torch_dtype
from ...quantized_reference import split_optional
from .compiled import multiply
from .launch import FORMATS, INT4, address, float_format, round_up, rows_of

Weights = tuple[torch.Tensor | None, ...]
Place = Callable[[torch.Tensor], torch.Tensor]

_COLUMNS_AT_ONCE = 64


def prepare_matmul(weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str, place: Place) -> Weights:
    """[n, k filled up], float32 bias."""
    float_format(weight, "a weight")
    return place(_filled_up(weight[:, None], 1)[:, 0]), None if bias is None else bias.float().contiguous()


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str) -> torch.Tensor:
    """x [T, k], weight [n, k], bias [n] -> [T, n]."""
    return _product(x, FORMATS[weight.dtype], dtype, (weight, None, None), bias=bias)


def prepare_gated_mlp(fc: torch.Tensor, gate: torch.Tensor, *, dtype: str, place: Place) -> Weights:
    return tuple(prepare_matmul(weight, dtype=dtype, place=place)[0] for weight in (fc, gate))


def gated_mlp(x: torch.Tensor, fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T) of x [T, k] and fc, gate [n, k] -> [T, n]."""
    return _product(x, FORMATS[fc.dtype], dtype, (fc, None, None), (gate, None, None))


def prepare_weight_only_quant_matmul(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *zero_and_bias: torch.Tensor,
    bits: int,
    has_zero: bool,
    dtype: str,
    place: Place,
) -> Weights:
    """Weight, scale and zero (of the integers as stored) as matmul.h has them, float32 bias."""
    zero, bias = split_optional(zero_and_bias, has_zero)
    packing = 8 // bits
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    stored_zero = None if zero is None else (zero.float() + (8 if bits == 4 else 0)).contiguous()
    return (
        place(_filled_up(grouped, packing).flatten(1)),
        place(scale.float()),
        stored_zero,
        None if bias is None else bias.float().contiguous(),
    )


def weight_only_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> torch.Tensor:
    """x [T, k] and what `prepare_weight_only_quant_matmul` made -> [T, n]."""
    return _product(x, INT4 if bits == 4 else FORMATS[torch.int8], dtype, (weight, scale, zero), bias=bias)


def prepare_weight_only_gated_mlp(
    *weights: torch.Tensor, bits: int, has_zero: bool, dtype: str, place: Place
) -> Weights:
    """Weight, scale and zero of fc, then of gate."""
    half = len(weights) // 2
    fc, gate = (
        prepare_weight_only_quant_matmul(*branch, bits=bits, has_zero=has_zero, dtype=dtype, place=place)[:3]
        for branch in (weights[:half], weights[half:])
    )
    return (*fc, *gate)


def weight_only_gated_mlp(
    x: torch.Tensor, *weights: torch.Tensor | None, bits: int, has_zero: bool, dtype: str
) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T), rounded once."""
    return _product(x, INT4 if bits == 4 else FORMATS[torch.int8], dtype, weights[:3], weights[3:])


def _product(
    x: torch.Tensor,
    weight_format: int,
    dtype: str,
    weight: Weights,
    gate: Weights = (None, None, None),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    stored, scale, zero = weight
    assert stored is not None
    rows, columns = stored.shape
    padded = columns * 2 if weight_format == INT4 else columns
    groups = 1 if scale is None else scale.shape[1]
    tokens, inner = x.shape
    group_columns = inner // groups
    if inner % groups or round_up(group_columns, _COLUMNS_AT_ONCE) * groups != padded:
        raise ValueError(f"x has {inner} columns, but the weight has {groups} groups of up to {padded // groups}")
    x = rows_of(x, inner)
    y = torch.empty(tokens, rows, dtype=torch_dtype(dtype))
    multiply(
        weight_format,
        tokens,
        rows,
        groups,
        group_columns,
        padded // groups,
        x.data_ptr(),
        float_format(x, "x"),
        *map(address, weight),
        *map(address, gate),
        address(bias),
        y.data_ptr(),
        float_format(y, "y"),
    )
    return y


def _filled_up(grouped: torch.Tensor, packing: int) -> torch.Tensor:
    """[n, groups, columns], zeros at the end of each group; `packing` columns share an element."""
    columns = grouped.shape[-1] * packing
    return pad(grouped, (0, (round_up(columns, _COLUMNS_AT_ONCE) - columns) // packing))
