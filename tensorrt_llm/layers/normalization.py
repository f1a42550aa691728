"""Root-mean-square normalization."""

from ..functional import rms_norm
from ..module import Module
from ..network import Tensor
from ..parameter import Parameter


class RmsNorm(Module):
    """Normalizes the last dim, of `normalized_shape` elements; the result has the dtype of the weight."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6, dtype: str = "float16") -> None:
        super().__init__()
        self.weight = Parameter((normalized_shape,), dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.value, self.eps)
