"""The command `python -m rooflm.lab.factorize`: measure every factorization and write the map.

Chapter: factorization.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rooflm.lab import maps
from rooflm.lab.bench import SMOLLM2, TOKENS, WINDOW, checkpoint_digest
from rooflm.lab.factorize.bench import FactorizeBench
from rooflm.lab.factorize.sweep import MAP, MODELS, SMOLLM2_TOKENS, default_tokens, sweep
from rooflm.lab.factorize.variants import METHODS, variants


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=MAP.command,
        description="Measure every factorization of a model and write the map.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--model", help="teacher, student, smollm2 or a checkpoint's folder (teacher and smollm2)")
    tokens = f"of Persuasion to measure on ({TOKENS}; {SMOLLM2}: {SMOLLM2_TOKENS})"
    add("--tokens", type=int, help=tokens)
    add("--method", choices=METHODS, metavar="METHOD", help="only variants of this method")
    add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
    add("--out", type=Path, help="the map (data/measurements/factorization_map.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    if a.tokens is not None and a.tokens < 2 * WINDOW:
        parser.error(f"--tokens is {a.tokens}; allowed: {2 * WINDOW} or more")
    path = a.out or MAP.path

    def work() -> None:
        for model in (a.model,) if a.model else MODELS:
            _measure(a, model, path)
        print(f"the map is in {path}")

    return maps.attempt("rooflm.lab.factorize", work)


def _measure(a: argparse.Namespace, model: str, path: Path) -> None:
    name, digest = Path(model).name, checkpoint_digest(model)
    tokens = a.tokens or default_tokens(model)
    if not a.fresh:  # before the model is read
        MAP.check(path, name, digest, tokens // WINDOW * WINDOW)
    bench = FactorizeBench.load(model, tokens)
    wanted = [v for v in variants(name, bench.model.config) if a.method in (None, v.method)]
    sweep(bench, wanted, path, name, digest, a.fresh, maps.say)


if __name__ == "__main__":
    sys.exit(main())
