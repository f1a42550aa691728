"""What every launcher of a compiled kernel needs: addresses, numbers of formats, rows without gaps."""

import torch


class _Formats(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise ValueError(f"the kernels in C have no {dtype}, expected float32, float16, bfloat16 or int8")


# As `enum format` in vec.h.
FORMATS = _Formats({torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3})
INT4 = 4


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x as [T, columns] without gaps."""
    if x.shape[1] != columns:
        raise ValueError(f"x has {x.shape[1]} columns, expected {columns}")
    return x if x.is_contiguous() else x.contiguous()


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
