"""A weight of a network: shape and dtype now, data when the engine is written.

A build streams: a loader set here reads one tensor when it is asked for and nobody keeps it afterwards, so the
host never holds the model. Knows nothing of files or checkpoints.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .dtype import is_floating, torch_dtype
from .network import Tensor, default_net


class Parameter:
    """A weight of `shape` (dims are ints) in `dtype`. Give it data with `.value = array` or `set_loader(function)`."""

    def __init__(self, shape: tuple[int, ...] | list[int], dtype: str = "float32") -> None:
        self.shape = tuple(int(dim) for dim in shape)
        self.dtype = dtype
        self.name = ""  # the dotted path in its model, given by Network.set_named_parameters
        self._loader: Callable[[], torch.Tensor] | None = None
        if any(dim < 1 for dim in self.shape):
            raise ValueError(f"Parameter: shape is {self.shape}, expected positive dims")
        torch_dtype(dtype)

    @property
    def value(self) -> Tensor:
        """The tensor of the network in work that stands for this weight."""
        return default_net().parameter(self.name, self.shape, self.dtype)

    @value.setter
    def value(self, array: Any) -> None:
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        self._check_shape(tensor)
        self.set_loader(lambda: tensor)

    def set_loader(self, loader: Callable[[], torch.Tensor]) -> None:
        """`loader()` gives a torch.Tensor of this shape, called whenever data is needed.

        A floating parameter takes any floating dtype, one of integers its own.
        """
        self._loader = loader

    def load(self) -> torch.Tensor:
        """The data, contiguous, in this parameter's dtype; a value that is not finite or too large is an error."""
        if self._loader is None:
            raise ValueError(f"parameter {self.name} has no data; load the model's weights before building")
        tensor = self._loader()
        self._check_shape(tensor)
        return cast_finite(tensor, self.dtype, self.name)

    def _check_shape(self, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"parameter {self.name}: data has shape {tuple(tensor.shape)}, expected {self.shape}")
        if is_floating(self.dtype) and not tensor.is_floating_point():
            raise ValueError(f"parameter {self.name}: data is {tensor.dtype}, expected a floating dtype")
        if not is_floating(self.dtype) and tensor.dtype != torch_dtype(self.dtype):
            raise ValueError(f"parameter {self.name}: data is {tensor.dtype}, expected {self.dtype}")


def cast_finite(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """`tensor` in `dtype`, contiguous; a value that is not finite, or is too large, is a ValueError with `name`."""
    cast = tensor.to(torch_dtype(dtype)).contiguous()
    # An inf or NaN let through here would end as NaN logits. The two ends tell, without a temporary of the tensor's
    # size.
    if not _ends(cast).isfinite().all():
        largest = _ends(tensor).abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"{name}: the data holds NaN or infinite values; the checkpoint is damaged")
        raise ValueError(
            f"{name}: largest magnitude {largest:g} does not fit {dtype} "
            f"(at most {torch.finfo(cast.dtype).max:g}); build with bfloat16"
        )
    return cast


def _ends(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest element."""
    return torch.stack(tensor.aminmax())
