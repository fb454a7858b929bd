"""Operators as points of a roofline: those at one place are one point, with one name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rooflm.roofline.analysis import Row
from rooflm.show.words import scalar

NEAR = 1.05  # places closer than this ratio are one: markers would lie on one another
NEAR_LABELS = 1.25  # and closer than this ratio they share a label
_ENDINGS = ("proj", "norm", "add", "matmul", "embedding")


@dataclass(frozen=True)
class Point:
    """Operators at one place: intensity in FLOP/B, attainable in FLOP/s, share of the time."""

    names: tuple[str, ...]
    intensity: float
    attainable: float
    share: float

    def is_near(self, other: Point, ratio: float) -> bool:
        """Whether the two differ by less than that ratio, in both directions."""
        x, y = other.intensity / self.intensity, other.attainable / self.attainable
        return max(x, 1 / x, y, 1 / y) < ratio

    @property
    def area(self) -> float:
        """Of the marker, in square points; never so small that the marker is lost."""
        return 24 + 300 * self.share


def group(rows: Iterable[Row]) -> list[Point]:
    """The operators of a pass by place, the longest first; those without arithmetic left out."""
    placed: list[Point] = []
    total = 0.0
    for row in rows:
        seconds = row.count * scalar(row.seconds, f"seconds of {row.name}")
        intensity = scalar(row.intensity, f"intensity of {row.name}")
        total += seconds
        if intensity > 0:
            attainable = scalar(row.attainable, f"attainable of {row.name}")
            placed.append(Point((row.name,), intensity, attainable, seconds))
    order = {point.names[0]: i for i, point in enumerate(placed)}
    merged = merge(sorted(placed, key=lambda point: -point.share), NEAR)
    return [
        replace(
            point,
            names=tuple(sorted(point.names, key=order.__getitem__)),
            share=point.share / total,
        )
        for point in sorted(merged, key=lambda point: -point.share)
    ]


def merge(points: Iterable[Point], ratio: float) -> list[Point]:
    """Points at one place as one, at the place of the first; shares and names added up."""
    merged: list[Point] = []
    for point in points:
        for i, other in enumerate(merged):
            if other.is_near(point, ratio):
                names = tuple(dict.fromkeys(other.names + point.names))
                share = other.share + point.share
                merged[i] = Point(names, other.intensity, other.attainable, share)
                break
        else:
            merged.append(point)
    return merged


def short_names(names: Sequence[str]) -> str:
    """Names with a common ending written once.

    >>> short_names(["q_proj", "k_proj", "lm_head", "attn_norm", "mlp_norm"])
    'q/k_proj, lm_head, attn/mlp_norm'
    """
    by_ending: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        start, _, ending = name.rpartition("_")
        if start and ending in _ENDINGS:
            by_ending.setdefault(f"_{ending}", []).append(start)
        else:
            by_ending.setdefault(name, []).append("")
    return ", ".join("/".join(starts) + ending for ending, starts in by_ending.items())
