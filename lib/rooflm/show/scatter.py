"""Points of several kinds over two axes, with curves behind them: measured beside predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rooflm.show import canvas, labels
from rooflm.show.canvas import INK, LINE_STYLES, MARKERS, PALETTE, Figure, blank, fold
from rooflm.show.words import number


def scatter(
    points: Mapping[str, tuple[Sequence[Any], Sequence[Any]]],
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    curves: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    intervals: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] | None = None,
    alt: str | None = None,
) -> Figure:
    """Points, each kind with a marker of its own.

    Parameters
    ----------
    points : {kind: (x, y)}, both (points,).
    xlabel, ylabel : quantity and unit.
    xscale, yscale : "linear", "log" or "log2".
    curves : {label: (x, y)}, drawn as lines.
    names : {kind: texts}, one beside each point of that kind; "" for none.
    intervals : {kind: (low, high)}, the ends of a vertical bar through each point.
    alt : words in place of those made from the numbers; give it where numbers are measured.

    Raises
    ------
    ValueError
        where the parts of a kind differ in length, or names and intervals are of no kind.
    """
    held = {kind: _pair(kind, xy) for kind, xy in points.items()}
    lines = {label: _pair(label, xy) for label, xy in (curves or {}).items()}
    named, spans = names or {}, intervals or {}
    _check_parts(held, named, spans)
    shown = len(held) + len(lines)
    with blank(4.1 + 0.22 * ((shown + 1) // 2 if shown > 1 else 0)) as ax:
        canvas.scale(ax, "x", xscale)
        canvas.scale(ax, "y", yscale)
        for i, (label, (x, y)) in enumerate(lines.items()):
            # As many curves as kinds: each belongs to one, and shares its colour.
            color = PALETTE[i % 8] if len(lines) == len(held) > 1 else INK
            ax.plot(x, y, label=fold(label, 36), color=color, linestyle=LINE_STYLES[i % 6],
                    linewidth=1.6, zorder=2)  # fmt: skip
        for i, (kind, (x, y)) in enumerate(held.items()):
            if kind in spans:
                ax.vlines(x, *spans[kind], color=PALETTE[i % 8], linewidth=1.4, zorder=3)
            ax.scatter(x, y, s=34 if len(x) < 60 else 16, color=PALETTE[i % 8], edgecolor=INK,
                       linewidth=0.6, marker=MARKERS[i % 8], label=fold(kind, 36),
                       zorder=4)  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        if shown > 1:
            canvas.legend(ax)
        if any(any(texts) for texts in named.values()):
            canvas.settle(ax)
            found, others = _labels(held, named)
            labels.place(ax, found, [*lines.values(), *others])
        return canvas.finish(ax, alt or _alt(held, lines, xlabel, ylabel))


def _pair(label: str, xy: tuple[Sequence[Any], Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(part, dtype=float) for part in xy)
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise ValueError(
            f"{label} has {x.shape} and {y.shape} numbers; allowed: as many, (points,)"
        )
    return x, y


def _check_parts(held: Mapping[str, Any], named: Mapping[str, Any], spans: Mapping) -> None:
    for what, parts in (("names", named), ("intervals", spans)):
        for kind, part in parts.items():
            if kind not in held:
                raise ValueError(f"{what} are given for {kind}; allowed: {', '.join(held)}")
            each = part if what == "intervals" else (part,)
            if any(len(one) != len(held[kind][0]) for one in each):
                raise ValueError(f"{what} of {kind} are not {len(held[kind][0])}, one for a point")


def _labels(
    held: Mapping[str, Any], named: Mapping[str, Sequence[str]]
) -> tuple[list[labels.Label], list[tuple[np.ndarray, np.ndarray]]]:
    """The labels, and the points without one, which no label should cover."""
    found, others = [], []
    for kind, (xs, ys) in held.items():
        for x, y, text in zip(xs, ys, named.get(kind, [""] * len(xs)), strict=True):
            if text:
                found.append(labels.Label(x, y, text))
            else:
                others.append((np.array([x, x]), np.array([y, y])))
    return found, others


def _alt(held: Mapping, lines: Mapping, xlabel: str, ylabel: str) -> str:
    parts = []
    for label, (x, y) in {**held, **lines}.items():
        ends = [number(float(v), 3) for v in (x.min(), x.max(), y.min(), y.max())]
        what = f"{len(x)} points" if label in held else "a curve"
        parts.append(f"{label}: {what}, {ends[0]} to {ends[1]} across, {ends[2]} to {ends[3]} up")
    return f"{ylabel} against {xlabel}. " + "; ".join(parts) + "."
