"""Where compiled kernels are kept: beside the engine, unless the user or the folder says otherwise."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tensorrt_llm.kernels.cuda.compiled import keep_compiled_in  # noqa: E402


@pytest.fixture(autouse=True)
def own_knobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's settings of a fresh process; gives its default folder."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with triton.knobs.cache.scope():
        yield triton.knobs.cache.dir


def test_kernels_are_kept_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    keep_compiled_in(tmp_path / "kernels")
    assert triton.knobs.cache.dir == str(tmp_path / "kernels")
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700


def test_a_relative_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keep_compiled_in(Path("kernels"))
    assert triton.knobs.cache.dir == str(tmp_path / "kernels")


def test_the_first_folder_of_a_process_stays(tmp_path: Path) -> None:
    for name in ("first", "second"):
        keep_compiled_in(tmp_path / name)
    assert triton.knobs.cache.dir == str(tmp_path / "first") and not (tmp_path / "second").exists()


def test_the_users_folder_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled_in(tmp_path / "kernels")
    assert triton.knobs.cache.dir == "/elsewhere" and not (tmp_path / "kernels").exists()


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, own_knobs: str) -> None:
    """What lies there is run."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    keep_compiled_in(tmp_path / "kernels")
    assert triton.knobs.cache.dir == own_knobs


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, own_knobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 1 + tmp_path.stat().st_uid)
    keep_compiled_in(tmp_path / "kernels")
    assert triton.knobs.cache.dir == own_knobs


@pytest.mark.parametrize("target", ["file", "link", "missing/parent"])
def test_what_is_no_folder_of_ours_is_not_used(tmp_path: Path, own_knobs: str, target: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    keep_compiled_in(tmp_path / target)
    assert triton.knobs.cache.dir == own_knobs
