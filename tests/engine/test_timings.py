"""Timings beside an engine: of several GPUs, found again, shown, and refused when they are not as written."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_of_modes import engine_of_mode, write_engine

from tensorrt_llm import Engine
from tensorrt_llm.inspect import main
from tensorrt_llm.kernels.tactics import BUCKETS, LIBRARY, MatmulShape, candidates, heuristic
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.stored_tactics import checked_tactics, matmuls_of, stored_tactics
from tensorrt_llm.timings import GpuTimings, MatmulTiming, read_timings, write_timings

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
GPU = torch.device("cuda", 0)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A float16 engine in its folder."""
    return Engine.load(write_engine(engine_of_mode(QuantMode(0), dtype="float16"), tmp_path))


def timing(tokens: int = 8, winner: str = "library", **changes: Any) -> MatmulTiming:
    """Of the qkv matmul of `engine`."""
    default = str(heuristic(MatmulShape("matmul", 192, 64, torch.float16), tokens))
    facts = dict(op="matmul", rows=192, depth=64, dtype="float16", bits=0, num_groups=1, has_zero=False, tokens=tokens)
    return MatmulTiming(
        **facts | changes,
        moved_bytes=24_000,
        winner=winner,
        heuristic=default,
        microseconds={default: 3.0, winner: 2.0},
    )


def section(*timings: MatmulTiming) -> GpuTimings:
    return GpuTimings("torch 2.11.0", timings)


# What is written is found again


def test_timings_of_several_gpus_stand_side_by_side(tmp_path: Path) -> None:
    gpus = {H100: section(timing(1), timing(8)), H200: section(timing(2))}
    write_timings(tmp_path, gpus)
    assert read_timings(tmp_path) == gpus


def test_an_engine_without_timings_has_none(tmp_path: Path) -> None:
    assert read_timings(tmp_path) == {}


def test_timings_are_added_without_touching_the_engine(engine: Engine) -> None:
    assert engine.path
    before = engine.path.read_bytes()
    write_timings(engine.path.parent, {H100: section(timing())})
    assert engine.path.read_bytes() == before and Engine.from_dir(engine.path.parent).config == engine.config


@pytest.mark.parametrize(("gpu", "is_timed"), [(H100, True), (H200, False)])
def test_a_session_takes_the_timings_of_its_gpu(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: str, is_timed: bool
) -> None:
    assert engine.path
    write_timings(engine.path.parent, {H100: section(timing())})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    shape = MatmulShape("matmul", 192, 64, torch.float16)
    with caplog.at_level("INFO"):
        tactics = stored_tactics(engine, GPU)
    assert (tactics.choose(*shape, 7) == LIBRARY) == is_timed
    assert tactics.choose(*shape, 9) == heuristic(shape, 9)
    (line,) = [record.message for record in caplog.records if "tactics" in record.message]
    assert H100 in line and (is_timed or H200 in line)


def test_a_cpu_and_a_batch_invariant_engine_read_no_timings(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "tactics.json").write_text("damaged")
    shape = MatmulShape("matmul", 192, 64, torch.float16)
    assert stored_tactics(engine, torch.device("cpu")).choose(*shape, 8) == heuristic(shape, 8)


def test_every_candidate_of_every_matmul_can_be_stored(engine: Engine) -> None:
    stored = 0
    for shape in matmuls_of(engine.plan):
        for tokens in BUCKETS:
            for tactic in candidates(shape, tokens):
                found = checked_tactics(
                    [timing(tokens, str(tactic), op=shape.op, rows=shape.rows, depth=shape.depth)], [shape]
                )
                assert found == {(shape, tokens): tactic}
                stored += 1
    assert stored > 100


# What was edited is refused


def edited(folder: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> Path:
    """A file with one timing and a change, and perhaps with the digest that belongs to it."""
    write_timings(folder, {H100: section(timing())})
    path = folder / "tactics.json"
    data = json.loads(path.read_text())
    change(data["gpus"][H100]["timings"][0])
    if signed:
        body = {"software": "torch 2.11.0", "timings": data["gpus"][H100]["timings"]}
        data["gpus"][H100]["sha256"] = digest(body)
    path.write_text(json.dumps(data))
    return path


def digest(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# An unknown way, a tile that is no candidate, a stream of many tokens.
@pytest.mark.parametrize("winner", ["magic", "tiles 16x48x128, 5 stages, 4 warps", "stream 8x64, 8 warps"])
def test_a_winner_that_is_no_candidate_is_left_to_the_heuristic(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, winner: str
) -> None:
    assert engine.path
    change = {"winner": winner, "microseconds": {winner: 1.0, "library": 2.0}, "heuristic": "library"}
    path = edited(engine.path.parent, lambda entry: entry.update(change))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    shape = MatmulShape("matmul", 192, 64, torch.float16)
    assert stored_tactics(engine, GPU).choose(*shape, 8) == heuristic(shape, 8)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{path}: 1 of 1 tactics") and "tune again" in warning


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "a shape that the engine has not": ({"rows": 191}, "the engine has no matmul of 191 x 64"),
    "another op": ({"op": "conv"}, "the engine has no conv"),
    "another dtype": ({"dtype": "float12"}, "unknown dtype 'float12'"),
    "tokens of no bucket": ({"tokens": 9}, "tokens is 9, expected one of"),
    "a negative count": ({"rows": -1}, "rows is -1, expected a count"),
    "a count that is a truth": ({"rows": True}, "rows is True, expected int"),
    "a list of names": ({"winner": ["library"]}, "winner is .*, expected str"),
    "no time": ({"microseconds": {"library": 0.0}, "heuristic": "library"}, "microseconds of 'library' is 0.0"),
    "a time that is no number": ({"microseconds": {"library": None}}, "microseconds of 'library' is None"),
    "a winner without a time": ({"winner": "widened"}, "winner is 'widened', expected one of"),
}


@pytest.mark.parametrize("case", FORGED)
def test_an_edited_timing_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """By file, GPU and field, even with a right digest."""
    assert engine.path
    change, words = FORGED[case]
    path = edited(engine.path.parent, lambda entry: entry.update(change))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    with pytest.raises(ValueError, match=words) as caught:
        stored_tactics(engine, GPU)
    assert str(caught.value).startswith(f"{path}: gpus['{H100}']: timings[0]") and "delete the file" in str(
        caught.value
    )


def test_a_timing_with_another_digest_is_refused(tmp_path: Path) -> None:
    edited(tmp_path, lambda entry: entry.update(rows=193), signed=False)
    with pytest.raises(ValueError, match=r"tactics.json: gpus\['NVIDIA H100 80GB HBM3'\]: sha256 is"):
        read_timings(tmp_path)


@pytest.mark.parametrize("key", ["winner", "microseconds"])
def test_a_timing_without_a_field_is_refused(tmp_path: Path, key: str) -> None:
    edited(tmp_path, lambda entry: entry.pop(key))
    with pytest.raises(ValueError, match=r"timings\[0\] has .*, expected"):
        read_timings(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, "{}", '{"format": "tensorrt_llm.tactics"}', '{"format": "x"}', "\udcff"],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tactics.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"tactics\.json: "):
        read_timings(tmp_path)


# What is shown


def test_inspect_shows_the_winner_its_rate_and_its_best_rival(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine.path
    write_timings(engine.path.parent, {H100: section(timing()), H200: section(timing(1))})
    assert main([str(engine.path.parent)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"Tactics {H100}: 1 timed with torch 2.11.0 matmul 192 x 64 8 tokens library (for ring_tiles 8x32x128" in shown
    )
    assert (
        "2.0 us 12 GB/s before ring_tiles 8x32x128, 6 stages, 2 warps, 1 splits, 3.0 us" in shown
        and f"{H200}: 1 timed" in shown
    )
    assert main([str(engine.path.parent), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tactics"]) == [H100, H200]


def test_inspect_names_a_damaged_file(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.path
    (engine.path.parent / "tactics.json").write_text("{}")
    assert main([str(engine.path.parent)]) == 1
    assert "tactics.json" in capsys.readouterr().err
