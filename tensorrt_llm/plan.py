"""A network as plain data: what the engine file stores and the runtime executes.

The border between the two halves of the project. The builder makes a Plan from a Network; the runtime reads it from an
engine and never sees a Network. Knows no op: a node here is a name, its operands and its attributes.
"""

import math
from dataclasses import asdict, dataclass
from reprlib import repr as shortened
from typing import Any

from .dtype import itemsize, torch_dtype

Dim = int | str  # a number, or the name of a number that a step decides ("num_tokens")
Attribute = int | float | str | bool | list[int]

_MAX_DIMS = 8


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one value."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def num_elements(self) -> int:
        """For a tensor whose dims are all numbers."""
        return math.prod(int(dim) for dim in self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class PlanNode:
    """One op: names of the values it reads, specs of those it makes."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    attrs: dict[str, Attribute]

    def __str__(self) -> str:
        attrs = "".join(f", {name}={value}" for name, value in self.attrs.items())
        return f"{', '.join(map(str, self.outputs))} = {self.op}({', '.join(self.inputs)}{attrs})"


@dataclass(frozen=True)
class Plan:
    """Nodes in the order of execution; every value is an input, a weight, or made by an earlier node."""

    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    nodes: tuple[PlanNode, ...]
    outputs: dict[str, str]  # name outside -> name of the value
    marks: dict[str, str]  # name in a debug run -> name of the value

    def __post_init__(self) -> None:
        known: set[str] = set()
        for spec in (*self.inputs, *self.weights):
            _define(known, spec)
        for node in self.nodes:
            for name in node.inputs:
                if name not in known:
                    raise ValueError(f"plan: node {node.op} reads {name!r}, which nothing before it makes")
            for spec in node.outputs:
                _define(known, spec)
        for role, names in (("output", self.outputs), ("mark", self.marks)):
            for outside, name in names.items():
                if name not in known:
                    raise ValueError(f"plan: {role} {outside!r} is {name!r}, which no node makes")

    def __str__(self) -> str:
        lines = [f"input {spec}" for spec in self.inputs]
        lines += [f"weight {spec}" for spec in self.weights]
        lines += [str(node) for node in self.nodes]
        lines += [f"output {outside} = {name}" for outside, name in self.outputs.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """Read what `to_dict` wrote; anything of another form is a ValueError that says where."""
        _expect(data, dict, "plan")
        _expect_keys(data, {"inputs", "weights", "nodes", "outputs", "marks"}, "plan")
        return cls(
            inputs=_read_specs(data["inputs"], "plan.inputs"),
            weights=_read_specs(data["weights"], "plan.weights"),
            nodes=tuple(
                _read_node(node, f"plan.nodes[{index}]")
                for index, node in enumerate(_expect(data["nodes"], list, "plan.nodes"))
            ),
            outputs=_read_names(data["outputs"], "plan.outputs"),
            marks=_read_names(data["marks"], "plan.marks"),
        )


def _define(known: set[str], spec: TensorSpec) -> None:
    if spec.name in known:
        raise ValueError(f"plan: {spec.name!r} is made twice")
    known.add(spec.name)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _expect_keys(data: dict[str, Any], keys: set[str], where: str) -> None:
    if set(data) != keys:
        raise ValueError(f"{where} has keys {sorted(map(str, data))}, expected {sorted(keys)}")


def _read_specs(data: Any, where: str) -> tuple[TensorSpec, ...]:
    return tuple(_read_spec(spec, f"{where}[{index}]") for index, spec in enumerate(_expect(data, list, where)))


def _read_spec(data: Any, where: str) -> TensorSpec:
    _expect(data, dict, where)
    _expect_keys(data, {"name", "dtype", "shape"}, where)
    shape = tuple(_expect(data["shape"], list, f"{where}.shape"))
    # Bounds that no tensor reaches keep the products of a hostile file's dims from growing without end.
    if len(shape) > _MAX_DIMS or not all(isinstance(dim, str) or _is_count(dim) for dim in shape):
        raise ValueError(f"{where}.shape is {shortened(shape)}, expected at most {_MAX_DIMS} positive counts or names")
    dtype = _expect(data["dtype"], str, f"{where}.dtype")
    torch_dtype(dtype)
    return TensorSpec(_expect(data["name"], str, f"{where}.name"), dtype, shape)


def _is_count(dim: Any) -> bool:
    return type(dim) is int and 0 < dim < 2**63


def _read_node(data: Any, where: str) -> PlanNode:
    _expect(data, dict, where)
    _expect_keys(data, {"op", "inputs", "outputs", "attrs"}, where)
    inputs = _expect(data["inputs"], list, f"{where}.inputs")
    return PlanNode(
        op=_expect(data["op"], str, f"{where}.op"),
        inputs=tuple(_expect(name, str, f"{where}.inputs") for name in inputs),
        outputs=_read_specs(data["outputs"], f"{where}.outputs"),
        attrs={
            key: _read_attribute(value, f"{where}.attrs.{key}")
            for key, value in _expect(data["attrs"], dict, f"{where}.attrs").items()
        },
    )


def _read_attribute(value: Any, where: str) -> Attribute:
    if isinstance(value, list):
        return [_expect(item, int, where) for item in value]
    if not isinstance(value, int | float | str | bool):
        raise ValueError(f"{where} is {type(value).__name__}, expected a number, a string or a list of integers")
    return value


def _read_names(data: Any, where: str) -> dict[str, str]:
    return {key: _expect(name, str, f"{where}.{key}") for key, name in _expect(data, dict, where).items()}
