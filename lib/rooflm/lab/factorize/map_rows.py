"""Rows of the map of factorizations, taken apart for the chapter's tables and figures.

Chapter: factorization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rooflm.lab import pairs, text
from rooflm.lab.bench import SMOLLM2, WINDOW
from rooflm.lab.estimates import Estimate, ratio_estimate
from rooflm.lab.factorize.sweep import find_row, more_correct
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
        found = [find_row(rows, v if share is None else replace(v, share=share)) for v in two]
        return words(contrast(*found))

    return [(f"{a} less {b}", *(cell((a, b), s) for s in columns)) for a, b in pairs]


def beside(rows: Iterable[Row], ours: Variant, theirs: Variant) -> tuple[float, float, str]:
    """Two variants: bits of a linear weight of each, and the paired difference of their losses."""
    rows = list(rows)
    pair = find_row(rows, ours), find_row(rows, theirs)
    whole = find_row(rows, Variant())["linear_bits"] / 16
    first, second = (row["linear_bits"] / whole for row in pair)
    return first, second, words(contrast(*pair))


def words(found: Estimate, digits: int = 4) -> str:
    """An estimate with half its interval, such as "+0.0057 ± 0.0028"."""
    return f"{found.value:+.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"


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
                contrast(row, full, first),
                contrast(row, full, second),
                more_correct(row, full, second),
            )
        )
    return sorted(found, key=lambda trial: trial.chosen.value)
