"""Each recorded layer, executed, gives what its documentation says: plain torch, odd sizes, fresh numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_tensorrt import ApiError
from interpreter import interpret, interpret_ranks
from test_fake import TRT, D, Net, gathered_by, matmul, rotated, scaled, updated

Feeds = dict[str, torch.Tensor]


def result(net: Net, output: Any, feeds: Feeds) -> torch.Tensor:
    if not output.is_network_output:
        net.network.mark_output(output)
    return interpret(net.network, feeds)[output.name]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_gather_takes_slices_along_an_axis_by_indices_of_any_rank() -> None:
    net, data = Net(), torch.randn(3, 5, 2)
    indices = torch.randint(0, 5, (2, 4), dtype=torch.int32)
    output = net.out(net.network.add_gather(net.input(3, 5, 2), net.input("a", "b", dtype="INT32"), 1))
    assert_same(result(net, output, {"in1": data, "in2": indices}), data[:, indices.long()])


@pytest.mark.parametrize("transpose", [False, True])
def test_matrices_of_16_bits_are_summed_in_float32_and_rounded_once(transpose: bool) -> None:
    net, left = Net(), torch.randn(2, 3, 700).half()
    right = torch.randn(1, 5, 700).half()
    given = right if transpose else right.transpose(1, 2).contiguous()
    x, w = net.input(2, 3, 700, dtype="HALF"), net.input(*given.shape, dtype="HALF")
    exact = left.double() @ right.double().transpose(1, 2)
    found = result(net, net.out(matmul(net, x, w, transpose)), {"in1": left, "in2": given})
    # Half a unit of float16; a sum of 700 products in float32 is off by a thousandth of that.
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * 2**-11, atol=2e-4)


OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "SUB": torch.sub, "DIV": torch.div, "MAX": torch.maximum,
    "MIN": torch.minimum, "POW": torch.pow, "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
    "FLOOR_DIV": torch.floor_divide,
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_elementwise_layers_repeat_dims_of_one(operation: str) -> None:
    net, left, right = Net(), torch.rand(3, 1, 4) + 0.5, torch.rand(1, 5, 4) + 0.5
    op = getattr(TRT.ElementWiseOperation, operation)
    output = net.out(net.network.add_elementwise(net.input(3, 1, 4), net.input(1, 5, 4), op))
    assert_same(result(net, output, {"in1": left, "in2": right}), OPERATIONS[operation](left, right))


def test_a_division_of_integers_is_cut() -> None:
    net, (left, right) = Net(), (torch.tensor([7, -7], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    x, y = net.input(2, dtype="INT32"), net.input(2, dtype="INT32")
    output = net.out(net.network.add_elementwise(x, y, TRT.ElementWiseOperation.DIV))
    assert result(net, output, {"in1": left, "in2": right}).tolist() == [3, -3]


def test_bits_are_combined() -> None:
    for operation, wanted in (
        ("AND", [True, False, False]),
        ("OR", [True, True, False]),
        ("XOR", [False, True, False]),
    ):
        net = Net()
        x, y = net.input(3, dtype="BOOL"), net.input(3, dtype="BOOL")
        output = net.out(net.network.add_elementwise(x, y, getattr(TRT.ElementWiseOperation, operation)))
        feeds = {"in1": torch.tensor([True, True, False]), "in2": torch.tensor([True, False, False])}
        assert result(net, output, feeds).tolist() == wanted


@pytest.mark.parametrize("operation", ["SQRT", "RECIP", "EXP", "LOG", "ABS", "NEG", "ROUND", "ERF", "SIN", "COS"])
def test_unary_layers(operation: str) -> None:
    net, x = Net(), torch.rand(7) + 0.1
    functions = {"RECIP": torch.reciprocal, "ROUND": torch.round}
    wanted = functions.get(operation, getattr(torch, operation.lower(), None))
    assert wanted is not None
    output = net.out(net.network.add_unary(net.input(7), getattr(TRT.UnaryOperation, operation)))
    assert_same(result(net, output, {"in1": x}), wanted(x))


def test_halves_are_rounded_to_the_even_integer() -> None:
    net = Net()
    output = net.out(net.network.add_unary(net.input(4), TRT.UnaryOperation.ROUND))
    assert result(net, output, {"in1": torch.tensor([0.5, 1.5, 2.5, -0.5])}).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("kind", ["SIGMOID", "TANH", "RELU"])
def test_activations_of_16_bits_are_computed_in_float32(kind: str) -> None:
    net, x = Net(), torch.randn(9).bfloat16()
    output = net.out(net.network.add_activation(net.input(9, dtype="BF16"), getattr(TRT.ActivationType, kind)))
    wanted = getattr(torch, kind.lower())(x.float()).bfloat16()
    assert torch.equal(result(net, output, {"in1": x}), wanted)


@pytest.mark.parametrize("keep_dims", [False, True])
@pytest.mark.parametrize(("operation", "function"), [("AVG", torch.mean), ("SUM", torch.sum), ("MAX", torch.amax)])
def test_reductions_over_the_dims_of_a_bit_mask(operation: str, function: Any, keep_dims: bool) -> None:
    net, x = Net(), torch.randn(2, 3, 4)
    op = getattr(TRT.ReduceOperation, operation)
    output = net.out(net.network.add_reduce(net.input(2, 3, 4), op, 0b101, keep_dims))
    assert_same(result(net, output, {"in1": x}), function(x, dim=(0, 2), keepdim=keep_dims))


def test_a_shuffle_transposes_reshapes_and_transposes() -> None:
    net, x = Net(), torch.randn(2, 3, 8)
    layer = net.network.add_shuffle(net.input(2, 3, 8))
    layer.first_transpose, layer.reshape_dims, layer.second_transpose = (1, 0, 2), (0, -1, 4), (2, 0, 1)
    wanted = x.permute(1, 0, 2).reshape(3, 4, 4).permute(2, 0, 1)
    assert torch.equal(result(net, net.out(layer), {"in1": x}), wanted)


def test_sizes_may_be_those_of_the_step() -> None:
    net, x = Net(), torch.randn(5, 6)
    tensor = net.input("a", 6)
    shape = net.out(net.network.add_shape(tensor))
    first = net.out(net.network.add_slice(shape, (0,), (1,), (1,)))
    sizes = net.out(net.network.add_concatenation([first, net.constant([2, 3], torch.int64)]))
    layer = net.network.add_shuffle(tensor)
    layer.set_input(1, sizes)
    cut = net.network.add_slice(net.out(layer), (0, 1, 0), (0, 1, 3), (1, 1, 1))
    rest = net.out(net.network.add_concatenation([first, net.constant([1, 3], torch.int64)]))
    cut.set_input(2, rest)
    assert torch.equal(result(net, net.out(cut), {"in1": x}), x.view(5, 2, 3)[:, 1:])


def test_slices_have_strides() -> None:
    net, x = Net(), torch.randn(9, 2)
    output = net.out(net.network.add_slice(net.input(9, 2), (1, 0), (3, 2), (3, 1)))
    assert torch.equal(result(net, output, {"in1": x}), x[1:8:3])


def test_parts_are_joined_along_the_axis() -> None:
    net, x, y = Net(), torch.randn(2, 3), torch.randn(2, 1)
    layer = net.network.add_concatenation([net.input(2, 3), net.input(2, 1)])
    layer.axis = 1
    assert torch.equal(result(net, net.out(layer), {"in1": x, "in2": y}), torch.cat((x, y), dim=1))


def test_a_condition_chooses() -> None:
    net, x, y = Net(), torch.randn(2, 3), torch.randn(2, 3)
    condition = torch.tensor([[True, False, True]])
    output = net.out(net.network.add_select(net.input(1, 3, dtype="BOOL"), net.input(2, 3), net.input(2, 3)))
    assert torch.equal(result(net, output, {"in1": condition, "in2": x, "in3": y}), torch.where(condition, x, y))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [0, 6])
def test_a_rotation_multiplies_pairs_as_complex_numbers(dim: int, interleaved: bool) -> None:
    net, x = Net(), torch.randn(2, 3, 5, 8)
    half = (dim or 8) // 2
    angles = torch.randn(9, half)
    positions = torch.randint(0, 9, (2, 5))
    cos, sin = net.constant(angles.cos()), net.constant(angles.sin())
    layer = net.network.add_rotary_embedding(net.input("b", 3, "s", 8), cos, sin, interleaved, dim)
    layer.set_input(3, net.input("b", "s", dtype="INT64"))
    turn = torch.polar(torch.ones(2, 5, half), angles[positions])[:, None]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = torch.view_as_complex(turned.unflatten(-1, (half, 2)).contiguous()) * turn
        wanted = torch.cat((torch.view_as_real(pairs).flatten(-2), rest), dim=-1)
    else:
        pairs = torch.complex(turned[..., :half], turned[..., half:]) * turn
        wanted = torch.cat((pairs.real, pairs.imag, rest), dim=-1)
    names = [tensor.name for tensor in net.network.recorded_inputs]
    assert_same(result(net, net.out(layer), dict(zip(names, (x, positions), strict=True))), wanted)


def test_a_cache_is_written_where_it_lies_from_each_index_on() -> None:
    net = Net()
    cache, new = torch.zeros(3, 2, 6, 4), torch.randn(3, 2, 2, 4)
    at = torch.tensor([0, 3, 4])
    output = net.out(updated(net, net.input("b", 2, 6, 4), net.input("b", 2, "s", 4), net.input("b", dtype="INT64")))
    found = result(net, output, {"in1": cache, "in2": new, "in3": at})
    assert found.data_ptr() == cache.data_ptr()
    wanted = torch.zeros(3, 2, 6, 4)
    wanted[0, :, :2], wanted[1, :, 3:5], wanted[2, :, 4:] = new
    assert torch.equal(cache, wanted)
    with pytest.raises(ApiError, match="places 5 to 7 of a cache of 6 are written"):
        result(net, output, {"in1": cache, "in2": new, "in3": at + 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["none", "bool", "number", "UPPER_LEFT", "LOWER_RIGHT"])
def test_attention_has_no_scale_and_sees_what_the_mask_keeps(form: str, dtype: torch.dtype) -> None:
    net = Net()
    query, key, value = (torch.randn(2, heads, length, 8).to(dtype) for heads, length in ((4, 3), (2, 7), (2, 7)))
    name = "FLOAT" if dtype == torch.float32 else "HALF"
    inputs = [
        net.input("b", heads, length, 8, dtype=name, name=side)
        for side, heads, length in (("q", 4, "s"), ("k", 2, "n"), ("v", 2, "n"))
    ]
    kind = getattr(TRT.CausalMaskKind, form if form.isupper() else "NONE")
    layer = net.network.add_attention_v2(*inputs, TRT.AttentionNormalizationOp.SOFTMAX, kind)
    feeds = {"q": query, "k": key, "v": value}
    mask: torch.Tensor | None = None
    if form == "bool":
        mask = torch.rand(2, 1, 3, 7) > 0.4
        mask[..., 0] = True
    elif form == "number":
        mask = torch.randn(2, 1, 3, 7).to(dtype)
    elif form.isupper():
        mask = torch.ones(3, 7, dtype=torch.bool).tril(0 if form == "UPPER_LEFT" else 4)
    if form in ("bool", "number"):
        assert mask is not None
        layer.mask = net.input("b", 1, "s", "n", dtype="BOOL" if form == "bool" else name, name="mask")
        feeds["mask"] = mask
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    wanted = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=wide_mask, scale=1.0, enable_gqa=True
    )
    found = result(net, net.out(layer), feeds)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_activations_are_rounded_to_steps_and_cut() -> None:
    net = Net()
    output = net.out(net.network.add_quantize(net.input(5), net.constant(0.5), D.INT8))
    x = torch.tensor([0.25, 0.75, -1.3, 100.0, -100.0])
    assert result(net, output, {"in1": x}).tolist() == [0, 2, -3, 127, -128]


def test_integers_are_multiplied_by_the_scale_of_all_of_a_row_or_of_a_column() -> None:
    integers = torch.randint(-127, 128, (3, 4), dtype=torch.int8)
    for scale, axis, wanted in (
        (torch.tensor(0.5), None, integers * 0.5),
        (torch.tensor([0.5]), None, integers * 0.5),
        (torch.rand(3) + 0.1, 0, None),
        (torch.rand(4) + 0.1, 1, None),
    ):
        net = Net()
        output = net.out(scaled(net, net.constant(integers, torch.int8), net.constant(scale), axis))
        by_axis = integers * (scale[:, None] if axis == 0 else scale)
        assert_same(result(net, output, {}), by_axis if wanted is None else wanted)


@pytest.mark.parametrize("block_shape", [None, (1, 4), (1, -1)])
def test_integers_of_four_bits_come_two_to_a_byte_and_are_scaled_by_blocks(block_shape: Any) -> None:
    net, nibbles = Net(), torch.randint(-8, 8, (3, 8))
    packed = ((nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] & 15) << 4).to(torch.uint8)
    net.kept.append(packed)
    weights = TRT.Weights(D.INT4, packed.data_ptr(), nibbles.numel())
    x = net.out(net.network.add_constant((3, 8), weights))
    scale = torch.rand(3, 1 if block_shape == (1, -1) else 2) + 0.1
    output = net.out(scaled(net, x, net.constant(scale), block_shape=block_shape))
    assert_same(result(net, output, {}), nibbles * scale.repeat_interleave(8 // scale.shape[1], dim=1))


def test_ranks_join_and_sum_what_each_has() -> None:
    nets, feeds = [], []
    for _ in range(2):
        net = Net()
        layer = gathered_by(net, [0, 1])
        layer.num_ranks = 2
        net.network.mark_output(net.out(layer))
        operation, reduction = TRT.CollectiveOperation.ALL_REDUCE, TRT.ReduceOperation.SUM
        reduced = net.network.add_dist_collective(net.network.get_input(0), operation, reduction, -1, [0, 1])
        reduced.num_ranks = 2
        net.network.mark_output(net.out(reduced))
        nets.append(net)
        feeds.append({"in1": torch.randn(3, 4)})
    for outputs in interpret_ranks([net.network for net in nets], feeds):
        joined, total = outputs.values()
        assert torch.equal(joined, torch.cat([feed["in1"] for feed in feeds]))
        assert torch.equal(total, feeds[0]["in1"] + feeds[1]["in1"])
    with pytest.raises(ApiError, match="1 ranks are executed, its group is"):
        interpret(nets[0].network, feeds[0])


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "feeds are"),
        (
            {"in1": torch.zeros(2, 1, 3, 8, dtype=torch.float64), "in4": torch.zeros(2, 3).long()},
            "is fed torch.float64",
        ),
        ({"in1": torch.zeros(2, 1, 3, 8), "in4": torch.zeros(2, 4).long()}, "expected .*'b', 's'"),
        ({"in1": torch.zeros(2, 2, 3, 8), "in4": torch.zeros(2, 3).long()}, "that is"),
    ],
)
def test_feeds_must_be_those_of_the_network(feeds: Feeds, words: str) -> None:
    net = Net()
    x = net.input("b", 1, "s", 8)
    net.network.mark_output(net.out(rotated(net, x)))
    with pytest.raises(ApiError, match=words):
        interpret(net.network, feeds)


def test_what_sizes_of_a_step_do_not_allow_is_found() -> None:
    net = Net()
    output = net.out(net.network.add_gather(net.input("a", 2), net.input("n", dtype="INT32"), 0))
    net.network.mark_output(output)
    with pytest.raises(ApiError, match="cannot be executed"):
        interpret(net.network, {"in1": torch.zeros(3, 2), "in2": torch.tensor([3], dtype=torch.int32)})
