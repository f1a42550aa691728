"""Names of data types. Graphs, engine files and flags use these strings; torch's own objects stay behind this file."""

import torch

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}

# What --dtype accepts: the type of activations and weights of an engine.
PRECISIONS = ("float32", "float16", "bfloat16")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; an unknown name is a ValueError."""
    if name not in _TORCH_DTYPES:
        raise ValueError(f"unknown dtype {name!r}, expected one of {', '.join(_TORCH_DTYPES)}")
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype, the inverse of `torch_dtype`."""
    if dtype not in _NAMES:
        raise ValueError(f"dtype {dtype} has no name here, expected one of {', '.join(_TORCH_DTYPES)}")
    return _NAMES[dtype]


def itemsize(name: str) -> int:
    """Bytes per element."""
    return torch_dtype(name).itemsize


def is_floating(name: str) -> bool:
    return torch_dtype(name).is_floating_point


def wider(a: str, b: str) -> str:
    """The floating dtype that holds sums of both: equal names stay, any mixture is float32."""
    return a if a == b else "float32"
