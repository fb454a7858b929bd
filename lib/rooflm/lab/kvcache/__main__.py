"""The command `python -m rooflm.lab.kvcache`: measure every KV cache and write the map.

Chapter: throwing the cache away; quantizing the cache.
"""

from __future__ import annotations

import sys

from rooflm.lab.kvcache import sweep as measured
from rooflm.lab.kvcache.sweep import BLOCK, CASES, MAP, METHODS, TOKENS
from rooflm.lab.map_command import Job, MapCommand


def _measure(job: Job) -> None:
    wanted = [x for x in measured.variants(job.name) if job.wants(x.method)]
    bench = measured.make_bench(job.model, job.tokens, job.given.cases)
    measured.sweep(bench, wanted, job)


COMMAND = MapCommand(
    MAP,
    "Measure every KV cache, by perplexity and by retrieval, and write the map.",
    TOKENS,
    BLOCK,
    METHODS,
    _measure,
)


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = COMMAND.parser()
    cases = f"of retrieval at each depth (smollm2: {CASES}, others: 0)"
    parser.add_argument("--cases", type=int, help=cases)
    a = parser.parse_args(given)
    if a.cases is not None and (a.cases < 0 or a.cases == 1):
        parser.error(f"--cases is {a.cases}; allowed: 0 for none, or 2 or more")
    return COMMAND.run(parser, a)


if __name__ == "__main__":
    sys.exit(main())
