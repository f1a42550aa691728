"""Runs a plan: weights on the device in their kernels' layouts, nodes in order, values dropped after their last use.

Knows nothing of requests, batches or the cache: the KV pools are inputs like the others.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch

from ..dtype import is_floating, torch_dtype
from ..kernels import Kernel, StepShape, reference_kernels
from ..plan import Plan, PlanNode
from .weight_stream import read_ahead

# What to call before the nodes with these numbers.
InFrontOf = Mapping[int, Callable[[], None]] | None


class Call(NamedTuple):
    """A node bound to its kernel."""

    run: Callable[..., Any]
    reads: tuple[str, ...]  # values of the step
    weights: tuple[Any, ...]  # operands after them, as the kernel's prepare made them
    makes: tuple[str, ...]
    attrs: dict[str, Any]
    needs_step: bool
    releases: tuple[str, ...]  # values that nothing reads after this node


class Executor:
    """`run` gives the plan's outputs. With `float32` every float is computed and kept in float32: the reference run."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Kernel],
        device: torch.device,
        *,
        float32: bool = False,
    ) -> None:
        self.plan = plan
        self._in_splits = made_in_splits(plan, kernels)
        with read_ahead(weights, _order_of_use(plan), device) as read:
            bound = bind_one_by_one(plan, read, kernels, device, float32=float32, in_splits=self._in_splits)
            self._calls = [call for _, call in bound]

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        step: StepShape,
        keep: Collection[str] = (),
        in_front_of: InFrontOf = None,
    ) -> dict[str, torch.Tensor]:
        """The plan's outputs under their names outside, and the values named in `keep` under their own.

        `in_front_of` may name nodes that the plan has not.
        """
        values = dict(inputs)
        kept: dict[str, torch.Tensor] = {}
        # Some 170 nodes a step, and a CPU waits for each: what is done here for one counts.
        for number, (run, reads, weights, makes, attrs, needs_step, releases) in enumerate(self._calls):
            if in_front_of and number in in_front_of:
                in_front_of[number]()
            operands = [values[name] for name in reads]
            made = run(*operands, *weights, step=step, **attrs) if needs_step else run(*operands, *weights, **attrs)
            if len(makes) == 1:
                values[makes[0]] = made
            else:
                values.update(zip(makes, made, strict=True))
            if keep:
                kept |= {name: self._whole(name, values[name], attrs) for name in makes if name in keep}
            for name in releases:
                del values[name]
        return kept | {outside: values[name] for outside, name in self.plan.outputs.items()}

    def _whole(self, name: str, value: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """A value as its kernel's `run` would have made it, with the attributes of its node."""
        is_split = name in self._in_splits and value.ndim == 3
        return value.sum(0).to(torch_dtype(attrs["dtype"])) if is_split else value


def bind_one_by_one(
    plan: Plan,
    read: Callable[[str], torch.Tensor],
    kernels: Mapping[str, Kernel],
    device: torch.device,
    *,
    float32: bool = False,
    in_splits: Collection[str] = (),
) -> Iterator[tuple[PlanNode, Call]]:
    """Every node with its call, its weights loaded when it is reached and not held here afterwards.

    `read` gives a weight, on any device; it is asked for each once, in the order of their first use. A node that
    makes one of `in_splits` is bound to its kernel's `run_in_splits`.
    """
    missing = sorted({node.op for node in plan.nodes} - set(kernels))
    if missing:
        raise ValueError(f"no kernel for {', '.join(missing)} on {device}; this engine needs what this version lacks")
    weight_names = {spec.name for spec in plan.weights}
    loaded = _LoadedWeights(plan, read, weight_names, device, float32)
    releases = _releases(plan, weight_names)
    for node, released in zip(plan.nodes, releases, strict=True):
        kernel = kernels[node.op]
        if any(spec.name in in_splits for spec in node.outputs):
            assert kernel.run_in_splits
            kernel = replace(kernel, run=kernel.run_in_splits)
        yield node, _bind_node(node, kernel, loaded, released, float32)


def made_in_splits(plan: Plan, kernels: Mapping[str, Kernel]) -> set[str]:
    """Values that a kernel may leave in splits: they are read once, by a kernel that adds them."""
    num_reads = Counter([*(name for node in plan.nodes for name in node.inputs), *plan.outputs.values()])
    producers = {op for op, kernel in kernels.items() if kernel.run_in_splits}
    adders = {op for op, kernel in kernels.items() if kernel.adds_splits}
    added = {name for node in plan.nodes if node.op in adders for name in node.inputs[1:2]}
    made = {spec.name for node in plan.nodes if node.op in producers for spec in node.outputs}
    return {name for name in made & added if num_reads[name] == 1}


def _bind_node(
    node: PlanNode, kernel: Kernel, loaded: "_LoadedWeights", releases: tuple[str, ...], float32: bool
) -> Call:
    reads = tuple(name for name in node.inputs if name not in loaded.names)
    _check_call(node, reads)
    attrs = dict(node.attrs)
    if float32 and is_floating(str(attrs.get("dtype", "int32"))):
        attrs["dtype"] = "float32"
    operands: tuple[Any, ...] = tuple(loaded.take(name) for name in node.inputs[len(reads) :])
    if kernel.prepare and operands:
        _check_arguments(kernel.prepare, operands, attrs, node)
        try:
            operands = kernel.prepare(*operands, **attrs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"plan: weights do not fit in {node}: {error}") from error
    makes = tuple(spec.name for spec in node.outputs)
    return Call(kernel.run, reads, operands, makes, attrs, kernel.needs_step, releases)


def _check_call(node: PlanNode, reads: tuple[str, ...]) -> None:
    """The node must be a call that its op can take: an engine file may have been edited."""
    if node.inputs[: len(reads)] != reads:
        raise ValueError(f"plan: {node} reads a weight before a value")
    reference = reference_kernels()[node.op]
    attrs = {**node.attrs, "step": None} if reference.needs_step else node.attrs
    _check_arguments(reference.run, node.inputs, attrs, node)


def _check_arguments(
    function: Callable[..., Any], operands: Sequence[object], attrs: Mapping[str, object], node: PlanNode
) -> None:
    try:
        signature(function).bind(*operands, **attrs)
    except TypeError as error:
        raise ValueError(f"plan: {node} is no call of {node.op}: {error}") from error


class _LoadedWeights:
    """Weights on the device, each read once and held no longer than until its last node has it."""

    def __init__(
        self, plan: Plan, read: Callable[[str], torch.Tensor], names: set[str], device: torch.device, float32: bool
    ) -> None:
        self.names = names
        self._read = read
        self._device = device
        self._float32 = float32
        self._users_left = dict.fromkeys(names, 0)
        for node in plan.nodes:
            for name in node.inputs:
                if name in names:
                    self._users_left[name] += 1
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        if name not in self._held:
            weight = self._read(name).to(self._device)
            self._held[name] = weight.float() if self._float32 and weight.is_floating_point() else weight
        self._users_left[name] -= 1
        return self._held[name] if self._users_left[name] else self._held.pop(name)


def _order_of_use(plan: Plan) -> list[str]:
    """The weights that nodes use, by their first use."""
    names = {spec.name for spec in plan.weights}
    return list(dict.fromkeys(name for node in plan.nodes for name in node.inputs if name in names))


def _releases(plan: Plan, weight_names: set[str]) -> list[tuple[str, ...]]:
    """For each node the values whose last reader it is."""
    last_use = {name: index for index, node in enumerate(plan.nodes) for name in node.inputs}
    last_use |= {
        spec.name: index for index, node in enumerate(plan.nodes) for spec in node.outputs if spec.name not in last_use
    }
    outputs = set(plan.outputs.values())
    releases: list[list[str]] = [[] for _ in plan.nodes]
    for name, index in last_use.items():
        if name not in weight_names and name not in outputs:
            releases[index].append(name)
    return [tuple(names) for names in releases]
