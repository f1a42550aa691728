"""Executes recorded layers of TensorRT in plain torch, with the semantics of its documentation.

    results of 16-bit layers are computed in float32 and rounded once; ROUND and quantize round half to the even integer
    attention is softmax(Q K^T) V without a scale, over the places that the mask keeps
    a rotary embedding that is not interleaved turns the first half of the turned dims against the second
    a cache takes each sequence's new tokens from its write index on, where it lies; beyond its end nobody may write
    dequantize multiplies by the scale of the tensor, of the place along an axis, or of the block
    ALL_GATHER joins the ranks along dim 0

Sizes are those of the feeds, so what rules.py could not tell of unknown dims is found here. Knows no network of ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fake_tensorrt.rules import RULES
from fake_tensorrt.strict import ENUMS, ApiError
from fake_tensorrt.tensors import TORCH_DTYPES

Values = dict[int, torch.Tensor]  # by the id of the recorded tensor


def interpret(network: Any, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs by name; caches among the feeds are written to, and are the outputs of their updates."""
    return interpret_ranks([network], [feeds])[0]


def interpret_ranks(networks: Sequence[Any], feeds: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The outputs of each rank. The networks of the ranks are alike, layer by layer, as collectives need them to be."""
    for network in networks:
        network._check()
    values = [_read_feeds(*pair) for pair in zip(networks, feeds, strict=True)]
    for layers in zip(*map(_in_order, networks), strict=True):
        kinds = {layer.recorded_kind for layer in layers}
        if len(kinds) > 1:
            raise ApiError(f"layer {layers[0].name}: the ranks have {sorted(kinds)} there")
        operands = [_operands(*pair) for pair in zip(layers, values, strict=True)]
        if kinds == {"IDistCollectiveLayer"}:
            made = _collective(layers, [each[0] for each in operands])
        else:
            made = [_execute(*pair) for pair in zip(layers, operands, strict=True)]
        for layer, result, known in zip(layers, made, values, strict=True):
            known[id(layer.recorded_outputs[0])] = result
    return [
        {tensor.name: known[id(tensor)] for tensor in network.recorded_outputs}
        for network, known in zip(networks, values, strict=True)
    ]


def _in_order(network: Any) -> list[Any]:
    """The layers, each behind those that it reads: a layer may be given an input that was added after it."""
    order: dict[int, Any] = {}
    waiting = list(reversed(network.recorded_layers))
    while waiting:
        layer = waiting.pop()
        missing = [made for made in _makers(layer) if id(made) not in order]
        if missing:
            waiting += [layer, *reversed(missing)]
        else:
            order.setdefault(id(layer), layer)
    return list(order.values())


def _makers(layer: Any) -> list[Any]:
    return [tensor._layer for tensor in _tensors_read(layer) if tensor is not None and tensor._layer is not None]


def _tensors_read(layer: Any) -> list[Any]:
    """Inputs in order; attention's mask behind them."""
    return [*layer.recorded_inputs, *([layer.mask] if layer.recorded_kind == "IAttention" else [])]


def _read_feeds(network: Any, feeds: dict[str, torch.Tensor]) -> Values:
    names = {tensor.name for tensor in network.recorded_inputs}
    if names != set(feeds):
        raise ApiError(f"feeds are {sorted(feeds)}, expected {sorted(names)}")
    sizes: dict[str, int] = {}
    for tensor in network.recorded_inputs:
        value = feeds[tensor.name]
        if value.dtype != TORCH_DTYPES[tensor.dtype]:
            raise ApiError(f"{tensor.name} is fed {value.dtype}, expected {tensor.dtype.name}")
        found = list(value.shape)
        wanted = [
            dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            for dim, size in zip(tensor._dims, found, strict=False)
        ]
        if found != wanted or len(found) != len(tensor._dims):
            raise ApiError(f"{tensor.name} is fed {found}, expected {list(tensor._dims)}, that is {wanted}")
    return {id(tensor): feeds[tensor.name] for tensor in network.recorded_inputs}


def _operands(layer: Any, known: Values) -> list[torch.Tensor | None]:
    return [None if tensor is None else known[id(tensor)] for tensor in _tensors_read(layer)]


def _execute(layer: Any, operands: list[torch.Tensor | None]) -> torch.Tensor:
    output = layer.recorded_outputs[0]
    try:
        result = EXECUTE[layer.recorded_kind](layer, *operands)
    except (RuntimeError, IndexError) as error:
        raise ApiError(f"layer {layer.name} ({layer.recorded_kind}) cannot be executed: {error}") from error
    wanted = TORCH_DTYPES[output.dtype]
    assert result.dtype == wanted, f"layer {layer.name} gives {result.dtype}, by its rule {wanted}"
    found = tuple(result.shape)
    is_same = len(found) == len(output.shape) and all(b in (-1, a) for a, b in zip(found, output.shape, strict=True))
    assert is_same, f"layer {layer.name} gives {found}, by its rule {output._dims}"
    return result


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() else x


def constant(layer: Any) -> torch.Tensor:
    return layer._constant()


def gather(layer: Any, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    taken = data.index_select(layer.axis, indices.flatten().long())
    return taken.reshape(*data.shape[: layer.axis], *indices.shape, *data.shape[layer.axis + 1 :])


def matrix_multiply(layer: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    transpose = ENUMS["MatrixOperation"].TRANSPOSE
    wide = [
        _wide(x).transpose(-1, -2) if op == transpose else _wide(x) for x, op in ((left, layer.op0), (right, layer.op1))
    ]
    return (wide[0] @ wide[1]).to(left.dtype)


_ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "POW": torch.pow,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


def elementwise(layer: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if layer.op.name == "DIV" and not left.is_floating_point():
        return torch.div(left, right, rounding_mode="trunc")
    if layer.op.name == "FLOOR_DIV":
        return torch.div(_wide(left), _wide(right), rounding_mode="floor").to(left.dtype)
    function = torch.div if layer.op.name == "DIV" else _ELEMENTWISE[layer.op.name]
    result = function(_wide(left), _wide(right))
    return result if result.dtype == torch.bool else result.to(left.dtype)


_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ROUND": torch.round,  # half to even
    "NOT": torch.logical_not,
    "ERF": torch.erf,
    "SIGN": torch.sign,
}


def unary(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return _UNARY[layer.op.name](_wide(x)).to(x.dtype)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "RELU": torch.relu,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
}


def activation(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return _ACTIVATIONS[layer.type.name](_wide(x)).to(x.dtype)


def reduce(layer: Any, x: torch.Tensor) -> torch.Tensor:
    axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "SUM": torch.sum,
        "AVG": torch.mean,
        "MAX": torch.amax,
        "MIN": torch.amin,
    }
    return functions[layer.op.name](_wide(x), dim=axes, keepdim=layer.keep_dims).to(x.dtype)


def cast(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x.to(TORCH_DTYPES[layer.to_type])


def identity(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def shape(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def shuffle(layer: Any, x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
    if layer.first_transpose is not None:
        x = x.permute(tuple(layer.first_transpose))
    wanted = layer.reshape_dims if sizes is None else sizes.tolist()
    if wanted is not None:
        keeps = layer.zero_is_placeholder
        x = x.reshape([x.shape[axis] if dim == 0 and keeps else dim for axis, dim in enumerate(wanted)])
    return x if layer.second_transpose is None else x.permute(tuple(layer.second_transpose))


def slice_(layer: Any, x: torch.Tensor, *given: torch.Tensor | None) -> torch.Tensor:
    tensors = [*given, *[None] * (3 - len(given))]
    static = (layer.start, layer.shape, layer.stride)
    start, sizes, stride = (
        part if tensor is None else tensor.tolist() for part, tensor in zip(static, tensors, strict=True)
    )
    for axis, (first, size, step, length) in enumerate(zip(start, sizes, stride, x.shape, strict=True)):
        if first < 0 or first + (size - 1) * step >= length:
            raise ApiError(f"layer {layer.name}: dim {axis}: {size} from {first} on of {length}")
    return x[tuple(slice(a, a + n * step, step) for a, n, step in zip(start, sizes, stride, strict=True))]


def concatenation(layer: Any, *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, dim=layer.axis)


def select(layer: Any, condition: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, chosen, other)


def rotary_embedding(
    layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """x [B, H, S, D]; tables [B, S, turned / 2], or rows of tables chosen by positions [B, S]."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = _wide(cos)[:, None], _wide(sin)[:, None]
    turned = 2 * cos.shape[-1]
    wide, rest = _wide(x)[..., :turned], _wide(x)[..., turned:]
    if layer.interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        pair = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((pair, rest), dim=-1).to(x.dtype)


def kv_cache_update(layer: Any, cache: torch.Tensor, update: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    for sequence, first in enumerate(indices.tolist()):
        end = first + update.shape[2]
        if first < 0 or end > cache.shape[2]:
            raise ApiError(f"layer {layer.name}: places {first} to {end} of a cache of {cache.shape[2]} are written")
        cache[sequence, :, first:end] = update[sequence]
    return cache


def attention(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    wide_key, wide_value = (_wide(x).repeat_interleave(group, dim=1) for x in (key, value))
    scores = _wide(query) @ wide_key.transpose(-1, -2)
    rows = torch.arange(scores.shape[-2])[:, None]
    columns = torch.arange(scores.shape[-1])
    if layer.causal_kind.name == "UPPER_LEFT":
        scores = scores.masked_fill(columns > rows, -torch.inf)
    elif layer.causal_kind.name == "LOWER_RIGHT":
        scores = scores.masked_fill(columns > rows + scores.shape[-1] - scores.shape[-2], -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + _wide(mask)
    weights = scores.softmax(dim=-1) if layer.norm_op.name == "SOFTMAX" else scores
    return (weights @ wide_value).to(query.dtype)


def quantize(layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (_wide(x) / _wide(scale)).round().clamp(-128, 127).to(torch.int8)


def dequantize(layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = _wide(scale)
    if wide.dim() == 1 and len(wide) > 1 or layer.axis != -1 and wide.dim() == 1:
        wide = wide.view([-1 if axis == layer.axis else 1 for axis in range(x.dim())])
    elif wide.dim() > 1:
        for axis, (size, count) in enumerate(zip(x.shape, scale.shape, strict=True)):
            wide = wide.repeat_interleave(size // count, dim=axis)
    return (x.float() * wide).to(TORCH_DTYPES[layer.to_type])


def _collective(layers: Sequence[Any], operands: list[torch.Tensor]) -> list[torch.Tensor]:
    operation, reduction, _, groups = layers[0]._numbers
    if len(layers) != len(groups) or any(layer._numbers != layers[0]._numbers for layer in layers):
        raise ApiError(f"layer {layers[0].name}: {len(layers)} ranks are executed, its group is {groups}")
    if operation.name == "ALL_GATHER":
        return [torch.cat(operands)] * len(layers)
    functions: dict[str, Callable[..., torch.Tensor]] = {"SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin}
    stacked = torch.stack([_wide(x) for x in operands])
    return [functions[reduction.name](stacked, dim=0).to(operands[0].dtype)] * len(layers)


EXECUTE: dict[str, Callable[..., torch.Tensor]] = {
    "IConstantLayer": constant,
    "IGatherLayer": gather,
    "IMatrixMultiplyLayer": matrix_multiply,
    "IElementWiseLayer": elementwise,
    "IUnaryLayer": unary,
    "IActivationLayer": activation,
    "IReduceLayer": reduce,
    "ICastLayer": cast,
    "IIdentityLayer": identity,
    "IShapeLayer": shape,
    "IShuffleLayer": shuffle,
    "ISliceLayer": slice_,
    "IConcatenationLayer": concatenation,
    "ISelectLayer": select,
    "IRotaryEmbeddingLayer": rotary_embedding,
    "IKVCacheUpdateLayer": kv_cache_update,
    "IAttention": attention,
    "IQuantizeLayer": quantize,
    "IDequantizeLayer": dequantize,
}
assert EXECUTE.keys() | {"IDistCollectiveLayer"} == RULES.keys()
