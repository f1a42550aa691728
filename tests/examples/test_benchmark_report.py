"""The table says what was measured and nothing else, and every row of it is a bar of both charts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarking.chart import METRICS, chart_paths, draw, write_charts
from benchmarking.figures import Figures, Percentiles
from benchmarking.report import Report
from benchmarking.workload import Shape
from timed_backends import make_dataset_figures, make_figures

FACTS = {"device": "a GPU", "warm_up": 1}
HF: dict[str, Any] = {"backend": "hf", "name": "HF float16"}


def report(*rows: Figures) -> Report:
    return Report(FACTS, rows)


def table_of(*rows: Figures) -> list[dict[str, str]]:
    """Each row as title -> cell."""
    lines = [line for line in report(*rows).text().splitlines() if line.startswith("| ")]
    header, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in cells]


def test_a_row_says_all_that_was_measured() -> None:
    row = make_figures(
        first_token=Percentiles(0.5, 1.0),
        between_tokens=Percentiles(0.25, 0.75),
        peak_device_bytes=3 * 2**29,
        ready_seconds=7.25,
    )
    hf = make_figures(**HF, run_seconds=(5.0,))
    assert table_of(row, hf)[0] == {
        "backend": "trt_llm float16",
        "batch": "2",
        "in": "8",
        "out": "5",
        "requests/s": "1.00",
        "in + out tokens/s": "13.0",
        "out tokens/s": "5.0",
        "x HF": "2.50",
        "decode tokens/s": "8.0",
        "decode x HF": "4.00",
        "of memory roofline": "40.0%",
        "first token p50 / p99, ms": "500.0 / 1000.0",
        "between tokens p50 / p99, ms": "250.0 / 750.0",
        "peak device memory, GiB": "1.50",
        "process start to ready, s": "7.2",
    }


def test_a_column_without_a_figure_is_left_out() -> None:
    (row,) = table_of(make_dataset_figures(between_tokens=None))
    assert set(row) == {
        "backend",
        "requests",
        "batch",
        "in",
        "out",
        "requests/s",
        "in + out tokens/s",
        "out tokens/s",
        "first token p50 / p99, ms",
    }


def test_a_dataset_is_compared_with_the_fastest_batch_of_hugging_face_which_is_named() -> None:
    engine = make_dataset_figures()
    hf = [make_dataset_figures(**HF, batch_size=size, run_seconds=(8.0 / size,)) for size in (1, 2)]
    rows = (engine, *hf)
    assert [row["x HF"] for row in table_of(*rows)] == ["2.00", "0.50", "1.00"]
    assert "Hugging Face is the fastest at lengths with batch 2." in report(*rows).text()


def test_the_caption_counts_runs_and_states_the_read_rate() -> None:
    rows = make_figures(run_seconds=(1.0, 2.0, 3.0), read_bytes_per_second=4.2e12), make_figures(**HF)
    caption = report(*rows).text().splitlines()[0]
    assert caption.startswith("On a GPU, medians of counted runs: 3 of an engine and 1 of Hugging Face.")
    assert "Memory is read at 0 to 4200 GB/s." in caption


def test_json_keeps_everything(tmp_path: Path) -> None:
    before = report(make_figures(), make_dataset_figures(**HF, between_tokens=None))
    before.write_json(tmp_path / "figures.json")
    assert Report.read_json([tmp_path / "figures.json"]) == before


def test_files_of_two_devices_make_no_table(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, device in zip(paths, ("a GPU", "another"), strict=True):
        Report({"device": device}, (make_figures(),)).write_json(path)
    with pytest.raises(ValueError, match="b.json: was measured on another, expected a GPU as .*a.json was"):
        Report.read_json(paths)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"device": "x", "runs": [{"name": "x"}]}', '{"runs": []}'])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "figures.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="figures.json: is not what --output_json of this version writes"):
        Report.read_json([path])


def test_what_is_derived_stands_in_the_json(tmp_path: Path) -> None:
    report(make_figures()).write_json(tmp_path / "figures.json")
    (run,) = json.loads((tmp_path / "figures.json").read_text())["runs"]
    names = ("first_token_seconds", "total_seconds", "decode_tokens_per_second", "tokens_per_second", "roofline_share")
    assert [run[name] for name in names] == [1.0, 2.0, 8.0, 13.0, 0.4]
    assert run["shape"] == {"batch_size": 2, "input_len": 8, "output_len": 5}


SWEEP = [
    make_figures(backend=backend, name=name, shape=Shape(size, 8, 5), batch_size=size, run_seconds=(seconds,))
    for size in (1, 2, 4)
    for backend, name, seconds in (("trt_llm", "float16", 2.0), ("trt_llm", "int8", 1.0), ("hf", "HF float16", 8.0))
]


def bars(panel: Any) -> list[tuple[str, float, str]]:
    """Label, length and colour of each, from the top."""
    labels = [tick.get_text() for tick in panel.get_yticklabels()]
    return [
        (label, patch.get_width(), "".join(f"{round(255 * part):02X}" for part in patch.get_facecolor()[:3]))
        for label, patch in zip(labels, panel.patches, strict=True)
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_every_row_is_a_bar_of_its_workloads_panel(metric: str) -> None:
    dataset = [make_dataset_figures(), make_dataset_figures(**HF)]
    panels = draw([*SWEEP, *dataset], metric, "a title").axes
    assert [panel.get_title(loc="left") for panel in panels] == ["8 in, 5 out", "lengths"]
    assert [len(panel.patches) for panel in panels] == [9, 2]


def test_bars_are_sorted_by_batch_and_hugging_face_is_grey() -> None:
    (panel,) = draw(SWEEP, "requests_per_second", "a title").axes
    found = bars(panel)
    assert [label for label, _, _ in found[:4]] == [
        "batch 1, HF float16", "batch 1, float16", "batch 1, int8", "batch 2, HF float16",
    ]  # fmt: skip
    assert [length for _, length, _ in found[:3]] == [0.25, 1.0, 2.0]
    colors = [color for _, _, color in found]
    assert colors[:3] == colors[3:6] and colors[0] == "999999" and len(set(colors[:3])) == 3


def test_a_bar_says_how_many_times_hugging_face_it_is() -> None:
    (panel,) = draw(SWEEP, "tokens_per_second", "a title").axes
    texts = [text.get_text() for text in panel.texts]
    assert texts[:3] == ["3.25", "13.00 (4.0 x HF)", "26.00 (8.0 x HF)"]


def test_charts_of_a_prefix_lie_beside_each_other_and_those_of_a_folder_in_it(tmp_path: Path) -> None:
    names = ["requests_per_second.png", "tokens_per_second.png"]
    assert list(chart_paths(tmp_path).values()) == [tmp_path / name for name in names]
    for prefix in (tmp_path / "speed", tmp_path / "speed.png"):
        assert list(chart_paths(prefix).values()) == [tmp_path / f"speed_{name}" for name in names]


def test_two_pictures_are_written_and_equal_figures_give_equal_ones(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_charts(tmp_path / name, SWEEP, "a title")
    assert len(list(tmp_path.glob("*.png"))) == 4
    for metric in METRICS:
        first, second = ((tmp_path / f"{name}_{metric}.png").read_bytes() for name in ("a", "b"))
        assert first == second and first.startswith(b"\x89PNG")


def test_matplotlib_and_transformers_are_not_loaded_before_they_are_needed() -> None:
    """An engine's start is not charged with them."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import benchmark; "
        "print([name for name in ('matplotlib', 'transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")
