"""What every launcher of a compiled kernel needs: addresses, names of formats, results, checks."""

import torch

# As `enum format` in vec.h.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
INT4 = 4


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def float_format(tensor: torch.Tensor, name: str) -> int:
    found = FORMATS.get(tensor.dtype, INT4)
    if found > 2:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16")
    return found


def rows_of(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x as [T, columns] without gaps."""
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x is {list(x.shape)}, expected [tokens, {columns}]")
    return x if x.is_contiguous() else x.contiguous()


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
