"""Weights, tensors and their dims.

A dim is a number, or a string that stands for a number that a step decides: the name of an input's dim, or an
expression of such names. Two equal strings are equal numbers. A tensor of few integers that the shape of another may
come from carries its values, in the same form.
"""

import ctypes
import hashlib
from typing import Any

import numpy as np
import torch

from .strict import ENUMS, ApiError, of_api

Dim = int | str
DataType = ENUMS["DataType"]
TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.HALF: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.INT64: torch.int64,
    DataType.INT32: torch.int32,
    DataType.INT8: torch.int8,
    DataType.UINT8: torch.uint8,
    DataType.BOOL: torch.bool,
    DataType.INT4: torch.int8,  # unpacked
}
FLOATS = (DataType.FLOAT, DataType.HALF, DataType.BF16)
INDICES = (DataType.INT32, DataType.INT64)
# Flow between quantize and dequantize layers only.
QUANTIZED = (DataType.INT8, DataType.INT4, DataType.FP8, DataType.FP4)


@of_api
class Weights:
    """Memory of somebody else, which must be there until the engine is built."""

    def __init__(self, *given: Any) -> None:
        if len(given) == 1 and isinstance(given[0], np.ndarray):
            raise ApiError(
                "Weights of an array: the lowering gives a type, a pointer and a count, as NumPy lacks types"
            )
        self._dtype, self._pointer, self._count = given if len(given) == 3 else (*given, 0, 0)
        if self._dtype not in TORCH_DTYPES:
            raise ApiError(f"Weights of {self._dtype}, expected one of {[dtype.name for dtype in TORCH_DTYPES]}")

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def size(self) -> int:
        return self._count

    def _digest(self) -> str:
        """Of the numbers in memory now."""
        return hashlib.sha256(self._values().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    def _values(self) -> torch.Tensor:
        """The numbers in memory now, flat; of INT4 two to a byte, the low nibble first."""
        is_int4 = self._dtype == DataType.INT4
        num_bytes = -(-self._count // 2) if is_int4 else self._count * TORCH_DTYPES[self._dtype].itemsize
        raw = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(self._pointer), dtype=torch.uint8)
        if not is_int4:
            return raw.view(TORCH_DTYPES[self._dtype])
        nibbles = torch.stack((raw & 15, raw >> 4), dim=1).flatten()[: self._count].to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles)


@of_api
class ITensor:
    """An input of a network, or what a layer makes: then dtype, dims and values are the layer's to say."""

    def __init__(self, network: Any, layer: Any = None, dtype: Any = None, dims: tuple[Dim, ...] = ()) -> None:
        self._network, self._layer = network, layer
        self._input_dtype, self._input_dims = dtype, dims
        self._is_output = False
        self.name = network._unnamed("tensor")

    @property
    def dtype(self) -> Any:
        return self._layer._made()[0] if self._layer else self._input_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """-1 for what a step decides."""
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._dims)

    @property
    def _dims(self) -> tuple[Dim, ...]:
        return self._layer._made()[1] if self._layer else self._input_dims

    @property
    def _values(self) -> list[Dim] | None:
        return self._layer._made()[2] if self._layer else None

    @property
    def _is_constant(self) -> bool:
        return self._layer is not None and self._layer.recorded_kind == "IConstantLayer"

    @property
    def is_network_input(self) -> bool:
        return self._layer is None

    @property
    def is_network_output(self) -> bool:
        return self._is_output

    def set_dimension_name(self, index: int, name: str) -> None:
        if self._layer or not 0 <= index < len(self._input_dims) or isinstance(self._input_dims[index], int):
            raise ApiError(f"{self.name}: dim {index} cannot be named; unknown dims of inputs can")
        self._input_dims = (*self._input_dims[:index], name, *self._input_dims[index + 1 :])

    def get_dimension_name(self, index: int) -> str:
        dim = self._input_dims[index]
        return dim if isinstance(dim, str) else ""


def product(dims: list[Dim] | tuple[Dim, ...]) -> Dim:
    """Of dims, as a number or an expression: its number, then names in order."""
    number, names = 1, []
    for dim in dims:
        own_number, own_names = _factors(dim)
        number *= own_number
        names += own_names
    return _expression(number, names)


def quotient(whole: Dim, part: Dim) -> Dim | None:
    """whole / part where that comes out even, as far as can be told; None: it cannot."""
    number, names = _factors(whole)
    divisor, gone = _factors(part)
    if not divisor or number % divisor:
        return None
    for name in gone:
        if name not in names:
            return None
        names.remove(name)
    return _expression(number // divisor, names)


def _factors(dim: Dim) -> tuple[int, list[str]]:
    if isinstance(dim, int):
        return dim, []
    first, *others = dim.split("*")
    return (int(first), others) if first.isdigit() else (1, [first, *others])


def _expression(number: int, names: list[str]) -> Dim:
    if not names or not number:
        return number
    return "*".join([*([str(number)] if number != 1 else []), *sorted(names)])
