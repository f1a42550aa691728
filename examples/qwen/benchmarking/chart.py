"""Throughput as two pictures, as the original port published it: requests/s and tokens/s beside Hugging Face.

A panel is a workload, a bar is a row of the table, a colour is a mode; Hugging Face is grey.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from summary.chart import new_figure

from .figures import Figures, fastest_hf

# What is drawn -> its file's name, its axis, its value.
METRICS: dict[str, tuple[str, Callable[[Figures], float]]] = {
    "requests_per_second": ("requests/s", lambda row: row.requests_per_second),
    "tokens_per_second": ("input + output tokens/s", lambda row: row.tokens_per_second),
}
# Okabe and Ito's, which all eyes tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREY, _INK = "#999999", "#333333"
_INCHES_PER_BAR, _INCHES_PER_PANEL = 0.26, 0.75


def chart_paths(output_chart: Path) -> dict[str, Path]:
    """Metric -> file: in a folder, else beside each other under names that begin with `output_chart`."""
    if output_chart.is_dir():
        return {metric: output_chart / f"{metric}.png" for metric in METRICS}
    prefix = output_chart.with_suffix("") if output_chart.suffix == ".png" else output_chart
    return {metric: prefix.with_name(f"{prefix.name}_{metric}.png") for metric in METRICS}


def write_charts(output_chart: Path, rows: Sequence[Figures], title: str) -> None:
    for metric, path in chart_paths(output_chart).items():
        draw(rows, metric, title).savefig(path, dpi=150, format="png")


def draw(rows: Sequence[Figures], metric: str, title: str) -> Any:
    """The figure of one metric; in a panel the bars are sorted by batch, Hugging Face first."""
    axis_label, value_of = METRICS[metric]
    workloads = list(dict.fromkeys(row.workload for row in rows))
    panels = [[row for row in rows if row.workload == workload] for workload in workloads]
    heights = [_INCHES_PER_PANEL + _INCHES_PER_BAR * len(panel) for panel in panels]
    figure = new_figure(9, 0.5 + sum(heights))
    figure.suptitle(title, color=_INK, fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    modes = list(dict.fromkeys(row.name for row in rows if row.backend != "hf"))
    for axis, workload, panel in zip(axes, workloads, panels, strict=True):
        bars = sorted(panel, key=lambda row: (row.batch_size, row.backend != "hf"))
        colors = [_GREY if row.backend == "hf" else _COLORS[modes.index(row.name) % len(_COLORS)] for row in bars]
        values = [value_of(row) for row in bars]
        drawn = axis.barh(range(len(bars)), values, color=colors, height=0.8)
        axis.bar_label(drawn, [_label(row, rows, value_of) for row in bars], padding=3, fontsize=8, color=_INK)
        axis.set_yticks(range(len(bars)), [f"batch {row.batch_size}, {row.name}" for row in bars])
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, 1.25 * max(values))  # room for the labels
        axis.set_title(workload, loc="left", fontsize=9, color=_INK)
        axis.set_xlabel(axis_label, fontsize=8, color=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=_INK)
    return figure


def _label(row: Figures, rows: Sequence[Figures], value_of: Callable[[Figures], float]) -> str:
    value, best = value_of(row), fastest_hf(row, rows)
    shown = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{shown} ({value / value_of(best):.1f} x HF)" if best and row.backend != "hf" else shown
