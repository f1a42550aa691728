"""Runs beside Hugging Face as a picture: what each costs in ROUGE-1, and its mean KL.

matplotlib is imported when a chart is asked for, without its user interfaces.
"""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from .figures import Figures, Mean

# Two of Okabe and Ito's colours, which all eyes tell apart.
_BLUE, _VERMILLION = "#0072B2", "#D55E00"
_INK, _FAINT = "#333333", "#BBBBBB"
_LABEL = {"color": _INK, "fontsize": 9}
_INCHES_PER_RUN = 0.24
# Where the axis of KL begins, in nats: a logarithm has no zero. Smaller ones, as a float32 engine's 1e-14, stand there.
_SMALLEST_KL = 1e-9


def new_figure(width: float, height: float) -> Any:
    """An empty figure in inches; a ValueError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"a chart needs the package matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_chart(path: Path, figures: Sequence[Figures], title: str) -> None:
    """One line for each run that has a difference to Hugging Face, the first on top; the same lines in both panels."""
    compared = [(row.name, row.difference) for row in figures if row.difference]
    figure = new_figure(9, 1.4 + _INCHES_PER_RUN * len(compared))
    figure.suptitle(title, color=_INK, fontsize=10)
    rouge, kl = figure.subplots(1, 2, sharey=True)
    rouge.axvline(0, color=_FAINT, linewidth=1, zorder=0)
    _draw(rouge, [difference.rouge1 for _, difference in compared], _BLUE)
    rouge.set_xlabel("ROUGE-1 less Hugging Face", **_LABEL)
    distances = [_at_least(_SMALLEST_KL, difference.kl) for _, difference in compared]
    kl.set_xscale("log")
    # Of a broken engine KL may be NaN or infinite, which no axis can show.
    kl.set_xlim(_SMALLEST_KL, 2 * max([100 * _SMALLEST_KL, *(mean.high for mean in distances if isfinite(mean.high))]))
    _draw(kl, distances, _VERMILLION)
    kl.set_xlabel(f"mean KL from Hugging Face, nats per token\n({_SMALLEST_KL:g} or less at the left end)", **_LABEL)
    rouge.set_yticks(range(len(compared)), [name for name, _ in compared])
    rouge.set_ylim(len(compared) - 0.5, -0.5)
    for panel in (rouge, kl):
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="both", labelsize=8, colors=_INK)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="y", color=_FAINT, linewidth=0.4)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=150, format="png")


def _at_least(smallest: float, mean: Mean) -> Mean:
    return Mean(max(mean.mean, smallest), max(mean.low, smallest), max(mean.high, smallest))


def _draw(panel: Any, means: Sequence[Mean], color: str) -> None:
    """A point for each mean, a bar for its interval."""
    lines = range(len(means))
    panel.hlines(lines, [mean.low for mean in means], [mean.high for mean in means], color=color, linewidth=1.5)
    # Points on the left end of the axis are drawn whole.
    panel.scatter([mean.mean for mean in means], lines, color=color, s=18, zorder=3, clip_on=False)
