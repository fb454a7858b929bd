"""The command `python -m rooflm.lab.prune`: measure every way of pruning and write the map.

Chapter: pruning.
"""

from __future__ import annotations

import sys

from rooflm.lab.bench import MAP_TOKENS, WINDOW
from rooflm.lab.map_command import Job, MapCommand
from rooflm.lab.prune.recipes import CRITERIA, METHODS
from rooflm.lab.prune.sweep import MAP, PruneBench, sweep
from rooflm.lab.prune.variants import names_of, variants


def _measure(job: Job) -> None:
    bench = PruneBench.load(job.model, job.tokens)
    config = bench.model.config
    wanted = [x for x in variants(job.name) if job.wants(names_of(x, config)["method"])]
    sweep(bench, wanted, job)


COMMAND = MapCommand(
    MAP,
    "Measure every way of pruning a model and write the map.",
    MAP_TOKENS,
    WINDOW,
    (*METHODS, *CRITERIA, "scratch"),
    _measure,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
