"""The ops of quantized networks as TensorRT's quantize and dequantize layers.

TensorRT's grids are symmetric, with positive constant scales of the dtype that comes out: one for a tensor, one for
each output channel of INT8, one for each block of a row of INT4. The builder is free to keep the integers or to fold
them into floats; which it does, and whether it is faster, is not measured.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..dtype import torch_dtype
from ..plan import PlanNode, TensorSpec
from .graph import Graph, Weight

# One scale per row of INT4 is said as equal scales of these blocks: TensorRT has INT4 in blocks only.
_BLOCKS = (128, 64, 32, 16)
# A scale may move this far when it is rounded: by the steps of bfloat16. Float16's are finer, but end at 6e-5.
_SCALE_TOLERANCE = 2**-8


def reason_against_matmul(node: PlanNode, specs: Mapping[str, TensorSpec]) -> str | None:
    """Why a weight_only_quant_matmul cannot be lowered."""
    if node.attrs["has_zero"]:
        return "its grid is asymmetric (zero points), and TensorRT dequantizes without; use a symmetric checkpoint"
    scale = specs[node.inputs[2]]
    if node.attrs["bits"] == 8 and scale.shape[1] != 1:
        return "INT8 weights have a scale per group, and TensorRT dequantizes INT8 with one per output channel"
    group_size = 2 * int(specs[node.inputs[1]].shape[1]) // int(scale.shape[1])
    if node.attrs["bits"] == 4 and group_size % 2:
        return f"its groups have {group_size} columns, and a byte holds two; use an even group size"
    return None


def weight_only_quant_matmul(
    graph: Graph,
    x: Any,
    weight: Weight,
    scale: Weight,
    bias: Weight | None = None,
    *,
    bits: int,
    has_zero: bool,
    dtype: str,
) -> Any:
    assert not has_zero, "refused before"
    matrix = (_int8_matrix if bits == 8 else _int4_matrix)(graph, weight, scale, graph.dtype_of(x))
    return graph.linear(x, matrix, bias, dtype)


def _int8_matrix(graph: Graph, weight: Weight, scale: Weight, dtype: str) -> Any:
    """[n, k] in `dtype`, from a scale for each row."""
    integers = weight.load()
    scales = _scales_in(dtype, scale.load().flatten(), integers.any(dim=1), scale.spec.name)
    layer = graph.network.add_dequantize(
        graph.constant(integers, "integers"), graph.constant(scales, "scales"), graph.data_type(dtype)
    )
    layer.axis = 0
    return graph.add(layer, "weight")


def _int4_matrix(graph: Graph, weight: Weight, scale: Weight, dtype: str) -> Any:
    """[n, k] in `dtype`, from a scale for each block of a row."""
    # Ours is q + 8, theirs two's complement: they differ in the highest bit of a nibble.
    packed = weight.load() ^ 0x88
    columns = 2 * packed.shape[1]
    scales = scale.load()
    is_used = (packed != 0).unflatten(1, (scales.shape[1], -1)).any(dim=2)
    scales = _scales_in(dtype, scales, is_used, scale.spec.name)
    if scales.shape[1] == 1:
        block = next((size for size in _BLOCKS if columns % size == 0), columns)
        scales = scales.expand(-1, columns // block)
    layer = graph.network.add_dequantize(
        graph.packed_int4(packed, "integers"), graph.constant(scales, "scales"), graph.data_type(dtype)
    )
    layer.block_shape = (1, columns // scales.shape[1])
    return graph.add(layer, "weight")


def quantize_tensor(graph: Graph, x: Any, scale: Weight, smoother: Weight | None = None) -> Any:
    """Our grid ends at -127 and TensorRT's at -128: what lies below is cut before."""
    wide = graph.cast(x, "float32")
    if smoother is not None:
        inverse = graph.constant(1 / smoother.load()[None], "inverse_smoother")
        wide = graph.elementwise(wide, inverse, "PROD", "smoothed")
    step = _one_scale_in("float32", scale)
    cut = graph.elementwise(wide, graph.scalar(-127 * float(step), 2, "least"), "MAX", "cut")
    layer = graph.network.add_quantize(cut, graph.constant(step, "scale"), graph.trt.DataType.INT8)
    return graph.add(layer, "quantized")


def smooth_quant_gemm(
    graph: Graph,
    x: Any,
    x_scale: Weight,
    weight: Weight,
    weight_scale: Weight,
    bias: Weight | None = None,
    *,
    dtype: str,
) -> Any:
    """Both sides of a product dequantized, which a builder makes one product of INT8."""
    scale = graph.constant(_one_scale_in(dtype, x_scale), "x_scale")
    left = graph.add(graph.network.add_dequantize(x, scale, graph.data_type(dtype)), "x")
    return graph.linear(left, _int8_matrix(graph, weight, weight_scale, dtype), bias, dtype)


def _one_scale_in(dtype: str, scale: Weight) -> torch.Tensor:
    """The scale of a whole tensor, without dims."""
    return _scales_in(dtype, scale.load()[0], torch.tensor(True), scale.spec.name)


def _scales_in(dtype: str, scales: torch.Tensor, is_used: torch.Tensor, name: str) -> torch.Tensor:
    """`scales` in `dtype`; a ValueError for one that TensorRT does not take, or that `dtype` cannot hold.

    A scale of nothing but zeros, which is not used, may be any number.
    """
    wanted = torch.where(is_used, scales, torch.ones_like(scales))
    if not (wanted > 0).all():
        raise ValueError(
            f"{name}: a scale is {wanted.min().item():g}, and TensorRT takes positive ones only; quantize with "
            f"positive scales, as build.py --backend tensorrt does"
        )
    rounded = wanted.to(torch_dtype(dtype))
    moved = ((rounded.float() - wanted) / wanted).abs()
    if moved.max() > _SCALE_TOLERANCE:
        worst = wanted.flatten()[moved.argmax()].item()
        raise ValueError(f"{name}: a scale is {worst:g}, which {dtype} cannot hold; build with --dtype bfloat16")
    return rounded


def scale_columns(graph: Graph, x: Any, scale: Weight) -> Any:
    return graph.elementwise(x, graph.row(scale), "PROD", "scaled")


def permute_columns(graph: Graph, x: Any, order: Weight) -> Any:
    return graph.gather(x, graph.weight(order), 1, "permuted")
