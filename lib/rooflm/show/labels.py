"""Labels beside points that do not cover one another: a greedy search over a few places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

SIZE = 10  # points
_ANGLES = (-45, 0, -90, 180, 45, -135, 90, 135, -20, -70, -110, 20)
LEADER_FROM = 20  # points
_DISTANCES = (9, 16, 26, 40, 56, 74)  # points


@dataclass(frozen=True)
class Label:
    """Text that belongs to a point (data coordinates).

    `radius` of its marker in points; `upward` if it would rather stand above than below.
    """

    x: float
    y: float
    text: str
    radius: float = 4.0
    upward: bool = False


def place(ax: Axes, labels: list[Label], lines: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write each label where it covers least: other labels, markers, the given lines.

    The figure is settled (`canvas.settle`), so that data coordinates have pixels.

    Parameters
    ----------
    labels : what to write, the most important first.
    lines : polylines in data coordinates that labels should not cross.
    """
    figure: Any = ax.figure
    renderer = figure.canvas.get_renderer()
    pixel = figure.dpi / 72
    inside = ax.get_window_extent(renderer)
    crossed = _pixels(ax, lines)
    taken = [text.get_window_extent(renderer) for text in ax.texts]
    for label in labels:
        px, py = ax.transData.transform((label.x, label.y))
        r = label.radius * pixel
        taken.append(Bbox.from_bounds(px - r, py - r, 2 * r, 2 * r))
    for label in labels:
        text = ax.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points",
            fontsize=SIZE, in_layout=False, zorder=6, linespacing=1.0,
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        anchor = ax.transData.transform((label.x, label.y))
        offset, best, distance = _best(label, anchor, box, pixel, inside, taken, crossed)
        text.set_position((offset[0] / pixel, offset[1] / pixel))
        taken.append(best)
        if distance > LEADER_FROM:
            _leader(ax, anchor, best)


def _best(
    label: Label,
    anchor: np.ndarray,
    box: Bbox,
    pixel: float,
    inside: Bbox,
    taken: list[Bbox],
    crossed: np.ndarray,
) -> tuple[tuple[float, float], Bbox, float]:
    """Offset in pixels of the text's lower left corner, its box there, and its distance."""
    found: tuple[float, tuple[float, float], Bbox, float] | None = None
    wish = 135 if label.upward else -45
    for distance in _DISTANCES:
        for angle in _ANGLES:
            reach = (distance + label.radius - 4) * pixel
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The nearest edge or corner of the box stands `reach` away from the point.
            dx = reach * cos - box.width * (1 - cos) / 2
            dy = reach * sin - box.height * (1 - sin) / 2
            dx = min(dx, inside.x1 - anchor[0] - box.width)
            dx = max(dx, inside.x0 - anchor[0] + 2)
            at = Bbox.from_bounds(anchor[0] + dx, anchor[1] + dy, box.width, box.height)
            turned = abs((angle - wish + 180) % 360 - 180)
            cost = _cost(at, inside, taken, crossed) + distance / 20 + turned / 300
            if distance > LEADER_FROM:
                cost += 3 * _crossings(anchor, _nearest(anchor, at), taken)
            if found is None or cost < found[0]:
                found = (cost, (dx, dy), at, distance)
    assert found is not None
    return found[1:]


def _cost(at: Bbox, inside: Bbox, taken: list[Bbox], crossed: np.ndarray) -> float:
    outside = max(inside.x0 - at.x0, 0) + max(at.x1 - inside.x1, 0)
    outside += max(inside.y0 - at.y0, 0) + max(at.y1 - inside.y1, 0)
    overlap = 0.0
    for other in taken:
        width = min(at.x1, other.x1) - max(at.x0, other.x0)
        height = min(at.y1, other.y1) - max(at.y0, other.y0)
        if width > 0 and height > 0:
            overlap += width * height
    hits = 0
    if len(crossed):
        hits = int(
            np.count_nonzero(
                (crossed[:, 0] > at.x0) & (crossed[:, 0] < at.x1)
                & (crossed[:, 1] > at.y0) & (crossed[:, 1] < at.y1)
            )
        )  # fmt: skip
    return 10 * outside + overlap / 10 + hits / 2


def _pixels(ax: Axes, lines: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Points along the lines, about two pixels apart."""
    parts = []
    for x, y in lines:
        corners = ax.transData.transform(np.column_stack([x, y]))
        for start, end in pairwise(corners):
            steps = max(int(np.hypot(*(end - start)) / 2), 1)
            parts.append(start + (end - start) * np.linspace(0, 1, steps)[:, None])
    return np.concatenate(parts) if parts else np.empty((0, 2))


def _nearest(anchor: np.ndarray, box: Bbox) -> np.ndarray:
    """The place of the box that is nearest to the point."""
    x, y = min(max(anchor[0], box.x0), box.x1), min(max(anchor[1], box.y0), box.y1)
    return np.array([x, y])


def _crossings(start: np.ndarray, end: np.ndarray, taken: list[Bbox]) -> int:
    """How many boxes a leader runs through; the one it starts from does not count."""
    steps = [start + (end - start) * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    others = [box for box in taken if not box.contains(*start)]
    return sum(any(box.contains(*step) for step in steps) for box in others)


def _leader(ax: Axes, anchor: np.ndarray, box: Bbox) -> None:
    """A thin line from the point to the nearest place of the box."""
    ends = ax.transData.inverted().transform(np.array([anchor, _nearest(anchor, box)]))
    ax.plot(ends[:, 0], ends[:, 1], color="#777777", linewidth=0.8, zorder=2, in_layout=False,
            scalex=False, scaley=False)  # fmt: skip
