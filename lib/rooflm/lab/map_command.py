"""The command that fills a map: its arguments, its checks, and what it prints.

A `MapCommand` measures the variants of one or more models into a `MapFile`; what it measures is a
function of the `Job` that was asked for.

Chapter: quantization methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.command import OneLineParser, attempt, say
from rooflm.lab.maps import MapFile, Variant
from rooflm.lab.rows import Row


@dataclass(frozen=True)
class Job:
    """What a map's command was asked for, of one model.

    Parameters
    ----------
    model, name, digest : as given, its last part, and the start of its checkpoint's SHA-256.
    tokens : predictions to measure on.
    path : of the map.
    given : all arguments.
    """

    model: str
    name: str
    digest: str
    tokens: int
    path: Path
    given: argparse.Namespace

    def fill(
        self,
        file: MapFile,
        tokens: int,
        wanted: Iterable[Variant],
        names: Callable[[Variant], Row],
        measure: Callable[[Variant], Row],
        words: Callable[[Row], str],
    ) -> None:
        """Measure what the job's file does not hold yet; arguments as of `MapFile.fill`."""
        file.fill(
            self.path, self.name, self.digest, tokens, wanted, names, measure, words,
            self.given.fresh, say,
        )  # fmt: skip

    def wants(self, method: str) -> bool:
        """Whether variants of a method were asked for."""
        return self.given.method in (None, method)


@dataclass(frozen=True)
class MapCommand:
    """The command that fills a map.

    Parameters
    ----------
    file : the map.
    about : what the command does, for --help.
    tokens : predictions of *Persuasion* that each model is measured on unless told otherwise; the
        models that are measured unless one is named. Others are measured on as many as the first.
    block : predictions in a block.
    methods : that --method allows.
    measure : fills the map with what a job asks for.
    """

    file: MapFile
    about: str
    tokens: Mapping[str, int]
    block: int
    methods: Iterable[str]
    measure: Callable[[Job], None]

    def parser(self) -> OneLineParser:
        """The arguments that all such commands have."""
        parser = OneLineParser(
            prog=self.file.command,
            description=self.about,
            epilog="An interrupted run goes on when the same command is given.",
        )
        add, methods = parser.add_argument, tuple(dict.fromkeys(self.methods))
        models = " and ".join(self.tokens)
        add("--model", help=f"teacher, student, smollm2 or a checkpoint's folder; else {models}")
        tokens = ", ".join(f"{name}: {count}" for name, count in self.tokens.items())
        add("--tokens", type=int, help=f"of Persuasion to measure on ({tokens})")
        add(
            "--method",
            choices=methods,
            metavar="METHOD",
            help=f"only the variants of one: {', '.join(methods)}",
        )
        add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
        add("--out", type=Path, help=f"the map (data/{'/'.join(self.file.place)})")
        return parser

    def run(self, parser: OneLineParser, a: argparse.Namespace) -> int:
        """Measure what was asked for; the exit status."""
        if a.tokens is not None and a.tokens < 2 * self.block:
            parser.error(f"--tokens is {a.tokens}; allowed: {2 * self.block} or more")
        path = a.out or self.file.path

        def work() -> None:
            for model in (a.model,) if a.model else self.tokens:
                name, digest = Path(model).name, checkpoint_digest(model)
                tokens = a.tokens or self.tokens.get(model, next(iter(self.tokens.values())))
                if not a.fresh:  # before a model is read
                    self.file.check(path, name, digest, tokens // self.block * self.block)
                self.measure(Job(model, name, digest, tokens, path, a))
            print(f"the map is in {path}")

        return attempt(self.file.command, work)

    def main(self, given: list[str] | None = None) -> int:
        """The command without arguments of its own."""
        parser = self.parser()
        return self.run(parser, parser.parse_args(given))
