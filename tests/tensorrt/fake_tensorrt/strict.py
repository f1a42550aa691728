"""Classes that take no other call, attribute or enum member than the manifest has.

manifest.json says, for TensorRT 11, which methods a class has, with their overloads (argument names, types, defaults),
which properties can be read (ro) or written as well (rw), and the members of enums. A class of the fake is declared
with `of_api`; a method that the manifest has and the fake has not is one that this project never calls.
"""

import enum
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST: dict[str, Any] = json.loads((Path(__file__).parents[1] / "manifest.json").read_text())
CLASSES: dict[str, type] = {}


class ApiError(Exception):
    """A use of the API that TensorRT 11 does not have, or does not allow."""


class _Members(type):
    """Of an enum; another member is an error of the fake's own."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ApiError(f"{cls.__name__} has no member {name}")

    def __getitem__(cls, name: str) -> Any:
        return vars(cls)[name]


def _enum(name: str, members: list[str]) -> Any:
    def described(member: Any) -> str:
        return f"{name}.{member.name}"

    made = _Members(name, (), {"__repr__": described, "name": ""})
    for member in members:
        value = made()
        value.name = member
        setattr(made, member, value)
    return made


ENUMS: dict[str, Any] = {name: _enum(name, members) for name, members in MANIFEST["enums"].items()}


def of_api(declared: type) -> type:
    """Hold a class to its entry of the manifest, by its name."""
    name = declared.__name__
    methods = _inherited(name, "methods")
    for method, overloads in methods.items():
        implementation = getattr(declared, method, None)
        if method in MANIFEST["classes"][name]["methods"] or method in vars(declared):
            setattr(declared, method, _bound(name, method, overloads, implementation))
    extra = {key for key in vars(declared) if not key.startswith("_")} - set(methods) - set(_properties(name))
    own = {key for key in extra if not key.startswith("recorded_")}
    assert not own, f"{name} has {sorted(own)} beside the API"
    declared.__setattr__ = _set_attribute  # type: ignore[method-assign,assignment]
    CLASSES[name] = declared
    return declared


def _inherited(name: str | None, part: str) -> dict[str, Any]:
    if name is None:
        return {}
    entry = MANIFEST["classes"][name]
    own: dict[str, Any] = entry[part]
    return _inherited(entry["base"], part) | own


def _properties(name: str) -> dict[str, str]:
    return _inherited(name, "properties")


def _set_attribute(self: Any, name: str, value: Any) -> None:
    """What begins with an underscore, or with `recorded_`, is the fake's own."""
    if not name.startswith(("_", "recorded_")):
        mode = _properties(type(self).__name__).get(name)
        if mode is None:
            raise ApiError(f"{type(self).__name__} has no attribute {name}")
        if mode == "ro":
            raise ApiError(f"{type(self).__name__}.{name} cannot be written in TensorRT 11")
        if hasattr(self, "_before_change"):
            self._before_change(name, value)
    object.__setattr__(self, name, value)


def _bound(
    owner: str, method: str, overloads: list[list[list[Any]]], implementation: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The method behind a check of its arguments, which it gets by position, defaults filled in."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        refusals = []
        for overload in overloads:
            try:
                values = _bind(overload, args, kwargs)
            except ApiError as error:
                refusals.append(str(error))
                continue
            if implementation is None:
                raise NotImplementedError(f"the fake does not know what {owner}.{method} does")
            return implementation(self, *values)
        raise ApiError(f"{owner}.{method}: {'; or '.join(refusals)}")

    return functools.update_wrapper(call, implementation) if implementation else call


def _bind(overload: list[list[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    names = [argument[0] for argument in overload]
    if len(args) > len(overload):
        raise ApiError(f"takes {len(overload)} arguments ({', '.join(names)}), got {len(args)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise ApiError(f"takes {', '.join(names) or 'nothing'}, got {name} once more or for nothing")
        given[name] = value
    values = []
    for name, kind, *default in overload:
        if name not in given and not default:
            raise ApiError(f"needs {name}")
        value = given[name] if name in given else _default(kind, default[0])
        if name in given:
            check_kind(value, kind, name)
        values.append(value)
    return values


def _default(kind: str, default: Any) -> Any:
    return ENUMS[kind][default] if kind in ENUMS and default is not None else default


def check_kind(value: Any, kind: str, name: str) -> None:
    """`kind` as the manifest writes it; a class of the API, an enum, or one of Python's types."""
    if kind.endswith("?"):
        if value is None:
            return
        kind = kind[:-1]
    if kind.startswith("list["):
        if not isinstance(value, list | tuple):
            raise ApiError(f"{name} is {type(value).__name__}, expected a list")
        for index, item in enumerate(value):
            check_kind(item, kind[5:-1], f"{name}[{index}]")
    elif not _is_of_kind(value, kind):
        raise ApiError(f"{name} is {_described(value)}, expected {kind}")


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind in ("Dims", "Permutation"):
        return isinstance(value, tuple | list) and all(type(dim) is int for dim in value)
    if kind in ENUMS:
        return isinstance(value, ENUMS[kind])
    if kind in CLASSES:
        return isinstance(value, CLASSES[kind])
    plain: dict[str, Any] = {"str": str, "float": (int, float), "buffer": (bytes, bytearray, memoryview)}
    if kind in plain:
        return isinstance(value, plain[kind])
    if kind == "ndarray":
        return isinstance(value, np.ndarray)
    if kind == "int":
        return type(value) is int
    if kind == "bool":
        return type(value) is bool
    if kind == "Logger.Severity":
        return isinstance(value, enum.Enum) and type(value).__name__ == "Severity"
    raise AssertionError(f"the manifest has an unknown type {kind}")


def _described(value: Any) -> str:
    return repr(value) if type(type(value)) is _Members else type(value).__name__
