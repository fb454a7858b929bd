"""Points on a plane of bytes and loss: what nothing beats, and what can be told from it.

Paired differences need the losses of the blocks, which most maps keep. Where one of two points has
none, their single intervals are set side by side; two can overlap where the difference is sure.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rooflm.lab import pairs, text
from rooflm.lab.bench import WINDOW
from rooflm.lab.evaluate import Comparison
from rooflm.lab.map_points import Point
from rooflm.lab.map_tables import lowest

FRONTIER_COLUMNS = ("bytes a token", "part", "model", "loss added", "trained", "step", "rivals")


class Beside(NamedTuple):
    """A point beside one of the frontier.

    Parameters
    ----------
    point, best : the two; `best` is of the frontier.
    apart : whether the point's loss is surely larger.
    paired : whether that is by a paired difference.
    """

    point: Point
    best: Point
    apart: bool
    paired: bool


def pareto(points: Iterable[Point]) -> list[Point]:
    """From few bytes to many, the points whose loss is below that of all that read as few."""
    return lowest(points, _read, lambda point: point.difference.value)


def best_within(points: Iterable[Point], most_bytes: float) -> Point | None:
    """The point of least loss that reads at most so many bytes; None where there is none."""
    within = [p for p in points if p.decode_bytes <= most_bytes]
    return min(within, key=lambda p: p.difference.value, default=None)


def contrast(point: Point, other: Point) -> Comparison | None:
    """The first minus the second, bits per byte, paired; None where a row keeps no blocks."""
    if not point.nats or not other.nats or point.tokens != other.tokens:
        return None
    return pairs.contrast(point.nats, other.nats, text.HELD_OUT, point.tokens, WINDOW)


def beside(point: Point, best: Point) -> Beside:
    """Whether a point's loss can be told from a smaller one."""
    found = contrast(point, best)
    if found is not None:
        return Beside(point, best, found.difference.low > 0, True)
    return Beside(point, best, point.difference.low > best.difference.high, False)


def rivals(points: Iterable[Point], frontier: Sequence[Point]) -> list[Beside]:
    """The points off the frontier that cannot be told from it, each beside the point it faces.

    A point faces the last one of the frontier that reads no more bytes than it does.
    """
    found = []
    on = {id(point) for point in frontier}
    for point in points:
        faced = [best for best in frontier if _read(best) <= _read(point)]
        if id(point) not in on and faced:
            found.append(beside(point, faced[-1]))
    return [x for x in found if not x.apart]


def frontier_rows(points: Iterable[Point]) -> list[tuple[str, ...]]:
    """The frontier for a table, by the columns of `FRONTIER_COLUMNS`.

    A step is "sure" where the point before it surely loses more, else "noise". Rivals are those
    that face the point, counted as "paired + unpaired".
    """
    points = list(points)
    frontier = pareto(points)
    others = rivals(points, frontier)
    rows: list[tuple[str, ...]] = []
    for i, best in enumerate(frontier):
        step = ""
        if i:
            step = "sure" if beside(frontier[i - 1], best).apart else "noise"
        near = [x for x in others if x.best is best]
        paired = sum(x.paired for x in near)
        rows.append(
            (
                f"{best.decode_bytes / 1e6:.3f} MB",
                best.part,
                best.label,
                best.difference.signed(),
                "yes" if best.trained else "no",
                step,
                f"{paired} + {len(near) - paired}",
            )
        )
    return rows


def _read(point: Point) -> float:
    """Bytes to the digits that all maps keep."""
    return float(f"{point.decode_bytes:.5g}")
