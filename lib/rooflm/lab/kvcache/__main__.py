"""The command `python -m rooflm.lab.kvcache`: measure every KV cache and write the map.

Chapter: throwing the cache away; quantizing the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rooflm.lab import maps
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.kvcache import sweep as measured
from rooflm.lab.kvcache.sweep import BLOCK, CASES, MAP, METHODS, MODELS, TOKENS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=MAP.command,
        description="Measure every KV cache, by perplexity and by retrieval, and write the map.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--model", help="teacher, student, smollm2 or a checkpoint's folder (teacher and smollm2)")
    tokens = ", ".join(f"{name}: {count}" for name, count in TOKENS.items())
    add("--tokens", type=int, help=f"of Persuasion to measure on ({tokens})")
    add("--cases", type=int, help=f"of retrieval at each depth (smollm2: {CASES}, others: 0)")
    add("--method", choices=METHODS, metavar="METHOD", help="only variants of this method")
    add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
    add("--out", type=Path, help="the map (data/measurements/kv_cache_map.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    if a.tokens is not None and a.tokens < 2 * BLOCK:
        parser.error(f"--tokens is {a.tokens}; allowed: {2 * BLOCK} or more")
    if a.cases is not None and (a.cases < 0 or a.cases == 1):
        parser.error(f"--cases is {a.cases}; allowed: 0 for none, or 2 or more")
    path = a.out or MAP.path

    def work() -> None:
        for model in (a.model,) if a.model else MODELS:
            _measure(a, model, path)
        print(f"the map is in {path}")

    return maps.attempt("rooflm.lab.kvcache", work)


def _measure(a: argparse.Namespace, model: str, path: Path) -> None:
    name, digest = Path(model).name, checkpoint_digest(model)
    tokens = a.tokens or TOKENS.get(model, TOKENS[MODELS[0]])
    if not a.fresh:  # before the models are read
        MAP.check(path, name, digest, tokens // BLOCK * BLOCK)
    wanted = [x for x in measured.variants(name) if a.method in (None, x.method)]
    bench = measured.make_bench(model, tokens, a.cases)
    measured.sweep(bench, wanted, path, name, digest, a.fresh, maps.say)


if __name__ == "__main__":
    sys.exit(main())
