"""tools/compare_greedy.py: what is equal, what is a tie, and what is neither."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backends import EngineBackend
from compare_greedy import CHECKPOINT, CompareArgs, Comparison, first_gap, unit_of
from compare_greedy import main as compare_greedy
from models_for_tests import engine_from_checkpoint
from summary.engine_folders import EngineFolder, find_engines

from tensorrt_llm import Builder, Limits
from tensorrt_llm.kernels import kernels_for
from tensorrt_llm.runtime import SamplingConfig

CPU = torch.device("cpu")
LIMITS = Limits(max_batch_size=4, max_input_len=512, max_output_len=64, max_num_tokens=1024, tokens_per_block=16)
ARGS = {"articles": 4, "batch_size": 4, "max_new_tokens": 24, "device": "cpu"}
PROMPT = [5, 9, 30, 7]


def write_engine(folder: Path, dtype: str) -> Path:
    engine = engine_from_checkpoint(CHECKPOINT, dtype, LIMITS)
    folder.mkdir()
    engine.save(folder / engine.config.engine_name)
    Builder.save_config(engine.config, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    return find_engines([write_engine(tmp_path_factory.mktemp("greedy") / "float32", "float32")])[0]


@pytest.fixture(scope="module")
def reference() -> EngineBackend:
    return EngineBackend(engine_from_checkpoint(CHECKPOINT, "float32", LIMITS), "reference", CPU, reference=True)


def greedy(backend: EngineBackend) -> list[int]:
    return backend.generate([PROMPT], SamplingConfig(max_new_tokens=12))[0]


def test_engines_of_all_dtypes_are_equal_up_to_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_engine(tmp_path / dtype, dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert compare_greedy(CompareArgs(engine_dir=folders, output_markdown=tmp_path / "table.md", **ARGS)) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (dtype, "4", "equal up to ties") for dtype in ("float32", "float16", "bfloat16")
    ]


def test_what_the_reference_writes_itself_has_no_gap(reference: EngineBackend) -> None:
    assert first_gap(reference, PROMPT, greedy(reference)) is None


def test_the_gap_is_that_of_the_first_token_that_differs(reference: EngineBackend) -> None:
    written = greedy(reference)
    logits = reference.logits(PROMPT + written[:5])[-1]
    second, first = logits.topk(2).indices.flip(0).tolist()
    assert first == written[5]
    found = first_gap(reference, PROMPT, [*written[:5], second, 3, 3, 3])
    assert found == pytest.approx(float(logits[first] - logits[second]), rel=1e-5)


def test_fast_kernels_that_are_wrong_are_found(
    engine: EngineFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They name the neighbour of each token."""
    kernels = kernels_for(CPU)
    matmul = kernels["matmul"]

    def wrong(*operands: torch.Tensor, **attributes: str) -> torch.Tensor:
        product: torch.Tensor = matmul.run(*operands, **attributes)
        return product.roll(1, dims=1) if product.shape[1] == engine.config.vocab_size else product

    broken = {**kernels, "matmul": replace(matmul, run=wrong)}
    monkeypatch.setattr("tensorrt_llm.runtime.session.kernels_for", lambda *args, **flags: broken)
    assert compare_greedy(CompareArgs(engine_dir=[engine.path], **ARGS)) == 1
    assert "BEYOND" in capsys.readouterr().out


def test_a_gap_or_an_error_beyond_its_bound_is_neither_equal_nor_a_tie() -> None:
    def verdict(gaps: list[float], error: float) -> bool:
        return Comparison("engine", 10, gaps, error, largest_error=0.5).is_within

    assert verdict([], 0.5) and verdict([0.0, 0.2], 0.1)
    assert not verdict([0.0, 0.3], 0.1) and not verdict([], 0.6)
    assert not verdict([float("nan")], 0.1) and not verdict([], float("nan"))


def test_the_unit_is_the_coarsest_step_of_the_network(engine: EngineFolder) -> None:
    assert unit_of(engine.config) == 2**-23


def test_no_engine_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="expected --engine_dir or --build_dir"):
        compare_greedy(CompareArgs())
