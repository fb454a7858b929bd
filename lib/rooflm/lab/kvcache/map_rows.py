"""Reading the map that `sweep` measures: rows for the chapters' tables.

Chapter: quantizing the cache; throwing the cache away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rooflm.lab.kvcache.sweep import BLOCK, find_row
from rooflm.lab.map_tables import loss_words
from rooflm.lab.maps import estimate
from rooflm.roofline.numeric import unknown

Keys = Mapping[str, tuple[Any, ...]]
COLUMNS = ("MB", "bits", "loss", "divergence", "agreement", "answered", "retrieved", "ln p")


def tabulate(
    rows: Iterable[Mapping[str, Any]], keys: Keys, columns: Iterable[str]
) -> list[tuple[Any, ...]]:
    """Rows for a table: what each cache is called, and what the map says of it.

    Parameters
    ----------
    rows : of one model.
    keys : method, budget and weights of each row, as of `sweep.find_row`, by what they are called.
    columns : of `COLUMNS`. "MB" for a block of 512 tokens, in 10^6 bytes; "bits" stored for a
        number of keys and values at the end of a block; "loss" in bits per byte and "ln p" in nats,
        each with half the width of its interval.
    """
    rows, columns = list(rows), list(columns)
    for column in columns:
        if column not in COLUMNS:
            raise unknown("column", column, COLUMNS)
    found = {name: find_row(rows, *key) for name, key in keys.items()}
    return [(name, *(_cell(row, c, rows) for c in columns)) for name, row in found.items()]


def at_budgets(
    rows: Iterable[Mapping[str, Any]], methods: Mapping[str, str], budgets: Sequence[int]
) -> list[tuple[str, ...]]:
    """Rows for a table: the loss that each method adds at each budget.

    Parameters
    ----------
    methods : {what it is called in the table: its name in the map}.
    """
    rows = list(rows)
    return [
        (name, *(loss_words(find_row(rows, method, b)) for b in budgets))
        for name, method in methods.items()
    ]


def stored_bits(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> float:
    """Bits stored for a number of keys and values at the end of a block: FP32's are 32."""
    return 32 * row["bytes_per_token"] / find_row(rows)["bytes_per_token"]


def _cell(row: Mapping[str, Any], column: str, rows: Iterable[Mapping[str, Any]]) -> Any:
    match column:
        case "MB":
            return row["bytes_per_token"] * BLOCK / 1e6
        case "bits":
            return stored_bits(row, rows)
        case "loss":
            return "–" if row["method"] == "full" and row["weights"] == "fp32" else loss_words(row)
        case "answered":
            return f"{row['answered'].count('1')} of {row['cases']}"
        case "retrieved":
            share = estimate(row, "exact")
            return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
        case "ln p":
            found = estimate(row, "log_probability")
            return f"{found.value:.1f} ± {found.half:.1f}"
    return row[column]
