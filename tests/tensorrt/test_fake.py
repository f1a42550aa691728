"""The stand-in refuses what TensorRT 11 does not have or allow, and says which layer, what it found and expected."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_tensorrt import ApiError, make_tensorrt
from fake_tensorrt.tensors import product, quotient

TRT = make_tensorrt()
D = TRT.DataType
TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.int32: "INT32", torch.int64: "INT64", torch.int8: "INT8"}


class Net:
    """A network with short names for what the cases below add."""

    def __init__(self) -> None:
        self.network = TRT.Builder(TRT.Logger(TRT.Logger.WARNING)).create_network(0)
        self.kept: list[torch.Tensor] = []
        self._count = 0

    def input(self, *dims: int | str, dtype: str = "FLOAT", name: str | None = None) -> Any:
        self._count += 1
        shape = tuple(-1 if isinstance(dim, str) else dim for dim in dims)
        tensor = self.network.add_input(name or f"in{self._count}", getattr(D, dtype), shape)
        for axis, dim in enumerate(dims):
            if isinstance(dim, str):
                tensor.set_dimension_name(axis, dim)
        return tensor

    def constant(self, values: Any, dtype: torch.dtype = torch.float32) -> Any:
        tensor = torch.as_tensor(values, dtype=dtype)
        self.kept.append(tensor)
        weights = TRT.Weights(getattr(D, TYPES[dtype]), tensor.data_ptr(), tensor.numel())
        return self.out(self.network.add_constant(tuple(tensor.shape), weights))

    def out(self, layer: Any) -> Any:
        self._count += 1
        layer.name = f"layer{self._count}"
        output = layer.get_output(0)
        output.name = f"tensor{self._count}"
        return output

    def shape(self, layer: Any) -> tuple[int, ...]:
        """Reads the layer, so that its rule is asked."""
        shape: tuple[int, ...] = self.out(layer).shape
        return shape


def matmul(n: Net, left: Any, right: Any, transpose: bool = True) -> Any:
    ops = TRT.MatrixOperation
    return n.network.add_matrix_multiply(left, ops.NONE, right, ops.TRANSPOSE if transpose else ops.NONE)


def shuffled(n: Net, x: Any, **attributes: Any) -> Any:
    layer = n.network.add_shuffle(x)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def scaled(n: Net, x: Any, scale: Any, axis: int | None = None, block_shape: Sequence[int] | None = None) -> Any:
    layer = n.network.add_dequantize(x, scale, D.FLOAT)
    if axis is not None:
        layer.axis = axis
    if block_shape is not None:
        layer.block_shape = tuple(block_shape)
    return layer


def attention(n: Net, heads: int = 4, kv_heads: int = 2, mask: Any = None, causal: str = "NONE") -> Any:
    query, key, value = (n.input("b", count, "s", 8) for count in (heads, kv_heads, kv_heads))
    kind = getattr(TRT.CausalMaskKind, causal)
    layer = n.network.add_attention_v2(query, key, value, TRT.AttentionNormalizationOp.SOFTMAX, kind)
    if mask is not None:
        layer.mask = mask
    return layer


def updated(n: Net, cache: Any, update: Any, indices: Any) -> Any:
    return n.network.add_kv_cache_update(cache, update, indices, TRT.KVCacheMode.LINEAR)


def rotated(n: Net, x: Any, width: int = 4, dim: int = 0, positions: Any = None, dtype: Any = torch.float32) -> Any:
    tables = [n.constant(torch.zeros(9, width), dtype) for _ in range(2)]
    layer = n.network.add_rotary_embedding(x, *tables, False, dim)
    layer.set_input(3, n.input("b", "s", dtype="INT64") if positions is None else positions)
    return layer


def gathered_by(n: Net, groups: list[int], reduction: str = "NONE", root: int = -1) -> Any:
    operation, reduce_op = TRT.CollectiveOperation.ALL_GATHER, getattr(TRT.ReduceOperation, reduction)
    return n.network.add_dist_collective(n.input(3, 4), operation, reduce_op, root, groups)


SUM, LESS = TRT.ElementWiseOperation.SUM, TRT.ElementWiseOperation.LESS
Case = Callable[[Net], Any]

# Each is read by its shape; the words are of the error.
REFUSED: dict[str, tuple[Case, str]] = {
    "sums of two dtypes": (
        lambda n: n.network.add_elementwise(n.input(2), n.input(2, dtype="HALF"), SUM),
        "several dtypes: in1 FLOAT, in2 HALF",
    ),
    "sums of two ranks": (lambda n: n.network.add_elementwise(n.input(2), n.input(1, 2), SUM), "different ranks"),
    "sums of two sizes": (lambda n: n.network.add_elementwise(n.input(2), n.input(3), SUM), "not known to be equal"),
    "sums of unknown sizes": (lambda n: n.network.add_elementwise(n.input("a"), n.input("b"), SUM), "'a', 'b'"),
    "sums of integers of 8 bits": (
        lambda n: n.network.add_elementwise(n.input(2, dtype="INT8"), n.input(2, dtype="INT8"), SUM),
        "is INT8, expected one of",
    ),
    "a conjunction of numbers": (
        lambda n: n.network.add_elementwise(n.input(2), n.input(2), TRT.ElementWiseOperation.AND),
        "is FLOAT, expected one of BOOL",
    ),
    "a product of other depths": (lambda n: matmul(n, n.input(2, 5), n.input(4, 3)), "inner dims of in1 and in2 are 5"),
    "a product of other batches": (lambda n: matmul(n, n.input(2, 2, 5), n.input(3, 4, 5)), "matrices of shapes"),
    "a product of integers": (
        lambda n: matmul(n, n.input(2, 5, dtype="INT32"), n.input(4, 5, dtype="INT32")),
        "is INT32, expected one of",
    ),
    "a product with a vector": (lambda n: matmul(n, n.input(2, 5), n.input(5)), "has rank 1, expected a matrix"),
    "a constant of other weights": (
        lambda n: n.network.add_constant((2, 3), TRT.Weights(D.FLOAT, n.kept.append(torch.zeros(5)) or 0, 5)),
        "has 6 values, the weights have 5",
    ),
    "indices that are floats": (lambda n: n.network.add_gather(n.input(3, 4), n.input(2), 0), "indices in2 is FLOAT"),
    "an axis that is not there": (
        lambda n: n.network.add_gather(n.input(3, 4), n.input(2, dtype="INT32"), 2),
        "axis is 2, expected one of a tensor of rank 2",
    ),
    "a root of integers": (
        lambda n: n.network.add_unary(n.input(2, dtype="INT32"), TRT.UnaryOperation.SQRT),
        "is INT32",
    ),
    "a mean over a dim too many": (
        lambda n: n.network.add_reduce(n.input(2, 3), TRT.ReduceOperation.AVG, 1 << 2, True),
        "axes are 100 as bits, expected some of 2 dims",
    ),
    "a mean over nothing": (
        lambda n: n.network.add_reduce(n.input(2, 3), TRT.ReduceOperation.AVG, 0, True),
        "axes are 0",
    ),
    "a cast to INT8": (lambda n: n.network.add_cast(n.input(2), D.INT8), "the result is INT8"),
    "a reshape to another size": (lambda n: shuffled(n, n.input(2, 3), reshape_dims=(4, 2)), "sizes differ"),
    "a reshape with two unknowns": (lambda n: shuffled(n, n.input(2, 3), reshape_dims=(-1, -1)), "several unknown"),
    "a reshape of unknown dims that cannot be told": (
        lambda n: shuffled(n, n.input("a", 6), reshape_dims=(4, -1)),
        "no whole number",
    ),
    "a transpose of other dims": (lambda n: shuffled(n, n.input(2, 3), first_transpose=(0, 2)), "a transpose by"),
    "a slice beyond the end": (lambda n: n.network.add_slice(n.input(5), (2,), (4,), (1,)), "dim 0: 4 from 2 of 5"),
    "a slice of other rank": (lambda n: n.network.add_slice(n.input(5, 2), (0,), (4,), (1,)), "a slice by"),
    "a slice of an unknown dim": (
        lambda n: n.network.add_slice(n.input("a"), (0,), (4,), (1,)),
        "not known to be inside",
    ),
    "parts of two dtypes": (
        lambda n: n.network.add_concatenation([n.input(2), n.input(2, dtype="HALF")]),
        "several dtypes",
    ),
    "parts of other sizes": (
        lambda n: n.network.add_concatenation([n.input(2, 3), n.input(2, 4)]),
        "dims 1 of what is joined are 4 and 3",
    ),
    "a choice by numbers": (
        lambda n: n.network.add_select(n.input(2), n.input(2), n.input(2)),
        "condition in1 is FLOAT, expected one of BOOL",
    ),
    "heads of an unknown size": (lambda n: rotated(n, n.input("b", 2, "s", "d")), "head size of in1 is d"),
    "tables of another width": (lambda n: rotated(n, n.input("b", 2, "s", 8), width=8), "expected .9, 4."),
    "tables of another dtype": (
        lambda n: rotated(n, n.input("b", 2, "s", 8), dtype=torch.float16),
        "several dtypes",
    ),
    "more turned than there is": (lambda n: rotated(n, n.input("b", 2, "s", 8), width=5, dim=10), "10 dims of 8"),
    "positions of 32 bits": (
        lambda n: rotated(n, n.input("b", 2, "s", 8), positions=n.input("b", "s", dtype="INT32")),
        "positions in2 is INT32|positions in\\d+ is INT32",
    ),
    "positions of another shape": (
        lambda n: rotated(n, n.input("b", 2, "s", 8), positions=n.input("s", "b", dtype="INT64")),
        "positions have shape",
    ),
    "a cache that is made": (
        lambda n: updated(
            n,
            n.out(n.network.add_identity(n.input("b", 2, 16, 8))),
            n.input("b", 2, "s", 8),
            n.input("b", dtype="INT32"),
        ),
        "is no input of the network",
    ),
    "a cache of an unknown length": (
        lambda n: updated(n, n.input("b", 2, "m", 8), n.input("b", 2, "s", 8), n.input("b", dtype="INT32")),
        "must be numbers",
    ),
    "an update of other heads": (
        lambda n: updated(n, n.input("b", 2, 16, 8), n.input("b", 4, "s", 8), n.input("b", dtype="INT32")),
        "heads of cache and update are 2 and 4",
    ),
    "write indices of another batch": (
        lambda n: updated(n, n.input("b", 2, 16, 8), n.input("b", 2, "s", 8), n.input("s", dtype="INT32")),
        "write indices have shape",
    ),
    "an update of another dtype": (
        lambda n: updated(
            n, n.input("b", 2, 16, 8), n.input("b", 2, "s", 8, dtype="HALF"), n.input("b", dtype="INT32")
        ),
        "several dtypes",
    ),
    "heads that do not divide": (lambda n: attention(n, 4, 3), "4 query heads over 3"),
    "a mask beside a causal one": (
        lambda n: attention(n, mask=n.input("b", 1, "s", "s", dtype="BOOL"), causal="UPPER_LEFT"),
        "a mask beside a causal mask",
    ),
    "a mask of integers": (
        lambda n: attention(n, mask=n.input("b", 1, "s", "s", dtype="INT32")),
        "the mask is INT32",
    ),
    "a mask of three dims": (
        lambda n: attention(n, mask=n.input("b", "s", "s", dtype="BOOL")),
        "the mask has shape",
    ),
    "a mask of one row for all queries": (
        lambda n: attention(n, mask=n.input("b", 1, 1, "s", dtype="BOOL")),
        "the mask has shape .*or 1 in place of sequences or heads",
    ),
    "more new tokens than places": (
        lambda n: updated(n, n.input("b", 2, 4, 8), n.input("b", 2, 5, 8), n.input("b", dtype="INT32")),
        "5 new tokens for a cache of 4 places",
    ),
    "a quantization by what is computed": (
        lambda n: n.network.add_quantize(n.input(2, 3), n.input(1), D.INT8),
        "the scale in2 is no constant",
    ),
    "a quantization by a scale of another dtype": (
        lambda n: n.network.add_quantize(n.input(2, 3), n.constant([0.5], torch.float16), D.INT8),
        "is HALF, expected FLOAT",
    ),
    "activations with a scale each": (
        lambda n: n.network.add_quantize(n.input(2, 3), n.constant([0.5, 0.5]), D.INT8),
        "activations have one scale",
    ),
    "a scale of zero": (lambda n: scaled(n, n.constant([[1]], torch.int8), n.constant(0.0)), "not positive"),
    "as many scales as columns along the rows": (
        lambda n: scaled(n, n.constant([[1, 2, 3]], torch.int8), n.constant([1.0, 1.0, 1.0]), axis=0),
        "are 3 and 1",
    ),
    "computed integers with scales of channels": (
        lambda n: scaled(n, n.input(2, 3, dtype="INT8"), n.constant([1.0, 1.0]), axis=0),
        "is no constant: only weights",
    ),
    "blocks of INT8": (
        lambda n: scaled(n, n.constant([[1, 2]], torch.int8), n.constant([[1.0]])),
        "only INT4 is scaled by blocks",
    ),
    "a group of one rank": (lambda n: gathered_by(n, [0]), "expected several"),
    "a rank twice": (lambda n: gathered_by(n, [0, 0]), "expected several, each once"),
    "a gather that sums": (lambda n: gathered_by(n, [0, 1], "SUM"), "an ALL_GATHER by"),
    "a root where there is none": (lambda n: gathered_by(n, [0, 1], root=0), "root is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_breaks_a_rule_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    net = Net()
    with pytest.raises(ApiError, match=words) as caught:
        net.shape(make(net))
    assert "layer layer" in str(caught.value), "the layer is named"


# Calls and attributes of another API
MISUSED: dict[str, tuple[Case, str]] = {
    "a keyword of another version": (
        lambda n: n.network.add_attention_v2(
            n.input("b", 1, "s", 8), n.input("b", 1, "s", 8), n.input("b", 1, "s", 8),
            TRT.AttentionNormalizationOp.SOFTMAX, causal=True,
        ),
        "got causal",
    ),
    "an argument too few": (lambda n: n.network.add_dequantize(n.input(2), n.input(1)), "needs output_type"),
    "an argument too many": (lambda n: n.network.add_identity(n.input(2), 1), "takes 1 arguments"),
    "an enum of another class": (
        lambda n: n.network.add_unary(n.input(2), SUM),
        "op is ElementWiseOperation.SUM, expected UnaryOperation",
    ),
    "a number for a member": (lambda n: n.network.add_unary(n.input(2), 2), "op is int, expected UnaryOperation"),
    "a truth for a number": (lambda n: n.network.add_gather(n.input(2), n.input(1), True), "axis is bool"),
    "a float in a shape": (lambda n: n.network.add_input("x", D.FLOAT, (2.0,)), "shape is tuple, expected Dims"),
    "a layer for a tensor": (lambda n: n.network.add_identity(n.network.add_identity(n.input(2))), "input is"),
    "a member that is not there": (lambda n: TRT.BuilderFlag.FP16, "BuilderFlag has no member FP16"),
    "a class that is not there": (lambda n: TRT.IInt8Calibrator, "tensorrt has no IInt8Calibrator"),
    "a dtype that is written": (lambda n: setattr(n.input(2), "dtype", D.HALF), "dtype cannot be written"),
    "a removed attribute": (
        lambda n: setattr(n.network.add_identity(n.input(2)), "precision", D.HALF),
        "IIdentityLayer has no attribute precision",
    ),
    "a flag of creation": (
        lambda n: TRT.Builder(TRT.Logger(TRT.Logger.WARNING)).create_network(1),
        "flags are 1",
    ),
    "an output twice": (
        lambda n: [n.network.mark_output(tensor) for tensor in [n.out(n.network.add_identity(n.input(2)))] * 2],
        "cannot be an output",
    ),
    "a tensor of another network": (lambda n: n.network.add_identity(Net().input(2)), "is of another network"),
    "a name for a known dim": (lambda n: n.input(2).set_dimension_name(0, "a"), "dim 0 cannot be named"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSED)
def test_what_is_not_of_the_api_is_refused(case: str) -> None:
    misuse, words = MISUSED[case]
    with pytest.raises(ApiError, match=words):
        misuse(Net())


def test_a_method_that_this_project_never_calls_says_so() -> None:
    net = Net()
    with pytest.raises(NotImplementedError, match="INetworkDefinition.add_softmax"):
        net.network.add_softmax(net.input(2))


# Dims


def test_unknown_dims_are_followed_through_layers() -> None:
    net = Net()
    x = net.input("batch", "length", 12)
    flat = net.out(shuffled(net, x, reshape_dims=(-1, 12)))
    assert flat._dims == ("batch*length", 12)
    shape = net.out(net.network.add_shape(x))
    parts = [net.out(net.network.add_slice(shape, (axis,), (1,), (1,))) for axis in (0, 1)]
    sizes = net.out(net.network.add_concatenation([*parts, net.constant([3, 4], torch.int64)]))
    layer = net.network.add_shuffle(flat)
    layer.set_input(1, sizes)
    layer.second_transpose = (0, 2, 1, 3)
    assert net.out(layer)._dims == ("batch", 3, "length", 4)


@pytest.mark.parametrize(
    ("whole", "part", "expected"),
    [
        (12, 4, 3),
        (12, 5, None),
        ("4*a*b", 2, "2*a*b"),
        ("a*b", "a", "b"),
        ("a*b", "c", None),
        ("a", 1, "a"),
        (5, 0, None),
    ],
)
def test_quotients_of_dims(whole: int | str, part: int | str, expected: int | str | None) -> None:
    assert quotient(whole, part) == expected


def test_products_of_dims_have_one_form() -> None:
    assert product(("b", 2, "a", 3)) == product(("a", 6, "b")) == "6*a*b"
    assert product((2, 0, "a")) == 0 and product(()) == 1


def test_a_change_is_seen_by_those_who_read_it_already() -> None:
    net = Net()
    layer = net.network.add_shuffle(net.input(2, 6))
    after = net.out(net.network.add_identity(net.out(layer)))
    assert after.shape == (2, 6)
    layer.reshape_dims = (3, 4)
    assert after.shape == (3, 4)


# Building and running


def finished(change: Callable[[Net, Any], None] | None = None) -> tuple[Net, Any, Any]:
    """A cache of which each step's rows are added, its sum, and a config with one profile."""
    net = Net()
    cache = net.input("b", 1, 4, 2, name="past")
    update, indices = net.input("b", 1, "s", 2, name="new"), net.input("b", dtype="INT32", name="at")
    layer = updated(net, cache, update, indices)
    present = net.out(layer)
    present.name = "present"
    net.network.mark_output(present)
    total = net.out(net.network.add_reduce(present, TRT.ReduceOperation.SUM, 0b1110, False))
    total.name = "total"
    net.network.mark_output(total)
    builder = TRT.Builder(TRT.Logger(TRT.Logger.WARNING))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(TRT.MemoryPoolType.WORKSPACE, 1 << 30)
    profile = builder.create_optimization_profile()
    profile.set_shape("past", (1, 1, 4, 2), (2, 1, 4, 2), (3, 1, 4, 2))
    profile.set_shape("new", (1, 1, 1, 2), (2, 1, 1, 2), (3, 1, 3, 2))
    profile.set_shape("at", (1,), (2,), (3,))
    if change:
        change(net, profile)
    config.add_optimization_profile(profile)
    return net, builder, config


UNBUILDABLE: dict[str, tuple[Callable[[Net, Any], None], str]] = {
    "a cache whose update is no output": (
        lambda n, p: n.out(
            updated(n, n.input(2, 1, 4, 2, name="more"), n.input(2, 1, 1, 2, name="m"), n.input(2, dtype="INT32"))
        ),
        "is no output of the network",
    ),
    "two layers of a name": (
        lambda n, p: setattr(n.network.add_identity(n.network.get_input(0)), "name", n.network.get_layer(0).name),
        "layers share the name",
    ),
    "two tensors of a name": (
        lambda n, p: setattr(n.out(n.network.add_identity(n.network.get_input(0))), "name", "new"),
        "tensors share the name new",
    ),
    "an input without shapes": (
        lambda n, p: n.out(n.network.add_identity(n.input("x", name="other"))),
        "profile 0 has no shapes of other",
    ),
    "shapes of no input": (lambda n, p: p.set_shape("nobody", (1,), (1,), (1,)), "nobody.*are no inputs"),
    "sizes of one name that differ": (lambda n, p: p.set_shape("at", (1,), (2,), (4,)), "where b is 3"),
    "a known dim of another size": (
        lambda n, p: p.set_shape("past", (1, 1, 4, 2), (2, 1, 4, 2), (3, 1, 5, 2)),
        "where 4 is 4",
    ),
    "more new tokens than places": (
        lambda n, p: p.set_shape("new", (1, 1, 1, 2), (2, 1, 1, 2), (3, 1, 5, 2)),
        "profile 0: 5 new tokens for past of 4 places",
    ),
    "weights that were changed": (
        lambda n, p: n.constant([1.0]) and n.kept[-1].fill_(2.0),
        "the memory of its weights was changed before the build",
    ),
    "ranks without a number": (lambda n, p: n.out(gathered_by(n, [0, 1])), "num_ranks is not set"),
}


@pytest.mark.parametrize("case", UNBUILDABLE)
def test_a_network_that_cannot_be_built_is_refused(case: str) -> None:
    change, words = UNBUILDABLE[case]
    net, builder, config = finished(change)
    with pytest.raises(ApiError, match=words):
        builder.build_serialized_network(net.network, config)


def test_profiles_and_a_workspace_are_wanted() -> None:
    net, builder, config = finished()
    empty = builder.create_builder_config()
    with pytest.raises(ApiError, match="the workspace has no limit"):
        builder.build_serialized_network(net.network, empty)
    empty.set_memory_pool_limit(TRT.MemoryPoolType.WORKSPACE, 1)
    with pytest.raises(ApiError, match="no optimization profile"):
        builder.build_serialized_network(net.network, empty)
    with pytest.raises(ApiError, match="do not grow"):
        builder.create_optimization_profile().set_shape("x", (2,), (1,), (3,))


def context_of(net: Net, builder: Any, config: Any) -> Any:
    serialized = builder.build_serialized_network(net.network, config)
    engine = TRT.Runtime(TRT.Logger(TRT.Logger.WARNING)).deserialize_cuda_engine(serialized)
    assert engine.get_aliased_input_tensor("present") == "past"
    context = engine.create_execution_context(TRT.ExecutionContextAllocationStrategy.STATIC)
    assert context.set_optimization_profile_async(0, 0)
    return context


def test_an_engine_writes_where_it_was_told() -> None:
    context = context_of(*finished())
    past, new = torch.zeros(2, 1, 4, 2), torch.arange(1.0, 9.0).view(2, 1, 2, 2)
    at, total = torch.tensor([0, 2], dtype=torch.int32), torch.full((2,), torch.nan)
    for name, tensor in {"past": past, "new": new, "at": at}.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in {"past": past, "present": past, "new": new, "at": at, "total": total}.items():
        assert context.set_tensor_address(name, tensor.data_ptr())
    assert context.execute_async_v3(0)
    assert past[:, 0].tolist() == [[[1, 2], [3, 4], [0, 0], [0, 0]], [[0, 0], [0, 0], [5, 6], [7, 8]]]
    assert total.tolist() == [10, 26]


def test_a_context_that_is_not_ready_does_not_run() -> None:
    context = context_of(*finished())
    with pytest.raises(ApiError, match="have no shape"):
        context.execute_async_v3(0)
    assert not context.set_input_shape("at", (4,)), "outside of the profile"
    for name, shape in {"past": (2, 1, 4, 2), "new": (2, 1, 1, 2), "at": (2,)}.items():
        context.set_input_shape(name, shape)
    with pytest.raises(ApiError, match="have no address"):
        context.execute_async_v3(0)
    memory = torch.zeros(64)
    for name in ("past", "new", "at", "total"):
        context.set_tensor_address(name, memory.data_ptr())
    context.set_tensor_address("present", memory.data_ptr() + 64)
    with pytest.raises(ApiError, match="different addresses"):
        context.execute_async_v3(0)


def test_what_is_no_plan_gives_no_engine() -> None:
    assert TRT.Runtime(TRT.Logger(TRT.Logger.WARNING)).deserialize_cuda_engine(b"something else") is None
