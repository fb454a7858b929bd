"""Rows of the map of factorizations, taken apart for the chapter's tables and figures.

Chapter: factorization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rooflm.lab import pairs, text
from rooflm.lab.bench import SMOLLM2, WINDOW
from rooflm.lab.estimates import Estimate, ratio_estimate
from rooflm.lab.factorize.sweep import find_row
from rooflm.lab.factorize.variants import Variant
from rooflm.lab.quantize.map_rows import loss_words
from rooflm.lab.rows import Row

WHOLE = slice(None)


def tabulate(
    rows: Iterable[Row], wanted: Mapping[str, Variant], columns: Iterable[str] = ("loss",)
) -> list[tuple[Any, ...]]:
    """Rows for a table.

    Parameters
    ----------
    rows : of the map.
    wanted : variants by the names that the table shall give them.
    columns : the map's own; or "loss", the difference with half its interval in words, "MB", which
        a decoded token reads, or "bits", of a linear weight of the full model.
    """
    rows, columns = list(rows), list(columns)
    whole = find_row(rows, Variant())["linear_bits"] / 16

    def cell(row: Mapping[str, Any], column: str) -> Any:
        if column == "loss":
            return loss_words(row)
        if column == "MB":
            return row["decode_bytes"] / 1e6
        if column == "bits":
            return row["linear_bits"] / whole
        return f"{row['agreement']:.0%}" if column == "agreement" else row[column]

    found = {name: find_row(rows, variant) for name, variant in wanted.items()}
    return [(name, *(cell(row, column) for column in columns)) for name, row in found.items()]


def points(
    rows: Iterable[Row], wanted: Iterable[Variant], across: str = "MB"
) -> list[tuple[float, float, float, float]]:
    """What a figure draws: place, loss added, and the ends of its interval.

    Parameters
    ----------
    across : "MB" or "bits", as in `tabulate`.
    """
    rows = list(rows)
    names = (across, "difference", "difference_low", "difference_high")
    labels = {str(i): variant for i, variant in enumerate(wanted)}
    return [tuple(row[1:]) for row in tabulate(rows, labels, names)]  # type: ignore[misc]


def contrast(row: Mapping[str, Any], other: Mapping[str, Any], blocks: slice = WHOLE) -> Estimate:
    """The first row minus the second, bits per byte, paired; on some of the text's blocks.

    Raises
    ------
    ValueError
        for rows of SmolLM2, whose blocks are of other tokens.
    """
    if SMOLLM2 in (row["model"], other["model"]):
        raise ValueError("the rows are of smollm2; allowed: models of the laboratory's tokenizer")
    ours, theirs = (
        pairs.from_nats(r["nats"], text.HELD_OUT, r["tokens"], WINDOW).blocks for r in (row, other)
    )
    gap = (ours.losses - theirs.losses) / math.log(2)
    return ratio_estimate(gap[blocks], ours.bytes[blocks])


def ranks_by_kind(row: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The ranks that a row gives to each kind of layer, the first layer's first; "all" for full."""
    found: dict[str, list[str]] = {}
    for name, rank in zip(shapes, row["ranks"].split(), strict=True):
        kind = name.rsplit(".", 1)[-1]
        found.setdefault(kind, []).append(rank if rank != "0" else "all")
    return {kind: " ".join(ranks) for kind, ranks in found.items()}
