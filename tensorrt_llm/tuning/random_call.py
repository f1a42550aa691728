"""An op of a plan with random operands of the right dtypes and shapes, of a size that keeps results around one."""

import math
from collections.abc import Mapping

import torch

from ..dtype import itemsize, torch_dtype
from ..kernels import Kernel, reference_kernels
from ..plan import PlanNode, TensorSpec

Operands = tuple[torch.Tensor | None, ...]


class RandomCall:
    """`node` with operands for up to `most_tokens` tokens. A step of fewer reads the first rows."""

    def __init__(
        self,
        node: PlanNode,
        specs: Mapping[str, TensorSpec],
        weight_names: frozenset[str],
        most_tokens: int,
        device: torch.device,
    ) -> None:
        self.op = node.op
        self.attrs = dict(node.attrs)
        self.out_dtype = torch_dtype(node.outputs[-1].dtype)
        self._row_bytes = sum(
            math.prod(int(dim) for dim in spec.shape[1:]) * itemsize(spec.dtype) for spec in node.outputs
        )
        self._generator = torch.Generator(device).manual_seed(0)
        operands = [specs[name] for name in node.inputs]
        depth = int(operands[0].shape[-1])
        self._values = [self._random(spec, most_tokens, depth) for spec in operands if spec.name not in weight_names]
        self._weights = [self._random(spec, most_tokens, depth) for spec in operands if spec.name in weight_names]

    def _random(self, spec: TensorSpec, most_tokens: int, depth: int) -> torch.Tensor:
        shape = tuple(most_tokens if isinstance(dim, str) else dim for dim in spec.shape)
        dtype, device, generator = torch_dtype(spec.dtype), self._generator.device, self._generator
        if not dtype.is_floating_point:
            # int16 is a zero point, which lies among the integers of 4 bits.
            low, high = {torch.int8: (-127, 128), torch.uint8: (0, 256), torch.int16: (-8, 8)}[dtype]
            return torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)
        if self._is_scale(spec):
            # Of integers of this size. Exact in float16, as those are that we choose ourselves.
            step = (
                1 / 64 if isinstance(spec.shape[0], str) or shape == (1,) else 1 / (2 ** (self._bits - 1) * depth**0.5)
            )
            uniform = torch.rand(shape, device=device, generator=generator)
            return ((0.5 + uniform) * step).half().to(dtype)
        size = 1.0 if isinstance(spec.shape[0], str) or len(shape) == 1 else 1 / depth**0.5
        return (torch.randn(shape, device=device, dtype=torch.float16, generator=generator) * size).to(dtype)

    @property
    def _bits(self) -> int:
        return int(self.attrs.get("bits", 8))  # type: ignore[arg-type]  # an attribute that is a number

    def _is_scale(self, spec: TensorSpec) -> bool:
        is_quantized = self.op.startswith(("weight_only", "smooth_quant", "quantize"))
        is_values = isinstance(spec.shape[0], str) and spec.shape[-1] != 1
        return is_quantized and spec.dtype == "float32" and not is_values

    def values(self, tokens: int) -> list[torch.Tensor]:
        """What the op reads besides weights."""
        return [value[:tokens] for value in self._values]

    def prepared(self, kernel: Kernel) -> Operands:
        """The weights in the kernel's layout."""
        return kernel.prepare(*self._weights, **self.attrs) if kernel.prepare else tuple(self._weights)

    def run(self, kernel: Kernel, tokens: int, weights: Operands) -> torch.Tensor:
        """The op's last output."""
        made = kernel.run(*self.values(tokens), *weights, **self.attrs)
        last: torch.Tensor = made[-1] if isinstance(made, tuple) else made
        return last

    def wanted(self) -> torch.Tensor:
        """What the op means for all tokens: float32, of float64 where operands are float32 already."""
        wide = torch.float64 if self._values[0].dtype == torch.float32 else torch.float32
        values, weights = ([_widened(tensor, wide) for tensor in part] for part in (self._values, self._weights))
        result: torch.Tensor = reference_kernels()[self.op].run(*values, *weights, **self.attrs | {"dtype": "float32"})
        return result

    @property
    def tolerance(self) -> float:
        """The largest relative error, as a Frobenius norm, of a tactic that is right.

        Operands or results are rounded, perhaps the weights too, and sums are float32.
        """
        dtypes = [tensor.dtype for tensor in self._values[:1]] + [self.out_dtype]
        roundoff = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        return max(4 * roundoff, 1e-5)

    def moved_bytes(self, tokens: int) -> int:
        """Weights, values and results, once."""
        return self.weight_bytes + sum(value.nbytes for value in self.values(tokens)) + tokens * self._row_bytes

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights)


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_sixteen_bit = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(dtype) if is_sixteen_bit or dtype == torch.float64 and tensor.is_floating_point() else tensor


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the whole matrix; NaN where one of its elements is."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp_min(math.ulp(0.0)))
