"""A whole answer: a prefill that gives the first token, then one decode step for each other.

Every decode step has its own context. Between the edges of attention windows, FLOPs and bytes
of each operator are affine in the context, so its time is the larger of two affine functions, and
the sum over the steps of a piece has a closed form: two passes are evaluated for each piece,
however long the answer.

Chapter: decode time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rooflm.roofline.analysis import AT_THE_ROOFS, Calibration, Report, analyze
from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import Number, ceil, choose, is_array, maximum, minimum, size


@dataclass(frozen=True)
class Generation:
    """Latency and throughput of one batch of answers.

    ttft : time to first token, s: the prefill.
    tpot : time per output token, s: the mean of the decode steps; NaN where there is none.
    seconds : the whole answer.
    tokens_per_second : batch x output tokens / seconds.
    memory : at the end of the answer, when the cache is fullest, beside the widest
        activations of prefill and decode. The prompts of the batch are prefilled at once; a
        server that takes them in turn needs less.
    """

    ttft: Number
    tpot: Number
    seconds: Number
    tokens_per_second: Number
    memory: Memory
    device: Hardware

    @property
    def fits(self) -> Any:
        """Whether the device holds it to the end; None where its capacity is not published."""
        return self.memory.fits(self.device)


def generation(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    precision: Precision | None = None,
    batch: Number = 1,
    prompt_tokens: Number = 512,
    output_tokens: Number = 128,
    attention: str = "flash",
    accounting: str = "exact",
    calibration: Calibration = AT_THE_ROOFS,
) -> Generation:
    """Predict a batch of answers.

    Parameters
    ----------
    model, device, precision, attention, accounting, calibration : as in `analyze`.
    batch, prompt_tokens, output_tokens : sizes, or arrays of them.

    Raises
    ------
    ValueError
        as `analyze` does.

    >>> g = generation("meta-llama/Llama-2-7b-hf", "nvidia-a6000", output_tokens=1)
    >>> g.seconds == g.ttft
    True
    """
    model, device = load_model(model), load_hardware(device)
    p = precision_of(precision)
    output = size("output_tokens", output_tokens)
    prompt = size("prompt_tokens", prompt_tokens)
    steps = output - 1
    size("prompt_tokens + output_tokens", prompt + output)

    def run(step: ForwardPass) -> Report:
        return analyze(model, device, step, p, attention, accounting, calibration)

    prefill = run(ForwardPass.prefill(batch, prompt))
    decode: Number = 0
    for first, last, count in _straight_pieces(model, prompt + 1, prompt + steps):
        low_report = run(ForwardPass.decode(batch, first))
        high_report = run(ForwardPass.decode(batch, last))
        for low, high in zip(low_report.operators, high_report.operators, strict=True):
            compute = device.peaks[low.rate] * calibration.compute
            bandwidth = device.bandwidth * calibration.memory
            time = _sum_of_larger(
                (low.flops / compute, high.flops / compute),
                (low.bytes / bandwidth, high.bytes / bandwidth),
                count,
            )
            decode = decode + low.count * (time + count * calibration.overhead)
    seconds = prefill.seconds + decode
    at_end = memory(model, p, batch, prompt + steps, 1, accounting, attention)
    return Generation(
        ttft=prefill.seconds,
        tpot=choose(steps > 0, decode / maximum(steps, 1), math.nan),
        seconds=seconds,
        tokens_per_second=prefill.step.batch * output / seconds,
        memory=Memory(
            at_end.weights,
            at_end.kv_cache,
            maximum(at_end.activations, prefill.memory.activations),
            accounting,
        ),
        device=device,
    )


def _straight_pieces(
    model: Model, start: Number, stop: Number
) -> Iterator[tuple[Number, Number, Number]]:
    """First and last context and the number of steps of each piece in which costs are affine.

    A window bends the cost of a step once; a chunk lets it start anew again and again.
    """
    edges = [block.mixer.edges() for _, block in model.blocks if block.mixer is not None]
    ends = {int(bend) for edge in edges for bend in edge.bends}
    lowest, highest = (_extreme(x, which) for x, which in ((start, "min"), (stop, "max")))
    for chunk in {int(edge.chunk) for edge in edges if edge.chunk}:
        ends |= set(range(chunk * (lowest // chunk), highest + 1, chunk))
    first = start
    for end in [*sorted(x for x in ends if lowest <= x < highest), highest]:
        count = maximum(minimum(stop, end) - first + 1, 0)
        if not is_array(count) and not count:
            continue
        low = minimum(first, maximum(stop, start))  # where a piece is empty, any context will do
        yield low, maximum(minimum(stop, end), low), count
        first = maximum(first, end + 1)


def _extreme(x: Number, which: str) -> int:
    return int(getattr(x, which)()) if is_array(x) else int(x)


def _sum_of_larger(x: tuple[Number, Number], y: tuple[Number, Number], m: Number) -> Number:
    """The sum over j = 0 ... m-1 of max(x_j, y_j), for affine x and y given at both ends.

    max(x, y) = (x + y)/2 + |x - y|/2. The difference is affine too and changes sign once at
    most, at step k; each side of k then sums as an arithmetic series.
    """
    start, end = x[0] - y[0], x[1] - y[1]
    slope = (end - start) / maximum(m - 1, 1)
    k = minimum(maximum(ceil(-start / (slope + choose(slope == 0, 1, 0))), 0), m)

    def series(count: Number) -> Number:
        return count * start + slope * count * (count - 1) / 2

    before, total = series(k), series(m)
    of_both = m * (x[0] + x[1] + y[0] + y[1]) / 2
    return (of_both + abs(before) + abs(total - before)) / 2
