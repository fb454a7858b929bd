"""Reading the map that `sweep` measures: rows for tables, points for figures, paired differences.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rooflm.lab.estimates import Estimate
from rooflm.lab.maps import estimate
from rooflm.lab.prune.sweep import contrast, find_row
from rooflm.lab.prune.variants import Variant
from rooflm.lab.rows import Row


def words(found: Estimate) -> str:
    """An estimate with half the width of its interval.

    >>> words(Estimate(0.0042, 0.0023, 0.0061))
    '+0.0042 ± 0.0019'
    """
    return f"{found.value:+.4f} ± {(found.high - found.low) / 2:.4f}"


def tabulate(
    rows: Iterable[Row], variants: Mapping[str, Variant], columns: Iterable[str]
) -> list[tuple[Any, ...]]:
    """Rows for a table: the name of each variant and what the map says of it.

    Parameters
    ----------
    variants : by what they are called in the table.
    columns : names of the map's; "loss" for the difference with its interval, "MB" for the bytes
        of a decoded token, "bits" per linear weight of the full model, "agreement" as a percentage.
    """
    rows, columns = list(rows), list(columns)
    weights = rows[0]["linear_bits"] / 16  # of the full model, which stands first

    def cell(row: Row, name: str) -> Any:
        if name == "loss":
            return words(estimate(row, "difference")) if row["difference"] else "–"
        if name == "MB":
            return f"{row['decode_bytes'] / 1e6:.2f}"
        if name == "bits":
            return f"{row['linear_bits'] / weights:.2f}"
        return f"{row['agreement']:.0%}" if name == "agreement" else row[name]

    found = {name: find_row(rows, variant) for name, variant in variants.items()}
    return [(name, *(cell(row, column) for column in columns)) for name, row in found.items()]


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


def points(
    rows: Iterable[Row], variants: Iterable[Variant], x: str = "sparsity"
) -> list[tuple[float, float, float, float]]:
    """Places of variants in a figure: (x, loss added, and the ends of its interval).

    Parameters
    ----------
    x : "sparsity" in per cent, or "MB" of a decoded token.
    """
    rows = list(rows)
    found = [find_row(rows, variant) for variant in variants]
    across = {
        "sparsity": lambda row: 100 * row["sparsity"],
        "MB": lambda row: row["decode_bytes"] / 1e6,
    }[x]
    return [
        (across(row), *(row[f"difference{end}"] for end in ("", "_low", "_high"))) for row in found
    ]


def beside(rows: Iterable[Row], one: Variant, other: Variant) -> str:
    """The first variant less the second, paired, with the verdict: "-0.0123 ± 0.0030, better"."""
    rows = list(rows)
    found = contrast(find_row(rows, one), find_row(rows, other))
    return f"{words(found.difference)}, {found.verdict}"
