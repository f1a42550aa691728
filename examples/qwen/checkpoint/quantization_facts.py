"""What a quantized checkpoint says of itself in JSON: quantize_config.json, quant_config.json, or config.json's
quantization_config. Where several are present, they must agree. Knows no format: each asks for the keys that it needs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

# File name -> the method that it means where it names none, as the first versions of its writer did.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "config.json": ""}
_LARGEST_GROUP = 2**17


@dataclass(frozen=True)
class Facts:
    """The objects found, by the place that errors name."""

    directory: Path
    objects: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, directory: Path) -> "Facts":
        objects: dict[str, dict[str, Any]] = {}
        for name, method in _FILES.items():
            if not (directory / name).exists():
                continue
            content = _read_object(directory / name)
            if method:
                objects[name] = {"quant_method": method} | content
            elif (inner := content.get("quantization_config")) is not None:
                if not isinstance(inner, dict):
                    raise ValueError(
                        f"{directory / name}: quantization_config is {shortened(inner)}, expected an object"
                    )
                objects[f"quantization_config of {name}"] = inner
        if not objects:
            raise ValueError(
                f"{directory}: nothing says how the checkpoint is quantized, expected {', '.join(list(_FILES)[:2])} or "
                f"a quantization_config in config.json"
            )
        return cls(directory, objects)

    def find(self, *keys: str) -> Any:
        """The value that any of `keys` has in any of the files; None when absent or null."""
        return self._agreed(dict(self._present(keys)))

    def choose(self, *keys: str, among: tuple[Any, ...], default: Any = None) -> Any:
        """One of `among`, as the files say, in capitals or not; anything else is refused by name."""
        found = {place: value.lower() if isinstance(value, str) else value for place, value in self._present(keys)}
        value = self._agreed(found) if found else default
        for choice in among:
            if not _differ(value, choice):
                return choice
        raise self.error(keys[0], value, f"expected {' or '.join(json.dumps(choice) for choice in among)}")

    def _present(self, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for place, content in self.objects.items():
            for key in keys:
                if content.get(key) is not None:
                    yield f"{key} of {place}", content[key]

    def _agreed(self, found: dict[str, Any]) -> Any:
        values = list(found.values())
        if any(_differ(values[0], value) for value in values):
            listed = " but ".join(f"{place} is {shortened(value)}" for place, value in found.items())
            raise ValueError(f"{self.directory}: {listed}, expected the same")
        return values[0] if values else None

    def group_size(self, *keys: str) -> int:
        """The size of a group; 0, written as -1, for one group per row."""
        value = self.find(*keys)
        if type(value) is not int or not (value == -1 or 1 <= value <= _LARGEST_GROUP):
            raise self.error(keys[0], value, f"expected -1 or 1 to {_LARGEST_GROUP}")
        return max(value, 0)

    def error(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.directory}: {key} in {' and '.join(self.objects)} is {shortened(value)}, {expected}")


def _differ(a: Any, b: Any) -> bool:
    # True == 1 in Python, but not in JSON.
    return bool(a != b) or isinstance(a, bool) != isinstance(b, bool)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: the top level is {shortened(content)}, expected an object")
    return content
