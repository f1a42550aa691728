"""The graph: tensors, nodes, and the network that holds them in order.

A network is in SSA form: every tensor is made once, by a node, as an input, or as a weight. Dims are ints or symbols
(`num_tokens`, `batch`). A node keeps its meaning (op and attributes) until kernels are chosen, so one network can be
printed, verified, rewritten by passes, interpreted by the reference kernels, or lowered. Knows no op by name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from .dtype import torch_dtype
from .plan import Attribute, Dim, Plan, PlanNode, TensorSpec

if TYPE_CHECKING:
    from .parameter import Parameter

_current: ContextVar["Network"] = ContextVar("network")


@contextmanager
def net_guard(network: "Network") -> Iterator["Network"]:
    """Make `network` the one that calls of modules and functional ops add to."""
    token = _current.set(network)
    try:
        yield network
    finally:
        _current.reset(token)


def default_net() -> "Network":
    """The network of the innermost `net_guard`."""
    try:
        return _current.get()
    except LookupError:
        message = "no network in work; call models and functional ops inside `with net_guard(network):`"
        raise RuntimeError(message) from None


class Tensor:
    """A value in a network. Constructed by name it is a new network input; ops make all others."""

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: Iterable[Dim],
        *,
        is_network_input: bool = True,
        network: "Network | None" = None,
        producer: "Node | None" = None,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = tuple(shape)
        self.network = network if network is not None else default_net()
        self.producer = producer
        torch_dtype(dtype)
        if is_network_input:
            self.network._add_input(self)

    def mark_output(self, name: str) -> None:
        """Make this tensor an output of the network, called `name` outside."""
        self.network.outputs[name] = self

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    def __add__(self, other: "Tensor") -> "Tensor":
        from .functional import add  # the operators are sugar over functional, which imports this file

        return add(self, other)

    def __mul__(self, other: "Tensor") -> "Tensor":
        from .functional import mul

        return mul(self, other)

    def __repr__(self) -> str:
        return str(self.spec())


class Node:
    """One op: what it reads, what it makes, and its attributes (JSON values)."""

    def __init__(self, op: str, inputs: tuple[Tensor, ...], attrs: dict[str, Attribute]) -> None:
        self.op = op
        self.inputs = inputs
        self.attrs = attrs
        self.outputs: tuple[Tensor, ...] = ()

    def to_plan(self) -> PlanNode:
        return PlanNode(
            self.op,
            tuple(read.name for read in self.inputs),
            tuple(made.spec() for made in self.outputs),
            dict(self.attrs),
        )

    def __repr__(self) -> str:
        return str(self.to_plan())


class Network:
    """Inputs, weights, nodes in an order that can be executed, outputs, and marks (tensors a debug run shows)."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.nodes: list[Node] = []
        self.outputs: dict[str, Tensor] = {}
        self.marks: dict[str, Tensor] = {}
        self.named_parameters: dict[str, Parameter] = {}
        self._scope: list[str] = []
        self._names: Counter[str] = Counter()

    # Describing

    def set_named_parameters(self, named_parameters: "Iterable[tuple[str, Parameter]]") -> None:
        """Name a model's parameters; call this before the model, so that their weights appear under these names."""
        for name, parameter in named_parameters:
            parameter.name = name
            self.named_parameters[name] = parameter

    def parameter(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """The tensor of the weight called `name`, made at its first use."""
        if name not in self.named_parameters:
            raise RuntimeError(f"weight {name!r} is not of this network; call set_named_parameters before the model")
        if name not in self.weights:
            self.weights[name] = Tensor(name, dtype, shape, is_network_input=False, network=self)
        return self.weights[name]

    def add(
        self,
        op: str,
        *inputs: Tensor,
        outputs: Iterable[tuple[str, tuple[Dim, ...]]],
        before: Node | None = None,
        **attrs: Attribute,
    ) -> tuple[Tensor, ...]:
        """Add a node that makes one tensor per (dtype, shape) of `outputs`; at the end, or in front of `before`."""
        node = Node(op, inputs, attrs)
        # A pass works outside of any module: what it adds belongs where the node it rewrites was.
        path = before.outputs[0].name.rpartition(".")[0] if before else ".".join(self._scope)
        node.outputs = tuple(
            Tensor(self._new_name(path, op), dtype, shape, is_network_input=False, network=self, producer=node)
            for dtype, shape in outputs
        )
        self.nodes.insert(self.nodes.index(before) if before else len(self.nodes), node)
        return node.outputs

    def mark(self, name: str, tensor: Tensor) -> None:
        """Let a debug run show `tensor` as `name`, which gets the path of the module in work in front."""
        self.marks[".".join([*self._scope, name])] = tensor

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names made inside begin with `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def _add_input(self, tensor: Tensor) -> None:
        if tensor.name in self.inputs:
            raise ValueError(f"network: input {tensor.name!r} exists already")
        self.inputs[tensor.name] = tensor

    def _new_name(self, path: str, op: str) -> str:
        name = f"{path}.{op}" if path else op
        self._names[name] += 1
        # '/' keeps a node's name apart from a weight's of the same path.
        return f"{name}/{self._names[name]}"

    # Rewriting

    def users(self, tensor: Tensor) -> list[Node]:
        """The nodes that read `tensor`."""
        return [node for node in self.nodes if any(read is tensor for read in node.inputs)]

    def is_output(self, tensor: Tensor) -> bool:
        """Whether `tensor` is an output of the network, whose dtype and shape others rely on."""
        return any(seen is tensor for seen in self.outputs.values())

    def is_visible(self, tensor: Tensor) -> bool:
        """Whether something outside the nodes looks at `tensor`: an output or a mark."""
        return self.is_output(tensor) or any(seen is tensor for seen in self.marks.values())

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Let everything that reads `old` read `new`."""
        for node in self.nodes:
            node.inputs = tuple(new if read is old else read for read in node.inputs)
        for names in (self.outputs, self.marks):
            for name, seen in names.items():
                if seen is old:
                    names[name] = new

    def remove_dead_nodes(self) -> int:
        """Drop nodes (and weights) that no output and no mark depends on; the number of nodes dropped."""
        alive = {id(tensor) for tensor in (*self.outputs.values(), *self.marks.values())}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(id(made) in alive for made in node.outputs):
                kept.append(node)
                alive.update(id(read) for read in node.inputs)
        dropped = len(self.nodes) - len(kept)
        self.nodes = kept[::-1]
        self.weights = {name: weight for name, weight in self.weights.items() if id(weight) in alive}
        return dropped

    # Checking and showing

    def verify(self) -> None:
        """Assert that the graph is in SSA form and every name resolves; a pass that breaks this is a bug."""
        known = {id(tensor) for tensor in (*self.inputs.values(), *self.weights.values())}
        for node in self.nodes:
            for read in node.inputs:
                assert id(read) in known, f"{node!r} reads {read.name}, which nothing before it makes"
            for made in node.outputs:
                assert made.producer is node, f"{made.name} names another producer than {node!r}"
                known.add(id(made))
        for name, tensor in (*self.outputs.items(), *self.marks.items()):
            assert id(tensor) in known, f"{name} is {tensor.name}, which no node makes"
        assert self.outputs, "the network has no output"
        self.to_plan()

    def to_plan(self) -> Plan:
        """This network as plain data."""
        return Plan(
            inputs=tuple(tensor.spec() for tensor in self.inputs.values()),
            weights=tuple(tensor.spec() for tensor in self.weights.values()),
            nodes=tuple(node.to_plan() for node in self.nodes),
            outputs={name: tensor.name for name, tensor in self.outputs.items()},
            marks={name: tensor.name for name, tensor in self.marks.items()},
        )

    def __str__(self) -> str:
        return str(self.to_plan())
