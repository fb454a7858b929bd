"""The ledger of distillation: what was run, its rows in a file, and paired differences of rows.

Runs "from scratch" and "continued" read equal numbers of tokens within their part. What a token is
differs: of a text the loss is taken at all positions, of a sample only at those that were written,
and whoever writes its own text pays for the writing beside it; `training_seconds` shows that, on
whatever machine it was (the teacher's answers to batches that an earlier run had are not asked for
again, and its text is written once). The objectives share one learning rate in each part; it was
chosen for none of them, and those in `LOW` were also run at a lower one. The rows "reference" are
what no run changes: the teacher, the committed student, an untrained one, and the author's own
text after the prompts.

All are measured on the teacher's bench and its prompts (`measure`), so that any two rows have a
paired difference. `python -m rooflm.lab.distill` makes the file.

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rooflm.lab import maps
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.distill import measure
from rooflm.lab.distill.workshop import CONTINUED, SCRATCH, STUDENT, Variant
from rooflm.lab.estimates import Estimate, ratio_estimate
from rooflm.lab.rows import Row
from rooflm.roofline.numeric import unknown

TEACHER, UNTRAINED, TEXT = "teacher", "untrained", "text"
REFERENCES = (TEACHER, STUDENT, UNTRAINED, TEXT)
REFERENCE = "reference"  # the part that they stand in
PARTS = (REFERENCE, SCRATCH, CONTINUED)
Wanted = Variant | str  # a run, or a name of `REFERENCES`
_RUN = {
    "part": str, "objective": str, "steps": int, "tokens_per_step": int, "learning_rate": float,
    "seed": int,
}  # fmt: skip
LEDGER = maps.MapFile(
    ("measurements", "distillation.csv"),
    "python -m rooflm.lab.distill",
    tuple(_RUN),
    {
        **maps.HEAD, **_RUN, "teacher": str, "weights": str, "training_seconds": float,
        **measure.COLUMNS, **maps.TAIL,
    },
)  # fmt: skip


def scratch(objective: str, **other: Any) -> Variant:
    """A run from new weights with the settings of the comparison, but for others."""
    return replace(Variant(SCRATCH, objective, 250, 3072, 6e-3), **other)


def continued(objective: str, **other: Any) -> Variant:
    """A run from the committed student with the settings of the comparison, but for others."""
    return replace(Variant(CONTINUED, objective, 120, 3072, 1e-3), **other)


LOW_RATE = 3e-4  # a control: would another rate have put the objectives in another order?
LOW = ("next-token", "forward-kl", "own-jsd", "policy-gradient")
# In the order in which they are run: what the chapter cannot do without comes first.
RUNS = (
    scratch("next-token"),
    scratch("forward-kl"),
    continued("next-token"),
    continued("own-jsd"),
    scratch("reverse-kl"),
    scratch("teacher-text"),
    continued("forward-kl"),
    continued("policy-gradient"),
    scratch("jsd"),
    scratch("forward-kl+text"),
    scratch("matching"),
    continued("teacher-text"),
    continued("ranked"),
    continued("reverse-kl"),
    scratch("next-token", seed=1),
    scratch("forward-kl", seed=1),
    scratch("forward-kl-t2"),
    continued("ranked-randomly"),
    continued("own-reverse-kl"),
    continued("best-of-n"),
    *(continued(name, seed=1) for name in ("next-token", "own-jsd", "forward-kl")),
    *(continued(name, learning_rate=LOW_RATE) for name in LOW),
)
# The checkpoints that data/checkpoints keeps.
KEPT = {
    scratch("next-token"): "student-alone",
    scratch("forward-kl"): "student-forward-kl",
    scratch("teacher-text"): "student-teacher-text",
    continued("own-jsd"): "student-on-policy",
}


def wanted(part: str | None = None, objective: str | None = None) -> list[Wanted]:
    """What the ledger holds, of all parts and objectives or of one."""
    references = list(REFERENCES) if part in (None, REFERENCE) and objective is None else []
    chosen = (v for v in RUNS if part in (None, v.part) and objective in (None, v.objective))
    return [*references, *chosen]


def names(variant: Wanted) -> Row:
    """The key columns of a run or of a reference."""
    if isinstance(variant, Variant):
        return asdict(variant)
    if variant not in REFERENCES:
        raise unknown("reference", variant, REFERENCES)
    nothing = {name: kind() for name, kind in _RUN.items()}
    return nothing | {"part": REFERENCE, "objective": variant}


def load_ledger(path: Path | None = None) -> list[Row]:
    """The rows, numbers as numbers.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or of another student or teacher.
    """
    rows = LEDGER.load(STUDENT, checkpoint_digest(STUDENT), path)
    check_teacher(rows)
    return rows


def check_teacher(rows: Iterable[Row]) -> None:
    """Refuse, with a ValueError, rows of another teacher."""
    digest = checkpoint_digest(TEACHER)
    for row in rows:
        if row["teacher"] != digest:
            raise ValueError(
                f"the ledger holds rows of teacher {row['teacher']}, not {digest}; "
                "give --fresh to measure all anew"
            )


def find_row(rows: Iterable[Row], variant: Wanted) -> Mapping[str, Any]:
    """The row of a run, or of a name in `REFERENCES`."""
    key = names(variant)
    return LEDGER.find(rows, key, label(key))


def find_rows(rows: Iterable[Row], **columns: Any) -> list[Row]:
    """The rows in which these columns hold these values, such as part="scratch", seed=0."""
    for name in columns:
        if name not in LEDGER.columns:
            raise unknown("column", name, LEDGER.columns)
    return [row for row in rows if all(row[name] == x for name, x in columns.items())]


def writing_contrast(row: Mapping[str, Any], other: Mapping[str, Any]) -> Estimate:
    """The first row's text minus the second's, nats a token of the teacher, paired by prompts."""
    cells = [row["teacher_row_nats"], other["teacher_row_nats"]]
    ours, theirs = (
        torch.tensor([float(x) for x in cell.split()], dtype=torch.float64) for cell in cells
    )
    if len(ours) != len(theirs):
        raise ValueError(f"the rows hold {len(ours)} and {len(theirs)} texts; allowed: as many")
    return ratio_estimate(ours - theirs, torch.full_like(ours, measure.NEW))


def label(row: Mapping[str, Any]) -> str:
    """A row in words, such as "scratch forward-kl 250 steps 0.006 seed 0"."""
    if row["part"] == REFERENCE:
        return str(row["objective"])
    run = f"{row['steps']} steps {row['learning_rate']:g} seed {row['seed']}"
    return f"{row['part']} {row['objective']} {run}"
