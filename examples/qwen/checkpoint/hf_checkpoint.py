"""Reads the tensors of a Hugging Face checkpoint, one at a time: safetensors or pytorch_model.bin, sharded or not.

Opening a folder reads names, shapes and dtypes only and proves that every shard is whole; each read maps the file,
touches the bytes asked for, and lets go of the file with the tensor. Pickled code is never run.
Knows no model: which names there should be is weight.py's business.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

# The bytes per element of every type in the safetensors format, under torch's names.
_SAFETENSORS_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
READABLE_DTYPES = ("float32", "float16", "bfloat16")  # of weights
READABLE_INTEGERS = ("int8", "int32", "int64")  # of quantized weights, and of what belongs to them
_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_GIT_LFS_POINTER = b"version https://git-lfs"

_Index = EllipsisType | slice | tuple[slice, slice]


@dataclass(frozen=True)
class TensorInfo:
    """What a shard says of one tensor. `dtype` is torch's name without "torch."."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class HfCheckpoint:
    """The tensors of one folder or file, by name. A damaged or unreadable one is a ValueError when it is opened.

    In a folder the shards are called "model", or first of all by one of the names in `stems`.
    """

    def __init__(self, path: str | Path, stems: tuple[str, ...] = ()) -> None:
        path = Path(path)
        self.directory = path.parent if path.is_file() else path
        self._tensors: dict[str, TensorInfo] = {}
        index, shards = ({}, [path]) if path.is_file() else _find_shards(path, stems)
        for shard in shards:
            scan = _scan_safetensors if shard.suffix == ".safetensors" else _scan_bin
            for name, info in scan(shard):
                # A name in two shards: the index says which one counts.
                if index.get(name, shard.name) == shard.name:
                    self._tensors[name] = info
        for name, shard_name in index.items():
            if name not in self._tensors:
                raise ValueError(
                    f"{self.directory / shard_name}: has no tensor {name}, which the checkpoint's index expects there"
                )

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the checkpoint, from the headers."""
        return dict(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor. It is backed by the file: don't write to it."""
        return self._read(name, ...)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of the first dim."""
        assert 0 <= start <= stop <= self._tensors[name].shape[0], (name, start, stop)
        return self._read(name, slice(start, stop))

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns start to stop of a matrix, contiguous."""
        assert 0 <= start <= stop <= self._tensors[name].shape[1], (name, start, stop)
        return self._read(name, (slice(None), slice(start, stop)))

    def _read(self, name: str, index: _Index) -> torch.Tensor:
        info = self._tensors[name]
        readable = READABLE_DTYPES + READABLE_INTEGERS
        if info.dtype not in readable:
            raise ValueError(f"{info.file}: {name} is {info.dtype}, expected {', '.join(readable)}")
        if info.file.suffix != ".safetensors":
            return _map_bin(info.file)[name][index].contiguous()
        try:
            with safe_open(info.file, framework="pt") as shard:
                return shard.get_slice(name)[index].contiguous()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{info.file}: {name} cannot be read: {error}") from error


def _find_shards(directory: Path, stems: tuple[str, ...]) -> tuple[dict[str, str], list[Path]]:
    """The index (tensor name -> shard name, empty without one) and the shards, in the order in which HF looks."""
    for stem, suffix in (*((stem, "safetensors") for stem in (*stems, "model")), ("pytorch_model", "bin")):
        single = directory / f"{stem}.{suffix}"
        if single.exists():
            return {}, [single]
        index_file = directory / f"{stem}.{suffix}.index.json"
        if index_file.exists():
            index = _read_index(index_file, f".{suffix}")
            return index, [directory / name for name in sorted(set(index.values()))]
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder, expected a Hugging Face checkpoint")
    found = sorted(file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))
    raise ValueError(
        f"{directory}: no weights found, expected {''.join(f'{stem}.safetensors, ' for stem in stems)}"
        f"model.safetensors or pytorch_model.bin, or shards with their "
        f"model.safetensors.index.json or pytorch_model.bin.index.json; found {', '.join(found) or 'no such files'}"
    )


def _read_index(file: Path, suffix: str) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file}: weight_map is missing, expected an object of tensor names and shards")
    for name, shard in weight_map.items():
        # A shard lies beside its index: a path could lead anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
            raise ValueError(f"{file}: {name} is in {shard!r}, expected the name of a {suffix} file of the same folder")
    return weight_map


def _file_size(file: Path) -> int:
    """The size of a shard that is there and is not a git-lfs pointer."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_GIT_LFS_POINTER))
            size = stream.seek(0, 2)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}), expected a shard of the checkpoint") from error
    if start == _GIT_LFS_POINTER:
        raise ValueError(f"{file}: is a git-lfs pointer, expected the weights; fetch them with `git lfs pull`")
    return size


def _scan_safetensors(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Names and facts from a header whose every offset is checked against the file."""
    size = _file_size(file)
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _LARGEST_HEADER_BYTES):
            raise ValueError(
                f"{file}: {size} bytes, expected 8 and a header of {header_bytes}, then data: "
                f"truncated, or not safetensors"
            )
        try:
            header = json.loads(stream.read(header_bytes).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - header_bytes
    end = 0
    entries = {name: _parse_entry(file, name, entry) for name, entry in header.items()}
    for name, (info, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise ValueError(f"{file}: {name} starts at byte {start} of the data, expected {end}")
        end = stop
        yield name, info
    if end != data_bytes:
        raise ValueError(
            f"{file}: {data_bytes} bytes of data, expected {end} as its header says"
            + (": truncated" if data_bytes < end else "")
        )


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise ValueError(f"{file}: the header's entry of {name} is damaged, expected dtype, shape and data_offsets")
    start, stop = offsets
    dtype_name, itemsize = _SAFETENSORS_DTYPES.get(dtype, (dtype, None))
    if stop < start or (itemsize and stop - start != math.prod(shape) * itemsize):
        raise ValueError(
            f"{file}: {name} has {stop - start} bytes, expected {math.prod(shape) * (itemsize or 1)} "
            f"for {dtype_name} {shape}"
        )
    return TensorInfo(tuple(shape), dtype_name, file), start, stop


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    # Eight dims are plenty, and keep a hostile shape from growing into a number of millions of digits.
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _scan_bin(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    for name, tensor in _map_bin(file).items():
        yield name, TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)


def _map_bin(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin shard, mapped: no data is read here, and no pickled code runs."""
    size = _file_size(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle fails in as many ways as Python has exceptions
        raise ValueError(
            f"{file}: {size} bytes that torch cannot read as plain tensors, expected a whole zip file by torch.save "
            f"without pickled code: {_first_line(error)}"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, expected a dict of tensors")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ValueError(f"{file}: {name!r} is a {type(value).__name__}, expected a name and a dense tensor")
    return tensors


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
