"""What each layer makes of its inputs, dtype and dims: the rules of strong typing, and those of the native LLM layers.

A rule takes a layer and gives (dtype, dims, values) of its output, or raises an ApiError that says what was found and
what was expected. `values` are those of a few integers that a shape may come from, else None. The rules are the
documentation's; where it leaves something open, the stricter reading is taken.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .strict import ENUMS, ApiError
from .tensors import FLOATS, INDICES, QUANTIZED, DataType, Dim, ITensor, product, quotient

Made = tuple[Any, tuple[Dim, ...], list[Dim] | None]
_MOST_VALUES = 16


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise ApiError(message)


def _is_one_of(tensor: ITensor, dtypes: Sequence[Any], what: str) -> None:
    names = ", ".join(dtype.name for dtype in dtypes)
    _expect(tensor.dtype in dtypes, f"{what} {tensor.name} is {tensor.dtype.name}, expected one of {names}")


def _have_one_dtype(tensors: Sequence[ITensor]) -> None:
    found = ", ".join(f"{tensor.name} {tensor.dtype.name}" for tensor in tensors)
    _expect(len({tensor.dtype for tensor in tensors}) == 1, f"operands of several dtypes: {found}")


def _axis(axis: int, rank: int) -> int:
    _expect(0 <= axis < rank, f"axis is {axis}, expected one of a tensor of rank {rank}")
    return axis


def _same(left: Dim, right: Dim, what: str) -> None:
    _expect(left == right, f"{what} are {left} and {right}, which are not known to be equal")


def broadcast(shapes: Sequence[tuple[Dim, ...]], what: str) -> tuple[Dim, ...]:
    _expect(len({len(dims) for dims in shapes}) == 1, f"{what} of different ranks: {list(shapes)}")
    merged = []
    for dims in zip(*shapes, strict=True):
        wide = sorted({dim for dim in dims if dim != 1}, key=str)
        _expect(len(wide) <= 1, f"{what} of shapes {list(shapes)} do not fit: {wide} are not known to be equal")
        merged.append(wide[0] if wide else 1)
    return tuple(merged)


def constant(layer: Any) -> Made:
    weights, dims = layer.weights, tuple(layer.shape)
    _expect(all(dim >= 0 for dim in dims), f"a constant of shape {dims}")
    _expect(product(dims) == weights.size, f"shape {dims} has {product(dims)} values, the weights have {weights.size}")
    values = None
    if weights.dtype in INDICES and weights.size <= _MOST_VALUES:
        values = layer._constant().flatten().tolist()
    return weights.dtype, dims, values


def gather(layer: Any) -> Made:
    data, indices = layer._operands(2)
    _is_one_of(indices, INDICES, "indices")
    _expect(data.dtype not in QUANTIZED, f"{data.name} is {data.dtype.name}, which only quantize layers know")
    _expect(layer.num_elementwise_dims == 0, "elementwise dims of a gather are not used here")
    axis = _axis(layer.axis, len(data._dims))
    return data.dtype, data._dims[:axis] + indices._dims + data._dims[axis + 1 :], None


def matrix_multiply(layer: Any) -> Made:
    left, right = layer._operands(2)
    _have_one_dtype((left, right))
    _is_one_of(left, FLOATS, "operand")
    operations = ENUMS["MatrixOperation"]
    for tensor in (left, right):
        _expect(len(tensor._dims) >= 2, f"{tensor.name} has rank {len(tensor._dims)}, expected a matrix")
    _expect(operations.VECTOR not in (layer.op0, layer.op1), "operations on vectors are not used here")
    (rows, inner), (other_inner, columns) = (
        tensor._dims[-2:] if op == operations.NONE else tensor._dims[:-3:-1]
        for tensor, op in ((left, layer.op0), (right, layer.op1))
    )
    _same(inner, other_inner, f"inner dims of {left.name} and {right.name}")
    return left.dtype, (*broadcast((left._dims[:-2], right._dims[:-2]), "matrices"), rows, columns), None


def elementwise(layer: Any) -> Made:
    left, right = layer._operands(2)
    _have_one_dtype((left, right))
    op, operations = layer.op, ENUMS["ElementWiseOperation"]
    if op in (operations.AND, operations.OR, operations.XOR):
        _is_one_of(left, (DataType.BOOL,), "operand")
    elif op == operations.EQUAL:
        _is_one_of(left, (*FLOATS, *INDICES, DataType.BOOL), "operand")
    elif op == operations.POW:
        _is_one_of(left, FLOATS, "operand")
    else:
        _is_one_of(left, (*FLOATS, *INDICES), "operand")
    is_comparison = op in (operations.EQUAL, operations.GREATER, operations.LESS)
    dims = broadcast((left._dims, right._dims), f"operands {left.name} and {right.name}")
    return DataType.BOOL if is_comparison else left.dtype, dims, None


def unary(layer: Any) -> Made:
    (x,) = layer._operands(1)
    operations = ENUMS["UnaryOperation"]
    _is_one_of(x, (DataType.BOOL,) if layer.op == operations.NOT else FLOATS, "operand")
    return x.dtype, x._dims, None


def activation(layer: Any) -> Made:
    (x,) = layer._operands(1)
    _is_one_of(x, FLOATS, "operand")
    return x.dtype, x._dims, None


def reduce(layer: Any) -> Made:
    (x,) = layer._operands(1)
    is_average = layer.op == ENUMS["ReduceOperation"].AVG
    _is_one_of(x, FLOATS if is_average else (*FLOATS, *INDICES), "operand")
    _expect(layer.op != ENUMS["ReduceOperation"].NONE, "a reduction by NONE")
    rank = len(x._dims)
    _expect(0 < layer.axes < 1 << rank, f"axes are {layer.axes:b} as bits, expected some of {rank} dims")
    is_reduced = [bool(layer.axes >> axis & 1) for axis in range(rank)]
    if layer.keep_dims:
        return x.dtype, tuple(1 if gone else dim for dim, gone in zip(x._dims, is_reduced, strict=True)), None
    return x.dtype, tuple(dim for dim, gone in zip(x._dims, is_reduced, strict=True) if not gone), None


def cast(layer: Any) -> Made:
    (x,) = layer._operands(1)
    for dtype, what in ((x.dtype, x.name), (layer.to_type, "the result")):
        _expect(dtype not in QUANTIZED, f"{what} is {dtype.name}, which only quantize layers know")
    return layer.to_type, x._dims, x._values if layer.to_type in INDICES else None


def identity(layer: Any) -> Made:
    (x,) = layer._operands(1)
    return x.dtype, x._dims, x._values


def shape(layer: Any) -> Made:
    (x,) = layer._operands(1)
    return DataType.INT64, (len(x._dims),), list(x._dims)


def _shape_values(tensor: ITensor, rank: int | None, what: str) -> list[Dim]:
    _is_one_of(tensor, INDICES, what)
    _expect(len(tensor._dims) == 1, f"{what} {tensor.name} has rank {len(tensor._dims)}, expected 1")
    _expect(tensor._values is not None, f"{what} {tensor.name} comes from no shape and no constant")
    assert tensor._values is not None
    _expect(
        rank in (None, len(tensor._values)), f"{what} {tensor.name} has {len(tensor._values)} dims, expected {rank}"
    )
    return tensor._values


def shuffle(layer: Any) -> Made:
    x = layer._operands(None)[0]
    dims = _permuted(x._dims, layer.first_transpose)
    values = x._values
    wanted: Sequence[Dim] | None = layer.reshape_dims
    if len(layer._inputs) > 1:
        _expect(wanted is None, "reshape_dims and a tensor of them")
        wanted = _shape_values(layer._inputs[1], None, "the shape")
    if wanted is not None:
        dims = _reshaped(dims, wanted, layer.zero_is_placeholder)
    return x.dtype, _permuted(dims, layer.second_transpose), values if len(dims) <= 1 else None


def _permuted(dims: tuple[Dim, ...], order: Sequence[int] | None) -> tuple[Dim, ...]:
    if order is None:
        return dims
    _expect(sorted(order) == list(range(len(dims))), f"a transpose by {tuple(order)} of {len(dims)} dims")
    return tuple(dims[axis] for axis in order)


def _reshaped(dims: tuple[Dim, ...], wanted: Sequence[Dim], zero_is_placeholder: bool) -> tuple[Dim, ...]:
    new: list[Dim] = []
    for axis, dim in enumerate(wanted):
        if dim == 0 and zero_is_placeholder:
            _expect(axis < len(dims), f"dim {axis} of {list(wanted)} stands for one that {list(dims)} has not")
            new.append(dims[axis])
        else:
            new.append(dim)
    unknown = [axis for axis, dim in enumerate(new) if dim == -1]
    _expect(len(unknown) <= 1, f"a shape {list(wanted)} with several unknown dims")
    if unknown:
        rest = quotient(product(dims), product([dim for dim in new if dim != -1]))
        _expect(rest is not None, f"{list(dims)} has no whole number of {list(wanted)}")
        assert rest is not None
        new[unknown[0]] = rest
    _expect(product(tuple(new)) == product(dims), f"{list(dims)} in the shape {list(wanted)}: sizes differ")
    return tuple(new)


def slice_(layer: Any) -> Made:
    x = layer._operands(None)[0]
    rank = len(x._dims)
    parts: list[Sequence[Dim]] = []
    for index, static in ((1, layer.start), (2, layer.shape), (3, layer.stride)):
        _expect(len(static) == rank, f"a slice by {tuple(static)} of {rank} dims")
        given = layer._inputs[index] if len(layer._inputs) > index else None
        parts.append(static if given is None else _shape_values(given, rank, "a part of the slice"))
    start, sizes, stride = parts
    for axis, (first, size, step, dim) in enumerate(zip(start, sizes, stride, x._dims, strict=True)):
        _expect(isinstance(step, int) and step > 0, f"a stride of {step} in dim {axis}")
        if size == dim and first == 0 and step == 1:
            continue
        _expect(
            isinstance(first, int) and isinstance(size, int) and isinstance(dim, int),
            f"dim {axis}: {size} from {first} on of {dim} is not known to be inside",
        )
        assert isinstance(first, int) and isinstance(size, int) and isinstance(dim, int) and isinstance(step, int)
        _expect(
            first >= 0 and size >= 0 and first + (size - 1) * step < dim, f"dim {axis}: {size} from {first} of {dim}"
        )
    values = None
    if x._values is not None and rank == 1 and all(isinstance(part[0], int) for part in parts):
        first, size, step = (int(part[0]) for part in parts)
        values = x._values[first : first + size * step : step]
    return x.dtype, tuple(sizes), values


def concatenation(layer: Any) -> Made:
    tensors = layer._operands(None)
    _have_one_dtype(tensors)
    _expect(tensors[0].dtype not in QUANTIZED, f"{tensors[0].dtype.name} is for quantize layers only")
    rank = len(tensors[0]._dims)
    axis = _axis(layer.axis, rank)
    for tensor in tensors:
        _expect(len(tensor._dims) == rank, f"{tensor.name} has rank {len(tensor._dims)}, the first has {rank}")
        for other in range(rank):
            if other != axis:
                _same(tensor._dims[other], tensors[0]._dims[other], f"dims {other} of what is joined")
    sizes = [tensor._dims[axis] for tensor in tensors]
    _expect(all(isinstance(size, int) for size in sizes), f"unknown sizes {sizes} are joined")
    dims = (*tensors[0]._dims[:axis], sum(int(size) for size in sizes), *tensors[0]._dims[axis + 1 :])
    parts = [tensor._values for tensor in tensors]
    is_known = rank == 1 and all(part is not None for part in parts)
    return tensors[0].dtype, dims, [value for part in parts for value in part or ()] if is_known else None


def select(layer: Any) -> Made:
    condition, chosen, other = layer._operands(3)
    _is_one_of(condition, (DataType.BOOL,), "condition")
    _have_one_dtype((chosen, other))
    return chosen.dtype, broadcast((condition._dims, chosen._dims, other._dims), "operands"), None


def rotary_embedding(layer: Any) -> Made:
    x, cos, sin = layer._operands(None)[:3]
    _is_one_of(x, FLOATS, "operand")
    _have_one_dtype((x, cos, sin))
    _expect(len(x._dims) == 4, f"{x.name} has shape {x._dims}, expected [batch, heads, length, head size]")
    batch, _, length, head_size = x._dims
    _expect(isinstance(head_size, int), f"the head size of {x.name} is {head_size}, expected a number")
    rotary_dim = layer.rotary_embedding_dim or head_size
    _expect(0 < rotary_dim <= head_size and rotary_dim % 2 == 0, f"{rotary_dim} dims of {head_size} are turned")
    positions = layer._inputs[3] if len(layer._inputs) > 3 else None
    wanted: tuple[Dim, ...] = (batch, length, rotary_dim // 2)
    if positions is not None:
        _is_one_of(positions, (DataType.INT64,), "positions")
        _expect(
            positions._dims == (batch, length), f"positions have shape {positions._dims}, expected {(batch, length)}"
        )
        wanted = (cos._dims[0], rotary_dim // 2)
    for table in (cos, sin):
        _expect(table._dims == wanted, f"{table.name} has shape {table._dims}, expected {wanted}")
    return x.dtype, x._dims, None


def kv_cache_update(layer: Any) -> Made:
    cache, update, indices = layer._operands(3)
    _expect(cache.is_network_input, f"the cache {cache.name} is no input of the network")
    _have_one_dtype((cache, update))
    _is_one_of(cache, FLOATS, "the cache")
    _is_one_of(indices, INDICES, "write indices")
    _expect(
        len(cache._dims) == len(update._dims) == 4, f"cache {cache._dims} and update {update._dims}, expected 4 dims"
    )
    batch, heads, places, head_size = cache._dims
    _expect(
        all(isinstance(dim, int) for dim in (heads, places, head_size)),
        f"the cache {cache.name} has shape {cache._dims}: heads, places and head size must be numbers",
    )
    for axis, name in ((0, "sequences"), (1, "heads"), (3, "head sizes")):
        _same(cache._dims[axis], update._dims[axis], f"{name} of cache and update")
    length = update._dims[2]
    _expect(isinstance(length, str) or length <= places, f"{length} new tokens for a cache of {places} places")  # type: ignore[operator]
    _expect(indices._dims == (batch,), f"write indices have shape {indices._dims}, expected {(batch,)}")
    return cache.dtype, cache._dims, None


def attention(layer: Any) -> Made:
    query, key, value = layer._operands(3)
    _have_one_dtype((query, key, value))
    _is_one_of(query, FLOATS, "operand")
    for tensor in (query, key, value):
        _expect(len(tensor._dims) == 4, f"{tensor.name} has shape {tensor._dims}, expected 4 dims")
        heads, head_size = tensor._dims[1], tensor._dims[3]
        is_static = isinstance(heads, int) and isinstance(head_size, int)
        _expect(is_static, f"{tensor.name} has shape {tensor._dims}: heads and head size must be numbers")
    _expect(key._dims == value._dims, f"keys have shape {key._dims}, values {value._dims}")
    _same(query._dims[0], key._dims[0], "sequences of queries and keys")
    _same(query._dims[3], key._dims[3], "head sizes of queries and keys")
    num_heads, num_kv_heads = query._dims[1], key._dims[1]
    _expect(num_heads % num_kv_heads == 0, f"{num_heads} query heads over {num_kv_heads} of keys")  # type: ignore[operator]
    mask = layer.mask
    if mask is not None:
        none = ENUMS["CausalMaskKind"].NONE
        _expect(layer.causal_kind == none, "a mask beside a causal mask")
        _expect(mask.dtype in (DataType.BOOL, query.dtype), f"the mask is {mask.dtype.name}")
        scores = (query._dims[0], num_heads, query._dims[2], key._dims[2])
        fits = len(mask._dims) == 4 and mask._dims[2:] == scores[2:]
        fits = fits and mask._dims[0] in (1, scores[0]) and mask._dims[1] in (1, num_heads)
        _expect(fits, f"the mask has shape {mask._dims}, expected {scores}, or 1 in place of sequences or heads")
    for name in ("query_lengths", "key_value_lengths", "normalization_quantize_scale"):
        _expect(getattr(layer, name) is None, f"{name} is set, which the fake does not know")
    return query.dtype, query._dims, None


def _check_scale(scale: ITensor, dtype: Any) -> None:
    _expect(scale.dtype == dtype, f"the scale {scale.name} is {scale.dtype.name}, expected {dtype.name}")
    _expect(scale._is_constant, f"the scale {scale.name} is no constant")
    _expect(bool((scale._layer._constant() > 0).all()), f"the scale {scale.name} is not positive everywhere")


def quantize(layer: Any) -> Made:
    x, scale = layer._operands(2)
    _is_one_of(x, FLOATS, "operand")
    _expect(layer.to_type == DataType.INT8, f"a result of {layer.to_type.name}, expected INT8")
    _check_scale(scale, x.dtype)
    _expect(scale._dims in ((), (1,)), f"activations have one scale, {scale.name} has shape {scale._dims}")
    return DataType.INT8, x._dims, None


def dequantize(layer: Any) -> Made:
    x, scale = layer._operands(2)
    _is_one_of(x, (DataType.INT8, DataType.INT4), "operand")
    _expect(layer.to_type in FLOATS, f"a result of {layer.to_type.name}, expected floats")
    _check_scale(scale, layer.to_type)
    if scale._dims in ((), (1,)) and len(x._dims) != 1:
        _expect(layer.axis == -1 or not scale._dims, "one scale and an axis")
        return layer.to_type, x._dims, None
    _expect(x._is_constant, f"{x.name} is no constant: only weights have more than one scale")
    if len(scale._dims) == 1:
        axis = _axis(layer.axis, len(x._dims))
        _same(scale._dims[0], x._dims[axis], f"the scales and dim {axis} of {x.name}")
        return layer.to_type, x._dims, None
    _check_blocks(x, scale, layer.block_shape)
    return layer.to_type, x._dims, None


def _check_blocks(x: ITensor, scale: ITensor, block_shape: Sequence[int] | None) -> None:
    _expect(x.dtype == DataType.INT4, f"{x.name} is {x.dtype.name}: only INT4 is scaled by blocks")
    _expect(len(scale._dims) == len(x._dims) == 2, f"scales {scale._dims} of {x._dims}, expected two matrices")
    blocks = []
    for axis, (size, count) in enumerate(zip(x._dims, scale._dims, strict=True)):
        assert isinstance(size, int) and isinstance(count, int), "constants have numbers"
        _expect(count > 0 and size % count == 0, f"dim {axis}: {size} values for {count} scales")
        blocks.append(size // count)
    _expect(sum(block > 1 for block in blocks) <= 1, f"blocks of {blocks}: one dim may be blocked")
    if block_shape is not None:
        given = [size if block == -1 else block for block, size in zip(block_shape, x._dims, strict=True)]
        _expect(given == blocks, f"block_shape is {tuple(block_shape)}, the scales make {tuple(blocks)}")


def dist_collective(layer: Any) -> Made:
    (x,) = layer._operands(1)
    _is_one_of(x, FLOATS, "operand")
    operations, reductions = ENUMS["CollectiveOperation"], ENUMS["ReduceOperation"]
    op, reduction, root, groups = layer._numbers
    _expect(len(groups) > 1 and sorted(set(groups)) == sorted(groups), f"ranks {groups}: expected several, each once")
    _expect(layer.num_ranks in (None, len(groups)), f"num_ranks is {layer.num_ranks}, the group has {len(groups)}")
    _expect(root == -1, f"root is {root}, expected -1 for an operation without one")
    if op == operations.ALL_REDUCE:
        _expect(reduction != reductions.NONE, "an ALL_REDUCE by NONE")
        return x.dtype, x._dims, None
    _expect(op == operations.ALL_GATHER, f"{op} is not used here")
    _expect(reduction == reductions.NONE, f"an ALL_GATHER by {reduction}, expected NONE")
    return x.dtype, (product((len(groups), x._dims[0])), *x._dims[1:]), None


RULES: dict[str, Callable[[Any], Made]] = {
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
    "IDistCollectiveLayer": dist_collective,
}
