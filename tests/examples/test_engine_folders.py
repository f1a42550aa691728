"""Which engines a folder stands for, and their names: each tells what the engine is, and no two are equal."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from engines_of_modes import engine_of_mode, write_engine
from summary.engine_folders import find_engines

from tensorrt_llm import Engine
from tensorrt_llm.quantization import QuantMode

FLOAT = QuantMode(0)
INT4_GROUPS = QuantMode.use_weight_only(True, per_group=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of_mode(FLOAT)


def found(*folders: Path) -> list[Path]:
    return [engine.path for engine in find_engines(folders)]


def names(*folders: Path) -> list[str]:
    return [engine.name for engine in find_engines(folders)]


def test_a_folder_stands_for_all_engines_below_it_in_order(engine: Engine, tmp_path: Path) -> None:
    for name in ("b", "a/deep/er", "a/c"):
        write_engine(engine, tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no engine")
    assert found(tmp_path) == [tmp_path / name for name in ("a/c", "a/deep/er", "b")]


def test_engines_named_one_by_one_keep_their_order(engine: Engine, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ba"]
    for folder in folders:
        write_engine(engine, folder)
    assert found(*folders) == folders


def test_an_engine_reached_twice_is_one(engine: Engine, tmp_path: Path) -> None:
    write_engine(engine, tmp_path / "a")
    assert found(tmp_path / "a", tmp_path) == [tmp_path / "a"]


def test_what_lies_below_an_engine_is_not_looked_at(engine: Engine, tmp_path: Path) -> None:
    write_engine(engine, tmp_path)
    write_engine(engine, tmp_path / "older")
    assert found(tmp_path) == [tmp_path]


def test_a_checkpoint_is_no_engine(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    write_engine(engine, tmp_path / "engine")
    assert found(tmp_path) == [tmp_path / "engine"]


@pytest.mark.parametrize(
    ("mode", "algo", "dtype", "layout", "expected"),
    [
        (FLOAT, "", "bfloat16", {}, "bfloat16"),
        (QuantMode.INT8_KV_CACHE, "", "float16", {}, "float16, INT8 KV"),
        (QuantMode.use_weight_only(), "W8A16", "float16", {}, "float16 W8A16"),
        (INT4_GROUPS, "W4A16_GPTQ", "float16", {"group_size": 32}, "float16 W4A16_GPTQ g32"),
        (INT4_GROUPS.set_int8_kv_cache(), "W4A16", "float32", {"group_size": 16}, "float32 W4A16 g16, INT8 KV"),
        (QuantMode.use_smooth_quant(True), "W8A8_SQ_X", "float16", {}, "float16 W8A8_SQ_X"),
    ],
)
def test_a_name_tells_what_the_engine_is(
    tmp_path: Path, mode: QuantMode, algo: str, dtype: str, layout: dict[str, Any], expected: str
) -> None:
    write_engine(engine_of_mode(mode, algo, dtype, **layout), tmp_path)
    assert names(tmp_path) == [expected]


def test_equal_engines_get_the_names_of_their_folders(engine: Engine, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_engine(engine, tmp_path / name)
    write_engine(engine_of_mode(FLOAT, dtype="float16"), tmp_path / "half")
    assert names(tmp_path) == ["float32 (first)", "float16", "float32 (second)"]


def test_equal_engines_in_folders_of_one_name_get_their_paths(engine: Engine, tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        write_engine(engine, tmp_path / name)
    assert names(tmp_path) == [f"float32 ({tmp_path / 'a/x'})", f"float32 ({tmp_path / 'b/x'})", "float32 (y)"]


# What is refused


@pytest.mark.parametrize("missing", ["config.json", "*.engine"])
def test_half_an_engine_is_none(engine: Engine, tmp_path: Path, missing: str) -> None:
    write_engine(engine, tmp_path)
    for file in tmp_path.glob(missing):
        file.unlink()
    with pytest.raises(
        ValueError, match="found no engine in it or below, expected config.json beside an .engine or .plan"
    ):
        find_engines([tmp_path])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--engine_dir {tmp_path}/absent: no such folder"):
        find_engines([tmp_path / "absent"])


def test_a_damaged_engine_among_whole_ones_is_found_at_once(engine: Engine, tmp_path: Path) -> None:
    whole = write_engine(engine, tmp_path / "whole")
    shutil.copytree(whole.parent, tmp_path / "damaged")
    damaged = tmp_path / "damaged" / whole.name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"{damaged}: weight .* was altered or damaged"):
        find_engines([tmp_path])
