"""Figures as a table, Markdown and JSON; the JSON has all that the table and the charts are made of."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import markdown_table

from .figures import Figures, Percentiles, fastest_hf

# A column without a cell that says something is left out.
_NOTHING = "-"
_WHOSE_RUNS = {"trt_llm": "an engine", "hf": "Hugging Face"}


@dataclass(frozen=True)
class Report:
    facts: dict[str, Any]  # about the runs of all rows; "device" is one of them
    rows: tuple[Figures, ...]

    def text(self) -> str:
        return f"{self._caption()}\n\n{self._table()}"

    def _caption(self) -> str:
        counts = {name: _range(len(row.run_seconds) for row in self._of(kind)) for kind, name in _WHOSE_RUNS.items()}
        runs = " and ".join(f"{count} of {name}" for name, count in counts.items() if count)
        sentences = [f"On {self.facts['device']}, medians of counted runs: {runs}."]
        if self.facts.get("warm_up"):
            sentences.append("Before them an engine did the same run, Hugging Face its first batch.")
        rates = [row.read_bytes_per_second / 1e9 for row in self.rows if row.read_bytes_per_second]
        if any(row.roofline_share for row in self.rows):
            sentences.append(f"Memory is read at {_range(round(rate) for rate in rates)} GB/s.")
        fastest = {best.workload: best for row in self.rows if (best := fastest_hf(row, self.rows)) and not row.shape}
        for best in fastest.values():
            sentences.append(f"Hugging Face is the fastest at {best.workload} with batch {best.batch_size}.")
        return " ".join(sentences)

    def _of(self, backend: str) -> list[Figures]:
        return [row for row in self.rows if row.backend == backend]

    def _table(self) -> str:
        cells = {title: [show(row, self.rows) for row in self.rows] for title, show in COLUMNS.items()}
        kept = {title: column for title, column in cells.items() if set(column) != {_NOTHING}}
        return markdown_table(tuple(kept), list(zip(*kept.values(), strict=True)))

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.facts | {"runs": [row.record() for row in self.rows]}, indent=2) + "\n")

    @classmethod
    def read_json(cls, paths: Sequence[Path]) -> "Report":
        """The rows of all files, which must be of one device."""
        reports = [cls._read_one(path) for path in paths]
        for path, report in zip(paths, reports, strict=True):
            found, wanted = report.facts["device"], reports[0].facts["device"]
            if found != wanted:
                raise ValueError(f"--from_json {path}: was measured on {found}, expected {wanted} as {paths[0]} was")
        return cls(reports[0].facts, tuple(row for report in reports for row in report.rows))

    @classmethod
    def _read_one(cls, path: Path) -> "Report":
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Figures.from_record(record) for record in facts.pop("runs"))
            return cls(facts | {"device": str(facts["device"])}, rows)
        except OSError as error:
            raise ValueError(f"--from_json {path}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"--from_json {path}: is not what --output_json of this version writes ({error!r})"
            ) from error


def _range(values: Any) -> str:
    """As "3", or "1 to 3"; nothing for no value."""
    found = sorted(set(values))
    return " to ".join(map(str, dict.fromkeys(found[:1] + found[-1:])))


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else f"{value:{form}}"


def _milliseconds(percentiles: Percentiles | None) -> str:
    return f"{1000 * percentiles.p50:.1f} / {1000 * percentiles.p99:.1f}" if percentiles else _NOTHING


def _times_hf(row: Figures, rows: Sequence[Figures]) -> str:
    """Requests/s and tokens/s alike, as both served the same requests."""
    best = fastest_hf(row, rows)
    return f"{row.requests_per_second / best.requests_per_second:.2f}" if best else _NOTHING


def _decode_times_hf(row: Figures, rows: Sequence[Figures]) -> str:
    best = fastest_hf(row, rows)
    own, theirs = row.decode_tokens_per_second, best.decode_tokens_per_second if best else None
    return f"{own / theirs:.2f}" if own and theirs else _NOTHING


# Title of a column -> its cell; the rows are those of the whole table.
COLUMNS: dict[str, Callable[[Figures, Sequence[Figures]], str]] = {
    "backend": lambda row, rows: row.name,
    "requests": lambda row, rows: _NOTHING if row.shape else f"{row.num_requests} of {row.workload}",
    "batch": lambda row, rows: str(row.batch_size),
    "in": lambda row, rows: f"{row.input_tokens / row.num_requests:.4g}",
    "out": lambda row, rows: f"{row.output_tokens / row.num_requests:.4g}",
    "requests/s": lambda row, rows: f"{row.requests_per_second:.2f}",
    "in + out tokens/s": lambda row, rows: f"{row.tokens_per_second:.1f}",
    "out tokens/s": lambda row, rows: f"{row.output_tokens_per_second:.1f}",
    "x HF": _times_hf,
    "decode tokens/s": lambda row, rows: _number(row.decode_tokens_per_second, ".1f"),
    "decode x HF": _decode_times_hf,
    "of memory roofline": lambda row, rows: _number(row.roofline_share, ".1%"),
    "first token p50 / p99, ms": lambda row, rows: _milliseconds(row.first_token),
    "between tokens p50 / p99, ms": lambda row, rows: _milliseconds(row.between_tokens),
    "peak device memory, GiB": lambda row, rows: _number(
        row.peak_device_bytes and row.peak_device_bytes / 2**30, ".2f"
    ),
    "process start to ready, s": lambda row, rows: _number(row.ready_seconds, ".1f"),
}
