"""Token ids and prompts in files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import read_prompts, read_token_ids, write_csv, write_npy


@pytest.mark.parametrize("name", ["rows.npy", "rows.csv"])
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    rows = np.array([[5, 6, 7], [8, 9, 1]], dtype=np.int32)
    (write_npy if name.endswith("npy") else write_csv)(tmp_path / "new" / name, rows)
    assert read_token_ids(tmp_path / "new" / name, ()) == rows.tolist()


def test_a_vector_is_one_prompt(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([4, 5]))
    assert read_token_ids(tmp_path / "ids.npy", ()) == [[4, 5]]


def test_only_padding_at_the_end_is_dropped(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[9, 4, 9, 5, 9, 9], [1, 2, 3, 4, -1, -1]]))
    assert read_token_ids(tmp_path / "ids.npy", (9,)) == [[9, 4, 9, 5], [1, 2, 3, 4]]


def test_rows_of_a_csv_may_differ_in_length(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("1,2,3\n\n4\n")
    assert read_token_ids(tmp_path / "ids.csv", ()) == [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("array", "found"), [(np.zeros((2, 2)), "float64"), (np.zeros((1, 2, 3), dtype=np.int32), r"\[1, 2, 3\]")]
)
def test_an_array_of_another_kind_is_named(array: np.ndarray, found: str, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=found):
        read_token_ids(tmp_path / "ids.npy", ())


def test_an_npy_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1], [2, 3]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a readable npy"):
        read_token_ids(tmp_path / "ids.npy", ())


def test_a_word_in_a_csv_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("1,2\n3,four\n")
    with pytest.raises(ValueError, match="line 2 holds 'four'"):
        read_token_ids(tmp_path / "ids.csv", ())


@pytest.mark.parametrize("name", ["ids.csv", "prompts.txt"])
def test_an_empty_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match="holds no"):
        read_token_ids(tmp_path / name, ()) if name.endswith("csv") else read_prompts(tmp_path / name)


def test_each_line_with_text_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("你好\n \nWho are you?\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["你好", "Who are you?"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([".npy", ".csv"]), st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_value_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"ids{suffix}"
    path.write_bytes(content)
    try:
        rows = read_token_ids(path, ())
    except ValueError:
        return
    assert all(isinstance(token, int) for row in rows for token in row)
