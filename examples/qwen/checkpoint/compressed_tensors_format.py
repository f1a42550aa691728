"""Linear layers as compressed-tensors' "pack-quantized" stores them, 4 or 8 bits, weights only.

    w[n, k] = (q[n, k] - zero[n, group of k]) * weight_scale[n, group of k]

weight_packed int32 [n, k * bits / 32] holds q along k, the lowest k in the lowest bits, in offset binary: 8 or 128
stands for 0. weight_scale is [n, groups]; an asymmetric weight_zero_point is packed like that along n, int32
[n * bits / 32, groups], or, by the first versions, int8 [n, groups]. weight_g_idx int32 [k] gives act-order's groups;
a -1 in it means that there are none. weight_shape holds [n, k].
"""

from functools import partial
from reprlib import repr as shortened
from typing import Any

import torch

from .hf_checkpoint import HfCheckpoint
from .packed_linear import (
    SCALES,
    WORD_BITS,
    WORDS,
    Headers,
    PackedLinear,
    StoredRows,
    column_order,
    groups_of,
    pack_count,
    unpack,
)
from .quantization_facts import Facts

# What must be said, or not said, of the weights: anything else changes the function.
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4, 8),
    "type": ("int", None),
    "strategy": ("group", "channel"),
    "dynamic": (False, None),
    "symmetric": (True, False, None),
    "actorder": (None, False, True, "group", "dynamic", "weight", "static"),
}
_ACTIVATIONS = ("input_activations", "output_activations")
_ORDERED = (True, "group", "dynamic")


def read_compressed_tensors(files: HfCheckpoint, facts: Facts) -> tuple[str, list[PackedLinear]]:
    """The name of the algorithm and the layers, from headers, weight_shape, weight_g_idx and zero points."""
    facts.choose("format", among=("pack-quantized",))
    for key in ("kv_cache_scheme", "transform_config"):
        if value := facts.find(key):
            raise facts.error(key, value, "expected none: it is not supported")
    sparsity = facts.find("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise facts.error("sparsity_config", sparsity, "expected none: sparse weights are not supported")
    weights = _weights_of(facts)
    bits, group_size = weights["num_bits"], weights["group_size"]
    headers = Headers(files)
    linears = [_linear(files, headers, name, bits, group_size, weights) for name in headers.modules("weight_packed")]
    return f"W{bits}A16", linears


def _weights_of(facts: Facts) -> dict[str, Any]:
    """What the one scheme of the config says of weights."""
    groups = facts.find("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(
        isinstance(scheme, dict) and isinstance(scheme.get("weights"), dict) for scheme in schemes
    ):
        raise facts.error("config_groups", groups, "expected groups with weights")
    for scheme in schemes:
        for key in _ACTIVATIONS:
            if scheme.get(key) is not None:
                raise facts.error(f"config_groups' {key}", scheme[key], "expected null: only weights may be quantized")
        for key, allowed in _WEIGHTS.items():
            value = scheme["weights"].get(key)
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                listed = ", ".join(map(str, allowed))
                raise facts.error(f"config_groups' weights.{key}", value, f"expected one of {listed}")
    first, *others = ({key: scheme["weights"].get(key) for key in (*_WEIGHTS, "group_size")} for scheme in schemes)
    if any(other != first for other in others):
        raise facts.error("config_groups", groups, "expected the same weights in all groups")
    size = first["group_size"]
    if first["strategy"] == "channel":
        return first | {"group_size": 0}
    if type(size) is not int or size < 1:
        raise facts.error("config_groups' weights.group_size", size, "expected at least 1")
    return first


def _linear(
    files: HfCheckpoint, headers: Headers, name: str, bits: int, group_size: int, weights: dict[str, Any]
) -> PackedLinear:
    rows, words = headers.matrix(f"{name}.weight_packed", WORDS, "integers packed along the input")
    columns = words * pack_count(bits)
    groups = groups_of(columns, group_size, f"{name}.weight_packed")
    what = f"{name}.weight_packed of {bits} bits and groups of {group_size or columns}"
    headers.check(f"{name}.weight_scale", SCALES, (rows, groups), what)
    headers.check(f"{name}.weight_shape", ("int64", "int32"), (2,), what)
    shape = files.read(f"{name}.weight_shape").tolist()
    if shape != [rows, columns]:
        raise ValueError(
            f"{name}.weight_shape is {shortened(shape)}, expected [{rows}, {columns}] with weight_packed "
            f"[{rows}, {words}] of {bits} bits"
        )
    tensors = [f"{name}.{kind}" for kind in ("weight_packed", "weight_scale", "weight_shape")]
    zero_name, order_name = f"{name}.weight_zero_point", f"{name}.weight_g_idx"
    has_zero = zero_name in headers.infos or weights["symmetric"] is False
    if has_zero:
        if zero_name in headers.infos and headers.infos[zero_name].dtype == "int8":
            headers.check(zero_name, ("int8",), (rows, groups), what)
        else:
            headers.check(zero_name, WORDS, (-(-rows * bits // WORD_BITS), groups), what)
        tensors.append(zero_name)
        has_zero = bool((_zero_points(files, zero_name, bits, 0, rows) != 1 << (bits - 1)).any())
    order = None
    if order_name in headers.infos or weights["actorder"] in _ORDERED:
        headers.check(order_name, WORDS, (columns,), what)
        tensors.append(order_name)
        g_idx = files.read(order_name)
        order = None if (g_idx == -1).any() else column_order(g_idx, order_name, groups)
    return PackedLinear(
        name=name,
        shape=(rows, columns),
        bits=bits,
        group_size=group_size,
        tensors=tuple(tensors),
        scales=f"{name}.weight_scale",
        read=partial(_read, files, name, bits, has_zero),
        has_zero=has_zero,
        order=order,
    )


def _read(files: HfCheckpoint, name: str, bits: int, has_zero: bool, start: int, stop: int) -> StoredRows:
    return StoredRows(
        unpack(files.read_rows(f"{name}.weight_packed", start, stop), bits),
        files.read_rows(f"{name}.weight_scale", start, stop),
        _zero_points(files, f"{name}.weight_zero_point", bits, start, stop) if has_zero else None,
    )


def _zero_points(files: HfCheckpoint, name: str, bits: int, start: int, stop: int) -> torch.Tensor:
    """int32 [stop - start, groups], counted from 0."""
    if files.tensors()[name].dtype == "int8":
        return files.read_rows(name, start, stop).int() + (1 << (bits - 1))
    per_word = pack_count(bits)
    first_word = start // per_word
    words = files.read_rows(name, first_word, -(-stop // per_word))
    skipped = first_word * per_word
    return unpack(words.T, bits).T[start - skipped : stop - skipped].int()
