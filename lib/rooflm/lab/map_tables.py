"""Rows of maps as rows of tables and points of figures: what all maps have in common.

A map's own module finds the rows; here they become cells. Numbers stay numbers, which `show.table`
formats; a loss is words, since it stands with its interval.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rooflm.lab.maps import estimate
from rooflm.lab.pairs import contrast_rows

Place = tuple[float, float, float, float]
Item = TypeVar("Item")


def loss_words(row: Mapping[str, Any]) -> str:
    """Bits per byte that a row adds, with half the width of its interval.

    >>> loss_words({"difference": 0.0042, "difference_low": 0.0023, "difference_high": 0.0061})
    '+0.0042 ± 0.0019'
    """
    return estimate(row, "difference").signed()


def tabulate(
    found: Mapping[str, Mapping[str, Any]],
    columns: Iterable[str],
    full: Mapping[str, Any] | None = None,
) -> list[tuple[Any, ...]]:
    """Rows for a table: a name and what the map says.

    Parameters
    ----------
    found : rows of the map, by what they are called in the table.
    columns : of the map; or "loss" for `loss_words`, a dash for the full model; "agreement" as a
        percentage; "MB", 10^6 bytes of weights that a decoded token reads; "bits", stored for a
        linear weight of the full model.
    full : the row of the full model in FP16, for "bits" and for the dash.
    """

    def cell(row: Mapping[str, Any], column: str) -> Any:
        if column == "loss":
            return "–" if row is full else loss_words(row)
        if column == "agreement":
            return f"{row['agreement']:.0%}"
        if column == "MB":
            return row["decode_bytes"] / 1e6
        if column == "bits" and full is not None and "linear_bits" in row:
            return 16 * row["linear_bits"] / full["linear_bits"]
        return row[column]

    columns = list(columns)
    return [(name, *(cell(row, column) for column in columns)) for name, row in found.items()]


def places(
    rows: Iterable[Mapping[str, Any]], across: Callable[[Mapping[str, Any]], float]
) -> list[Place]:
    """Where rows stand in a figure: (across, loss added, and the ends of its interval)."""
    found = []
    for row in rows:
        loss = estimate(row, "difference")
        found.append((across(row), loss.value, loss.low, loss.high))
    return found


def beside(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first row less the second, paired, with the verdict: "-0.0123 ± 0.0030, better"."""
    found = contrast_rows(row, other)
    return f"{found.difference.signed()}, {found.verdict}"


def lowest(
    items: Iterable[Item], size: Callable[[Item], float], loss: Callable[[Item], float]
) -> list[Item]:
    """From small to large, the items whose loss is below that of all that are as small."""
    best: list[Item] = []
    for item in sorted(items, key=lambda x: (size(x), loss(x))):
        if not best or loss(item) < loss(best[-1]):
            best.append(item)
    return best
