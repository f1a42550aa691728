"""The graph and its plain form: names, scopes, verification, and the way to data and back."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import describe_config, make_config

from tensorrt_llm import Mapping, Module, ModuleList, Network, Parameter, Tensor, default_net, net_guard
from tensorrt_llm.functional import matmul, silu
from tensorrt_llm.models import QWenForCausalLM
from tensorrt_llm.network import Node
from tensorrt_llm.plan import Plan, PlanNode, TensorSpec


class Scale(Module):
    """One matmul, named by where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter((4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight.value)


class Stack(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Scale()
        self.blocks = ModuleList([Scale(), Scale()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return silu(x)


def run_through(module: Module) -> Network:
    network = Network()
    network.set_named_parameters(module.named_parameters())
    with net_guard(network):
        module(Tensor("x", "float32", ["n", 4])).mark_output("y")
    return network


def test_nodes_and_weights_are_named_by_the_path_of_their_module() -> None:
    network = run_through(Stack())
    assert [node.outputs[0].name for node in network.nodes] == [
        "first.matmul/1",
        "blocks.0.matmul/1",
        "blocks.1.matmul/1",
        "silu/1",
    ]
    assert list(network.weights) == ["first.weight", "blocks.0.weight", "blocks.1.weight"]


def test_a_parameter_shared_by_two_modules_has_one_name() -> None:
    stack = Stack()
    stack.blocks[1].weight = stack.first.weight
    assert [name for name, _ in stack.named_parameters()] == ["first.weight", "blocks.0.weight"]


def test_a_tied_lm_head_adds_no_weight() -> None:
    names = dict(QWenForCausalLM(make_config(tie_word_embeddings=True), "float32").named_parameters())
    assert "vocab_embedding.weight" in names and "lm_head.weight" not in names


def test_a_tied_lm_head_of_two_ranks_is_a_weight_of_its_own() -> None:
    model = QWenForCausalLM(make_config(tie_word_embeddings=True), "float32", Mapping(2, 0, tp_size=2))
    assert dict(model.named_parameters())["lm_head.weight"].shape == (6, 8)  # 11 rows padded to 12, halved


def test_two_networks_can_be_in_work_one_inside_the_other() -> None:
    outer, inner = Network(), Network()
    with net_guard(outer):
        with net_guard(inner):
            assert default_net() is inner
        assert default_net() is outer


def test_without_a_network_in_work_the_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="with net_guard"):
        default_net()


def test_a_name_can_be_an_input_once() -> None:
    with net_guard(Network()), pytest.raises(ValueError, match="input 'x' exists already"):
        for _ in range(2):
            Tensor("x", "float32", [4])


# verify


def broken_order(network: Network) -> None:
    network.nodes.reverse()


def missing_node(network: Network) -> None:
    del network.nodes[1]


def missing_weight(network: Network) -> None:
    del network.weights["first.weight"]


def foreign_producer(network: Network) -> None:
    network.nodes[1].outputs[0].producer = network.nodes[0]


def foreign_output(network: Network) -> None:
    network.outputs["y"] = run_through(Stack()).outputs["y"]


def foreign_mark(network: Network) -> None:
    network.marks["seen"] = run_through(Stack()).outputs["y"]


def no_output(network: Network) -> None:
    network.outputs.clear()


@pytest.mark.parametrize(
    "damage",
    [broken_order, missing_node, missing_weight, foreign_producer, foreign_output, foreign_mark, no_output],
)
def test_verify_refuses_a_broken_graph(damage: Callable[[Network], None]) -> None:
    network = run_through(Stack())
    network.verify()
    damage(network)
    with pytest.raises(AssertionError):
        network.verify()


def test_verify_refuses_a_name_made_twice() -> None:
    network = run_through(Stack())
    network.nodes[1].outputs[0].name = network.nodes[0].outputs[0].name
    with pytest.raises(ValueError, match="made twice"):
        network.verify()


def test_a_node_can_be_put_in_front_of_another() -> None:
    network = run_through(Stack())
    last: Node = network.nodes[-1]
    network.add("silu", network.inputs["x"], outputs=[("float32", ("n", 4))], before=last)
    assert [node.op for node in network.nodes] == ["matmul", "matmul", "matmul", "silu", "silu"]
    assert network.nodes[-1] is last


# Parameters


def test_a_parameter_takes_arrays_and_tensors() -> None:
    parameter = Parameter((2, 3), "float16")
    for data in (np.ones((2, 3), np.float32), torch.ones(2, 3)):
        parameter.value = data
        assert parameter.load().dtype == torch.float16


def test_data_of_another_shape_is_refused_by_name() -> None:
    parameter = Parameter((2, 3))
    parameter.name = "layers.0.weight"
    with pytest.raises(ValueError, match=r"layers.0.weight: data has shape \(3, 2\), expected \(2, 3\)"):
        parameter.value = torch.ones(3, 2)


def test_data_of_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a floating dtype"):
        Parameter((2,)).value = torch.ones(2, dtype=torch.int32)


def test_a_parameter_without_data_says_so() -> None:
    with pytest.raises(ValueError, match="has no data"):
        Parameter((2,)).load()


@pytest.mark.parametrize("value", [65520.0, -1e9, 3e38])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_value_beyond_float16_names_the_parameter(value: float, stored: torch.dtype) -> None:
    parameter = Parameter((3,), "float16")
    parameter.name = "layers.0.mlp.proj.weight"
    parameter.value = torch.tensor([0.0, value, 1.0], dtype=stored)
    with pytest.raises(ValueError, match="layers.0.mlp.proj.weight.*does not fit float16"):
        parameter.load()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_values_pass_where_they_fit(dtype: str) -> None:
    parameter = Parameter((1,), dtype)
    parameter.value = torch.tensor([1e38])
    assert parameter.load().isfinite().all()


def test_the_largest_float16_passes() -> None:
    parameter = Parameter((2,), "float16")
    parameter.value = torch.tensor([-65504.0, 65519.0])
    assert parameter.load().tolist() == [-65504.0, 65504.0]


# Plans


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_plan_survives_the_way_through_json(dtype: str, optimized: bool) -> None:
    plan = describe_config(make_config(num_hidden_layers=2), dtype, optimized=optimized).to_plan()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ("n", 4))


def plan_of(*nodes: PlanNode, output: str = "b", marks: dict[str, str] | None = None) -> Plan:
    return Plan((spec("a"),), (), nodes, {"y": output}, marks or {})


SILU = PlanNode("silu", ("a",), (spec("b"),), {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan_of(PlanNode("silu", ("c",), (spec("b"),), {})), "silu reads 'c', which nothing before it makes"),
        (lambda: plan_of(PlanNode("silu", ("b",), (spec("b"),), {})), "reads 'b', which nothing before it makes"),
        (lambda: plan_of(SILU, SILU), "'b' is made twice"),
        (lambda: plan_of(SILU, output="c"), "output 'y' is 'c', which no node makes"),
        (lambda: plan_of(SILU, marks={"m": "c"}), "mark 'm' is 'c', which no node makes"),
    ],
)
def test_a_plan_that_does_not_hang_together_is_refused(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dim", [0, -1, True, 1.5, None, [], 2**63])
def test_a_plan_with_a_strange_dim_is_refused(dim: object) -> None:
    data = json.loads(json.dumps(plan_of(SILU).to_dict()))
    data["nodes"][0]["outputs"][0]["shape"] = [dim]
    with pytest.raises(ValueError, match=r"plan.nodes\[0\].outputs\[0\].shape"):
        Plan.from_dict(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(data=JSON, place=st.sampled_from(["inputs", "weights", "nodes", "outputs", "marks"]))
def test_a_plan_with_anything_in_it_is_a_plan_or_a_value_error(data: object, place: str) -> None:
    plan = json.loads(json.dumps(plan_of(SILU).to_dict()))
    for candidate in (data, plan | {place: data}):
        try:
            Plan.from_dict(candidate)
        except ValueError:
            pass
