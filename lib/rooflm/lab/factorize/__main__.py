"""The command `python -m rooflm.lab.factorize`: measure every factorization and write the map.

Chapter: factorization.
"""

from __future__ import annotations

import sys

from rooflm.lab.bench import MAP_TOKENS, WINDOW
from rooflm.lab.factorize.bench import FactorizeBench
from rooflm.lab.factorize.sweep import MAP, sweep
from rooflm.lab.factorize.variants import METHODS, variants
from rooflm.lab.map_command import Job, MapCommand


def _measure(job: Job) -> None:
    bench = FactorizeBench.load(job.model, job.tokens)
    wanted = [v for v in variants(job.name, bench.model.config) if job.wants(v.method)]
    sweep(bench, wanted, job)


COMMAND = MapCommand(
    MAP,
    "Measure every factorization of a model and write the map.",
    MAP_TOKENS,
    WINDOW,
    METHODS,
    _measure,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
