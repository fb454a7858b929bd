"""Measured points with error bars: what is paid in bits against what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rooflm.show import canvas
from rooflm.show.canvas import INK, MARKERS, PALETTE, Figure, blank, fold
from rooflm.show.words import number

# Below this a logarithmic axis would show noise; there the axis is linear.
LINEAR_BELOW = 1e-3


class Measured(NamedTuple):
    """A point of a figure.

    Parameters
    ----------
    x, y : where it stands.
    low, high : the ends of its error bar; None for none.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def frontier(
    series: Mapping[str, Sequence[Measured]],
    xlabel: str,
    ylabel: str,
    line: Sequence[tuple[float, float]] = (),
    yscale: str = "log",
    joined: bool = False,
    alt: str | None = None,
) -> Figure:
    """Points of several kinds, each with its error bar.

    Parameters
    ----------
    series : {label: points}.
    xlabel, ylabel : quantity and unit.
    line : the corners of a staircase below the points, from left to right: what nothing beats.
    yscale : "log", which is linear around 0 (within `LINEAR_BELOW`), or "linear".
    joined : whether the points of a kind are joined by a line.
    alt : words in place of those made from the numbers.

    Raises
    ------
    ValueError
        for no points, an error bar that does not hold its point, or another scale.
    """
    _check(series, yscale)
    names = [label for label, points in series.items() if points]
    with blank(3.9 + 0.22 * ((len(names) + 1) // 2)) as ax:
        for i, label in enumerate(names):
            points = sorted(series[label])
            x, y = (np.array([getattr(p, axis) for p in points], dtype=float) for axis in "xy")
            ends = [
                (p.y if p.low is None else p.low, p.y if p.high is None else p.high) for p in points
            ]
            reach = np.abs(np.array(ends, dtype=float).T - y)
            ax.errorbar(x, y, yerr=reach if reach.any() else None, label=fold(label, 36),
                        color=PALETTE[i % 8], marker=MARKERS[(i + i // 8) % 8], markeredgecolor=INK,
                        markeredgewidth=0.5, linestyle="-" if joined else "none", linewidth=1.4,
                        elinewidth=1.4, capsize=2, zorder=3)  # fmt: skip
        if line:
            across, up = np.array(line, dtype=float).T
            ax.step(across, up, where="post", color="#888888", linewidth=1.2, zorder=1)
        if yscale == "log":
            _log_around_zero(ax, [p for points in series.values() for p in points])
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        if len(names) > 1:
            canvas.legend(ax)
        words = alt or _alt({label: series[label] for label in names}, xlabel, ylabel)
        return Figure(canvas.render(ax.figure), words)


def _log_around_zero(ax: Axes, points: Sequence[Measured]) -> None:
    low = min(p.y if p.low is None else p.low for p in points)
    high = max(p.y if p.high is None else p.high for p in points)
    ax.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.6)
    decades = [10.0**power for power in range(-3, 4)]
    ax.yaxis.set_major_locator(FixedLocator([-t for t in decades] + [0.0] + decades))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.6g}"), 3)))
    ax.set_ylim(low * (1.5 if low < 0 else 0.5), max(high, 0) * 1.5 + LINEAR_BELOW / 5)


def _check(series: Mapping[str, Sequence[Measured]], yscale: str) -> None:
    if yscale not in ("log", "linear"):
        raise ValueError(f"yscale is {yscale!r}; allowed: log, linear")
    if not any(series.values()):
        raise ValueError("no points are given; allowed: at least one")
    for label, points in series.items():
        for p in points:
            if (p.low is not None and p.low > p.y) or (p.high is not None and p.high < p.y):
                raise ValueError(
                    f"a point of {label} at {p.y} has an error bar from {p.low} to {p.high}; "
                    "allowed: one that holds it"
                )


def _alt(series: Mapping[str, Sequence[Measured]], xlabel: str, ylabel: str) -> str:
    parts = []
    for label, points in series.items():
        each = ", ".join(f"{number(p.y, 2)} at {number(p.x, 3)}" for p in sorted(points))
        parts.append(f"{label}: {each}")
    return f"{ylabel} against {xlabel}. " + "; ".join(parts) + "."
