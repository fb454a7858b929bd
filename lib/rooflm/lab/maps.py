"""Maps: files of measurements with a row for each variant, filled row by row and resumed.

A `MapFile` says where a map lies, what its columns are and which of them tell the variants of a
model apart. `fill` measures what the file does not hold yet and writes it after every row, so that
an interrupted run goes on when the same command is given; rows of another checkpoint or another
length of text are refused. Every command that measures, `python -m rooflm.lab.quantize.sweep`
and its like, is one of these.

Chapter: quantization methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from rooflm.lab.estimates import Estimate
from rooflm.lab.rows import Columns, Row, check_rows, read_rows, write_rows
from rooflm.roofline.datafiles import data_path

Variant = TypeVar("Variant")
HEAD: Columns = {"model": str, "checkpoint": str}
ENDS = ("", "_low", "_high")  # of an estimate's columns
# What `pairs.measured_cells` makes of a model beside the full one.
LOSS: Columns = {f"{x}{end}": float for x in ("bits_per_byte", "difference") for end in ENDS}
MATCH: Columns = {"agreement": float, "divergence": float}
TAIL: Columns = {"tokens": int, "date": str, "torch": str}


@dataclass(frozen=True)
class MapFile:
    """A file of measurements.

    Parameters
    ----------
    place : its folder in `data` and its name.
    command : what makes it, for messages.
    keys : the columns that tell the variants of one model apart.
    columns : all of them, with their types; `HEAD` and `TAIL` among them.
    """

    place: tuple[str, str]
    command: str
    keys: tuple[str, ...]
    columns: Columns

    @property
    def path(self) -> Path:
        """Where the committed file lies."""
        return data_path(*self.place)

    def load(self, name: str, digest: str, path: Path | None = None) -> list[Row]:
        """The rows of a model, numbers as numbers.

        Parameters
        ----------
        name, digest : of the model, and the start of its checkpoint's SHA-256.

        Raises
        ------
        ValueError
            in one line: the file is missing or altered, or holds no rows of this checkpoint.
        """
        path = path or self.path
        rows = [r for r in read_rows(path, self.columns, self.command) if r["model"] == name]
        if not rows:
            raise ValueError(
                f"{path.name} has no rows of {name}; {self.command} --model {name} makes them"
            )
        check_rows(path, rows, name, digest)
        return rows

    def check(self, path: Path, name: str, digest: str, tokens: int) -> None:
        """Refuse, before the work, a file whose rows are of another checkpoint or length."""
        if path.exists():
            check_rows(path, read_rows(path, self.columns, self.command), name, digest, tokens)

    def key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What tells a row from the others of its model."""
        return tuple(row[name] for name in self.keys)

    def find(
        self, rows: Iterable[Mapping[str, Any]], wanted: Mapping[str, Any], label: str
    ) -> Mapping[str, Any]:
        """The row of a variant.

        Raises
        ------
        ValueError
            where the map has none; `label` names it.
        """
        key = self.key(wanted)
        for row in rows:
            if self.key(row) == key:
                return row
        raise ValueError(f"the map has no row of {label}")

    def fill(
        self,
        path: Path,
        name: str,
        digest: str,
        tokens: int,
        wanted: Iterable[Variant],
        names: Callable[[Variant], Row],
        measure: Callable[[Variant], Row],
        words: Callable[[Row], str],
        fresh: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """Measure what the file does not hold yet; after each variant the file is whole.

        Parameters
        ----------
        path : of the map; its rows are kept.
        name, digest, tokens : of the model, and the predictions that it is measured on.
        wanted : the variants, in order; one that stands there twice is measured once.
        names, measure : a variant to its key columns, and to the other columns.
        words : a row to a line of progress.
        fresh : drop the rows that the file holds of this model, once the first new one is there.
        say : receives the lines of progress.
        """
        rows = read_rows(path, self.columns, self.command) if path.exists() else []
        if fresh:
            rows = [row for row in rows if row["model"] != name]
        check_rows(path, rows, name, digest, tokens)
        done = {self.key(row) for row in rows if row["model"] == name}
        unique = {self.key(names(v)): v for v in wanted}
        missing = [v for key, v in unique.items() if key not in done]
        begin = time.monotonic()
        for i, variant in enumerate(missing):
            row = {"model": name, "checkpoint": digest, **names(variant), **measure(variant)}
            row |= {"tokens": tokens, "date": date.today().isoformat(), "torch": torch.__version__}
            rows.append(row)
            write_rows(path, self.columns, rows)
            left = (time.monotonic() - begin) / (i + 1) * (len(missing) - i - 1)
            say(f"{i + 1}/{len(missing)}  {words(row)}; {left / 60:.0f} min left")


def spread(name: str, found: Estimate) -> dict[str, float]:
    """An estimate as three columns: its value, and the ends of its interval."""
    values = found.value, found.low, found.high
    return {f"{name}{end}": x for end, x in zip(ENDS, values, strict=True)}


def estimate(row: Mapping[str, Any], name: str) -> Estimate:
    """Three columns as the estimate that `spread` made them of."""
    return Estimate(*(row[f"{name}{end}"] for end in ENDS))
