"""Distil the student in every way of the chapter, and measure what came of it.

    python -m rooflm.lab.distill
    python -m rooflm.lab.distill --part scratch --objective forward-kl --save

train the runs of `ledger.RUNS`, each with the same trainer, and write a row for each into
`data/measurements/distillation.csv`. Runs lie in a folder with their states, checkpoints and
logs; a run that is finished is not done again and a row that is there is not measured again, so
that an interrupted command goes on when it is given again.

Chapter: distillation.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import torch

from rooflm.lab import text
from rooflm.lab.bench import TOKENS, WINDOW, Bench, checkpoint_digest
from rooflm.lab.checkpoints import load_checkpoint, save_checkpoint
from rooflm.lab.command import OneLineParser, attempt, say
from rooflm.lab.distill import ledger
from rooflm.lab.distill.ledger import LEDGER, Wanted
from rooflm.lab.distill.measure import Scales
from rooflm.lab.distill.workshop import OBJECTIVES, STUDENT, Variant, Workshop
from rooflm.lab.model import Transformer
from rooflm.lab.rows import Row, read_rows
from rooflm.lab.train import CONFIGS
from rooflm.roofline.datafiles import data_path


class Measurer:
    """Trains and measures; models and texts are loaded at first use.

    Parameters
    ----------
    runs : folder of the runs.
    tokens : of *Persuasion*, measured on; prompts are taken from what follows.
    """

    def __init__(self, runs: Path, tokens: int = TOKENS, say: Callable[[str], None] = say) -> None:
        self.runs, self.tokens, self.say = runs, tokens, say

    @cached_property
    def workshop(self) -> Workshop:
        """Where runs are trained."""
        return Workshop(self.runs, say=self.say)

    @cached_property
    def scales(self) -> Scales:
        """What they are measured on."""
        rest = text.encode(text.load_text(text.HELD_OUT))[self.tokens + 1 :]
        return Scales(Bench.load(ledger.TEACHER, self.tokens), rest)

    def row(self, variant: Wanted) -> Row:
        """Train, if need be, and measure."""
        row: Row = {"teacher": checkpoint_digest(ledger.TEACHER), "training_seconds": 0.0}
        if isinstance(variant, Variant):
            folder = self.workshop.train(variant)
            row |= {"weights": checkpoint_digest(folder), "training_seconds": _seconds(folder)}
            return row | self.scales.measure(load_checkpoint(folder))
        if variant in (ledger.TEACHER, STUDENT):
            row |= {"weights": checkpoint_digest(variant)}
            return row | self.scales.measure(load_checkpoint(variant))
        row |= {"weights": ""}
        if variant == ledger.TEXT:
            return row | self.scales.measure_text()
        torch.manual_seed(0)
        return row | self.scales.measure(Transformer(CONFIGS[STUDENT]).requires_grad_(False))


def words(row: Row) -> str:
    """A row as a line of progress."""
    found = ledger.label(row)
    if row["bits_per_byte"] is not None:
        found += f": {row['bits_per_byte']:.4f} bits per byte, {row['agreement']:.1%} agreement"
        found += f", {row['acceptance']:.1%} accepted"
    return f"{found}, its text {row['teacher_nats']:.3f} nats a token"


def keep(variants: Iterable[Wanted], workshop: Workshop, say: Callable[[str], None]) -> None:
    """Write those of the runs that `data/checkpoints` keeps to their places there."""
    for variant in variants:
        if isinstance(variant, Variant) and variant in ledger.KEPT:
            source, target = workshop.train(variant), data_path("checkpoints", ledger.KEPT[variant])
            log = (source / "log.csv").read_text(encoding="utf-8")
            save_checkpoint(load_checkpoint(source), target, log)
            say(f"written to {target}")


def _seconds(folder: Path) -> float:
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    return float(list(csv.DictReader(x for x in lines if x[:1] != "#"))[-1]["seconds"])


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=LEDGER.command,
        description="Distil the student in every way of the chapter, and measure it.",
        epilog="An interrupted command goes on when it is given again.",
    )
    add = parser.add_argument
    add("--part", choices=ledger.PARTS, metavar="PART", help=", ".join(ledger.PARTS))
    add("--objective", choices=OBJECTIVES, metavar="OBJECTIVE", help=", ".join(OBJECTIVES))
    add("--runs", type=Path, default=Path("distilled"), help="folder of the runs (%(default)s)")
    add("--tokens", type=int, default=TOKENS, help="measured on (%(default)s)")
    add("--threads", type=int, default=1, help="of torch; one gives the same bits (%(default)s)")
    add("--fresh", action="store_true", help="drop the rows that the file holds; runs are kept")
    add("--save", action="store_true", help="write what data/checkpoints keeps of these runs")
    add("--list", action="store_true", help="name the runs, and do nothing")
    add("--out", type=Path, help="the ledger (data/measurements/distillation.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    if not 2 * WINDOW <= a.tokens <= 65_536:
        parser.error(f"--tokens is {a.tokens}; allowed: {2 * WINDOW} to 65536")
    if a.threads < 1:
        parser.error(f"--threads is {a.threads}; allowed: 1 or more")
    wanted, path = ledger.wanted(a.part, a.objective), a.out or LEDGER.path
    if not wanted:
        parser.error(f"--objective {a.objective} has no run of part {a.part}; --list names all")
    if a.list:
        for variant in wanted:
            print(ledger.label(ledger.names(variant)))
        return 0

    def work() -> None:
        torch.set_num_threads(a.threads)
        measurer = Measurer(a.runs, a.tokens)
        if path.exists() and not a.fresh:
            ledger.check_teacher(read_rows(path, LEDGER.columns, LEDGER.command))
        digest, tokens = checkpoint_digest(STUDENT), a.tokens // WINDOW * WINDOW
        LEDGER.fill(
            path, STUDENT, digest, tokens, wanted, ledger.names, measurer.row, words, a.fresh, say
        )
        if a.save:
            keep(wanted, measurer.workshop, say)
        print(f"the ledger is in {path}")

    return attempt(LEDGER.command, work)


if __name__ == "__main__":
    sys.exit(main())
