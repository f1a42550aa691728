"""Articles from every format that a local cnn_dailymail comes in."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="other datasets than the bundled one need it")

import datasets
from texts.articles import BUNDLED_ARTICLES, Article, load_articles

ROWS = [{"article": f"Article {i}.\u2028Still {i}.", "highlights": f"Highlight {i}.", "id": str(i)} for i in range(5)]


def write_lines(folder: Path) -> Path:
    file = folder / "articles.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return file


def write_compressed_list(folder: Path) -> Path:
    file = folder / "articles.json.gz"
    file.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    return file


def write_parquet_file(folder: Path) -> Path:
    file = folder / "articles.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    return file


def write_parquet_splits(folder: Path) -> Path:
    """As the hub has them: the test split in two files, beside another split."""
    (folder / "3.0.0").mkdir()
    splits = {"test-00000-of-00002": ROWS[:2], "test-00001-of-00002": ROWS[2:], "train-00000-of-00001": ROWS[::-1]}
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / "3.0.0" / f"{name}.parquet")
    return folder


def write_saved_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS[::-1]), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "write",
    [
        write_lines,
        write_compressed_list,
        write_parquet_file,
        write_parquet_splits,
        write_saved_dataset,
        write_saved_splits,
    ],
)
def test_the_first_articles_of_the_test_split_come_in_order(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert load_articles(write(tmp_path), 3) == [Article(row["article"], row["highlights"]) for row in ROWS[:3]]


def test_a_dataset_may_have_fewer_articles_than_asked_for(tmp_path: Path) -> None:
    assert len(load_articles(write_lines(tmp_path), 500)) == 5


def test_splits_without_a_test_split_are_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="found the splits train, expected test"):
        load_articles(tmp_path / "saved", 1)


def test_500_articles_are_bundled() -> None:
    assert len(load_articles(BUNDLED_ARTICLES, 500)) == 500
