"""Bars side by side, and lines: comparisons and sweeps. Every figure is reached from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rooflm.show import canvas
from rooflm.show.canvas import HATCHES, INK, MARKERS, PALETTE, Figure, blank, figure, fold
from rooflm.show.rooflines import roofline, roofs
from rooflm.show.stacks import memory_bars, operator_bars
from rooflm.show.words import number

__all__ = ["bars", "figure", "lines", "memory_bars", "operator_bars", "roofline", "roofs"]


def lines(
    x: Sequence[Any],
    series: Mapping[str, Sequence[Any]],
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    marks: Mapping[str, float] | None = None,
    alt: str | None = None,
) -> Figure:
    """Curves over one axis.

    Parameters
    ----------
    x : (points,) values of the horizontal axis.
    series : {label: (points,) values}; NaN leaves a gap.
    xlabel, ylabel : quantity and unit.
    xscale, yscale : "linear", "log" or "log2".
    marks : {text: x}, vertical lines.
    alt : words in place of those made from the numbers; give it where numbers are measured.
    """
    across = np.asarray(x, dtype=float)
    values = {label: np.asarray(y, dtype=float) for label, y in series.items()}
    for label, y in values.items():
        if y.shape != across.shape or y.ndim != 1 or not y.size:
            raise ValueError(f"{label} has shape {y.shape}; allowed: that of x, {across.shape}")
    with blank(3.7 + 0.22 * ((len(values) + 1) // 2 if len(values) > 1 else 0)) as ax:
        canvas.scale(ax, "x", xscale)
        canvas.scale(ax, "y", yscale)
        for i, (label, y) in enumerate(values.items()):
            marker = MARKERS[i % 8] if len(across) <= 24 else ""
            ax.plot(across, y, label=fold(label, 36), color=PALETTE[i % 8],
                    linestyle=canvas.LINE_STYLES[i % 6], marker=marker)  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        _draw_marks(ax, marks or {})
        if len(values) > 1:
            canvas.legend(ax)
        return canvas.finish(ax, alt or _lines_alt(across, values, xlabel, ylabel, marks or {}))


def bars(
    labels: Sequence[Any],
    series: Mapping[str, Sequence[Any]],
    ylabel: str,
    yscale: str = "linear",
    alt: str | None = None,
) -> Figure:
    """Bars side by side, a group for each label.

    Parameters
    ----------
    labels : (groups,) names under the axis.
    series : {label: (groups,) values}; None or NaN leaves the place empty.
    ylabel : quantity and unit.
    yscale : "linear" or "log".
    alt : words in place of those made from the numbers; give it where numbers are measured.
    """
    names = [str(label) for label in labels]
    values = {label: np.asarray(y, dtype=float) for label, y in series.items()}
    for label, y in values.items():
        if y.shape != (len(names),):
            raise ValueError(f"{label} has shape {y.shape}; allowed: ({len(names)},), as labels")
    width = 0.8 / max(len(values), 1)
    with blank(3.7 + 0.22 * ((len(values) + 1) // 2 if len(values) > 1 else 0)) as ax:
        canvas.scale(ax, "y", yscale)
        for i, (label, y) in enumerate(values.items()):
            at = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
            drawn = ax.bar(at, y, width * 0.92, label=fold(label, 36), color=PALETTE[i % 8],
                           edgecolor=INK, linewidth=0.6, hatch=HATCHES[i % 8])  # fmt: skip
            if len(names) * len(values) <= 10:
                texts = ["" if v != v else number(v, 3) for v in y]
                ax.bar_label(drawn, texts, fontsize=10, padding=2)
        ax.margins(y=0.1)
        ax.grid(axis="x", visible=False)
        turned = sum(len(name) for name in names) > 60
        ax.set_xticks(range(len(names)), [fold(name, 14) for name in names],
                      rotation=30 if turned else 0, ha="right" if turned else "center")  # fmt: skip
        ax.set_ylabel(ylabel)
        if len(values) > 1:
            canvas.legend(ax)
        return canvas.finish(ax, alt or _bars_alt(names, values, ylabel))


def _draw_marks(ax: Axes, marks: Mapping[str, float]) -> None:
    for i, (text, at) in enumerate(marks.items()):
        ax.axvline(at, color="#555555", linestyle=":", linewidth=1.4, zorder=1)
        ax.annotate(text, (at, 0.98 - 0.09 * i), (4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top", fontsize=10,
                    bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
                    )  # fmt: skip


def _lines_alt(
    x: np.ndarray, values: Mapping[str, np.ndarray], xlabel: str, ylabel: str, marks: Mapping
) -> str:
    parts = []
    for label, y in values.items():
        known = np.flatnonzero(np.isfinite(y))
        if len(known):
            first, last = number(float(y[known[0]]), 3), number(float(y[known[-1]]), 3)
            parts.append(f"{label} from {first} to {last}")
        else:
            parts.append(f"{label} has no values")
    text = (
        f"Lines of {ylabel} against {xlabel} from {number(float(x[0]), 4)} to "
        f"{number(float(x[-1]), 4)}: " + "; ".join(parts)
    )
    if marks:
        text += ". Marked: " + ", ".join(f"{t} at {number(float(a), 4)}" for t, a in marks.items())
    return text + "."


def _bars_alt(names: list[str], values: Mapping[str, np.ndarray], ylabel: str) -> str:
    parts = []
    for label, y in values.items():
        each = ", ".join(
            f"{name} {number(float(v), 3) if v == v else 'none'}"
            for name, v in zip(names, y, strict=True)
        )
        parts.append(f"{label}: {each}")
    return f"Bars of {ylabel}. " + "; ".join(parts) + "."
