"""Layers of quantized models, under 0.7.1's names. A quantized layer is made from the layer that it replaces.

Their parameters are what quantization makes of that layer's weight: integers in the layout of quantize.py, and scales.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..functional import allgather, allreduce, rms_norm
from ..layers import Attention, ColumnLinear, GatedMLP, RmsNorm, RowLinear
from ..module import Module
from ..network import Tensor
from ..parameter import Parameter
from .functional import (
    permute_columns,
    quantize_per_token,
    quantize_tensor,
    scale_columns,
    smooth_quant_gemm,
    weight_only_quant_matmul,
)
from .mode import QuantMode
from .quantize import QuantizedWeight

Linear = ColumnLinear | RowLinear
Quantized = tuple[Tensor, Tensor]  # int8 activations, and the scale of each token [m, 1] or of all [1]


@dataclass(frozen=True)
class WeightOnlyLayout:
    """How a weight-only layer stores its weight; group_size 0 is one scale per output channel.

    `positive_scales` is about rounding: scales of both signs use the grid better, and not every backend takes them.
    """

    bits: int
    group_size: int = 0
    zero: bool = False
    pre_quant_scale: bool = False
    act_order: bool = False
    positive_scales: bool = False


# Smaller groups would hold more scale than weight, and kernels work in steps of this many columns.
SMALLEST_GROUP = 16


class WeightOnlyMatmul(Module):
    """x times a weight of integers [out, in]: `weight`, `scale` and, as asked for, `zero`, `order`, `pre_quant_scale`.

    `order` int32 [in] says which column of x each column of the weight reads (GPTQ's act-order); `pre_quant_scale`
    [in] multiplies x first (AWQ). `whole_group_size` is the group size of the whole weight; on a rank whose columns
    do not divide into such groups they are stored as smaller ones with equal scales.
    """

    def __init__(self, linear: Linear, layout: WeightOnlyLayout) -> None:
        super().__init__()
        bits, group_size = layout.bits, layout.group_size
        rows, columns = linear.weight.shape
        if columns * bits % 8:
            raise ValueError(
                f"the weight [{rows}, {columns}] has an odd number of columns, expected an even one for int4"
            )
        groups = columns // _group_size_of_rank(linear, group_size) if group_size else 1
        self.bits = bits
        self.whole_group_size = group_size
        self.positive_scales = layout.positive_scales
        self.dtype = linear.weight.dtype
        self.weight = Parameter((rows, columns * bits // 8), "int8" if bits == 8 else "uint8")
        self.scale = Parameter((rows, groups), "float32")
        self.zero = Parameter((rows, groups), "int16") if layout.zero else None
        self.order = Parameter((columns,), "int32") if layout.act_order else None
        self.pre_quant_scale = Parameter((columns,), self.dtype) if layout.pre_quant_scale else None
        self.tp_group = linear.tp_group

    def set_loader(self, load: Callable[[], QuantizedWeight]) -> None:
        """`load()` gives this rank's weight; it is called once for all its tensors, each time they are asked for."""
        once = _Once(lambda: self._checked(load()), 2 + (self.zero is not None))
        self.weight.set_loader(lambda: once.take().weight)
        self.scale.set_loader(lambda: once.take().scale)
        if self.zero:
            self.zero.set_loader(lambda: _present(once.take().zero))

    def _checked(self, loaded: QuantizedWeight) -> QuantizedWeight:
        name = self.weight.name
        assert loaded.bits == self.bits and (loaded.zero is None) == (self.zero is None), name
        if not loaded.scale.isfinite().all() or (loaded.scale == 0).any():
            bad = loaded.scale[~(loaded.scale.isfinite() & (loaded.scale != 0))][0].item()
            raise ValueError(f"{name}: a quantization scale is {bad}, expected finite numbers other than zero")
        return loaded

    def multiply(self, x: Tensor, bias: Parameter | None = None, dtype: str | None = None) -> Tensor:
        if self.pre_quant_scale:
            x = scale_columns(x, self.pre_quant_scale.value)
        if self.order:
            x = permute_columns(x, self.order.value)
        return weight_only_quant_matmul(
            x,
            self.weight.value,
            self.scale.value,
            self.zero.value if self.zero else None,
            bias.value if bias else None,
            bits=self.bits,
            dtype=dtype,
        )


def _group_size_of_rank(linear: Linear, group_size: int) -> int:
    columns = linear.weight.shape[1]
    whole = columns * (linear.tp_size if isinstance(linear, RowLinear) else 1)
    if whole % group_size:
        raise ValueError(f"group size is {group_size}, expected a divisor of the weight's {whole} columns")
    common = math.gcd(group_size, columns)
    if common < min(SMALLEST_GROUP, group_size):
        raise ValueError(
            f"a rank has {columns} of {whole} columns: groups of {group_size} would be cut to {common}, expected at "
            f"least {SMALLEST_GROUP}; use a smaller tp_size"
        )
    return common


def _present(zero: torch.Tensor | None) -> torch.Tensor:
    assert zero is not None, "checked when it was loaded"
    return zero


class _Once:
    """A quantized weight that is made when the first of its tensors is taken, and let go of with the last."""

    def __init__(self, load: Callable[[], QuantizedWeight], takers: int) -> None:
        self._load = load
        self._takers = takers
        self._left = 0
        self._made: QuantizedWeight | None = None

    def take(self) -> QuantizedWeight:
        if self._made is None:
            self._made, self._left = self._load(), self._takers
        made = self._made
        self._left -= 1
        if not self._left:
            self._made = None
        return made


class WeightOnlyQuantLinear(WeightOnlyMatmul):
    """A ColumnLinear whose weight is quantized, per channel or in groups."""

    def __init__(self, linear: ColumnLinear, layout: WeightOnlyLayout) -> None:
        super().__init__(linear, layout)
        self.bias = linear.bias
        self.gathers = linear.gathers
        self.output_dtype = linear.output_dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x, self.bias, self.output_dtype)
        return allgather(y, self.tp_group, gather_dim=1) if self.gathers else y


class WeightOnlyQuantRowLinear(WeightOnlyMatmul):
    """A RowLinear whose weight is quantized, per channel or in groups."""

    def __init__(self, linear: RowLinear, layout: WeightOnlyLayout) -> None:
        super().__init__(linear, layout)
        self.tp_size = linear.tp_size

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return allreduce(y, self.tp_group) if self.tp_size > 1 else y


class SmoothQuantRmsNorm(Module):
    """RmsNorm with an int8 result, with one scale per token, or with the static `act_scale` [1] of calibration."""

    def __init__(self, norm: RmsNorm, quant_mode: QuantMode) -> None:
        super().__init__()
        # Smoothing spreads the weight over a wider range than a norm has, so it stays float32.
        self.weight = Parameter(norm.weight.shape, "float32")
        self.eps = norm.eps
        self.act_scale = Parameter((1,), "float32") if quant_mode.has_act_static_scaling() else None

    def forward(self, x: Tensor) -> Quantized:
        return _quantize(rms_norm(x, self.weight.value, self.eps, dtype="float32"), self.act_scale, None)


class SmoothQuantLinear(Module):
    """A ColumnLinear of int8 weights [out, in] that takes int8 activations."""

    def __init__(self, linear: Module) -> None:
        super().__init__()
        assert isinstance(linear, ColumnLinear) and not linear.gathers, type(linear).__name__
        rows = linear.weight.shape[0]
        self.dtype = linear.weight.dtype
        self.weight = Parameter(linear.weight.shape, "int8")
        self.per_channel_scale = Parameter((rows,), "float32")
        self.bias = linear.bias

    def forward(self, x: Quantized) -> Tensor:
        return smooth_quant_gemm(
            *x,
            self.weight.value,
            self.per_channel_scale.value,
            self.bias.value if self.bias else None,
            dtype=self.dtype,
        )


class SmoothQuantRowLinear(Module):
    """A RowLinear of int8 weights [out, in] that divides its input by `smoother` [in] and quantizes it."""

    def __init__(self, linear: Module, quant_mode: QuantMode) -> None:
        super().__init__()
        assert isinstance(linear, RowLinear), type(linear).__name__
        rows, columns = linear.weight.shape
        self.dtype = linear.weight.dtype
        self.weight = Parameter((rows, columns), "int8")
        self.per_channel_scale = Parameter((rows,), "float32")
        self.smoother = Parameter((columns,), "float32")
        self.act_scale = Parameter((1,), "float32") if quant_mode.has_act_static_scaling() else None
        self.tp_group = linear.tp_group
        self.tp_size = linear.tp_size

    def forward(self, x: Tensor) -> Tensor:
        quantized = _quantize(x, self.act_scale, self.smoother)
        y = smooth_quant_gemm(*quantized, self.weight.value, self.per_channel_scale.value, dtype=self.dtype)
        return allreduce(y, self.tp_group) if self.tp_size > 1 else y


def _quantize(x: Tensor, act_scale: Parameter | None, smoother: Parameter | None) -> Quantized:
    divisor = smoother.value if smoother else None
    if act_scale is None:
        return quantize_per_token(x, divisor)
    return quantize_tensor(x, act_scale.value, divisor), act_scale.value


def _take_over(layer: Module, replaced: Module) -> None:
    """Make `layer` hold what `replaced` holds: facts, children and parameters."""
    vars(layer).update(vars(replaced))
    layer._modules, layer._parameters = dict(replaced._modules), dict(replaced._parameters)


class SmoothQuantAttention(Attention):
    """Attention between int8 projections: its input is what SmoothQuantRmsNorm gives."""

    def __init__(self, attention: Attention, quant_mode: QuantMode) -> None:
        _take_over(self, attention)
        self.qkv = SmoothQuantLinear(attention.qkv)
        self.dense = SmoothQuantRowLinear(attention.dense, quant_mode)


class SmoothQuantMLP(GatedMLP):
    """The gated MLP of int8 projections: its input is what SmoothQuantRmsNorm gives."""

    def __init__(self, mlp: GatedMLP, quant_mode: QuantMode) -> None:
        _take_over(self, mlp)
        self.fc = SmoothQuantLinear(mlp.fc)
        self.gate = SmoothQuantLinear(mlp.gate)
        self.proj = SmoothQuantRowLinear(mlp.proj, quant_mode)
