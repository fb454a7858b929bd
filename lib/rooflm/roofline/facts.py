"""The survey's printed numbers, to be set beside ours.

`data/survey/` holds them as text, so that a check knows how many digits were printed.
"""

from __future__ import annotations

import csv
from functools import lru_cache

from rooflm.roofline.datafiles import data_path
from rooflm.roofline.numeric import unknown


def survey_table1() -> list[dict[str, str]]:
    """The rows of the survey's Table 1 (Llama-2-7b, A6000, 2048 tokens, batch 1).

    Printed values stand under `ops_printed`, `bytes_printed`, `intensity_printed`,
    `performance_printed` and `bound_printed`; their decimals, from a re-run of the survey's
    tool, under the same names without `_printed`.
    """
    return [dict(row) for row in _rows("table1.csv")]


def survey_figure(figure: int | str) -> list[dict[str, str]]:
    """What the survey's figure of that number says: figure, case, quantity, value, unit, source."""
    rows = [dict(row) for row in _rows("figures.csv") if row["figure"] == str(figure)]
    if not rows:
        raise unknown("survey figure", figure, {row["figure"] for row in _rows("figures.csv")})
    return rows


def survey_value(figure: int | str, case: str, quantity: str) -> str:
    """One number of a figure, as text.

    >>> survey_value(8, "W16 batch 1", "time")
    '34.594'
    """
    rows = survey_figure(figure)
    for row in rows:
        if (row["case"], row["quantity"]) == (case, quantity):
            return row["value"]
    known = {f"{row['case']}: {row['quantity']}" for row in rows}
    raise unknown(f"number of figure {figure}", f"{case}: {quantity}", known)


@lru_cache(maxsize=4)
def _rows(file_name: str) -> tuple[dict[str, str], ...]:
    with data_path("survey", file_name).open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))
