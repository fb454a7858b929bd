"""Run the survey's tool again and compare it with the numbers in data/survey.

    python benchmarks/survey_tool.py CHECKOUT

CHECKOUT is a checkout of LLM-Viewer at commit 472f71f. Prints how many numbers were compared and
each that differs; the exit status is 1 where any does. Figures 5, 6, 18 and 20 are arithmetic on
roofs and are left to the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from llm_viewer import analyzer

import rooflm

WEIGHTS = {"W16": 16, "W8": 8, "W4": 4, "W2": 2, "W1": 1}
FORMATS = {
    "FP16": (16, 16, 16),
    "W4": (4, 16, 16),
    "KV4": (16, 16, 4),
    "KV2": (16, 16, 2),
    "W4KV4": (4, 16, 4),
    "W4A4": (4, 4, 4),
}
LAYERS = {"norm": "attn_norm", "add": "attn_add", "o_proj": "out_proj"}


def figure_numbers(tool: Any) -> Iterator[tuple[float, dict[str, str]]]:
    """What the tool says now, beside each row of figures 7, 8, 9, 11 and 19."""

    def run(context: int, batch: int, formats: tuple[int, int, int]) -> Any:
        return tool.analyze(context, batch, *formats)

    for row in (r for figure in (7, 8, 9, 11, 19) for r in rooflm.survey_figure(figure)):
        words, quantity = row["case"].replace(",", "").split(), row["quantity"]
        if row["figure"] in ("7", "11"):
            phase, batch, context, name = words[0], int(words[2]), int(words[4]), words[5]
            held, full = (
                run(context, batch, FORMATS[x])["total_results"][phase]["memory_consumption"]
                for x in (name, "FP16")
            )
            yield (held / 1e9 if quantity == "memory" else held / full), row
        elif quantity == "smallest compute-bound batch":
            bits = (WEIGHTS[words[2]], 16, 16)
            batches = (b for b in range(1, 1000) if _bound(run(1024, b, bits), words[1]))
            yield next(batches), row
        elif row["figure"] in ("8", "9"):
            phase, n = ("decode", int(words[2])) if row["figure"] == "8" else ("prefill", 1)
            context = 1024 if phase == "decode" else int(words[2])
            found = run(context, n, (WEIGHTS[words[0]], 16, 16))["total_results"][phase]
            yield found["inference_time"] * 1e3, row
        elif quantity.startswith("largest batch"):
            held_by = {b: _decode(run(int(words[1]), b, (8, 8, 8))) for b in range(1, 128)}
            yield max(b for b, x in held_by.items() if x["memory_consumption"] < 48e9), row
        else:
            batch = int(words[3])
            found = _decode(run(int(words[1]), batch, (8, 8, 8)))
            seconds = found["inference_time"]
            memory = found["memory_consumption"] / 1e9
            yield (
                {"throughput": batch / seconds, "time": seconds * 1e3, "memory": memory}[quantity],
                row,
            )


def _decode(results: Any) -> Any:
    return results["total_results"]["decode"]


def _bound(results: Any, layer: str) -> bool:
    return results["decode"][layer]["bound"] == "compute"


def main(checkout: str) -> int:
    """Compare; returns the exit status."""
    compared = differ = 0
    for ours, row in figure_numbers(analyzer(checkout, "meta-llama/Llama-2-13b-hf")):
        digits = len(row["value"].partition(".")[2])
        compared += 1
        if abs(ours - float(row["value"])) > 0.5000001 * 10**-digits:
            differ += 1
            print(f"figure {row['figure']}, {row['case']}, {row['quantity']}: {ours}, not", row)
    print(f"figures 7, 8, 9, 11 and 19: {compared} numbers compared, {differ} differ")

    results = analyzer(checkout, "meta-llama/Llama-2-7b-hf").analyze(2048, 1)
    fields = {"OPs": "ops", "memory_access": "bytes"}
    fields |= {"arithmetic_intensity": "intensity", "performance": "performance"}
    worst = 0.0
    for row in rooflm.survey_table1():
        found = results[row["stage"]][LAYERS.get(row["layer"], row["layer"])]
        differ += found["bound"] != row["bound"]
        for theirs, stored in fields.items():
            worst = max(worst, abs(found[theirs] / float(row[stored]) - 1))
    print(f"table 1: worst relative deviation {worst:.1e}")
    return int(differ > 0 or worst > 1e-4)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/survey_tool.py CHECKOUT")
    sys.exit(main(sys.argv[1]))
