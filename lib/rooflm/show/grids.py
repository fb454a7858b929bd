"""Grids of number formats, drawn: where the levels lie, under the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rooflm.show import canvas
from rooflm.show.canvas import PALETTE, Figure, blank, fold
from rooflm.show.words import number

_CURVE = 2.2  # rows of levels that the density is as high as


def grids(
    levels: Mapping[str, Sequence[Any]],
    xlabel: str,
    density: tuple[Sequence[Any], Sequence[Any]] | None = None,
    reach: float | None = None,
    alt: str | None = None,
) -> Figure:
    """A row of marks for each format, one at every level; over them a density.

    Parameters
    ----------
    levels : {label: (levels,) numbers on one axis}, drawn from the top down.
    xlabel : quantity and unit.
    density : (places, heights), both (points,): a curve or a histogram, drawn to its own scale.
    reach : the axis goes from -reach to reach; None for all levels.
    alt : words in place of those made from the numbers.

    Raises
    ------
    ValueError
        for no format, a format without levels, or a density whose parts differ in length.
    """
    rows = {label: np.asarray(x, dtype=float) for label, x in levels.items()}
    if not rows:
        raise ValueError("no levels are given; allowed: at least one format")
    for label, x in rows.items():
        if x.ndim != 1 or not x.size or not np.isfinite(x).all():
            raise ValueError(f"levels of {label} have shape {x.shape}; allowed: (levels,), finite")
    with blank(1.0 + 0.42 * len(rows) + (0.9 if density else 0)) as ax:
        for i, x in enumerate(rows.values()):
            seen = x if reach is None else x[np.abs(x) <= reach]
            ax.vlines(seen, -i - 0.32, -i + 0.32, color=PALETTE[i % 6], linewidth=1.8)
            ax.axhline(-i, color="#bbbbbb", linewidth=0.8, zorder=0)
        if density is not None:
            places, heights = (np.asarray(part, dtype=float) for part in density)
            if places.shape != heights.shape or places.ndim != 1 or not places.size:
                raise ValueError(
                    f"density has {places.shape} places and {heights.shape} heights; "
                    "allowed: as many, (points,)"
                )
            curve = 0.6 + _CURVE * heights / max(heights.max(), 1e-300)
            ax.fill_between(places, 0.6, curve, color="#cccccc", linewidth=0)
            ax.plot(places, curve, color="#555555", linewidth=1.2)
        ax.set_yticks(range(0, -len(rows), -1), [fold(label, 16) for label in rows])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        if reach is not None:
            ax.set_xlim(-reach * 1.03, reach * 1.03)
        ax.set_xlabel(xlabel)
        return canvas.finish(ax, alt or _alt(rows, xlabel, density is not None))


def _alt(rows: Mapping[str, np.ndarray], xlabel: str, density: bool) -> str:
    parts = []
    for label, x in rows.items():
        low, high = number(float(x.min()), 3), number(float(x.max()), 3)
        gap = np.diff(np.unique(x))
        steps = ""
        if len(gap):
            steps = f", steps from {number(float(gap.min()), 2)} to {number(float(gap.max()), 2)}"
        parts.append(f"{label}: {len(np.unique(x))} levels from {low} to {high}{steps}")
    under = " under the density of the numbers" if density else ""
    return f"Levels{under}, {xlabel}. " + "; ".join(parts) + "."
