"""Tables that read the same on a page, in a terminal and to a screen reader."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rooflm.roofline.analysis import Report, Row
from rooflm.show.words import number, plain, report_words, si

# What `operators` can show: {name: (heading, unit or None)}.
OPERATOR_COLUMNS = {
    "block": ("block", None),
    "name": ("operator", None),
    "count": ("layers", ""),
    "flops": ("work", "FLOP"),
    "bytes": ("bytes", "B"),
    "weight_bytes": ("weights", "B"),
    "activation_bytes": ("activations", "B"),
    "kv_bytes": ("KV cache", "B"),
    "intensity": ("FLOP/B", ""),
    "attainable": ("attainable", "FLOP/s"),
    "seconds": ("time of one layer", "s"),
    "total_seconds": ("time", "s"),
    "bound": ("bound", None),
    "rate": ("roof", None),
}
_PERCENT = re.compile(r"[+−-]?\d[\d,]*(\.\d+)? ?%")
# A number and its unit, such as "13.8 GB" or "1.72 ×"; the unit may be escaped.
_QUANTITY = re.compile(r"[+−-]?\d[\d,.]* [^\s\d()]{1,8}")
_USUAL = ("name", "count", "flops", "bytes", "intensity", "attainable", "total_seconds", "bound")


@dataclass(frozen=True)
class Table:
    """Rows of text that show themselves as an HTML table and as aligned text.

    Attributes
    ----------
    columns : headings.
    rows : cells as text, each with the number of columns.
    right : for each column, whether it stands to the right.
    caption : one line over the table, or None.
    kind : a class for the style sheet, such as "checks", or nothing.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]
    caption: str | None = None
    kind: str = ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": str(self)}

    def __repr__(self) -> str:
        return str(self)

    @property
    def html(self) -> str:
        """The table in a box that scrolls by itself, with the keyboard too."""
        label = html.escape(self.caption or "Table: " + ", ".join(self.columns), quote=True)
        # A region is a landmark, whose name must be its own; only a caption is that.
        role = "region" if self.caption else "group"
        kind = f" {self.kind}" if self.kind else ""
        # The span can stay in view while the table below it scrolls.
        words = html.escape(self.caption or "")
        caption = f"<caption><span>{words}</span></caption>" if words else ""
        head = "".join(
            f'<th scope="col"{_class(right)}>{html.escape(name)}</th>'
            for name, right in zip(self.columns, self.right, strict=True)
        )
        body = "\n".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        return (
            f'<div class="table-scroll" tabindex="0" role="{role}" aria-label="{label}" '
            f'style="overflow-x: auto">\n<table class="rooflm-table{kind}">{caption}\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )

    def _cells(self, row: tuple[str, ...]) -> str:
        first = f'<th scope="row"{_class(self.right[0])}>{html.escape(row[0])}</th>'
        rest = "".join(
            f"<td{_class(right)}>{_unbroken(html.escape(cell))}</td>"
            for cell, right in zip(row[1:], self.right[1:], strict=True)
        )
        return first + rest

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        texts = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.right, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([*([self.caption] if self.caption else []), texts[0], rule, *texts[1:]])


def _unbroken(cell: str) -> str:
    """A cell in which no line ends before a number's unit, or begins with a plus-minus sign."""
    if _QUANTITY.fullmatch(cell):
        return cell.replace(" ", "&nbsp;")
    return cell.replace(" ± ", "&nbsp;± ")


def table(
    rows: Any,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    caption: str | None = None,
    digits: int = 4,
) -> Table:
    """A table.

    Parameters
    ----------
    rows : dicts, tuples, or a pandas DataFrame (its index is shown unless it only counts).
    columns : for dicts and DataFrames the keys to show, in order, or {key: heading};
        for tuples the headings.
    caption : what the table holds.
    digits : significant digits of numbers that are not whole; None becomes a dash.

    Raises
    ------
    ValueError
        for no columns, a key that no row has, or rows of another length than the columns.
    """
    keys, headings, cells = _cells_of(rows, columns)
    if not headings:
        raise ValueError("the table has no columns; allowed: at least one")
    for row in cells:
        if len(row) != len(headings):
            raise ValueError(f"a row has {len(row)} cells; allowed: {len(headings)}, as columns")
    numeric = tuple(_is_numeric([plain(row[i]) for row in cells]) for i in range(len(keys)))
    texts = tuple(tuple(_text(cell, digits) for cell in row) for row in cells)
    return Table(tuple(headings), texts, numeric, caption)


def operators(report: Report, columns: Sequence[str] | None = None) -> Table:
    """The operators of a forward pass, with SI units.

    Parameters
    ----------
    report : of one pass, not of a sweep.
    columns : names from `OPERATOR_COLUMNS`; the fields of a row, and "total_seconds", the time
        of all layers. Work and bytes are those of one layer.
    """
    names = tuple(columns or _USUAL)
    unknown = [name for name in names if name not in OPERATOR_COLUMNS]
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; allowed: {', '.join(OPERATOR_COLUMNS)}")
    headings = tuple(OPERATOR_COLUMNS[name][0] for name in names)
    right = tuple(OPERATOR_COLUMNS[name][1] is not None for name in names)
    rows = tuple(tuple(_operator_cell(row, name) for name in names) for row in report.operators)
    of_all = ", time of all" if "total_seconds" in names else ""
    caption = f"{report_words(report)}; work and bytes of one layer{of_all}"
    return Table(headings, rows, right, caption)


def _operator_cell(row: Row, name: str) -> str:
    unit = OPERATOR_COLUMNS[name][1]
    value = plain(row.count * row.seconds if name == "total_seconds" else getattr(row, name))
    if getattr(value, "ndim", 0):
        raise ValueError(f"{name} of {row.name} is a sweep; allowed: one number")
    if unit is None or unit == "":
        return number(value) if unit == "" else str(value)
    return si(value, unit)


def _cells_of(rows: Any, columns: Any) -> tuple[list[Any], list[str], list[tuple[Any, ...]]]:
    """Keys, headings and cells of whatever holds a table."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        counts = rows.index.name is None and type(rows.index).__name__ == "RangeIndex"
        rows = (rows if counts else rows.reset_index()).to_dict("records")
        rows = [{key: _gap(cell) for key, cell in row.items()} for row in rows]
    rows = [row._asdict() if hasattr(row, "_asdict") else row for row in rows]
    if rows and isinstance(rows[0], Mapping):
        if columns is None:
            columns = list(dict.fromkeys(key for row in rows for key in row))
        keys = list(columns)
        for key in keys:
            if not any(key in row for row in rows):
                raise ValueError(f"no row has {key!r}; they have: {', '.join(map(str, rows[0]))}")
        headings = [str(columns[key] if isinstance(columns, Mapping) else key) for key in keys]
        return keys, headings, [tuple(row.get(key) for key in keys) for row in rows]
    if columns is None:
        raise ValueError("rows are tuples; allowed: together with columns=[headings]")
    keys = list(columns)
    return keys, [str(key) for key in keys], [tuple(row) for row in rows]


def _gap(cell: Any) -> Any:
    """None for a frame's empty cell, which pandas holds as NaN."""
    return None if isinstance(cell, float) and cell != cell else cell


def _text(cell: Any, digits: int) -> str:
    return " ".join(number(cell, digits).split())


def _is_numeric(cells: list[Any]) -> bool:
    """Whether a column stands to the right: numbers or percentages, and nothing else but gaps."""
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(
        _PERCENT.fullmatch(cell)
        if isinstance(cell, str)
        else isinstance(cell, (int, float)) and not isinstance(cell, bool)
        for cell in known
    )


def _class(right: bool) -> str:
    return ' class="number"' if right else ""
