"""Linear layers as AutoAWQ's "gemm" version stores them, 4 bits: qweight, qzeros, scales.

    w[k, n] = (q[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]

qweight int32 [k, n / 8] and qzeros int32 [groups, n / 8] are packed along n: from the low end of a word lie the
columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from functools import partial

import torch

from .hf_checkpoint import HfCheckpoint
from .packed_linear import SCALES, WORDS, Headers, PackedLinear, StoredRows, groups_of, pack_count, unpack
from .quantization_facts import Facts

_BITS = 4
_PER_WORD = pack_count(_BITS)
# Where in a word each of the eight columns lies: the inverse of the order above.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
_MIDDLE = 1 << (_BITS - 1)


def read_awq(files: HfCheckpoint, facts: Facts) -> tuple[str, list[PackedLinear]]:
    """The name of the algorithm and the layers, from headers and qzeros."""
    facts.choose("bits", "w_bit", among=(_BITS,))
    facts.choose("version", "checkpoint_format", "format", among=("gemm",), default="gemm")
    group_size = facts.group_size("group_size", "q_group_size")
    headers = Headers(files)
    return "W4A16_AWQ", [_linear(files, headers, name, group_size) for name in headers.modules("qweight")]


def _linear(files: HfCheckpoint, headers: Headers, name: str, group_size: int) -> PackedLinear:
    columns, words = headers.matrix(f"{name}.qweight", WORDS, "integers packed along the output")
    rows = words * _PER_WORD
    groups = groups_of(columns, group_size, f"{name}.qweight")
    what = f"{name}.qweight of 4 bits and groups of {group_size or columns}"
    headers.check(f"{name}.scales", SCALES, (groups, rows), what)
    headers.check(f"{name}.qzeros", WORDS, (groups, words), what)
    has_zero = bool((_unpack_rows(files, f"{name}.qzeros", 0, rows) != _MIDDLE).any())
    return PackedLinear(
        name=name,
        shape=(rows, columns),
        bits=_BITS,
        group_size=group_size,
        tensors=tuple(f"{name}.{kind}" for kind in ("qweight", "qzeros", "scales")),
        scales=f"{name}.scales",
        read=partial(_read, files, name, has_zero),
        has_zero=has_zero,
    )


def _read(files: HfCheckpoint, name: str, has_zero: bool, start: int, stop: int) -> StoredRows:
    return StoredRows(
        _unpack_rows(files, f"{name}.qweight", start, stop),
        files.read_columns(f"{name}.scales", start, stop).T,
        _unpack_rows(files, f"{name}.qzeros", start, stop).int() if has_zero else None,
    )


def _unpack_rows(files: HfCheckpoint, name: str, start: int, stop: int) -> torch.Tensor:
    """Columns start to stop of the matrix in words, as rows: uint8 [stop - start, k]."""
    first_word = start // _PER_WORD
    words = files.read_columns(name, first_word, -(-stop // _PER_WORD))
    integers = unpack(words, _BITS).unflatten(1, (-1, _PER_WORD))[:, :, _PLACES].flatten(1)
    skipped = first_word * _PER_WORD
    return integers[:, start - skipped : stop - skipped].T
