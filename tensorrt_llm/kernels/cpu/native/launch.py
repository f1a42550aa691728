"""What every launcher of a compiled kernel needs: addresses, numbers of formats, rows without gaps."""

import torch


class _FloatFormats(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise ValueError(f"the kernels in C compute with float32, float16 and bfloat16, not with {dtype}")


# As `enum format` in vec.h.
FLOATS = _FloatFormats({torch.float32: 0, torch.float16: 1, torch.bfloat16: 2})
INT8, INT4 = 3, 4


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x as [T, columns] without gaps."""
    if x.shape[1] != columns:
        raise ValueError(f"x has {x.shape[1]} columns, expected {columns}")
    return x if x.is_contiguous() else x.contiguous()


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
