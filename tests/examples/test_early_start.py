"""Weights are checked and the GPU starts beside the import of torch; whatever is wrong is said as without that."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cli_chat
import pytest
import run
from early_start import begin_start, wake_gpu
from models_for_tests import make_engine

from tensorrt_llm import Builder, Engine
from tensorrt_llm.engine_file import EngineFile

SCRIPTS = Path(run.__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The engine's file, in a folder as build.py leaves it."""
    engine = make_engine()
    Builder.save_config(engine.config, tmp_path / "config.json")
    engine.save(tmp_path / engine.config.engine_name)
    return tmp_path / engine.config.engine_name


def damage(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def run_script(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """run.py, or `code` before it, on an engine."""
    flags = ["--engine_dir", str(path.parent), "--device", "cpu", "--input_file", str(path.parent / "in.csv")]
    (path.parent / "in.csv").write_text("1,2,3\n")
    start = ["-c", code] if code else [str(SCRIPTS / "run.py")]
    return subprocess.run(
        [sys.executable, *start, *flags, "--max_new_tokens", "2"],
        cwd=SCRIPTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("flags", [["--engine_dir", "{}"], ["--engine_dir={}"], ["--top_k", "1", "--engine_dir", "{}"]])
def test_the_engine_that_the_flags_name_is_the_one_that_is_checked(path: Path, flags: list[str]) -> None:
    file = begin_start([*(flag.format(path.parent) for flag in flags), "--device", "cpu"])
    assert file and file._check
    assert Engine.from_dir(path.parent, opened=file).file is file and file._is_checked


@pytest.mark.parametrize("flags", [[], ["--engine_dir"], ["--help"], ["--engine_dir", "absent"], ["--engine_dir", ""]])
def test_without_an_engine_nothing_is_begun_and_nothing_said(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin_start(["--device", "cpu", *flags]) is None
    assert capsys.readouterr() == ("", "")
    assert not any(thread.name == "weight digest" for thread in threading.enumerate())


@pytest.mark.parametrize("place", [4, 100])
def test_nothing_is_begun_on_a_file_with_a_damaged_header(path: Path, place: int) -> None:
    damage(path, place)
    assert begin_start(["--engine_dir", str(path.parent), "--device", "cpu"]) is None


def test_importing_the_scripts_opens_nothing() -> None:
    assert run.OPENED is None and cli_chat.OPENED is None


def test_the_script_begins_before_torch_is_there(path: Path) -> None:
    code = """
import runpy, sys
import early_start
begin = early_start.begin_start
def begin_start(argv):
    print("torch" in sys.modules)
    return begin(argv)
early_start.begin_start = begin_start
runpy.run_path("run.py", run_name="__main__")
"""
    done = run_script(code, path)
    assert done.returncode == 0 and done.stdout.startswith("False\nInput: [1, 2, 3]\nOutput: [")


@pytest.mark.parametrize(("place", "message"), [(-1, "altered or damaged"), (100, "header"), (0, "header")])
def test_damage_is_one_line_and_no_token(path: Path, place: int, message: str) -> None:
    damage(path, place)
    done = run_script("", path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"run.py: error: {path}: ") and message in line


def test_a_file_of_another_folder_is_refused(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_bytes((path.parent / "config.json").read_bytes())
    with pytest.raises(ValueError, match="is open, but the engine of rank 0 in .*other"):
        Engine.from_dir(other, opened=EngineFile.of_folder(path.parent))


# The GPU


class Driver:
    """Stands for libcuda.so.1, on a machine with two GPUs."""

    def __init__(self, cu_init: int = 0) -> None:
        self._cu_init = cu_init
        self.contexts: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self._cu_init

    def cuDeviceGet(self, gpu: Any, ordinal: int) -> int:
        assert self._cu_init == 0
        gpu._obj.value = ordinal + 40
        return 0 if ordinal < 2 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, gpu: ctypes.c_int) -> int:
        self.contexts.append(gpu.value)
        return 0


def wake(monkeypatch: pytest.MonkeyPatch, driver: Driver, device: str | None) -> list[int]:
    """The GPUs that have a context then."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    thread = wake_gpu(device)
    if thread:
        thread.join()
    return driver.contexts


@pytest.mark.parametrize(
    ("device", "contexts"),
    [(None, [40]), ("cuda", [40]), ("cuda:1", [41]), ("cuda:2", []), ("cpu", []), ("cuda:", []), ("cuda:x", [])],
)
def test_the_gpu_that_will_be_used_is_the_one_that_starts(
    monkeypatch: pytest.MonkeyPatch, device: str | None, contexts: list[int]
) -> None:
    assert wake(monkeypatch, Driver(), device) == contexts


def test_a_driver_without_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wake(monkeypatch, Driver(cu_init=100), None) == []


def test_a_machine_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    thread = wake_gpu("cuda")
    assert thread and thread.daemon
    thread.join()
    assert not failed
