"""Linear layers as AutoGPTQ and GPTQModel store them, 4 or 8 bits: qweight, qzeros, scales, g_idx.

    w[k, n] = (q[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]

qweight int32 [k * bits / 32, n] holds q along k, the lowest k in the lowest bits; qzeros int32 [groups, n * bits / 32]
holds zero points along n. Format "gptq" (v1) stores zero points less one, "gptq_v2" as they are. With act-order g_idx
is in any order, and says alone which group a column is in.
"""

import logging
from collections.abc import Callable
from functools import partial

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

logger = logging.getLogger(__name__)

_FORMAT_KEYS = ("checkpoint_format", "format")
# The zero points [groups, n] of packed words, int32.
ZeroPoints = Callable[[torch.Tensor, int], torch.Tensor]


def read_gptq(files: HfCheckpoint, facts: Facts) -> tuple[str, list[PackedLinear]]:
    """The name of the algorithm and the layers, from headers, g_idx and qzeros."""
    bits = facts.choose("bits", among=(4, 8))
    group_size = facts.group_size("group_size")
    facts.choose("is_marlin_format", among=(False,), default=False)
    facts.choose(*_FORMAT_KEYS, among=("gptq", "gptq_v2"), default="gptq")
    headers = Headers(files)
    modules = headers.modules("qweight")
    for name in modules:
        _check(headers, name, bits, group_size, facts)
    zero_points = _zero_points(files, facts, modules, bits)
    return f"W{bits}A16_GPTQ", [_linear(files, headers, name, bits, group_size, zero_points) for name in modules]


def _check(headers: Headers, name: str, bits: int, group_size: int, facts: Facts) -> None:
    words, rows = headers.matrix(f"{name}.qweight", WORDS, "integers packed along the input")
    columns = words * pack_count(bits)
    what = f"{name}.qweight of {bits} bits and groups of {group_size or columns}"
    groups = groups_of(columns, group_size, f"{name}.qweight")
    if rows % pack_count(bits):
        raise ValueError(f"{name}.qweight: has {rows} outputs, expected a multiple of {pack_count(bits)}")
    headers.check(f"{name}.scales", SCALES, (groups, rows), what)
    headers.check(f"{name}.qzeros", WORDS, (groups, rows * bits // WORD_BITS), what)
    if f"{name}.g_idx" in headers.infos or facts.choose("desc_act", among=(True, False), default=False):
        headers.check(f"{name}.g_idx", WORDS, (columns,), what)


def _linear(
    files: HfCheckpoint, headers: Headers, name: str, bits: int, group_size: int, zero_points: ZeroPoints
) -> PackedLinear:
    groups, rows = headers.infos[f"{name}.scales"].shape
    tensors = [f"{name}.{kind}" for kind in ("qweight", "qzeros", "scales")]
    order = None
    if f"{name}.g_idx" in headers.infos:
        tensors.append(f"{name}.g_idx")
        order = column_order(files.read(tensors[-1]), tensors[-1], groups)
    has_zero = bool((zero_points(files.read(f"{name}.qzeros"), bits) != 1 << (bits - 1)).any())
    return PackedLinear(
        name=name,
        shape=(rows, headers.infos[f"{name}.qweight"].shape[0] * pack_count(bits)),
        bits=bits,
        group_size=group_size,
        tensors=tuple(tensors),
        scales=f"{name}.scales",
        read=partial(_read, files, name, bits, zero_points if has_zero else None),
        has_zero=has_zero,
        order=order,
    )


def _read(
    files: HfCheckpoint, name: str, bits: int, zero_points: ZeroPoints | None, start: int, stop: int
) -> StoredRows:
    words = files.read_columns(f"{name}.qweight", start, stop)
    scale = files.read_columns(f"{name}.scales", start, stop)
    zero = zero_points(files.read(f"{name}.qzeros"), bits)[:, start:stop].T if zero_points else None
    return StoredRows(unpack(words.T, bits), scale.T, zero)


def _as_stored(words: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack(words, bits).int()


def _stored_less_one(words: torch.Tensor, bits: int) -> torch.Tensor:
    """AutoGPTQ's v1: the largest stored integer means one more than bits can hold."""
    return unpack(words, bits).int() + 1


def _words_less_ones(words: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQModel's v1: it subtracts one from all integers of a word at once, so that a zero borrows from the next."""
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return unpack(words + ones, bits).int()  # int32 wraps around, as it did when they were subtracted


def _zero_points(files: HfCheckpoint, facts: Facts, modules: list[str], bits: int) -> ZeroPoints:
    """What a stored zero point means. In a file that says `sym` they are all in the middle, which tells by itself:
    some writers store v2 and call it "gptq"."""
    named = facts.choose(*_FORMAT_KEYS, among=("gptq", "gptq_v2"), default="gptq")
    if not facts.choose("sym", among=(True, False), default=False):
        if named == "gptq_v2":
            return _as_stored
        return _words_less_ones if _is_by_gptqmodel(facts) else _stored_less_one
    middle = 1 << (bits - 1)
    meanings = {middle: "gptq_v2", middle - 1: "gptq"}
    found: str | None = None
    for name in modules:
        stored = _as_stored(files.read(f"{name}.qzeros"), bits)
        low, high = int(stored.min()), int(stored.max())
        meaning = meanings.get(low) if low == high else None
        if meaning is None or found not in (None, meaning):
            raise ValueError(
                f"{facts.directory}: {name}.qzeros stores zero points from {low} to {high}, expected everywhere "
                f"{middle - 1} (gptq) or everywhere {middle} (gptq_v2), as sym is true"
            )
        found = meaning
    if found not in (None, named):
        logger.warning(
            "%s: checkpoint_format says %s, but zero points of a symmetric model are stored as %s has them: read as %s",
            facts.directory,
            named,
            found,
            found,
        )
    return _as_stored if found == "gptq_v2" else _stored_less_one


def _is_by_gptqmodel(facts: Facts) -> bool:
    for content in facts.objects.values():
        meta = content.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
        names = quantizer if isinstance(quantizer, list) else [quantizer]
        if any(str(name).lower().startswith("gptqmodel") for name in names):
            return True
    return False
