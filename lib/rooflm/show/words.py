"""How numbers, units and passes are written, in figures, tables and alternative text alike."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from rooflm.roofline.analysis import Report
from rooflm.roofline.model import ForwardPass

PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
PREFIXES |= {18: "E", 21: "Z"}
# Units that take a prefix; "FLOP/B" and counts such as "tokens/s" are written out.
PREFIXED = ("B", "B/s", "FLOP", "FLOP/s", "OP", "OP/s", "s", "W", "J", "bit", "bit/s", "Hz")
DASH = "—"


def si(value: Any, unit: str, digits: int = 3) -> str:
    """A value in SI units, as text of `digits` significant digits.

    Parameters
    ----------
    value : a number in the bare unit (B, not GB).
    unit : "B", "B/s", "FLOP", "FLOP/s", "s", ... take a prefix; any other ("FLOP/B",
        "tokens/s") is written after the number as it is.

    >>> si(154.8385e12, "FLOP/s"), si(0.018618, "s"), si(201.613, "FLOP/B", digits=4)
    ('155 TFLOP/s', '18.6 ms', '201.6 FLOP/B')
    """
    value = plain(value)
    if unit not in PREFIXED or value == 0 or not math.isfinite(value):
        return f"{number(value, digits)} {unit}"
    # Round first: 999.6 with three digits is 1.00 of the next prefix.
    rounded = float(f"{value:.{digits - 1}e}")
    power = 3 * math.floor(_exponent(rounded) / 3)
    power = min(max(power, min(PREFIXES)), max(PREFIXES))
    return f"{number(value / 10**power, digits)} {PREFIXES[power]}{unit}"


def number(value: Any, digits: int = 4) -> str:
    """A number as text: whole numbers in full, others to `digits` significant digits.

    >>> number(2048), number(113.7777), number(0.25), number(68719476736.0), number(None)
    ('2,048', '113.8', '0.25', '6.872e10', '—')
    """
    value = plain(value)
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if value != value else ("∞" if value > 0 else "-∞")
    if value == 0:
        return "0"
    rounded = significant(value, digits)
    if 1e-4 <= abs(rounded) < 1e7:
        decimals = max(digits - 1 - _exponent(float(rounded)), 0)
        text = f"{rounded:,.{decimals}f}" if decimals else f"{significant(value, 7):,.0f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, power = f"{rounded:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"


def significant(value: float, digits: int) -> Decimal:
    """The decimal of `digits` significant digits that is nearest to value."""
    exact = Decimal(repr(value))
    return exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), ROUND_HALF_EVEN)


def plain(value: Any) -> Any:
    """A scalar of NumPy, torch or SymPy as a Python number; anything else as it is."""
    if type(value) in (bool, int, float, str) or value is None:
        return value  # numpy.float64 is a float too, but does not print as one
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if getattr(value, "is_number", False) is True:  # SymPy
        return int(value) if value.is_integer else float(value)
    return value


def scalar(value: Any, what: str) -> float:
    """A number to draw; a sweep (an array) is refused by name."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is {type(value).__name__}; allowed: one number, not a sweep")
    return float(value)


def pass_words(step: ForwardPass) -> str:
    """A forward pass in words.

    >>> pass_words(ForwardPass.decode(batch=1, context=2048))
    'decode, batch 1, context 2,048'
    """
    batch, new = number(step.batch), number(step.new_tokens)
    if plain(step.cached_tokens) == 0:
        return f"prefill, batch {batch}, {new} tokens"
    if plain(step.new_tokens) == 1:
        return f"decode, batch {batch}, context {number(step.context)}"
    return f"{new} new tokens after {number(step.cached_tokens)}, batch {batch}"


def report_words(report: Report) -> str:
    """Model, device, pass and formats of a report, and whether it fits where it does not."""
    name = report.model.name.rsplit("/", 1)[-1]
    parts = [f"{name} on {report.device.name}", pass_words(report.step), plan_words(report)]
    return ", ".join(filter(None, parts)) + fit_words(report)


def plan_words(report: Report) -> str:
    """What of a plan is not usual: formats other than FP16, attention that is not fused."""
    p = report.precision
    held = {"weights": p.weights, "activations": p.activations, "KV cache": p.kv_cache}
    words = [f"{what} {form.name}" for what, form in held.items() if form.name != "fp16"]
    return ", ".join(words + ["unfused attention"] * (report.attention == "unfused"))


def fit_words(report: Report) -> str:
    """Empty where the plan fits, else by how much it does not."""
    if plain(report.fits) is not False:
        return ""
    need, have = report.memory.total, report.device.memory_capacity
    return f" (does not fit: {si(need, 'B')} of {si(have, 'B')})"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
