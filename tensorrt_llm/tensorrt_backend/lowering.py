"""From a network of ours to an INetworkDefinition of TensorRT: one small function per op, in one table.

The network is the unfused one, as a plan: TensorRT fuses by itself. Matrices stay matrices: `num_tokens` is B S, all
tokens of B padded sequences, and only attention sees the two dims (attention.py). Values are rounded where
kernels/reference.py rounds them, but for what an engine of one dtype cannot say: a product with its bias added is
rounded twice, logits go through the dtype of the weights, integers of weights times scales are rounded to that dtype.

What cannot be lowered is a ValueError that names op and reason, before any weight is read. Knows no file and no device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..plan import Plan, PlanNode, TensorSpec
from .attention import LayerCache, Positions, StepInputs
from .attention import gpt_attention as add_attention
from .graph import DATA_TYPES, Graph, Weight
from .quantized import (
    permute_columns,
    quantize_tensor,
    reason_against_matmul,
    scale_columns,
    smooth_quant_gemm,
    weight_only_quant_matmul,
)

# Inputs of our networks that a padded engine has no use for.
_PACKED_AND_PAGED = ("query_starts", "sequence_length", "block_tables")


def lower(plan: Plan, weights: Mapping[str, torch.Tensor], trt_network: Any, trt: Any, cache_length: int) -> Graph:
    """Fill `trt_network` with the layers of `plan`; a sequence's cache has room for `cache_length` tokens.

    Each weight is read once, when its first layer needs it. The result holds the memory that TensorRT's weights point
    to: keep it until the engine is built.
    """
    check_lowerable(plan)
    graph = Graph(trt_network, trt)
    values, positions = _add_inputs(plan, graph, cache_length)
    values |= {spec.name: Weight(spec, partial(weights.__getitem__, spec.name)) for spec in plan.weights}
    for node in plan.nodes:
        (spec,) = node.outputs
        with graph.naming(spec.name):
            operands = [values[name] for name in node.inputs]
            step = {"positions": positions, "dtype": spec.dtype} if node.op == "gpt_attention" else {}
            values[spec.name] = LOWERINGS[node.op](graph, *operands, **node.attrs, **step)
        values[spec.name].name = spec.name
    for outside, name in plan.outputs.items():
        # Outputs of an engine are found by the name of their tensor.
        values[name].name = outside
        trt_network.mark_output(values[name])
    return graph


def _add_inputs(plan: Plan, graph: Graph, cache_length: int) -> tuple[dict[str, Any], Positions]:
    """What our nodes read from outside, by our names, and the positions of the step."""
    values: dict[str, Any] = dict.fromkeys(_PACKED_AND_PAGED)
    ids = graph.add_input("input_ids", "int32", ("batch", "length"))
    with graph.naming("input_ids"):
        values["input_ids"] = graph.reshape(ids, (-1,), "tokens")
    values["position_ids"] = graph.add_input("position_ids", "int32", ("batch", "length"))
    values["last_token_ids"] = graph.add_input("last_token_ids", "int32", ("num_logits",))
    # An input that nothing reads would not be in the engine: NTK needs lengths where the cache goes beyond the trained.
    ntk_lengths = [int(str(node.attrs["ntk_length"])) for node in plan.nodes if node.op == "gpt_attention"]
    stretches = any(0 < length < cache_length for length in ntk_lengths)
    values["context_lengths"] = graph.add_input("context_lengths", "int32", ("batch",)) if stretches else None
    inputs = StepInputs(
        position_ids=values["position_ids"],
        kv_write_indices=graph.add_input("kv_write_indices", "int32", ("batch",)),
        context_lengths=values["context_lengths"],
    )
    for spec in plan.inputs:
        if spec.name.startswith("past_key_value_"):
            index = int(spec.name.removeprefix("past_key_value_"))
            _, _, num_kv_heads, _, head_size = spec.shape
            shape = ("batch", num_kv_heads, cache_length, head_size)
            key, value = (graph.add_input(f"past_{side}_{index}", spec.dtype, shape) for side in ("key", "value"))
            values[spec.name] = LayerCache(index, key, value)
    return values, Positions(graph, inputs, cache_length)


# What can be lowered


def check_lowerable(plan: Plan) -> None:
    """A ValueError for the first node that TensorRT's own layers cannot say."""
    specs = {spec.name: spec for spec in (*plan.inputs, *plan.weights)}
    specs |= {spec.name: spec for node in plan.nodes for spec in node.outputs}
    for node in plan.nodes:
        reason = _reason_against(node, specs)
        if reason:
            raise ValueError(f"{node.outputs[0].name}: {node.op} cannot be lowered to TensorRT: {reason}")


def _reason_against(node: PlanNode, specs: Mapping[str, TensorSpec]) -> str | None:
    if node.op in _REASONS:
        return _REASONS[node.op]
    if node.op not in LOWERINGS:
        return "it is made by our own passes or unknown; lower the network before the passes"
    if node.op == "gpt_attention" and specs[node.inputs[1]].dtype not in DATA_TYPES.keys() - {"int8"}:
        return "its KV cache is INT8, and TensorRT's cache holds float32, float16 or bfloat16; build without it"
    if node.op == "weight_only_quant_matmul":
        return reason_against_matmul(node, specs)
    return None


_REASONS = {
    "quantize_per_token": (
        "activations are INT8 with a scale per token, and TensorRT quantizes with constant scales; build without "
        "--per_token"
    ),
}


# The ops, each with the operands of its reference in kernels/


def embedding(graph: Graph, ids: Any, weight: Weight) -> Any:
    return graph.gather(graph.weight(weight), ids, 0, "rows")


def rms_norm(graph: Graph, x: Any, weight: Weight, *, eps: float, dtype: str) -> Any:
    """Of single layers: TensorRT's normalization subtracts the mean."""
    wide = graph.cast(x, "float32")
    square = graph.elementwise(wide, wide, "PROD", "square")
    mean = graph.add(graph.network.add_reduce(square, graph.trt.ReduceOperation.AVG, 1 << 1, True), "mean")
    shifted = graph.elementwise(mean, graph.scalar(eps, 2, "eps"), "SUM", "mean_and_eps")
    root = graph.add(graph.network.add_unary(shifted, graph.trt.UnaryOperation.SQRT), "root")
    normed = graph.elementwise(wide, root, "DIV", "normed")
    return graph.cast(graph.elementwise(normed, graph.cast(graph.row(weight), "float32"), "PROD", "weighted"), dtype)


def matmul(graph: Graph, x: Any, weight: Weight, bias: Weight | None = None, *, dtype: str) -> Any:
    return graph.linear(x, graph.weight(weight), bias, dtype)


def add(graph: Graph, left: Any, right: Any) -> Any:
    return _in_one_dtype(graph, left, right, "SUM")


def mul(graph: Graph, left: Any, right: Any) -> Any:
    return _in_one_dtype(graph, left, right, "PROD")


def _in_one_dtype(graph: Graph, left: Any, right: Any, operation: str) -> Any:
    """Operands of two dtypes meet in float32."""
    if left.dtype != right.dtype:
        left, right = graph.cast(left, "float32"), graph.cast(right, "float32")
    return graph.elementwise(left, right, operation, operation.lower())


def silu(graph: Graph, x: Any) -> Any:
    wide = graph.cast(x, "float32")
    sigmoid = graph.add(graph.network.add_activation(wide, graph.trt.ActivationType.SIGMOID), "sigmoid")
    return graph.cast(graph.elementwise(wide, sigmoid, "PROD", "activated"), graph.dtype_of(x))


def cast(graph: Graph, x: Any, *, dtype: str) -> Any:
    return graph.cast(x, dtype)


def gather_last_token(graph: Graph, x: Any, last_token_ids: Any) -> Any:
    return graph.gather(x, last_token_ids, 0, "rows")


def gpt_attention(
    graph: Graph,
    qkv: Any,
    cache: LayerCache,
    position_ids: Any,
    query_starts: None,
    sequence_length: None,
    context_lengths: Any | None,
    block_tables: None,
    *,
    positions: Positions,
    **attrs: Any,
) -> Any:
    # What says where tokens stand is the same for all layers: `positions` has it. The packed and paged inputs are gone.
    del position_ids, query_starts, sequence_length, context_lengths, block_tables
    return add_attention(graph, positions, qkv, cache, **attrs)


def allreduce(graph: Graph, x: Any, *, group: list[int]) -> Any:
    return _collective(graph, x, "ALL_REDUCE", "SUM", group)


def allgather(graph: Graph, x: Any, *, group: list[int], gather_dim: int) -> Any:
    """TensorRT joins ranks along dim 0; ours are columns."""
    assert gather_dim == 1, "the only one that layers use"
    joined = _collective(graph, x, "ALL_GATHER", "NONE", group)  # [ranks m, n]
    columns = int(x.shape[1])
    beside = graph.reshape(joined, (len(group), -1, columns), "ranks", after=(1, 0, 2))  # [m, ranks, n]
    return graph.reshape(beside, (-1, len(group) * columns), "columns")


def _collective(graph: Graph, x: Any, operation: str, reduction: str, group: list[int]) -> Any:
    trt = graph.trt
    layer = graph.network.add_dist_collective(
        x, getattr(trt.CollectiveOperation, operation), getattr(trt.ReduceOperation, reduction), -1, group
    )
    layer.num_ranks = len(group)
    return graph.add(layer, operation.lower())


LOWERINGS: dict[str, Callable[..., Any]] = {
    "embedding": embedding,
    "rms_norm": rms_norm,
    "matmul": matmul,
    "add": add,
    "mul": mul,
    "silu": silu,
    "cast": cast,
    "gather_last_token": gather_last_token,
    "gpt_attention": gpt_attention,
    "allreduce": allreduce,
    "allgather": allgather,
    "weight_only_quant_matmul": weight_only_quant_matmul,
    "scale_columns": scale_columns,
    "permute_columns": permute_columns,
    "quantize_tensor": quantize_tensor,
    "smooth_quant_gemm": smooth_quant_gemm,
}
