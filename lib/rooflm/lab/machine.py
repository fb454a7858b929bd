"""The roofs of the machine at hand, measured, and the operators of a block timed beside them.

The prediction of `rooflm.analyze` needs a bandwidth and a peak. `measure_machine` finds both
with plain torch on the processor; `time_block` then times the operators of one transformer
layer under the names of the prediction's rows.

Three things decide what such a number means.

- A roof is a bound, so it is taken from the fastest run: whatever else the machine does can
  only make a run slower (the rule of STREAM). A `Timing` has the fastest run, to be set beside
  a roof, and the median with its interquartile range, to be expected.
- Bytes are counted as the program asks for them: a copy reads and writes each element once.
  A processor without streaming stores first reads the line that it is about to overwrite
  (write-allocate), so that a copy may really move half as much again. The read kernel has
  no such doubt, and the bandwidth is the best of all three.
- A weight that was just used lies in a cache. `cold_copies` says how many copies to cycle
  through so that each is gone from the last-level cache before its turn comes again.

Sources: J. D. McCalpin, STREAM, 1995; Williams, Waterman and Patterson, "Roofline",
CACM 52(4), 2009, sections 3 and 6.

Chapter: hardware alone; decode time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.layer import make_layer, run_layer
from rooflm.roofline.hardware import Hardware
from rooflm.roofline.model import Block
from rooflm.roofline.numeric import shorten, size, unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STREAM_ELEMENTS = 2**26  # 256 MiB in FP32, several times a last-level cache
# Streams and squares are timed in calls of a few milliseconds: a longer one is interrupted on
# a busy machine, and then no run is a fast one.
STREAM_PIECE = 2**21
SQUARES = (512, 1024)  # sides of the matmuls that look for the compute roof
_UNKNOWN_CACHE = 32 * 2**20  # assumed where the system does not say


@dataclass(frozen=True)
class Timing:
    """How long a call took.

    Parameters
    ----------
    median_s : median, seconds.
    iqr_s : interquartile range, seconds; 0 for a single run.
    runs : timed runs.
    best_s : the fastest run, seconds.
    """

    median_s: float
    iqr_s: float
    runs: int
    best_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Summarize single times.

        >>> Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Timing(median_s=3.0, iqr_s=2.0, runs=5, best_s=1.0)
        """
        times = sorted(seconds)
        if not times:
            raise ValueError("no times to summarize; allowed: at least one run")
        iqr = 0.0
        if len(times) > 1:
            low, _, high = statistics.quantiles(times, n=4, method="inclusive")
            iqr = high - low
        return cls(statistics.median(times), iqr, len(times), times[0])


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run torch on that many threads inside the `with`; None leaves the number as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(size("threads", threads))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def time_call(f: Callable[[], Any], runs: int = 7, warmup: int = 1) -> Timing:
    """Time a call.

    Parameters
    ----------
    f : called `warmup` times untimed (first touches, kernel choice), then `runs` times.
    """
    for _ in range(size("warmup", warmup, smallest=0)):
        f()
    return Timing.of([_seconds(f) for _ in range(size("runs", runs))])


def last_level_cache_bytes() -> int:
    """The largest cache that the system reports, in bytes; 32 MiB where it reports none."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        digits, unit = text.rstrip("KM"), text[-1:]
        found.append(int(digits) * {"K": 2**10, "M": 2**20}.get(unit, 1))
    return max(found, default=_UNKNOWN_CACHE)


def cold_copies(nbytes: float, cache_bytes: float | None = None) -> int:
    """How many copies of `nbytes` make four times the last-level cache; at least 1.

    >>> cold_copies(2**24, cache_bytes=2**25), cold_copies(2**30, cache_bytes=2**25)
    (8, 1)
    """
    cache = last_level_cache_bytes() if cache_bytes is None else cache_bytes
    return max(1, math.ceil(4 * cache / nbytes))


def stream_bytes(elements: int) -> dict[str, int]:
    """Bytes that each bandwidth kernel asks for, on FP32 vectors of that many elements.

    >>> stream_bytes(10)
    {'read': 40, 'copy': 80, 'triad': 120}
    """
    return {"read": 4 * elements, "copy": 8 * elements, "triad": 12 * elements}


def stream_timings(
    elements: int = STREAM_ELEMENTS, piece: int = STREAM_PIECE, seconds: float = 0.5
) -> dict[str, Timing]:
    """Time the kernels of `stream_bytes` on a piece: y = X w by rows, z = x, z = x + 3 y.

    Parameters
    ----------
    elements : length of each vector; too large for a cache. Its pieces take turns, so that each
        has left the cache when its turn comes again.
    piece : elements of one call, a multiple of 4096 that divides `elements`.
    seconds : about how long in all.
    """
    width = 4096
    if size("elements", elements) % size("piece", piece) or piece % width:
        raise ValueError(
            f"piece is {piece}; allowed: a multiple of {width} that divides {elements}"
        )
    x, y, z = (torch.ones(elements).split(piece) for _ in range(3))
    vector, out = torch.ones(width), torch.empty(piece // width)
    turn = cycle(range(len(x)))

    def read() -> Tensor:
        return torch.mv(x[next(turn)].view(-1, width), vector, out=out)

    def copy() -> Tensor:
        i = next(turn)
        return z[i].copy_(x[i])

    def triad() -> Tensor:
        i = next(turn)
        return torch.add(x[i], y[i], alpha=3.0, out=z[i])

    kernels = {"read": read, "copy": copy, "triad": triad}
    return {name: _time_for(seconds / 3, kernel, 5000) for name, kernel in kernels.items()}


def square_timing(side: int, dtype: str = "fp32", seconds: float = 0.5) -> Timing:
    """Time a square matmul, 2 side^3 FLOPs, over and over on the same operands."""
    kind = _dtype(dtype)
    x = torch.randn(size("side", side), side).to(kind)
    y = torch.randn(side, side).to(kind)
    out = torch.empty(side, side, dtype=kind)
    return _time_for(seconds, lambda: torch.mm(x, y, out=out))


def matmul_timing(
    t: int, d_in: int, d_out: int, dtype: str = "fp32", cold: bool = True, runs: int = 7
) -> Timing:
    """Time a linear layer: t rows by a (d_out, d_in) weight, without bias.

    Parameters
    ----------
    t, d_in, d_out : sizes, as in `operators.linear`.
    dtype : "fp32", "bf16" or "fp16".
    cold : cycle through copies of the weight, so that none is read from a cache; False uses
        one weight again and again.
    runs : timed runs, after one call to warm up.
    """
    return matmul_timings([(t, d_in, d_out)], dtype, cold, runs)[t, d_in, d_out]


def matmul_timings(
    shapes: Iterable[tuple[int, int, int]],
    dtype: str = "fp32",
    cold: bool = True,
    runs: int = 7,
) -> dict[tuple[int, int, int], Timing]:
    """`matmul_timing` of each (t, d_in, d_out); neighbours of one width share their weights."""
    kind = _dtype(dtype)
    timings: dict[tuple[int, int, int], Timing] = {}
    width, weights = (0, 0), [torch.empty(0)]
    for t, d_in, d_out in shapes:
        if width != (d_in, d_out):
            width = (d_in, d_out)
            weight = torch.randn(size("d_out", d_out), size("d_in", d_in)).to(kind)
            copies = cold_copies(weight.nbytes) if cold else 1
            weights = [weight, *(weight.clone() for _ in range(copies - 1))]
        x = torch.randn(size("t", t), d_in).to(kind)
        timings[t, d_in, d_out] = _time_linear(x, weights, runs)
    return timings


def measure_machine(seconds: float = 1.5, threads: int | None = None) -> Hardware:
    """The roofs of this machine's processor.

    Parameters
    ----------
    seconds : about how long to measure.
    threads : torch threads; None for as many as torch uses already.

    Returns
    -------
    Hardware
        named "this machine": the bandwidth of the fastest streaming kernel, the FP32 rate of
        the fastest square matmul, and a BF16 rate where BF16 is faster than FP32 here.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {shorten(seconds)}; allowed: a positive number")
    with thread_count(threads), torch.inference_mode():
        moved, streams = (
            stream_bytes(STREAM_PIECE),
            stream_timings(STREAM_ELEMENTS, STREAM_PIECE, seconds / 3),
        )
        bandwidth = max(moved[name] / streams[name].best_s for name in moved)
        peaks = {"fp32": _square_rate("fp32", seconds / 3)}
        if _beats_fp32("bf16"):
            peaks["bf16"] = _square_rate("bf16", seconds / 3)
    return Hardware("this machine", bandwidth=bandwidth, peaks=peaks)


def time_block(
    block: Block,
    batch: int,
    context: int,
    new_tokens: int = 1,
    dtype: str = "fp32",
    layers: int | None = None,
    seconds: float = 1.5,
    threads: int | None = None,
) -> dict[str, Timing]:
    """Time the operators of one layer, in the order in which it runs them.

    Random weights, attention fused, the KV cache in the same dtype. Rotary embeddings are left
    out, as in the prediction, which counts them as fused. The nonlinearity is SiLU.

    Parameters
    ----------
    block : a layer of a model, as in `model.blocks[0][1]`.
    batch, context, new_tokens : sequences; tokens of each once the pass is done; how many of
        these are new (1 is a decode step).
    dtype : "fp32", "bf16" or "fp16".
    layers : copies of the layer that take turns, each with its own weights and cache; None for
        as many as `cold_copies` asks for.
    seconds : passes over all copies are repeated for about this long, at least 3 times.
    threads : torch threads; None for as many as torch uses already.

    Returns
    -------
    {name: Timing}
        the seconds of one layer; the names are those of `rooflm.analyze`'s rows.
    """
    kind = _dtype(dtype)
    with thread_count(threads), torch.inference_mode():
        first = make_layer(block, batch, context, kind)
        nbytes = sum(tensor.nbytes for tensor in first.values())
        copies = cold_copies(nbytes) if layers is None else size("layers", layers)
        stack = [first]
        for _ in range(copies - 1):
            stack.append({name: tensor.clone() for name, tensor in first.items()})
        x = torch.randn(batch, size("new_tokens", new_tokens), block.hidden).to(kind)
        times: dict[str, list[float]] = {}

        def record(name: str, f: Callable[[], Tensor]) -> Tensor:
            start = time.perf_counter()
            result = f()
            times.setdefault(name, []).append(time.perf_counter() - start)
            return result

        def one_pass() -> None:
            for layer in stack:
                run_layer(block, layer, x, record)

        _time_for(seconds, one_pass)
    # The first pass over the copies was the warm-up.
    return {name: Timing.of(of[copies:]) for name, of in times.items()}


def _square_rate(dtype: str, seconds: float) -> float:
    """The best FLOP/s of square matmuls; FLOPs, not MACs: hence the 2."""
    timings = {side: square_timing(side, dtype, seconds / len(SQUARES)) for side in SQUARES}
    return max(2 * side**3 / timing.best_s for side, timing in timings.items())


def _beats_fp32(dtype: str) -> bool:
    """Whether small squares are faster than in FP32; emulated, a large one takes seconds.

    Twice, and FP32 for longer, so that one stall on a busy machine does not decide.
    """
    for side in (256, 512):
        if square_timing(side, dtype, 0).best_s >= square_timing(side, "fp32", 0.05).best_s:
            return False
    return True


def _time_linear(x: Tensor, weights: list[Tensor], runs: int) -> Timing:
    turn = cycle(weights)
    return time_call(lambda: functional.linear(x, next(turn)), runs)


def _seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def _time_for(seconds: float, f: Callable[[], Any], most: int = 100) -> Timing:
    """Time f for about that long, 3 to `most` times, after one call to warm up."""
    f()
    times = [_seconds(f) for _ in range(3)]
    total = sum(times)
    while total < seconds and len(times) < most:
        times.append(_seconds(f))
        total += times[-1]
    return Timing.of(times)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]
