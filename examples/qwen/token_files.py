"""Prompts and sequences in files: token ids as npy or csv, prompts as lines of text. Knows no tokenizer, no engine."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

READABLE = (".npy", ".csv", ".txt")


def read_token_ids(path: Path, pad_ids: Sequence[int]) -> list[list[int]]:
    """Rows of ids: npy [rows, longest] or [ids], or one comma-separated row per line; padding at their ends is dropped.

    Padding is -1 and what `pad_ids` names. An id inside a row stays, whatever it is.
    """
    rows = _read_npy(path) if path.suffix == ".npy" else _read_csv(path)
    if not rows:
        raise ValueError(f"{path}: holds no row of token ids")
    padding = {-1, *pad_ids}
    for row in rows:
        while row and row[-1] in padding:
            row.pop()
    return rows


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that hold more than white space."""
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def write_npy(path: Path, sequences: np.ndarray) -> None:
    """int32 ids or float32 logits as they are; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # np.save would add .npy to another name
        np.save(file, sequences)


def write_csv(path: Path, sequences: np.ndarray) -> None:
    """One row of comma-separated ids per sequence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(sequences.tolist())


def _read_npy(path: Path) -> list[list[int]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable npy file ({error})") from error
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        raise ValueError(f"{path}: holds {array.dtype} of shape {list(array.shape)}, expected integers [rows, longest]")
    rows: list[list[int]] = np.atleast_2d(array).tolist()
    return rows


def _read_csv(path: Path) -> list[list[int]]:
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    rows.append([_read_id(cell, path, number) for cell in row])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable csv file ({error})") from error
    return rows


def _read_id(cell: str, path: Path, line: int) -> int:
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"{path}: line {line} holds {cell!r}, expected comma-separated token ids") from None
