"""Products are left in splits where, and only where, their one reader adds them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import make_config, make_engine

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import Kernel, StepShape, reference, reference_kernels
from tensorrt_llm.plan import Plan, PlanNode, TensorSpec
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session, session
from tensorrt_llm.runtime.executor import Executor

CPU = torch.device("cpu")
NO_STEP = StepShape(3, 1, 1, 3, 3, 3)  # no op of these plans looks at it
HIDDEN = 4
Calls = list[str]


def splitting_kernels(calls: Calls) -> dict[str, Kernel]:
    """Those of the reference, but for products that come in halves where they may, and norms that add them."""

    def matmul_in_splits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **attrs: Any) -> Any:
        calls.append("matmul in splits")
        half = x.shape[1] // 2
        parts = (x[:, :half], weight[:, :half], bias), (x[:, half:], weight[:, half:])
        return torch.stack([reference.matmul(*part, dtype="float32") for part in parts])

    def add_rms_norm(x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor, **attrs: Any) -> Any:
        calls.append(f"add_rms_norm of {y.ndim} dims")
        return reference.add_rms_norm(x, y.sum(0) if y.ndim == 3 else y, *weights, **attrs)

    return reference_kernels() | {
        "matmul": Kernel(counted(calls, "matmul", reference.matmul), run_in_splits=matmul_in_splits),
        "add_rms_norm": Kernel(add_rms_norm, adds_splits=True),
    }


def counted(calls: Calls, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*operands: Any, **attrs: Any) -> Any:
        calls.append(name)
        return run(*operands, **attrs)

    return counting


def test_products_in_front_of_norms_are_left_in_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_config(num_hidden_layers=2))
    prompts, sampling = [[5, 6, 7], [8, 9]], SamplingConfig(max_new_tokens=4, end_id=None)
    wanted = GenerationSession(Session(engine, "cpu")).decode_batch(prompts, sampling)
    calls: Calls = []
    monkeypatch.setattr(session, "kernels_for", lambda *_, **__: splitting_kernels(calls))
    found = GenerationSession(Session(engine, "cpu")).decode_batch(prompts, sampling)
    assert torch.equal(found, wanted)
    # What attention and MLP make goes to a norm, qkv to attention, and the logits are an output.
    steps = calls.count("matmul") // 3
    assert steps >= 4 and calls.count("matmul") == 3 * steps
    assert calls.count("matmul in splits") == calls.count("add_rms_norm of 3 dims") == 4 * steps


# Plans of a few nodes. Their inputs are x and residual, their weights W and w.


def spec(name: str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, ("num_tokens", HIDDEN))


def product(dtype: str = "float32") -> PlanNode:
    return PlanNode("matmul", ("x", "W"), (spec("y", dtype),), {"dtype": dtype})


def norm(x: str, y: str, made: str = "normed") -> PlanNode:
    return PlanNode("add_rms_norm", (x, y, "w"), (spec(f"{made} sum"), spec(made)), {"eps": 1e-6, "dtype": "float32"})


def other(op: str, *inputs: str, made: str = "other") -> PlanNode:
    return PlanNode(op, inputs, (spec(made),), {})


def plan_of(*nodes: PlanNode, outputs: tuple[str, ...] = (), dtype: str = "float32") -> Plan:
    """Without `outputs`, what the last node makes last is the only one."""
    names = outputs or (nodes[-1].outputs[-1].name,)
    weights = TensorSpec("W", dtype, (HIDDEN, HIDDEN)), TensorSpec("w", "float32", (HIDDEN,))
    return Plan((spec("x", dtype), spec("residual")), weights, nodes, {name: name for name in names}, {})


def run(plan: Plan, kernels: dict[str, Kernel], *keep: str, **options: Any) -> dict[str, torch.Tensor]:
    """Outputs and kept values, for inputs and weights that are the same each time."""
    generator = torch.Generator().manual_seed(0)
    given = {
        each.name: torch.randn(
            [3 if isinstance(dim, str) else dim for dim in each.shape], generator=generator
        ).to(torch_dtype(each.dtype))
        for each in (*plan.inputs, *plan.weights)
    }  # fmt: skip
    return Executor(plan, given, kernels, CPU, **options).run(given, NO_STEP, keep)


ONLY_READER = norm("residual", "y")
WHOLE = {
    "its reader takes it for the residual": plan_of(product(), norm("y", "residual")),
    "its reader takes it for both": plan_of(product(), norm("y", "y")),
    "its reader adds no splits": plan_of(product(), other("add", "residual", "y")),
    "another node reads it": plan_of(product(), ONLY_READER, other("add", "normed", "y")),
    "another node reads it first": plan_of(product(), other("silu", "y"), norm("other", "y")),
    "two norms read it": plan_of(product(), ONLY_READER, norm("normed", "y", "again")),
    "it is an output": plan_of(product(), ONLY_READER, outputs=("normed", "y")),
    "nothing reads it": plan_of(product(), norm("residual", "x")),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_product_is_left_in_splits_to_the_norm_that_alone_reads_it(dtype: str) -> None:
    plan, calls = plan_of(product(dtype), ONLY_READER, outputs=("normed", "normed sum"), dtype=dtype), Calls()
    wanted, found = run(plan, reference_kernels()), run(plan, splitting_kernels(calls))
    assert calls == ["matmul in splits", "add_rms_norm of 3 dims"]
    for name, value in wanted.items():
        # Whole products are rounded to float16, sums of splits are not.
        torch.testing.assert_close(found[name], value, rtol=0, atol=4 * torch.finfo(torch_dtype(dtype)).eps)


@pytest.mark.parametrize("why", WHOLE)
def test_a_product_is_whole_where(why: str) -> None:
    calls: Calls = []
    wanted, found = run(WHOLE[why], reference_kernels()), run(WHOLE[why], splitting_kernels(calls))
    assert "matmul" in calls and "matmul in splits" not in calls
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_made_otherwise_is_never_split() -> None:
    plan, calls = plan_of(other("silu", "x"), norm("residual", "other")), Calls()
    assert torch.equal(run(plan, splitting_kernels(calls))["normed"], run(plan, reference_kernels())["normed"])
    assert calls == ["add_rms_norm of 2 dims"]


@pytest.mark.parametrize(
    ("dtype", "float32", "kept"),
    [("float32", False, torch.float32), ("float16", False, torch.float16), ("float16", True, torch.float32)],
)
def test_kept_values_are_whole(dtype: str, float32: bool, kept: torch.dtype) -> None:
    plan, calls = plan_of(product(dtype), ONLY_READER, dtype=dtype), Calls()
    wanted = run(plan, reference_kernels(), "y", "normed sum", float32=float32)
    found = run(plan, splitting_kernels(calls), "y", "normed sum", float32=float32)
    assert "matmul in splits" in calls and found["y"].dtype == wanted["y"].dtype == kept
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=4 * torch.finfo(torch_dtype(dtype)).eps)
