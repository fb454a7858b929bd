"""Measurements as rows of a CSV file that is whole at every moment.

A column has a type: str, int or float; an empty cell of a number is None. What is read is
checked; what is written goes to a temporary file first.

Chapter: quantization methods.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rooflm.lab.stored import write_whole

Columns = Mapping[str, type]
Row = dict[str, Any]


def read_rows(path: Path, columns: Columns, command: str) -> list[Row]:
    """The rows of a file, numbers as numbers.

    Parameters
    ----------
    columns : the file's, in order, with their types.
    command : what makes the file, for the message where it is missing.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered.
    """
    try:
        content = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(content), strict=True)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError("its columns are not those of this version")
        return [_typed(row, columns) for row in reader]
    except OSError as error:
        raise ValueError(f"cannot read {path.name}: {error.strerror}; {command} makes it") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path.name} is altered: {error}; restore or delete it") from None


def write_rows(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    """Write all rows, or leave the file as it was; numbers get seven digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = ("" if row[name] is None else row[name] for name in columns)
        writer.writerow([f"{x:.7g}" if isinstance(x, float) else x for x in cells])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, out.getvalue().encode("utf-8"))


def check_rows(
    path: Path, rows: Iterable[Row], name: str, digest: str, tokens: int | None = None
) -> None:
    """Refuse, with a ValueError, rows of another checkpoint or measured on other tokens."""
    for row in (row for row in rows if row["model"] == name):
        if row["checkpoint"] != digest:
            raise ValueError(
                f"{path.name} holds rows of checkpoint {row['checkpoint']}, not {digest}; "
                "give --fresh to measure all anew"
            )
        if tokens not in (None, row["tokens"]):
            raise ValueError(
                f"{path.name} holds rows measured on {row['tokens']} tokens, not {tokens}; "
                "give --fresh to measure all anew"
            )


def _typed(row: Mapping[str, Any], columns: Columns) -> Row:
    if None in row or None in row.values():
        raise ValueError("a row has too many cells or too few")
    return {
        name: row[name] if kind is str else kind(row[name]) if row[name] else None
        for name, kind in columns.items()
    }
