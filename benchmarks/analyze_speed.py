"""How fast the theory answers: passes one at a time, and configurations by broadcasting.

    python benchmarks/analyze_speed.py [--seconds 3] [--llm-viewer CHECKOUT]

Every call has other arguments, nothing is memoized between calls, and every field of every row
is evaluated. With the path of a checkout of LLM-Viewer (github.com/hahnyuan/LLM-Viewer), that
tool runs the same pairs in turns with ours, so that the ratio means something on a noisy
machine; it reports fewer rows and fields.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from llm_viewer import analyzer

import rooflm
from rooflm import ForwardPass, Precision, analyze

MODEL, DEVICE = "meta-llama/Llama-2-7b-hf", "nvidia-a6000"
PAIRS_AT_ONCE = 500
SWEEP = 16_384  # configurations evaluated together; their arrays stay in the cache


def one_at_a_time(attention: str) -> Callable[[int], None]:
    model, device, p = rooflm.load_model(MODEL), rooflm.load_hardware(DEVICE), Precision()

    def pair(i: int) -> None:
        analyze(model, device, ForwardPass.prefill(1 + i % 64, 1 + i), p, attention)
        analyze(model, device, ForwardPass.decode(1 + i % 64, 1 + i), p, attention)

    return pair


def llm_viewer(checkout: str, attention: str) -> Callable[[int], None]:
    their = analyzer(checkout, MODEL)

    def pair(i: int) -> None:
        their.analyze(1 + i, 1 + i % 64, use_flashattention=attention == "flash")

    return pair


def rates(functions: dict[str, Callable[[int], None]], seconds: float) -> dict[str, list[float]]:
    """Calls per second of each function, in turns of `PAIRS_AT_ONCE` calls."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds * len(functions):
        for name, function in functions.items():
            began = time.perf_counter()
            for j in range(i, i + PAIRS_AT_ONCE):
                function(j % 100_000)
            found[name].append(PAIRS_AT_ONCE / (time.perf_counter() - began))
        i += PAIRS_AT_ONCE
    return found


def broadcast_rates(seconds: float) -> list[float]:
    model, device, p = rooflm.load_model(MODEL), rooflm.load_hardware(DEVICE), Precision()
    batch = np.arange(SWEEP) % 256 + 1
    found = []
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        context = (np.arange(SWEEP) + i) % 8192 + 1
        began = time.perf_counter()
        report = analyze(model, device, ForwardPass.decode(batch, context), p)
        found.append(SWEEP / (time.perf_counter() - began))
        assert report.seconds.shape == (SWEEP,)
        i += 1
    return found


def show(name: str, values: list[float], unit: str, aim: float) -> None:
    median, best = statistics.median(values), max(values)
    print(f"{name:42} median {median:12,.0f}  best {best:12,.0f} {unit}  (aim {aim:,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--llm-viewer", metavar="CHECKOUT", help="run it beside ours")
    options = parser.parse_args()
    print(f"{MODEL} on {DEVICE}, Python {sys.version.split()[0]}, NumPy {np.__version__}")
    for attention in ("flash", "unfused"):
        functions = {f"rooflm, {attention}": one_at_a_time(attention)}
        if options.llm_viewer:
            functions[f"LLM-Viewer, {attention}"] = llm_viewer(options.llm_viewer, attention)
        found = rates(functions, options.seconds)
        for name, values in found.items():
            show(name, values, "pairs/s", 10_000)
        if options.llm_viewer:
            ours, theirs = found.values()
            turns = [x / y for x, y in zip(ours, theirs, strict=True)]
            print(f"{'  ratio, turn by turn':42} median {statistics.median(turns):12.2f}")
    show(f"rooflm, broadcasting {SWEEP:,} at once", broadcast_rates(options.seconds),
         "configurations/s", 2_000_000)  # fmt: skip


if __name__ == "__main__":
    main()
