"""Reading the map that `sweep` measures: rows for tables, a method beside its control, the winners.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from rooflm.lab import map_tables
from rooflm.lab.map_tables import loss_words, lowest
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.quantize.sweep import FULL, find_row, label


def tabulate(
    rows: Iterable[Mapping[str, Any]], recipes: Mapping[str, Recipe | None], columns: Iterable[str]
) -> list[tuple[Any, ...]]:
    """Rows for a table: the name of each recipe and what the map says of it.

    Parameters
    ----------
    recipes : by what they are called in the table.
    columns : as of `map_tables.tabulate`.
    """
    rows = list(rows)
    found = {name: find_row(rows, recipe) for name, recipe in recipes.items()}
    return map_tables.tabulate(found, columns)


def at_widths(
    rows: Iterable[Mapping[str, Any]],
    recipes: Mapping[str, Recipe],
    places: Iterable[tuple[int, int]],
) -> list[tuple[str, ...]]:
    """Rows for a table: the loss of each recipe at each pair of bits and group."""
    rows, places = list(rows), list(places)
    return [
        (name, *(loss_words(find_row(rows, replace(r, bits=b, group=g))) for b, g in places))
        for name, r in recipes.items()
    ]


def beside_control(rows: Iterable[Mapping[str, Any]], recipe: Recipe) -> tuple[Any, ...]:
    """A method beside its control, for a table.

    Returns
    -------
    tuple
        its label, stored bits, both losses in words, whether the method's interval ends below
        where the control's begins ("yes" or "no"), and by how much its divergence is less.
    """
    rows = list(rows)
    ours, control = (find_row(rows, replace(recipe, control=c)) for c in (False, True))
    apart = "yes" if ours["difference_high"] < control["difference_low"] else "no"
    less = f"{1 - ours['divergence'] / control['divergence']:.0%}"
    losses = loss_words(ours), loss_words(control)
    return (label(recipe), ours["bits_per_weight"], *losses, apart, less)


def weights_only(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of quantized weights: no rounded activations, no controls, not the full model."""
    return [
        row
        for row in rows
        if row["method"] not in (FULL, "llm-int8")
        and not {"control"} & set(row["options"].split())
        and "activations=" not in row["options"]
    ]


def frontier(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """From few bits to many, the rows whose loss is below that of every row with as few bits."""
    return lowest(rows, lambda row: row["bits_per_weight"], lambda row: row["difference"])


def winners(rows: Iterable[Mapping[str, Any]], most_bits: float) -> list[Mapping[str, Any]]:
    """The row of least loss within a number of bits, and those that it can't be told from.

    Returns
    -------
    list
        by loss; after the first, every row whose interval overlaps the first one's. That is more
        than a paired test would leave: two intervals can overlap where their difference is sure.
    """
    within = sorted(
        (row for row in rows if row["bits_per_weight"] <= most_bits),
        key=lambda row: row["difference"],
    )
    if not within:
        raise ValueError(f"no row has {most_bits} bits or fewer")
    return [row for row in within if row["difference_low"] <= within[0]["difference_high"]]
