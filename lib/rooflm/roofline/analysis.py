"""One forward pass on one device: every operator against the two roofs, and their sum.

The time of an operator is max(F / (e_c P), Q / (e_m W)) + t0, with e_c = e_m = 1 and t0 = 0
at the roofs. Source: survey (arXiv 2402.16363), sections 2.2 and 2.3; Williams, Waterman and
Patterson, "Roofline", CACM 52(4), 2009.

Chapter: one forward pass; decode time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from rooflm.roofline import survey
from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory, memory_of
from rooflm.roofline.model import ForwardPass, Model, PlacedOperator
from rooflm.roofline.numeric import (
    Number,
    choose,
    is_array,
    maximum,
    minimum,
    positive,
    shorten,
    unknown,
)

if TYPE_CHECKING:
    import pandas

ATTENTIONS = ("flash", "unfused")
ACCOUNTINGS = ("exact", "survey")


class Row(NamedTuple):
    """An operator on a device. Quantities are those of one layer; `count` layers have it.

    flops in FLOP; bytes and its three parts in B; intensity in FLOP/B; attainable in FLOP/s;
    seconds in s; bound "compute" or "memory"; rate is the format whose peak was used.
    """

    block: str
    name: str
    count: int  # type: ignore[assignment]  # hides tuple.count, by design
    flops: Number
    bytes: Number
    weight_bytes: Number
    activation_bytes: Number
    kv_bytes: Number
    intensity: Number
    attainable: Number
    seconds: Number
    bound: Any
    rate: str


@dataclass(frozen=True)
class Calibration:
    """What share of each roof a kernel reaches, and what every launch costs.

    Parameters
    ----------
    compute, memory : e_c and e_m, shares in (0, 1].
    overhead : t0, seconds per operator.
    """

    compute: float = 1.0
    memory: float = 1.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            share = positive(f"calibration {name}", getattr(self, name), "1, up to 1")
            if share > 1:
                raise ValueError(f"calibration {name} is {share}; allowed: a share in (0, 1]")
        if type(self.overhead) not in (int, float) or self.overhead:
            positive("calibration overhead", self.overhead, "seconds, or 0")


AT_THE_ROOFS = Calibration()


@dataclass(frozen=True)
class Report:
    """What `analyze` found.

    Attributes
    ----------
    operators : rows, one for each operator of each kind of block.
    seconds : the sum over operators, this sequence of kernels, in s.
    lower_bound : s; no schedule beats it (see `analyze`).
    flops, bytes : totals over all layers.
    bound : the kind of bound that holds more of the time.
    """

    model: Model
    device: Hardware
    step: ForwardPass
    precision: Precision
    attention: str
    accounting: str
    operators: tuple[Row, ...]
    seconds: Number
    lower_bound: Number
    flops: Number
    bytes: Number
    bound: Any

    @cached_property
    def memory(self) -> Memory:
        """What the device must hold for this pass; see `memory.Memory`."""
        return memory_of(self.model, self.precision, self.step, self.attention, self.accounting)

    @property
    def fits(self) -> Any:
        """Whether it does; None where the capacity is not published."""
        return self.memory.fits(self.device)

    @property
    def tokens_per_second(self) -> Number:
        """New tokens of all sequences over the time of the pass."""
        return self.step.tokens / self.seconds

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, a column for each field."""
        import pandas

        return pandas.DataFrame(self.operators, columns=list(Row._fields))

    def __str__(self) -> str:
        fits = self.fits
        if is_array(fits):
            word = "fits" if fits.all() else "fits for some" if fits.any() else "DOES NOT FIT"
        else:
            word = {True: "fits", False: "DOES NOT FIT", None: "capacity not published"}.get(
                fits, f"fits where {fits}"
            )
        return (
            f"{self.model.name} on {self.device.name}, {self.step}: {self.seconds} s, "
            f"{self.bound}-bound, {word}"
        )


def analyze(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    step: ForwardPass,
    precision: Precision | None = None,
    attention: str = "flash",
    accounting: str = "exact",
    calibration: Calibration = AT_THE_ROOFS,
) -> Report:
    """Predict one forward pass.

    Parameters
    ----------
    model, device : what `load_model` and `load_hardware` return, or take.
    step : the pass; its sizes may be arrays (the results are arrays of their common shape).
    precision : formats of weights, activations and KV cache; FP16 by default.
    attention : "flash" (scores stay on chip) or "unfused".
    accounting : "exact", or "survey" for the counting of the survey's Table 1.
    calibration : shares of the roofs and launch overhead.

    Returns
    -------
    Report
        `seconds` is the sum over operators. `lower_bound` is max(sum of F/P, compulsory
        bytes / W): the weights that the pass reads, and each position of the cache moved once.

    Raises
    ------
    ValueError
        for an unknown name, or a pass that the survey's accounting does not cover.

    >>> report = analyze("meta-llama/Llama-2-7b-hf", "nvidia-a6000", ForwardPass.decode(1, 2048))
    >>> report.bound, f"{report.seconds * 1e3:.1f} ms"
    ('memory', '18.6 ms')
    """
    model, device = load_model(model), load_hardware(device)
    p = precision_of(precision)
    if not isinstance(calibration, Calibration):
        raise ValueError(f"calibration is {shorten(calibration)}; allowed: a Calibration")
    if not isinstance(step, ForwardPass):
        raise ValueError(
            f"step is {shorten(step)}; allowed: a ForwardPass, such as ForwardPass.decode(1, 2048)"
        )
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    if accounting not in ACCOUNTINGS:
        raise unknown("accounting", accounting, ACCOUNTINGS)
    placed: Iterable[PlacedOperator]
    if accounting == "survey":
        placed = survey.operators(model, step, p, attention)
        rates = {"survey": survey.rate(device, p)}
    else:
        placed = model.operators(step, p, attention)
        rates = {
            "linear": device.rate(p.weights, p.activations),
            "attention": device.rate(p.activations, p.kv_cache),
            "vector": device.rate(p.activations, p.activations),
        }
    return _report(model, device, step, p, attention, accounting, placed, rates, calibration)


def _report(
    model: Model,
    device: Hardware,
    step: ForwardPass,
    p: Precision,
    attention: str,
    accounting: str,
    placed: Iterable[PlacedOperator],
    rates: dict[str, tuple[str, float]],
    calibration: Calibration,
) -> Report:
    rows = []
    bandwidth = device.bandwidth
    real_bandwidth, t0 = bandwidth * calibration.memory, calibration.overhead
    roofs = {kind: (at, peak, peak * calibration.compute) for kind, (at, peak) in rates.items()}
    # Sums over all layers; compute seconds and weight bytes are for the lower bound.
    seconds = flops = moved = compute_seconds = weights = compute_bound = 0
    for block, count, (name, rate, f, weight, read, written, kv_read, kv_written) in placed:
        rate_name, peak, real_peak = roofs[rate]
        activations = read + written
        kv = kv_read + kv_written
        q = weight + activations + kv
        intensity = f / q
        compute, transfer = f / real_peak, q / real_bandwidth
        limited = compute >= transfer
        reach = intensity * bandwidth
        plain = type(limited) is bool  # not an array, nor a symbol: the fast way
        if plain:
            bound = "compute" if limited else "memory"
            time = compute if limited else transfer
            attainable = peak if reach > peak else reach
        else:
            bound = choose(limited, "compute", "memory")
            time = maximum(compute, transfer)
            attainable = minimum(peak, reach)
        if t0:
            time = time + t0
        layers_time = count * time
        fields = (
            block, name, count, f, q, weight, activations, kv,
            intensity, attainable, time, bound, rate_name,
        )  # fmt: skip
        rows.append(tuple.__new__(Row, fields))  # half the time of Row(*fields)
        seconds = seconds + layers_time
        if not plain:
            compute_bound = compute_bound + choose(limited, layers_time, 0)
        elif limited:
            compute_bound = compute_bound + layers_time
        flops = flops + count * f
        moved = moved + count * q
        compute_seconds = compute_seconds + count * compute
        weights = weights + count * weight
    if accounting == "survey":
        cache = survey.cache_bytes(model, step, p)
    else:
        cache = model.cache_bytes(
            step.batch, step.context, p.kv_cache.bytes, p.state.bytes, p.activations.bytes
        )
        weights = weights - model.repeated_rows(step) * p.weights.bytes
    at_peak = compute_seconds * calibration.compute
    lower_bound = maximum(at_peak, (weights + cache) / bandwidth)
    bound = choose(2 * compute_bound > seconds, "compute", "memory")
    return Report(
        model, device, step, p, attention, accounting, tuple(rows),
        seconds, lower_bound, flops, moved, bound,
    )  # fmt: skip
