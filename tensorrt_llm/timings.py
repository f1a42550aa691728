"""What a GPU measured of an engine's matmuls: which tactic won and what its rivals took, in a file beside the engine.

tactics.json holds one section for each GPU, by its name, so that timings can be added at any time and weights are not
written again:

    {"format": "tensorrt_llm.tactics", "format_version": "1",
     "gpus": {"NVIDIA H100 80GB HBM3": {"software": "torch 2.11.0+cu130", "timings": [...], "sha256": "..."}}}

A timing is the fields of MatmulTiming. `sha256` is that of the section without it, as JSON with sorted keys, unspaced.
Data only: a tactic is a name, and what it launches is in the code that knows the name. Knows no kernel and no device.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, get_origin

FILE_NAME = "tactics.json"
_FORMAT = "tensorrt_llm.tactics"
_FORMAT_VERSION = "1"
_LARGEST_COUNT = 2**63 - 1


@dataclass(frozen=True)
class MatmulTiming:
    """A matmul at a number of tokens: the fields of its shape, and microseconds of its tactics by name."""

    op: str
    rows: int
    depth: int
    dtype: str
    bits: int
    num_groups: int
    has_zero: bool
    tokens: int
    moved_bytes: int  # weight, input and output once
    winner: str
    heuristic: str  # what would be taken without timings
    microseconds: dict[str, float]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = get_origin(field.type) or field.type
            if type(value) is not kind:
                raise ValueError(f"{field.name} is {shortened(value)}, expected {kind.__name__}")
            least = 0 if field.name == "bits" else 1
            if kind is int and not least <= value <= _LARGEST_COUNT:
                raise ValueError(f"{field.name} is {shortened(value)}, expected a count of {least} or more")
        for name, time in self.microseconds.items():
            if type(time) is not float or not 0 < time < 1e12:
                raise ValueError(f"microseconds of {name!r} is {shortened(time)}, expected a positive number")
        for role in ("winner", "heuristic"):
            if getattr(self, role) not in self.microseconds:
                raise ValueError(f"{role} is {getattr(self, role)!r}, expected one of {list(self.microseconds)}")

    @property
    def best_rival(self) -> str | None:
        """The fastest tactic beside the winner."""
        rivals = {name: time for name, time in self.microseconds.items() if name != self.winner}
        return min(rivals, key=rivals.__getitem__, default=None)

    @property
    def bytes_per_second(self) -> float:
        """What the winner moves."""
        return self.moved_bytes / self.microseconds[self.winner] * 1e6


@dataclass(frozen=True)
class GpuTimings:
    """All timings of one GPU, and the software that they are of."""

    software: str
    timings: tuple[MatmulTiming, ...]

    @classmethod
    def from_dict(cls, data: Any) -> "GpuTimings":
        """Read what `to_dict` wrote; a ValueError says which field is wrong."""
        expected = {"software", "timings", "sha256"}
        if not isinstance(data, dict) or set(data) != expected:
            raise ValueError(f"has {_keys(data)}, expected {sorted(expected)}")
        digest = _digest({key: value for key, value in data.items() if key != "sha256"})
        if data["sha256"] != digest:
            found = shortened(data["sha256"])
            raise ValueError(f"sha256 is {found}, but the section has {digest}: the file was altered or damaged")
        if not isinstance(data["software"], str) or not isinstance(data["timings"], list):
            raise ValueError("software or timings is of another form, expected a string and a list")
        return cls(data["software"], tuple(_read_timing(entry, index) for index, entry in enumerate(data["timings"])))

    def to_dict(self) -> dict[str, Any]:
        section = {"software": self.software, "timings": [asdict(timing) for timing in self.timings]}
        return section | {"sha256": _digest(section)}


def read_timings(folder: Path) -> dict[str, GpuTimings]:
    """The timings of an engine's folder by the name of the GPU, none if it has none; a ValueError names the file."""
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: _read_section(name, section) for name, section in _sections(data).items()}
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; delete the file, or tune again after that") from error


def write_timings(folder: Path, gpus: Mapping[str, GpuTimings]) -> None:
    """Write the file anew, whole or not at all."""
    path = folder / FILE_NAME
    data = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "gpus": {name: section.to_dict() for name, section in gpus.items()},
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot write the timings: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sections(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"is no file of {_FORMAT}")
    if data.get("format_version") != _FORMAT_VERSION:
        raise ValueError(f"format_version is {data.get('format_version')!r}, this version reads {_FORMAT_VERSION!r}")
    if set(data) != {"format", "format_version", "gpus"} or not isinstance(data["gpus"], dict):
        raise ValueError(f"has {_keys(data)}, expected format, format_version and an object gpus")
    sections: dict[str, Any] = data["gpus"]
    return sections


def _read_section(name: str, data: Any) -> GpuTimings:
    try:
        return GpuTimings.from_dict(data)
    except ValueError as error:
        raise ValueError(f"gpus[{name!r}]: {error}") from error


def _read_timing(data: Any, index: int) -> MatmulTiming:
    names = {field.name for field in fields(MatmulTiming)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(f"timings[{index}] has {_keys(data)}, expected {sorted(names)}")
    try:
        return MatmulTiming(**data)
    except ValueError as error:
        raise ValueError(f"timings[{index}]: {error}") from error


def _keys(data: Any) -> str:
    return shortened(sorted(data)) if isinstance(data, dict) else type(data).__name__


def _digest(section: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(section, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
