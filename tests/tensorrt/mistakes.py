"""Mistakes that a lowering could make, each seeded by a patch, with who has to catch it.

"fake": lowering or building through the strict fake raises. "interpreter": all that passes, and the logits are wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tensorrt_llm.tensorrt_backend import attention, building, lowering, quantized
from tensorrt_llm.tensorrt_backend.attention import Positions
from tensorrt_llm.tensorrt_backend.graph import Graph
from tensorrt_llm.tensorrt_backend.shapes import Shapes

Patch = pytest.MonkeyPatch
Seed = Callable[[Patch], None]


@dataclass(frozen=True)
class Mistake:
    seed: Seed
    caught_by: str
    mode: str = "float"
    architecture: str = "qwen1"

    @property
    def dtype(self) -> str:
        """Types show where there are several, numbers where roundings are small."""
        return "float16" if self.caught_by == "fake" else "float32"


class _Network:
    """A network whose calls of one method are changed on their way."""

    def __init__(self, network: Any, method: str, change: Callable[..., Any]) -> None:
        self._network, self._method, self._change = network, method, change

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._network, name)
        if name != self._method:
            return original
        return lambda *args: self._change(original, *args)


def call(method: str, change: Callable[..., Any]) -> Seed:
    """`change` is called instead of the network's `method`, with it and its arguments."""

    def seed(patch: Patch) -> None:
        make = Graph.__init__

        def make_changed(graph: Graph, network: Any, trt: Any) -> None:
            make(graph, _Network(network, method, change), trt)

        patch.setattr(Graph, "__init__", make_changed)

    return seed


def op(name: str, change: Callable[..., Any]) -> Seed:
    """`change` is called instead of the function of an op, with it and its arguments."""

    def seed(patch: Patch) -> None:
        right = lowering.LOWERINGS[name]
        patch.setitem(lowering.LOWERINGS, name, lambda *args, **attrs: change(right, *args, **attrs))

    return seed


def method(owner: Any, name: str, change: Callable[..., Any]) -> Seed:
    def seed(patch: Patch) -> None:
        right = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: change(right, *args, **kwargs))

    return seed


def elementwise(what: str, change: Callable[..., Any]) -> Seed:
    """`change` of the operands and operation of the elementwise layers called `what`."""

    def changed(right: Any, graph: Graph, left: Any, other: Any, operation: str, name: str) -> Any:
        operands = change(graph, left, other, operation) if name == what else (left, other, operation)
        return right(graph, *operands, name)

    return method(Graph, "elementwise", changed)


def _transpose_flag(original: Any, x: Any, x_op: Any, weight: Any, weight_op: Any) -> Any:
    """Of square weights only, whose shapes give nothing away."""
    is_square = weight.shape[0] == weight.shape[1]
    return original(x, x_op, weight, x_op if is_square else weight_op)


def _norm_without_cast(right: Any, graph: Graph, x: Any, weight: Any, *, eps: float, dtype: str) -> Any:
    real = Graph.cast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "cast", lambda graph, x, wanted: x if wanted == "float32" else real(graph, x, wanted))
        return right(graph, x, weight, eps=eps, dtype=dtype)


def _writes_one_place_later(right: Any, graph: Graph, cache: Any, new: Any, positions: Positions, name: str) -> Any:
    one = graph.constant(torch.ones(1, dtype=torch.int32), "one")
    later = graph.elementwise(positions.inputs.kv_write_indices, one, "SUM", "later")
    layer = graph.network.add_kv_cache_update(cache, new, later, graph.trt.KVCacheMode.LINEAR)
    present = graph.add(layer, name)
    present.name = name
    graph.network.mark_output(present)
    return present


def _plus_one(graph: Graph, ends: Any) -> Any:
    one = graph.constant(torch.ones(1, 1, 1, 1, dtype=torch.int32), "one_more")
    return graph.elementwise(ends, one, "SUM", "later_ends")


def _values_not_marked(original: Any, tensor: Any) -> None:
    if not tensor.name.startswith("present_value"):
        original(tensor)


def _cache_through_a_cast(right: Any, graph: Graph, cache: Any, *rest: Any) -> Any:
    return right(graph, graph.add(graph.network.add_identity(cache), "copy"), *rest)


def _keys_first(right: Any, *args: Any) -> Any:
    q, k, v = right(*args)
    return [k, q, v]


def _values_first(right: Any, *args: Any) -> Any:
    q, k, v = right(*args)
    return [q, v, k]


def _rows_as_int32(right: Any, positions: Positions, ntk_length: int) -> Any:
    return positions.inputs.position_ids


def _first_tables_only(right: Any, positions: Positions, ntk_length: int) -> Any:
    return right(positions, 0)


def _profiles_without_positions(right: Any, shapes: Shapes, config: Any) -> Any:
    profiles = right(shapes, config)
    for profile in profiles:
        del profile["position_ids"]
    return profiles


def _profile_upside_down(right: Any, shapes: Shapes, config: Any) -> Any:
    return [
        {name: ranges._replace(min=ranges.max, max=ranges.min) for name, ranges in profile.items()}
        for profile in right(shapes, config)
    ]


def _weak_typing(right: Any, engine: Any, shapes: Shapes, builder: Any, trt: Any) -> Any:
    config = right(engine, shapes, builder, trt)
    config.set_flag(trt.BuilderFlag.FP16)
    return config


def _scales_in_float32(right: Any, dtype: str, *rest: Any) -> Any:
    return right("float32", *rest)


def _axis(wanted: int, only_square: bool) -> Seed:
    """The scale of a weight along its columns."""

    def changed(right: Any, graph: Graph, layer: Any, what: str) -> Any:
        if what == "weight":
            integers = layer.get_input(0).shape
            if integers[0] == integers[1] or not only_square:
                layer.axis = wanted
        return right(graph, layer, what)

    return method(Graph, "add", changed)


def _block_of_rows(right: Any, graph: Graph, layer: Any, what: str) -> Any:
    if what == "weight":
        layer.block_shape = tuple(layer.block_shape)[::-1]
    return right(graph, layer, what)


def _offset_binary(right: Any, graph: Graph, values: torch.Tensor, what: str) -> Any:
    return right(graph, values ^ 0x88, what)


def _swapped_nibbles(right: Any, graph: Graph, values: torch.Tensor, what: str) -> Any:
    return right(graph, (values >> 4) | (values << 4), what)


def _without_bias(right: Any, graph: Graph, x: Any, weight: Any, bias: Any, dtype: str) -> Any:
    return right(graph, x, weight, None, dtype)


def _bias_of_rank_one(right: Any, graph: Graph, weight: Any) -> Any:
    return graph.weight(weight)


def _causal_too(original: Any, q: Any, k: Any, v: Any, norm: Any, kind: Any) -> Any:
    return original(q, k, v, norm, type(kind).LOWER_RIGHT)


def _in_ranks_order(right: Any, graph: Graph, x: Any, *, group: list[int], gather_dim: int) -> Any:
    """Joined along rows, and the memory taken for columns."""
    joined = lowering._collective(graph, x, "ALL_GATHER", "NONE", group)
    return graph.reshape(joined, (-1, len(group) * int(x.shape[1])), "columns")


def _squeezed(right: Any, graph: Graph, name: str, dtype: str, shape: Any) -> Any:
    return right(graph, name, dtype, shape[:-1] if name.startswith("past_key") else shape)


MISTAKES: dict[str, Mistake] = {
    # Spelling: what the API does not have, or does not take.
    "an enum member is misspelt": Mistake(op("mul", lambda right, g, a, b: g.elementwise(a, b, "MUL", "mul")), "fake"),
    "a removed builder flag is set": Mistake(method(building, "_builder_config", _weak_typing), "fake"),
    "a profile lacks an input": Mistake(method(Shapes, "profiles", _profiles_without_positions), "fake"),
    "a profile's smallest shape is its largest": Mistake(method(Shapes, "profiles", _profile_upside_down), "fake"),
    "an output is not marked": Mistake(call("mark_output", _values_not_marked), "fake"),
    "the cache is no network input": Mistake(method(attention, "_update", _cache_through_a_cast), "fake"),
    "the cache has three dims": Mistake(method(Graph, "add_input", _squeezed), "fake"),
    "a mask goes with a causal kind": Mistake(call("add_attention_v2", _causal_too), "fake"),
    # Types and ranks.
    "a cast is missing": Mistake(op("rms_norm", _norm_without_cast), "fake"),
    "a bias has another rank": Mistake(method(Graph, "row", _bias_of_rank_one), "fake"),
    "positions of the rotation are INT32": Mistake(method(Positions, "rotary_rows", _rows_as_int32), "fake"),
    "a scale has another dtype than what comes out": Mistake(
        method(quantized, "_scales_in", _scales_in_float32), "fake", mode="int8"
    ),
    # Shapes that do not fit.
    "embedding gathers columns": Mistake(
        op("embedding", lambda right, g, ids, weight: g.gather(g.weight(weight), ids, 1, "rows")), "fake"
    ),
    "a scale lies along the columns": Mistake(_axis(1, only_square=False), "fake", mode="int8"),
    "a block of INT4 lies along the rows": Mistake(method(Graph, "add", _block_of_rows), "fake", mode="int4-g32"),
    "keys are taken for queries": Mistake(
        method(attention, "_split_heads", _keys_first), "fake", architecture="qwen2-gqa"
    ),
    # Numbers: everything fits, and means something else.
    "a square weight is not transposed": Mistake(call("add_matrix_multiply", _transpose_flag), "interpreter"),
    "a square weight's scale lies along the columns": Mistake(_axis(1, only_square=True), "interpreter", mode="int8"),
    "the mask hides a token from itself": Mistake(
        elementwise("ends", lambda g, a, b, operation: (a, b, "PROD")), "interpreter"
    ),
    "the mask shows one place too many": Mistake(
        elementwise("mask", lambda g, places, ends, operation: (places, _plus_one(g, ends), operation)),
        "interpreter",
    ),
    "keys and values are written one place later": Mistake(
        method(attention, "_update", _writes_one_place_later), "interpreter"
    ),
    "keys and values are exchanged": Mistake(
        method(attention, "_split_heads", _values_first), "interpreter", architecture="qwen2-gqa"
    ),
    "the rotation is of pairs side by side": Mistake(
        call("add_rotary_embedding", lambda original, x, cos, sin, style, dim: original(x, cos, sin, True, dim)),
        "interpreter",
    ),
    "sine and cosine are exchanged": Mistake(
        call("add_rotary_embedding", lambda original, x, cos, sin, style, dim: original(x, sin, cos, style, dim)),
        "interpreter",
    ),
    "long prompts are not stretched": Mistake(method(Positions, "rotary_rows", _first_tables_only), "interpreter"),
    "scores are not scaled": Mistake(
        elementwise("scaled_q", lambda g, a, b, operation: (a, g.scalar(1.0, 4, "one"), operation)), "interpreter"
    ),
    "log-n counts from 0": Mistake(
        method(attention, "logn_scale", lambda right, positions, *rest: right(positions - 1, *rest)), "interpreter"
    ),
    "a norm sums instead of taking the mean": Mistake(
        call(
            "add_reduce",
            lambda original, x, kind, axes, keep: original(x, type(kind).SUM, axes, keep),
        ),
        "interpreter",
    ),
    "a gate is not multiplied by its input": Mistake(
        elementwise("activated", lambda g, x, sigmoid, operation: (sigmoid, g.scalar(1.0, 2, "one"), operation)),
        "interpreter",
    ),
    "a bias is left out": Mistake(method(Graph, "linear", _without_bias), "interpreter"),
    "INT4 is taken for offset binary": Mistake(
        method(Graph, "packed_int4", _offset_binary), "interpreter", mode="int4-g32"
    ),
    "INT4 is packed with the odd columns low": Mistake(
        method(Graph, "packed_int4", _swapped_nibbles), "interpreter", mode="int4-g32"
    ),
    "activations are multiplied by the smoother": Mistake(
        elementwise("smoothed", lambda g, a, b, operation: (a, b, "DIV")), "interpreter", mode="smooth-quant"
    ),
    "columns of ranks are joined as rows": Mistake(op("allgather", _in_ranks_order), "interpreter", mode="two-ranks"),
}
