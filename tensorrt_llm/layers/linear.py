"""Linear layers, whole or split over tensor-parallel ranks."""

from ..functional import allgather, allreduce, matmul
from ..module import Module
from ..network import Tensor
from ..parameter import Parameter


def _share(features: int, tp_size: int, what: str) -> int:
    if features % tp_size:
        raise ValueError(f"{what} is {features}, not a multiple of tp_size {tp_size}")
    return features // tp_size


class ColumnLinear(Module):
    """y = x W^T + b with W [out_features, in_features] split by rows: each rank makes its share of the outputs.

    `weight` is a Parameter to share (a tied lm_head); `output_dtype` is y's dtype, by default x's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str = "float16",
        tp_group: tuple[int, ...] = (0,),
        tp_size: int = 1,
        gather_output: bool = True,
        share_weight: Parameter | None = None,
        output_dtype: str | None = None,
    ) -> None:
        super().__init__()
        out_per_rank = _share(out_features, tp_size, "out_features")
        self.weight = share_weight or Parameter((out_per_rank, in_features), dtype)
        self.bias = Parameter((out_per_rank,), dtype) if bias else None
        self.tp_group = tp_group
        self.gathers = gather_output and tp_size > 1
        self.output_dtype = output_dtype

    def forward(self, x: Tensor) -> Tensor:
        y = matmul(x, self.weight.value, self.bias.value if self.bias else None, dtype=self.output_dtype)
        return allgather(y, self.tp_group, gather_dim=1) if self.gathers else y


class RowLinear(Module):
    """y = x W^T with W [out_features, in_features] split by columns: each rank adds its part of every output."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: str = "float16",
        tp_group: tuple[int, ...] = (0,),
        tp_size: int = 1,
    ) -> None:
        super().__init__()
        self.weight = Parameter((out_features, _share(in_features, tp_size, "in_features")), dtype)
        self.tp_group = tp_group
        self.tp_size = tp_size

    def forward(self, x: Tensor) -> Tensor:
        y = matmul(x, self.weight.value)
        return allreduce(y, self.tp_group) if self.tp_size > 1 else y
