"""Layers of an INetworkDefinition, under our names, as strong typing wants them: casts and ranks are explicit.

Keeps the memory that TensorRT's weights point to: whoever builds must hold the Graph until the engine is built. Knows
no op of ours.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..dtype import dtype_name
from ..plan import TensorSpec

# Our dtypes by the names of TensorRT's members; numbers of members change between versions.
DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}


class Weight(NamedTuple):
    """A weight of our network, read when a layer needs it."""

    spec: TensorSpec
    load: Callable[[], torch.Tensor]


class Graph:
    def __init__(self, network: Any, trt: Any) -> None:
        self.network = network
        self.trt = trt
        self.kept: list[torch.Tensor] = []
        self._constants: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._path = ""
        self._names: Counter[str] = Counter()

    # Names

    @contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """Layers and tensors added inside are called `path:what`."""
        outer, self._path = self._path, path
        try:
            yield
        finally:
            self._path = outer

    def add(self, layer: Any, what: str) -> Any:
        """The output of a new layer, both named; None is what TensorRT gives for a layer that it does not take."""
        name = f"{self._path}:{what}"
        self._names[name] += 1
        if self._names[name] > 1:
            name += f"/{self._names[name]}"
        if layer is None:
            raise ValueError(f"TensorRT refuses the layer {name}; its log says why")
        layer.name = name
        output = layer.get_output(0)
        output.name = name
        return output

    # Inputs and constants

    def data_type(self, dtype: str) -> Any:
        return getattr(self.trt.DataType, DATA_TYPES[dtype])

    def dtype_of(self, x: Any) -> str:
        return next(dtype for dtype in DATA_TYPES if x.dtype == self.data_type(dtype))

    def add_input(self, name: str, dtype: str, shape: Sequence[int | str]) -> Any:
        """A network input; a named dim is decided at run time, and equal wherever it has the same name."""
        dims = tuple(-1 if isinstance(dim, str) else dim for dim in shape)
        tensor = self.network.add_input(name, self.data_type(dtype), dims)
        for index, dim in enumerate(shape):
            if isinstance(dim, str):
                tensor.set_dimension_name(index, dim)
        return tensor

    def constant(self, values: torch.Tensor, what: str, shape: Sequence[int] | None = None) -> Any:
        """`values`, which are held here, in their dtype."""
        return self._add_constant(values, self.data_type(dtype_name(values.dtype)), values.numel(), what, shape)

    def packed_int4(self, values: torch.Tensor, what: str) -> Any:
        """INT4 [n, k] of uint8 [n, k / 2]: two's complement, even columns in the low nibbles."""
        rows, pairs = values.shape
        return self._add_constant(values, self.trt.DataType.INT4, 2 * values.numel(), what, (rows, 2 * pairs))

    def _add_constant(
        self, values: torch.Tensor, data_type: Any, count: int, what: str, shape: Sequence[int] | None
    ) -> Any:
        values = values.detach().cpu().contiguous()
        self.kept.append(values)
        weights = self.trt.Weights(data_type, values.data_ptr(), count)
        return self.add(self.network.add_constant(tuple(values.shape if shape is None else shape), weights), what)

    def weight(self, weight: Weight, shape: Sequence[int] | None = None) -> Any:
        """A constant of our weight, read once however many nodes use it in this shape."""
        key = (weight.spec.name, tuple(int(dim) for dim in (weight.spec.shape if shape is None else shape)))
        if key not in self._constants:
            with self.naming(weight.spec.name):
                self._constants[key] = self.constant(weight.load(), "constant", key[1])
        return self._constants[key]

    def row(self, weight: Weight) -> Any:
        """A vector [n] as [1, n], the rank of what it meets."""
        return self.weight(weight, (1, int(weight.spec.shape[0])))

    def scalar(self, value: float, rank: int, what: str) -> Any:
        """float32 [1, ..., 1]."""
        return self.constant(torch.full((1,) * rank, value, dtype=torch.float32), what)

    # Arithmetic

    def cast(self, x: Any, dtype: str) -> Any:
        wanted = self.data_type(dtype)
        return x if x.dtype == wanted else self.add(self.network.add_cast(x, wanted), f"to_{dtype}")

    def elementwise(self, left: Any, right: Any, operation: str, what: str) -> Any:
        """Both of one dtype and rank; dims of 1 are repeated."""
        op = getattr(self.trt.ElementWiseOperation, operation)
        return self.add(self.network.add_elementwise(left, right, op), what)

    def linear(self, x: Any, weight: Any, bias: Weight | None, dtype: str) -> Any:
        """x [m, k] times the transpose of weight [n, k], plus bias [n], in x's dtype; then `dtype`."""
        matrix = self.trt.MatrixOperation
        y = self.add(self.network.add_matrix_multiply(x, matrix.NONE, weight, matrix.TRANSPOSE), "product")
        if bias is not None:
            y = self.elementwise(y, self.row(bias), "SUM", "with_bias")
        return self.cast(y, dtype)

    def gather(self, x: Any, indices: Any, axis: int, what: str) -> Any:
        return self.add(self.network.add_gather(x, indices, axis), what)

    # Shapes

    def reshape(
        self,
        x: Any,
        shape: Sequence[int] | Any,
        what: str,
        *,
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Any:
        """Transposed as `before`, in `shape` (numbers, or a tensor of them), transposed as `after`."""
        layer = self.network.add_shuffle(x)
        if before is not None:
            layer.first_transpose = tuple(before)
        if isinstance(shape, tuple):
            layer.reshape_dims = shape
        else:
            layer.set_input(1, shape)
        if after is not None:
            layer.second_transpose = tuple(after)
        return self.add(layer, what)

    def sizes(self, dims: Sequence[Any], what: str) -> Any:
        """A tensor of sizes for a shape: numbers, and INT64 tensors [1] for those that a step decides."""
        parts = [self.constant(torch.tensor([dim]), f"{what}_dim") if isinstance(dim, int) else dim for dim in dims]
        layer = self.network.add_concatenation(parts)
        layer.axis = 0
        return self.add(layer, what)

    def dim_of(self, x: Any, axis: int) -> Any:
        """The size of a dim of x, INT64 [1]."""
        shape = self.add(self.network.add_shape(x), "shape")
        return self.add(self.network.add_slice(shape, (axis,), (1,), (1,)), f"dim_{axis}")
