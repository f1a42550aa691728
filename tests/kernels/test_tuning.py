"""Tuning by a clock that says what it is told: who wins, who may take part, and what is kept beside the engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from engines_of_modes import engine_of_mode, write_engine

from tensorrt_llm import Engine
from tensorrt_llm.kernels import Kernel
from tensorrt_llm.kernels.cuda import cuda_kernels
from tensorrt_llm.kernels.tactics import LIBRARY, MatmulShape, Tactic, Tactics, candidates, heuristic
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.stored_tactics import checked_tactics, matmuls_of
from tensorrt_llm.timings import GpuTimings, read_timings, write_timings
from tensorrt_llm.tuning import Bench, Measured, measure_matmuls, tune
from tensorrt_llm.tuning.cold_timing import chain_of, time_in_turns
from tensorrt_llm.tuning.tune import winner_of

CPU = torch.device("cpu")
SIZES = {"num_tokens": 2, "num_logits": 1}
SHAPE = MatmulShape("matmul", 192, 64, torch.float16)  # qkv
RIVAL = candidates(SHAPE, 2)[1]


class Misfit(Exception):
    pass


def few_candidates(shape: MatmulShape, tokens: int) -> list[Tactic]:
    return list(dict.fromkeys([*candidates(shape, tokens)[:2], LIBRARY]))


def clock(*seconds: float) -> Callable[[Sequence[Sequence[Any]]], list[float]]:
    return lambda chains: list(seconds[: len(chains)])


def bench(seconds: Sequence[float] = (3e-6, 2e-6, 1e-6)) -> Bench:
    return Bench(CPU, lambda tactics: cuda_kernels(tactics=tactics), few_candidates, clock(*seconds), (Misfit,))


def changed(change: Callable[[Tactic, torch.Tensor], torch.Tensor]) -> Callable[[Tactics], dict[str, Kernel]]:
    """Kernels whose matmuls of SHAPE for two tokens are changed where a timing names their tactic."""

    def kernels(tactics: Tactics) -> dict[str, Kernel]:
        plain = cuda_kernels(tactics=tactics)

        def run(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **attrs: Any) -> torch.Tensor:
            made: torch.Tensor = plain["matmul"].run(x, weight, *rest, **attrs)
            return change(tactics.choose(*SHAPE, 2), made) if weight.shape == (192, 64) and len(x) == 2 else made

        return plain | {"matmul": Kernel(run)}

    return kernels


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine.load(write_engine(engine_of_mode(QuantMode(0), dtype="float16"), tmp_path))


def measured_qkv(engine: Engine, on: Bench) -> Measured:
    (found,) = (item for item in measure_matmuls(engine.plan, SIZES, on) if item.shape == SHAPE and item.tokens == 2)
    return found


def times(*seconds: float, tokens: int = 2) -> Measured:
    tactics = few_candidates(SHAPE, tokens)
    return Measured("qkv", SHAPE, tokens, 1, dict(zip(tactics, seconds, strict=True)))


# Who wins


def test_the_fastest_wins() -> None:
    assert winner_of(times(3.0, 1.0, 2.0)) == RIVAL


def test_a_rival_that_is_faster_by_noise_does_not_win() -> None:
    assert winner_of(times(1.0, 0.99, 1.2)) == heuristic(SHAPE, 2)
    assert winner_of(times(1.0, 0.97, 1.2)) == RIVAL


def test_chains_of_one_token_are_believed_less() -> None:
    assert winner_of(times(1.0, 0.9, 1.2, tokens=1)) == heuristic(SHAPE, 1)
    assert winner_of(times(1.0, 0.8, 1.2, tokens=1)) != heuristic(SHAPE, 1)


# Who takes part


def test_every_matmul_is_measured_up_to_the_bucket_of_its_most_tokens(engine: Engine) -> None:
    found = [(item.shape, item.tokens) for item in measure_matmuls(engine.plan, SIZES, bench())]
    logits = next(shape for shape in matmuls_of(engine.plan) if shape.rows == 61)
    expected = [
        (shape, tokens) for shape in matmuls_of(engine.plan) for tokens in (1, 2) if (shape, tokens) != (logits, 2)
    ]
    assert found == expected


def test_a_matmul_of_fewer_tokens_than_are_asked_for_is_left_out(engine: Engine) -> None:
    found = {item.shape.rows for item in measure_matmuls(engine.plan, SIZES, bench(), only=[2])}
    assert found == {shape.rows for shape in matmuls_of(engine.plan)} - {61}


def test_a_tactic_that_is_wrong_is_left_out_and_named(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    broken = changed(lambda tactic, made: made * 1.1 if tactic == RIVAL else made)
    assert list(measured_qkv(engine, replace(bench(), kernels=broken)).seconds) == [heuristic(SHAPE, 2), LIBRARY]
    assert f"2 tokens: {RIVAL} is wrong by 1.0e-01" in caplog.text


def test_what_a_tactic_does_not_write_is_seen(engine: Engine) -> None:
    broken = changed(lambda tactic, made: made.clone().fill_(float("nan")) if tactic == LIBRARY else made)
    assert list(measured_qkv(engine, replace(bench(), kernels=broken)).seconds) == [heuristic(SHAPE, 2), RIVAL]


def test_a_tactic_that_does_not_fit_is_left_out_and_named(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def fail(tactic: Tactic, made: torch.Tensor) -> torch.Tensor:
        if tactic == RIVAL:
            raise Misfit("out of resource: shared memory")
        return made

    assert list(measured_qkv(engine, replace(bench(), kernels=changed(fail))).seconds) == [heuristic(SHAPE, 2), LIBRARY]
    assert "does not fit on cpu: out of resource: shared memory" in caplog.text


def test_without_the_default_tactic_there_is_no_tuning(engine: Engine) -> None:
    broken = changed(lambda tactic, made: made + 1 if tactic == heuristic(SHAPE, 2) else made)
    with pytest.raises(ValueError, match="attention.qkv, 2 tokens: the default tactic .* cannot be used: it is wrong"):
        measured_qkv(engine, replace(bench(), kernels=broken))


# What is kept


def test_winners_are_kept_beside_the_engine_and_those_of_other_gpus_stay(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.path
    other = GpuTimings("torch 2.9", ())
    write_timings(engine.path.parent, {"NVIDIA A100": other, "NVIDIA H100": other})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(Bench, "on", lambda device: bench())
    plan = replace(engine.plan, nodes=engine.plan.nodes[:4], outputs={}, marks={})
    small = Engine(engine.config, plan, engine.weights)
    seen: list[Measured] = []
    tuning = tune(small, CPU, seen.append)
    found = read_timings(engine.path.parent)
    assert found == {"NVIDIA A100": other, "NVIDIA H100": GpuTimings(f"torch {torch.__version__}", tuning.timings)}
    timed = checked_tactics(found["NVIDIA H100"].timings, matmuls_of(engine.plan))
    assert timed[SHAPE, 4] == LIBRARY and len(timed) == len(seen) == 7
    assert str(tuning) == "7 tactics timed on NVIDIA H100, 7 are not what heuristics choose"


# The clock


def test_chains_take_turns_and_each_op_runs_as_often() -> None:
    calls: list[str] = []
    chains = [[lambda: calls.append("a")] * 3, [lambda: calls.append("b")]]
    seconds = time_in_turns(chains, CPU, rounds=2)
    assert calls == ["a", "a", "a", "b"] * 2 and all(second > 0 for second in seconds)


def test_a_chain_goes_through_all_copies_until_it_is_long_enough() -> None:
    ops = [lambda: None for _ in range(3)]
    assert len(chain_of(ops, weight_bytes=1 << 20)) == 21 and len(chain_of(ops, weight_bytes=1 << 31)) == 3
