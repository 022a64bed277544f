"""Plots of an evaluation, each as PNG and as SVG, drawn without a display.

Invariant: colour is never the only distinction (lines also differ in marker and dash), and the same values give the
same files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from aft_ray.evaluation.statistics.bootstrap import Estimate
from aft_ray.evaluation.statistics.histograms import Histogram

# The palette of Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",  # text is written as text, not as outlines
    "svg.hashsalt": "aft_ray",
}
PANEL_INCHES = 3.6


def plot_curves(
    path: Path,
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
    xlabel: str,
    ylabel: str,
    title: str | None = None,
) -> list[Path]:
    """Draws shares as a function of a number such as n, k or β, in panels side by side that share a y axis.

    Each series is a line with its 95 % intervals as a band.

    Args:
        path: path of the files without suffix.
        x: the values of the horizontal axis.
        panels: for each panel the series, and for each series one estimate per value of `x`; a point that is NaN is
            left out.

    Returns:
        The files that were written.
    """
    with _figure(len(panels), 1, 1.5 if len(panels) == 1 else 1.0, title) as (figure, axes):
        for axis, (name, series) in zip(axes, panels.items(), strict=True):
            for number, (label, points) in enumerate(series.items()):
                _line(axis, x, points, label, number)
            axis.set_title(name)
            axis.set_xlabel(xlabel)
            if _needs_log_axis(x):
                axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(x))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[0].set_ylabel(ylabel)
        axes[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        _legend(figure, axes[0])
        return _save(figure, path)


def plot_histograms(
    path: Path, models: Mapping[str, Histogram], assessments: Mapping[str, Estimate | None]
) -> list[Path]:
    """Draws the scores of right and of wrong samples, with a panel and the assessment accuracy of each model."""
    with _figure(1, len(models), 1.9, None, shared_x=True) as (figure, axes):
        for axis, (label, histogram) in zip(axes, models.items(), strict=True):
            for number, (name, counts) in enumerate((("right", histogram.right), ("wrong", histogram.wrong))):
                total = sum(counts)
                shares = [count / max(1, total) for count in counts]
                axis.stairs(shares, histogram.edges, fill=True, color=COLOURS[number], alpha=0.22)
                line = axis.stairs(shares, histogram.edges, color=COLOURS[number], label=f"{name} ({total:,} samples)")
                line.set_linestyle(DASHES[number])
                line.set_linewidth(1.6)
            estimate = assessments.get(label)
            known = estimate is not None and not math.isnan(estimate.value)
            axis.set_title(
                f"{label}: assessment accuracy {100 * estimate.value:.1f} %" if known and estimate else label
            )
            axis.set_ylabel("samples of its kind, %")
            axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            axis.legend(loc="upper left")
        axes[-1].set_xlabel("score, nats per token (lower scores are in the first bin)")
        return _save(figure, path)


def _line(axis: Axes, x: Sequence[float], points: Sequence[Estimate], label: str, number: int) -> None:
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }
    axis.plot(x, [point.value for point in points], label=label, **style)
    low, high = ([getattr(point, bound) for point in points] for bound in ("low", "high"))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)


def _needs_log_axis(x: Sequence[float]) -> bool:
    """Whether values grow so fast that only a logarithmic axis separates them."""
    return len(x) > 3 and min(x) > 0 and bool(np.median(np.divide(x[1:], x[:-1])) >= 1.9)


def _legend(figure: Figure, axis: Axes) -> None:
    """Draws the legend below the panels, where it hides no line."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), 4)))


@contextmanager
def _figure(
    columns: int, rows: int, stretch: float, title: str | None, shared_x: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yields a figure and its axes in the style of this module; restores the global state of matplotlib."""
    with matplotlib.rc_context(STYLE):
        size = (
            PANEL_INCHES * stretch * max(columns, 1.2),
            (PANEL_INCHES if rows == 1 else 0.8 * PANEL_INCHES * rows) + 0.5,
        )
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharey=True, sharex=shared_x, squeeze=False)
        if title:
            figure.suptitle(title)
        yield figure, list(axes.flat)


def _save(figure: Figure, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    kinds: dict[str, dict[str, Any]] = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    for suffix, options in kinds.items():
        file = path.with_name(f"{path.name}.{suffix}")
        figure.savefig(file, format=suffix, **options)
        files.append(file)
    return files
