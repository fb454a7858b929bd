"""Reading the map that `sweep` measures: rows for tables, points for figures, paired differences.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rooflm.lab import map_tables
from rooflm.lab.map_tables import Place
from rooflm.lab.prune.sweep import find_row
from rooflm.lab.prune.variants import Variant
from rooflm.lab.rows import Row


def tabulate(
    rows: Iterable[Row], variants: Mapping[str, Variant], columns: Iterable[str]
) -> list[tuple[Any, ...]]:
    """Rows for a table: the name of each variant and what the map says of it.

    Parameters
    ----------
    variants : by what they are called in the table.
    columns : as of `map_tables.tabulate`.
    """
    rows = list(rows)
    found = {name: find_row(rows, variant) for name, variant in variants.items()}
    return map_tables.tabulate(found, columns, find_row(rows, None))


def losses(
    rows: Iterable[Row],
    variants: Mapping[str, Iterable[Variant]],
    less: Iterable[tuple[int, int]] = (),
) -> list[tuple[str, ...]]:
    """Rows for a table: a name, and the loss of each of its variants; the full model is a dash.

    Parameters
    ----------
    less : for each (i, j) one more column, of the i-th variant less the j-th, paired, with the
        verdict; a dash where one of them is the full model.
    """
    rows, less, found = list(rows), list(less), []
    for name, wanted in variants.items():
        own = list(wanted)
        cells = [row[1] for row in tabulate(rows, {str(i): x for i, x in enumerate(own)}, ["loss"])]
        pairs = [(own[i], own[j]) for i, j in less]
        apart = ["–" if None in pair else beside(rows, *pair) for pair in pairs]
        found.append((name, *cells, *apart))
    return found


def points(rows: Iterable[Row], variants: Iterable[Variant], x: str = "sparsity") -> list[Place]:
    """Places of variants in a figure: (x, loss added, and the ends of its interval).

    Parameters
    ----------
    x : "sparsity" in per cent, or "MB" of a decoded token.
    """
    rows = list(rows)
    across = {
        "sparsity": lambda row: 100 * row["sparsity"],
        "MB": lambda row: row["decode_bytes"] / 1e6,
    }[x]
    return map_tables.places((find_row(rows, variant) for variant in variants), across)


def beside(rows: Iterable[Row], one: Variant, other: Variant) -> str:
    """The first variant less the second, paired, with the verdict: "-0.0123 ± 0.0030, better"."""
    rows = list(rows)
    return map_tables.beside(find_row(rows, one), find_row(rows, other))
