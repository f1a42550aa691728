"""The chart is drawn for whatever figures there are: many runs, one, equal ones, broken ones."""

import struct
import subprocess
import sys
import warnings
from math import inf, nan
from pathlib import Path

import pytest
from summary.chart import new_figure, write_chart
from summary.figures import Difference, Figures, Mean


def figures(*kl: float) -> list[Figures]:
    """Hugging Face, and a run for each KL."""
    hf = Figures("HF", {}, 8.0, 1.0, 1.0, None)
    return [hf] + [
        Figures(
            f"run {index}",
            {},
            8.0,
            1.0,
            1.0,
            Difference(Mean(-0.5, -0.75, 0.25), Mean(value, value / 2, value * 2), 1.0, 1.0, 1.0),
        )
        for index, value in enumerate(kl)
    ]


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its first chunk."""
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw[12:16] == b"IHDR"
    width, height = struct.unpack(">II", raw[16:24])
    return width, height


@pytest.mark.parametrize("kl", [(1e-3,), (0.0, 0.0), (1e-14, 3.0), (nan, 1e-3), (inf, inf), (nan,)])
def test_any_distance_can_be_drawn_without_a_warning(tmp_path: Path, kl: tuple[float, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_chart(tmp_path / "chart.png", figures(*kl), "500 articles")
    assert size_of(tmp_path / "chart.png")[0] > 1000


def test_every_run_has_as_much_room_as_before(tmp_path: Path) -> None:
    heights = []
    for count in (1, 11, 21):
        write_chart(tmp_path / "chart.png", figures(*[1e-3] * count), "500 articles")
        heights.append(size_of(tmp_path / "chart.png")[1])
    assert heights[2] - heights[1] == heights[1] - heights[0] > 200


def test_equal_figures_give_equal_charts(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_chart(tmp_path / name, figures(1e-3, 1e-5), "500 articles")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="a chart needs the package matplotlib: pip install matplotlib"):
        new_figure(1, 1)


def test_matplotlib_is_not_loaded_before_a_chart_is_drawn() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import summarize; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")
