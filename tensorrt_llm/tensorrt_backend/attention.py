"""gpt_attention as TensorRT's layers: rotary embedding, KV-cache update, attention under a mask.

Sequences are padded here, not packed, and each has a contiguous cache:

    qkv [B S, (H + 2 Hkv) D] -> [B, H + 2 Hkv, S, D] -> q, k, v
    q, k -> rotary embedding in float32 by tables -> k, v into past_key, past_value [B, Hkv, Smax, D]
    q * scale -> attention over all Smax places, of which the mask keeps those up to q's position

The padded form and the mask are a choice: layers with key_value_lengths, and the packed form, which needs them, failed
to build or gave wrong tokens in 11.1 and 11.2 (docs/tensorrt.md). The score scale goes into q, as the layer has none.

Rotation tables are constants by position. Qwen's dynamic NTK has one base per doubling of the prompt beyond the trained
length, so its tables lie behind each other, and a sequence's row is step * Smax + position. The step follows from
context_lengths inside the network: the engine needs to be told nothing that our own engines are not.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.reference import logn_scale, ntk_alpha, rope_angles
from .graph import Graph


@dataclass(frozen=True)
class StepInputs:
    """The network inputs that say where tokens stand, in the form of the engine. B sequences of S new tokens."""

    position_ids: Any  # [B, S]
    kv_write_indices: Any  # [B]
    context_lengths: Any | None  # [B], where dynamic NTK has anything to stretch


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer."""

    index: int
    past_key: Any  # [B, Hkv, Smax, D]
    past_value: Any


class Positions:
    """What all layers of a network make of the positions; made by the first that asks."""

    def __init__(self, graph: Graph, inputs: StepInputs, cache_length: int) -> None:
        self._graph = graph
        self.inputs = inputs
        self._cache_length = cache_length
        self._made: dict[tuple[Any, ...], Any] = {}

    def mask(self) -> Any:
        """BOOL [B, 1, S, Smax]: a token sees the places up to its own."""
        return self._once(("mask",), self._mask)

    def rotary_tables(self, base: float, rotary_dim: int, ntk_length: int) -> tuple[Any, Any]:
        """cos and sin, float32 [steps * Smax, rotary_dim / 2]."""
        return self._once(("tables", base, rotary_dim, ntk_length), self._tables, base, rotary_dim, ntk_length)

    def rotary_rows(self, ntk_length: int) -> Any:
        """The row of each token in these tables, INT64 [B, S]."""
        return self._once(("rows", ntk_length), self._rows, ntk_length)

    def query_scale(self, scale: float, logn_length: int) -> Any:
        """What q is multiplied by: float32 [1, 1, 1, 1], or with log-n [B, 1, S, 1]."""
        return self._once(("scale", scale, logn_length), self._scale, scale, logn_length)

    def head_sizes(self, num_heads: int, head_size: int) -> Any:
        """The sizes [B, num_heads, S, head_size]."""
        return self._once(("heads", num_heads, head_size), self._head_sizes, num_heads, head_size)

    def token_sizes(self, num_heads: int, head_size: int) -> Any:
        """The sizes [B, S, num_heads, head_size]."""
        return self._once(("tokens", num_heads, head_size), self._token_sizes, num_heads, head_size)

    def _once(self, key: tuple[Any, ...], make: Any, *args: Any) -> Any:
        if key not in self._made:
            with self._graph.naming("positions"):
                self._made[key] = make(*args)
        return self._made[key]

    def _mask(self) -> Any:
        graph = self._graph
        places = graph.constant(
            torch.arange(self._cache_length, dtype=torch.int32), "places", (1, 1, 1, self._cache_length)
        )
        one = graph.constant(torch.ones(1, 1, dtype=torch.int32), "one")
        ends = graph.elementwise(self.inputs.position_ids, one, "SUM", "ends")
        return graph.elementwise(places, self._per_token(ends, "ends_per_token"), "LESS", "mask")

    def _tables(self, base: float, rotary_dim: int, ntk_length: int) -> tuple[Any, Any]:
        positions = torch.arange(self._cache_length)
        longest_prompts = [*self._ntk_lengths(ntk_length), self._cache_length]
        angles = torch.cat(
            [
                rope_angles(
                    positions,
                    rotary_base=base,
                    rotary_dim=rotary_dim,
                    alpha=ntk_alpha(longest, ntk_length) if ntk_length else 1,
                    dtype=torch.float32,
                )
                for longest in longest_prompts
            ]
        )
        return self._graph.constant(angles.cos(), "cos"), self._graph.constant(angles.sin(), "sin")

    def _ntk_lengths(self, ntk_length: int) -> list[int]:
        """The prompt lengths beyond which NTK stretches further: S, 2 S, 4 S... as far as the cache goes."""
        lengths = [ntk_length] if ntk_length else []
        while lengths and 2 * lengths[-1] < self._cache_length:
            lengths.append(2 * lengths[-1])
        return [length for length in lengths if length < self._cache_length]

    def _rows(self, ntk_length: int) -> Any:
        graph, rows = self._graph, self.inputs.position_ids
        thresholds = self._ntk_lengths(ntk_length)
        if thresholds:
            assert self.inputs.context_lengths is not None, "an input wherever there are thresholds"
            lengths = graph.reshape(self.inputs.context_lengths, (-1, 1), "lengths")  # [B, 1]
            limits = graph.constant(torch.tensor([thresholds], dtype=torch.int32), "ntk_thresholds")  # [1, steps - 1]
            passed = graph.cast(graph.elementwise(lengths, limits, "GREATER", "ntk_passed"), "int32")
            step = graph.add(graph.network.add_reduce(passed, graph.trt.ReduceOperation.SUM, 1 << 1, True), "ntk_step")
            size = graph.constant(torch.full((1, 1), self._cache_length, dtype=torch.int32), "table_rows")
            rows = graph.elementwise(rows, graph.elementwise(step, size, "PROD", "first_row"), "SUM", "rotary_rows")
        return graph.cast(rows, "int64")

    def _scale(self, scale: float, logn_length: int) -> Any:
        graph = self._graph
        if not logn_length:
            return graph.scalar(scale, 4, "query_scale")
        positions = torch.arange(self._cache_length)
        table = graph.constant(scale * logn_scale(positions, logn_length, torch.float32), "logn_table")
        return self._per_token(graph.gather(table, self.inputs.position_ids, 0, "query_scale"), "query_scale_per_token")

    def _per_token(self, x: Any, what: str) -> Any:
        """[B, S] as [B, 1, S, 1]."""
        sizes = self._once(("per_token",), self._per_token_sizes)
        return self._graph.reshape(x, sizes, what)

    def _per_token_sizes(self) -> Any:
        batch, length = self._batch_and_length()
        return self._graph.sizes((batch, 1, length, 1), "per_token_sizes")

    def _head_sizes(self, num_heads: int, head_size: int) -> Any:
        batch, length = self._batch_and_length()
        return self._graph.sizes((batch, num_heads, length, head_size), "head_sizes")

    def _token_sizes(self, num_heads: int, head_size: int) -> Any:
        batch, length = self._batch_and_length()
        return self._graph.sizes((batch, length, num_heads, head_size), "token_sizes")

    def _batch_and_length(self) -> tuple[Any, Any]:
        return tuple(self._once(("dim", axis), self._graph.dim_of, self.inputs.position_ids, axis) for axis in (0, 1))


def gpt_attention(
    graph: Graph,
    positions: Positions,
    qkv: Any,
    cache: LayerCache,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_scaling: float,
    rotary_base: float,
    rotary_dim: int,
    ntk_length: int,
    logn_length: int,
    dtype: str,
) -> Any:
    """The context [B S, H D] in `dtype`, which is that of qkv and the cache; marks the two outputs of the cache."""
    network, trt = graph.network, graph.trt
    q, k, v = _split_heads(graph, positions, qkv, num_heads, num_kv_heads, head_size)
    cos, sin = positions.rotary_tables(rotary_base, rotary_dim, ntk_length)
    rows = positions.rotary_rows(ntk_length)
    q, k = (
        _rotate(graph, graph.cast(x, "float32"), cos, sin, rows, rotary_dim, what) for x, what in ((q, "q"), (k, "k"))
    )
    scale = positions.query_scale(1 / (q_scaling * math.sqrt(head_size)), logn_length)
    q = graph.cast(graph.elementwise(q, scale, "PROD", "scaled_q"), dtype)
    present_key = _update(graph, cache.past_key, graph.cast(k, dtype), positions, f"present_key_{cache.index}")
    present_value = _update(graph, cache.past_value, v, positions, f"present_value_{cache.index}")
    mask = positions.mask()
    attention = network.add_attention_v2(
        q, present_key, present_value, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    attention.mask = mask
    # Where no fused kernel fits, the builder may take the layer apart instead of failing.
    attention.decomposable = True
    context = graph.add(attention, "attention")  # [B, H, S, D]
    return graph.reshape(context, (-1, num_heads * head_size), "context", before=(0, 2, 1, 3))


def _split_heads(
    graph: Graph, positions: Positions, qkv: Any, num_heads: int, num_kv_heads: int, head_size: int
) -> list[Any]:
    """Q [B, H, S, D], K and V [B, Hkv, S, D]."""
    sizes = positions.token_sizes(num_heads + 2 * num_kv_heads, head_size)
    heads = graph.reshape(qkv, sizes, "heads", after=(0, 2, 1, 3))
    parts = []
    start = 0
    for what, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        part_sizes = positions.head_sizes(count, head_size)
        # The numbers are those that a step does not decide; the tensor of sizes is what counts.
        layer = graph.network.add_slice(heads, (0, start, 0, 0), (0, count, 0, head_size), (1, 1, 1, 1))
        layer.set_input(2, part_sizes)
        parts.append(graph.add(layer, what))
        start += count
    return parts


def _rotate(graph: Graph, x: Any, cos: Any, sin: Any, rows: Any, rotary_dim: int, what: str) -> Any:
    """Qwen turns a head's first half against its second, which TensorRT calls not interleaved."""
    layer = graph.network.add_rotary_embedding(x, cos, sin, False, rotary_dim)
    layer.set_input(3, rows)
    return graph.add(layer, f"rotated_{what}")


def _update(graph: Graph, cache: Any, new: Any, positions: Positions, name: str) -> Any:
    """The cache with the new tokens in their places: an output that lies where the cache lies."""
    layer = graph.network.add_kv_cache_update(
        cache, new, positions.inputs.kv_write_indices, graph.trt.KVCacheMode.LINEAR
    )
    present = graph.add(layer, name)
    present.name = name
    graph.network.mark_output(present)
    return present
