"""Rows of the map of factorizations, taken apart for the chapter's tables and figures.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rooflm.lab import map_tables
from rooflm.lab.estimates import Estimate
from rooflm.lab.factorize.sweep import find_row, more_correct
from rooflm.lab.factorize.variants import Variant
from rooflm.lab.map_tables import Place, loss_words
from rooflm.lab.pairs import contrast_rows
from rooflm.lab.rows import Row


def tabulate(
    rows: Iterable[Row], wanted: Mapping[str, Variant], columns: Iterable[str] = ("loss",)
) -> list[tuple[Any, ...]]:
    """Rows for a table.

    Parameters
    ----------
    wanted : variants by the names that the table shall give them.
    columns : as of `map_tables.tabulate`.
    """
    rows = list(rows)
    found = {name: find_row(rows, variant) for name, variant in wanted.items()}
    return map_tables.tabulate(found, columns, find_row(rows, Variant()))


def at_shares(
    rows: Iterable[Row], wanted: Mapping[str, Variant], shares: Iterable[float]
) -> list[tuple[str, ...]]:
    """Rows for a table: the loss of each variant at each share, with half its interval in words."""
    rows, shares = list(rows), list(shares)
    return [
        (name, *(loss_words(find_row(rows, replace(variant, share=s))) for s in shares))
        for name, variant in wanted.items()
    ]


def gaps(
    rows: Iterable[Row],
    wanted: Mapping[str, Variant],
    pairs: Iterable[tuple[str, str]],
    shares: Iterable[float] = (),
) -> list[tuple[str, ...]]:
    """Rows for a table: paired differences of two variants' losses, the first less the second.

    Parameters
    ----------
    wanted : variants by name.
    pairs : names, two by two.
    shares : a column for each; for none, one column of the variants as they are.
    """
    rows = list(rows)
    columns: list[float | None] = [*shares] or [None]

    def cell(pair: tuple[str, str], share: float | None) -> str:
        two = (wanted[name] for name in pair)
        a, b = (find_row(rows, v if share is None else replace(v, share=share)) for v in two)
        return contrast_rows(a, b).difference.signed()

    return [(f"{a} less {b}", *(cell((a, b), s) for s in columns)) for a, b in pairs]


def beside(rows: Iterable[Row], ours: Variant, theirs: Variant) -> tuple[float, float, str]:
    """Two variants: bits of a linear weight of each, and the paired difference of their losses."""
    rows = list(rows)
    first, second = find_row(rows, ours), find_row(rows, theirs)
    gap = contrast_rows(first, second).difference
    return _bits(rows, first), _bits(rows, second), gap.signed()


def points(rows: Iterable[Row], wanted: Iterable[Variant], across: str = "MB") -> list[Place]:
    """What a figure draws: place, loss added, and the ends of its interval.

    Parameters
    ----------
    across : "MB", which a decoded token reads, or "bits" of a linear weight of the full model.
    """
    rows = list(rows)

    def place(row: Mapping[str, Any]) -> float:
        return _bits(rows, row) if across == "bits" else float(row["decode_bytes"]) / 1e6

    return map_tables.places([find_row(rows, variant) for variant in wanted], place)


def _bits(rows: Iterable[Row], row: Mapping[str, Any]) -> float:
    """What a row stores for a linear weight of the full model."""
    return float(16 * row["linear_bits"] / find_row(rows, Variant())["linear_bits"])


def ranks_by_kind(row: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The ranks that a row gives to each kind of layer, the first layer's first; "all" for full."""
    found: dict[str, list[str]] = {}
    for name, rank in zip(shapes, row["ranks"].split(), strict=True):
        kind = name.rsplit(".", 1)[-1]
        found.setdefault(kind, []).append(rank if rank != "0" else "all")
    return {kind: " ".join(ranks) for kind, ranks in found.items()}


class Trial(NamedTuple):
    """A cut of LASER's, beside the full model.

    Parameters
    ----------
    cut : in words.
    chosen, tested : differences of the loss, bits per byte, on the blocks that cuts are chosen by
        and on the others.
    foreseen : by what share of the tokens more it is right, on the others.
    """

    cut: str
    chosen: Estimate
    tested: Estimate
    foreseen: Estimate


def laser_trials(rows: Iterable[Row]) -> list[Trial]:
    """LASER's cuts, chosen on the first half of the text's blocks and tested on the second.

    Returns
    -------
    list
        the best of the first half first.
    """
    rows = list(rows)
    full, found = find_row(rows, Variant()), []
    half = len(full["nats"].split()) // 2
    first, second = slice(0, half), slice(half, None)
    for row in (row for row in rows if row["method"] == "laser"):
        layer, matrix = (word.split("=")[1] for word in row["options"].split())
        found.append(
            Trial(
                f"block {layer}, {matrix}, {row['share']:.0%} of the rank",
                contrast_rows(row, full, first).difference,
                contrast_rows(row, full, second).difference,
                more_correct(row, full, second),
            )
        )
    return sorted(found, key=lambda trial: trial.chosen.value)
