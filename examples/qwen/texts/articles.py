"""Articles with reference summaries, read from files: the bundled set, or a local copy of cnn_dailymail.

Nothing is downloaded. Knows neither prompts nor models.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

BUNDLED_ARTICLES = Path(__file__).resolve().parents[1] / "data" / "summarize_test.jsonl.gz"

_FIELDS = ("article", "highlights")
_JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_FORMATS = f"a datasets folder (save_to_disk), parquet files or a folder of them, or {', '.join(_JSON_SUFFIXES)}"


class Article(NamedTuple):
    article: str
    highlights: str


def load_articles(path: Path, count: int) -> list[Article]:
    """The first `count` articles at `path`, or all if there are fewer; none at all is a ValueError."""
    records = enumerate(islice(_records(path), count))
    articles = [_check_record(record, f"{path}, record {number}") for number, record in records]
    if not articles:
        raise ValueError(f"{path}: has 0 articles, expected at least one")
    return articles


def _check_record(record: Any, where: str) -> Article:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found a {type(record).__name__}, expected an object with {' and '.join(_FIELDS)}")
    for field in _FIELDS:
        if field not in record:
            found = ", ".join(map(str, record)) or "no fields"
            raise ValueError(f"{where}: found {found}, expected the fields {' and '.join(_FIELDS)}")
        if not isinstance(record[field], str) or not record[field].strip():
            raise ValueError(f"{where}: {field} is {str(record[field])[:60]!r}, expected text that is not empty")
    return Article(record["article"], record["highlights"])


def _records(path: Path) -> Iterable[Any]:
    """The records at `path` in order, each read when it is asked for as far as the format allows."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder, expected {_FORMATS}")
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _datasets_records(path)
        return _parquet_records(_test_split(path))
    if path.suffix == ".parquet":
        return _parquet_records([path])
    if path.name.endswith(_JSON_SUFFIXES):
        return _json_records(path)
    raise ValueError(f"{path}: found a {path.suffix or 'file without suffix'}, expected {_FORMATS}")


def _test_split(folder: Path) -> list[Path]:
    """The folder's parquet files of the test split; all of them where no name says which split it is."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder}: found no parquet files and no saved dataset, expected {_FORMATS}")
    tests = [file for file in files if file.name.startswith("test")]
    if not tests and any(file.name.startswith(("train", "validation")) for file in files):
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{folder}: found {names}, expected files of the test split; to use others, name one file")
    return tests or files


def _parquet_records(files: list[Path]) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"parquet files need the package pyarrow: pip install pyarrow ({error})") from error
    for file in files:
        try:
            # Small batches, as often only the first few articles of thousands are wanted.
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file}: not a whole parquet file: {error}") from error


def _datasets_records(folder: Path) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"a datasets folder needs the package datasets: pip install datasets ({error})") from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow, json and the library itself each have errors of their own
        raise ValueError(f"{folder}: cannot be read as a saved dataset: {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "test" not in loaded:
        raise ValueError(
            f"{folder}: found the splits {', '.join(loaded)}, expected test; to use another, name its folder"
        )
    return loaded["test"]


def _json_records(file: Path) -> Iterator[Any]:
    """A list of objects, or one object on each line."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        yield from _parse_json(text, str(file))
        return
    # Not splitlines(): JSON may hold other line separators inside its strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_json(line, f"{file}, line {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
