"""Products are left in splits where, and only where, their one reader adds them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import make_config, make_engine

from tensorrt_llm import Engine
from tensorrt_llm.kernels import Kernel, StepShape, reference, reference_kernels
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session, session
from tensorrt_llm.runtime.executor import Executor

CPU = torch.device("cpu")
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


@pytest.fixture
def engine() -> Engine:
    return make_engine(make_config(num_hidden_layers=2))


def test_products_in_front_of_norms_are_left_in_splits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_kept_values_are_whole(engine: Engine) -> None:
    calls: Calls = []
    plain = Executor(engine.plan, engine.weights, reference_kernels(), CPU)
    splitting = Executor(engine.plan, engine.weights, splitting_kernels(calls), CPU)
    name = engine.plan.marks["layers.0.attention"]
    inputs = inputs_of_three_tokens(engine)
    wanted = plain.run(inputs, StepShape(3, 1, 1, 3, 3, 3), keep=[name])[name]
    found = splitting.run(inputs, StepShape(3, 1, 1, 3, 3, 3), keep=[name])[name]
    assert "matmul in splits" in calls and found.shape == wanted.shape and found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def inputs_of_three_tokens(engine: Engine) -> dict[str, torch.Tensor]:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    pools = {
        name: pool
        for layer in range(engine.config.num_layers)
        for name, pool in (
            (f"past_key_value_{layer}", session.new_pool(engine.config, 3, "float32", CPU)["past_key_value"]),
        )
    }
    return pools | {
        "input_ids": ints(3, 4, 5), "position_ids": ints(0, 1, 2), "query_starts": ints(0, 3),
        "sequence_length": ints(3), "context_lengths": ints(3), "block_tables": ints(1, 2)[None],
        "last_token_ids": ints(2),
    }  # fmt: skip
