"""The command `python -m rooflm.lab.prune`: measure every way of pruning and write the map."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rooflm.lab import maps
from rooflm.lab.bench import SMOLLM2, TOKENS, WINDOW, checkpoint_digest
from rooflm.lab.prune.recipes import CRITERIA, METHODS
from rooflm.lab.prune.sweep import MAP, SMOLLM2_TOKENS, PruneBench
from rooflm.lab.prune.sweep import sweep as fill
from rooflm.lab.prune.variants import names_of, variants


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=MAP.command,
        description="Measure every way of pruning a model and write the map.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--model", default="teacher", help="teacher, student, smollm2 or a checkpoint's folder")
    tokens = f"of Persuasion to measure on ({TOKENS}; {SMOLLM2}: {SMOLLM2_TOKENS})"
    add("--tokens", type=int, help=tokens)
    methods = (*METHODS, *CRITERIA, "scratch")
    add("--method", choices=methods, metavar="METHOD", help=f"only: {', '.join(methods)}")
    add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
    add("--out", type=Path, help="the map (data/measurements/pruning_map.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    tokens = a.tokens or (SMOLLM2_TOKENS if a.model == SMOLLM2 else TOKENS)
    if tokens < 2 * WINDOW:
        parser.error(f"--tokens is {tokens}; allowed: {2 * WINDOW} or more")
    path, name = a.out or MAP.path, Path(a.model).name

    def work() -> None:
        digest = checkpoint_digest(a.model)
        if not a.fresh:  # before the model is read
            MAP.check(path, name, digest, tokens // WINDOW * WINDOW)
        bench = PruneBench.load(a.model, tokens)
        wanted = [
            x
            for x in variants(name)
            if a.method in (None, names_of(x, bench.model.config)["method"])
        ]
        fill(bench, wanted, path, name, digest, a.fresh, maps.say)
        print(f"the map is in {path}")

    return maps.attempt("rooflm.lab.prune", work)


if __name__ == "__main__":
    sys.exit(main())
