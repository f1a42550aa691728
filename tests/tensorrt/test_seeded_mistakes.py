"""Every seeded mistake is caught, by the strict fake or by the interpreter's logits, as mistakes.py says of it."""

from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import ApiError, make_tensorrt
from lowered_networks import engine_of
from mistakes import MISTAKES, Mistake
from test_whole_networks import TOLERANCES, errors_of, rank_engines, ranks_errors

from tensorrt_llm.tensorrt_backend.building import build_plan

# A mistake that changes logits by less than this beside the largest might pass for rounding.
_CLEAR = 10


def build(mistake: Mistake, folder: Path) -> None:
    for engine in engines_of(mistake, folder):
        build_plan(engine, make_tensorrt(), folder)


def engines_of(mistake: Mistake, folder: Path) -> list[Any]:
    if mistake.mode == "two-ranks":
        return rank_engines(folder, mistake.dtype)
    return [engine_of(mistake.architecture, mistake.dtype, mistake.mode)]


def largest_error(mistake: Mistake, folder: Path) -> float:
    if mistake.mode == "two-ranks":
        return float(ranks_errors(folder, mistake.dtype).max())
    return float(errors_of(*engines_of(mistake, folder)).max())


def test_there_are_mistakes_of_both_kinds() -> None:
    for catcher in ("fake", "interpreter"):
        assert sum(mistake.caught_by == catcher for mistake in MISTAKES.values()) >= 15


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.caught_by == "fake"])
def test_the_fake_refuses(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    mistake.seed(monkeypatch)
    with pytest.raises(ApiError):
        build(mistake, tmp_path)


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.caught_by == "interpreter"])
def test_the_logits_tell(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    mistake.seed(monkeypatch)
    build(mistake, tmp_path)  # nothing is wrong with its form
    assert largest_error(mistake, tmp_path) > _CLEAR * TOLERANCES[mistake.dtype]


@pytest.mark.parametrize("name", MISTAKES)
def test_without_the_mistake_all_is_well(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    build(mistake, tmp_path)
