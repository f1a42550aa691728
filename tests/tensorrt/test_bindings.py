"""The manifest of TensorRT's API, and so what the strict fake lets the lowering call, against NVIDIA's own wheel.

    pip download --no-deps tensorrt_cu13_bindings==11.4.0.106 && unzip -d FOLDER tensorrt_cu13_bindings-*.whl
    TENSORRT_BINDINGS_DIR=FOLDER pytest -q -rs -m tensorrt_bindings

The wheel (for Python 3.11, as named) is not part of this repository. It needs three libraries for little else than nine
functions: here they give null, so the module imports anywhere with gcc, names all it has, and can build nothing. What
its methods take stands in their docstrings; what they do, this cannot know.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt.engine import Severity

MANIFEST: dict[str, Any] = json.loads((Path(__file__).parent / "manifest.json").read_text())
WHEEL_DIR = os.environ.get("TENSORRT_BINDINGS_DIR")
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# What a process with those libraries prints: the wheel's enums and classes by their dotted names.
DESCRIBE = """
import inspect, json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings

def classes_in(owner, prefix=""):
    for name, value in vars(owner).items():
        if inspect.isclass(value) and value.__module__.startswith("tensorrt_bindings") and not name.startswith("_"):
            yield prefix + name, value
            yield from classes_in(value, prefix + name + ".")

def describe(cls):
    values = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    properties = {name: value for name, value in values.items() if isinstance(value, property)}
    docstrings = {name: getattr(cls, name).__doc__ or "" for name in values if name not in properties}
    return {
        "is_a": [base.__qualname__ for base in cls.__mro__],
        "members": list(cls.__members__) if isinstance(getattr(cls, "__members__", None), dict) else [],
        "properties": {name: "rw" if value.fset else "ro" for name, value in properties.items()},
        "methods": {name: [line for line in doc.splitlines() if ") -> " in line] for name, doc in docstrings.items()},
    }

classes = {name: describe(cls) for name, cls in classes_in(tensorrt_bindings)}
print(json.dumps({"version": tensorrt_bindings.__version__, "classes": classes}))
"""
# How the wheel writes what the manifest calls by Python's names.
PLAIN_TYPES = {
    "bool": ("bool",),
    "buffer": ("typing_extensions.Buffer", "collections.abc.Buffer"),
    "float": ("float", "typing.SupportsFloat"),
    "int": ("int", "typing.SupportsInt"),
    "ndarray": ("numpy.ndarray",),
    "str": ("str",),
}

needs_the_wheel = pytest.mark.skipif(
    not WHEEL_DIR,
    reason="needs NVIDIA's wheel: `pip download --no-deps tensorrt_cu13_bindings==11.4.0.106`, unzip it, "
    "and set TENSORRT_BINDINGS_DIR to the folder",
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    libraries = tmp_path_factory.mktemp("null_libraries")
    source = libraries / "null.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(libraries / library), str(source)]
        subprocess.run(command, check=True)
    search = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    described = subprocess.run(
        [sys.executable, "-c", DESCRIBE, str(WHEEL_DIR)],
        env=os.environ | {"LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
    )
    assert described.returncode == 0, f"the wheel in {WHEEL_DIR} cannot be imported:\n{described.stderr}"
    return json.loads(described.stdout)


def split_arguments(text: str) -> list[str]:
    """At the commas that no bracket holds."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def read_argument(text: str) -> list[str]:
    """`flags: typing.SupportsInt = 0` in the manifest's form; no module before a type, no class before a member."""
    name, _, rest = text.partition(": ")
    kind, equals, default = rest.partition(" = ")
    member = re.fullmatch(r"<\w+\.(\w+): -?\d+>", default)
    bare_kind = re.sub(r"tensorrt_bindings\.tensorrt\.|\w+::", "", kind)
    return [name, bare_kind, *([member[1] if member else default] if equals else [])]


def read_overloads(method: str, docstring: list[str]) -> list[list[list[str]]]:
    """What each signature in the lines of a docstring takes after `self`."""
    matches = [re.fullmatch(rf"(?:\d+\. )?{method}\((.*)\) -> .*", line) for line in docstring]
    return [[read_argument(argument) for argument in split_arguments(match[1])[1:]] for match in matches if match]


def is_of_type(kind: str, theirs: str, classes: dict[str, Any]) -> bool:
    """Whether what the manifest calls `kind` can be given where the wheel writes `theirs`."""
    kind = kind.removesuffix("?")
    if theirs == "object":
        return True
    if kind.startswith("list["):
        items = re.fullmatch(r"(?:list|collections\.abc\.Sequence)\[(.*)\]", theirs)
        return items is not None and is_of_type(kind[5:-1], items[1], classes)
    if kind in PLAIN_TYPES:
        return theirs in PLAIN_TYPES[kind]
    return kind in classes and theirs in classes[kind]["is_a"]


def is_same(ours: list[Any], theirs: list[str], classes: dict[str, Any]) -> bool:
    """Whether an argument has the name, a type that takes ours, and the default. A null only says that there is one."""
    (name, kind, *default), (their_name, their_kind, *their_default) = ours, theirs
    if name != their_name or not is_of_type(kind, their_kind, classes) or len(default) != len(their_default):
        return False
    return default in ([], [None]) or str(default[0]) == their_default[0]


def takes(theirs: list[list[str]], ours: list[list[Any]], classes: dict[str, Any]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(is_same(our, their, classes) for our, their in pairs)


def signature(arguments: list[list[Any]]) -> str:
    written = [f"{name}: {kind}" + "".join(f" = {value}" for value in default) for name, kind, *default in arguments]
    return f"({', '.join(written)})"


def differences(name: str, ours: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    """What a class of the manifest says and the wheel does not, a line each."""
    if name not in classes:
        return [f"no class {name}"]
    theirs, found = classes[name], []
    if ours["base"] and ours["base"] not in theirs["is_a"]:
        found.append(f"{name} is no {ours['base']}, but {theirs['is_a'][1]}")
    for method, overloads in ours["methods"].items():
        known = read_overloads(method, theirs["methods"].get(method, []))
        for overload in overloads:
            if not any(takes(candidate, overload, classes) for candidate in known):
                there = " or ".join(map(signature, known)) or "nothing of that name"
                found.append(f"{name}.{method}{signature(overload)}: the wheel has {there}")
    for attribute, mode in ours["properties"].items():
        if attribute not in theirs["properties"]:
            found.append(f"{name} has no property {attribute}")
        elif mode == "rw" and theirs["properties"][attribute] == "ro":
            found.append(f"{name}.{attribute} cannot be written")
    return found


@needs_the_wheel
@pytest.mark.tensorrt_bindings
def test_the_wheel_is_of_the_version_of_the_manifest(wheel: dict[str, Any]) -> None:
    assert wheel["version"].partition(".")[0] == MANIFEST["version"]


@needs_the_wheel
@pytest.mark.tensorrt_bindings
@pytest.mark.parametrize("name", MANIFEST["classes"])
def test_a_class_has_in_the_wheel_what_the_manifest_says(name: str, wheel: dict[str, Any]) -> None:
    found = differences(name, MANIFEST["classes"][name], wheel["classes"])
    assert not found, "\n".join(found)


@needs_the_wheel
@pytest.mark.tensorrt_bindings
@pytest.mark.parametrize("name", MANIFEST["enums"])
def test_an_enum_has_in_the_wheel_the_members_of_the_manifest(name: str, wheel: dict[str, Any]) -> None:
    members = wheel["classes"].get(name, {"members": []})["members"]
    assert not [member for member in MANIFEST["enums"][name] if member not in members], f"the wheel has {members}"


@needs_the_wheel
@pytest.mark.tensorrt_bindings
def test_the_severities_of_the_fake_are_those_of_the_wheel_and_on_its_logger(wheel: dict[str, Any]) -> None:
    members = {member.name for member in Severity}
    assert members <= set(wheel["classes"]["Logger.Severity"]["members"])
    assert members <= set(wheel["classes"]["Logger"]["methods"])


# A wheel of one class, and what a manifest may say of it.
PUMP_WHEEL = {
    "Mode": {"is_a": ["Mode", "object"], "members": ["FAST"], "properties": {}, "methods": {}},
    "IPump": {
        "is_a": ["IPump", "IMachine", "object"],
        "members": [],
        "properties": {"level": "rw", "serial": "ro"},
        "methods": {
            "open": [
                "1. open(self: tensorrt_bindings.tensorrt.IPump, rate: typing.SupportsInt) -> bool",
                "2. open(self: tensorrt_bindings.tensorrt.IPump, rate: typing.SupportsInt, "
                "mode: tensorrt_bindings.tensorrt.Mode = <Mode.FAST: 0>) -> bool",
            ],
        },
    },
}
TRUE_SAYINGS: tuple[dict[str, Any], ...] = (
    {"base": "IMachine", "properties": {"level": "rw", "serial": "ro"}},
    {"methods": {"open": [[["rate", "int"]], [["rate", "int"], ["mode", "Mode", "FAST"]]]}},
    {"methods": {"open": [[["rate", "int"], ["mode", "Mode", None]]]}},
)
FALSE_SAYINGS: dict[str, dict[str, Any]] = {
    "another base": {"base": "ILayer"},
    "no such method": {"methods": {"close": [[]]}},
    "another name": {"methods": {"open": [[["speed", "int"]]]}},
    "another order": {"methods": {"open": [[["mode", "Mode", "FAST"], ["rate", "int"]]]}},
    "one argument too many": {"methods": {"open": [[["rate", "int"], ["mode", "Mode", "FAST"], ["more", "int"]]]}},
    "one argument too few": {"methods": {"open": [[]]}},
    "another enum": {"methods": {"open": [[["rate", "int"], ["mode", "Speed", "FAST"]]]}},
    "another plain type": {"methods": {"open": [[["rate", "str"]]]}},
    "no default": {"methods": {"open": [[["rate", "int"], ["mode", "Mode"]]]}},
    "another default": {"methods": {"open": [[["rate", "int"], ["mode", "Mode", "SLOW"]]]}},
    "a default too many": {"methods": {"open": [[["rate", "int", 1]]]}},
    "one overload of two": {"methods": {"open": [[["rate", "int"]], [["rate", "bool"]]]}},
    "a property written": {"properties": {"serial": "rw"}},
    "a property that is a method": {"properties": {"open": "ro"}},
    "a method that is a property": {"methods": {"level": [[]]}},
}
NOTHING_SAID: dict[str, Any] = {"base": None, "methods": {}, "properties": {}}


def test_what_the_wheel_has_is_no_difference() -> None:
    found = [differences("IPump", NOTHING_SAID | saying, PUMP_WHEEL) for saying in TRUE_SAYINGS]
    assert found == [[]] * len(TRUE_SAYINGS)


@pytest.mark.parametrize("saying", FALSE_SAYINGS)
def test_what_the_wheel_has_not_is_one_difference_by_name(saying: str) -> None:
    (found,) = differences("IPump", NOTHING_SAID | FALSE_SAYINGS[saying], PUMP_WHEEL)
    assert found.startswith("IPump")
