"""Ours beside an independent number: a derivation that parts from it stops the run.

An expected number given as text keeps its printed digits: "201.6" is met by anything that rounds
to it, so the tolerance is half of the last printed digit. "69G", "155 TFLOP/s", "48 GiB",
"226.9 ms" and "96.8 %" are read with their prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rooflm.show.tables import Table
from rooflm.show.words import number, plain, significant

_SCALES = {"k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_SMALL = {"m": -3, "µ": -6, "μ": -6, "u": -6, "n": -9}
_UNIT = r"(?:B|bytes?|FLOPs?|FLOPS|OPs?|OPS|ops?|bits?|b|Hz|W|J|s|params?|parameters)(?![a-zA-Z])"
_PRINTED = re.compile(
    r"\s*(?P<digits>[+−-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
    rf"(?:(?P<binary>[KMGTP])i(?=B)|(?P<scale>[kKMGTPE])(?=\W*$|\s*{_UNIT})|"
    r"(?P<small>[mµμun])(?=s(?![a-zA-Z])|[JW](?![a-zA-Z]))|(?P<percent>%))?(?!\s*[\d.^–-]).*"
)
_RELATIVE = Decimal("1e-9")  # for an expected number, which is not printed but computed
_NOISE = Decimal("1e-12")  # of binary arithmetic, at the edge of a printed digit


@dataclass(frozen=True)
class Printed:
    """A number as someone printed it: value, half its last digit, and what scaled it."""

    value: Decimal
    half_digit: Decimal
    factor: Decimal
    sign: str


@dataclass(frozen=True)
class Verdict:
    """One comparison, in words."""

    name: str
    ours: str
    expected: str
    source: str
    agrees: bool

    def __str__(self) -> str:
        mark = "✓" if self.agrees else "✗"
        return f"{mark} {self.name}: ours {self.ours}, expected {self.expected} ({self.source})"


def check(
    name: str,
    ours: Any,
    expected: Any,
    source: str,
    tolerance: float | None = None,
    reason: str | None = None,
) -> None:
    """Print ours beside what is expected, and stop the run where they part.

    Parameters
    ----------
    name : what is compared.
    ours : our number, in the bare unit (FLOP/s, not TFLOP/s); or a word, or a truth value.
    expected : text keeps its printed digits ("201.6", "69G", "155 TFLOP/s", "34.59 ms"), and
        ours must round to it; a number must be met to a relative 1e-9; words and truth values
        must be equal.
    source : who says so.
    tolerance : absolute, in the bare unit, in place of half the last printed digit.
    reason : why that tolerance; required with it.

    Raises
    ------
    AssertionError
        where they part.
    ValueError
        for a tolerance without a reason, or text that is no number.

    >>> check("ridge point, A6000 FP16", 201.6126, "201.6", source="survey, Fig. 5")
    ✓ ridge point, A6000 FP16: ours 201.613, expected 201.6 (survey, Fig. 5)
    """
    verdict = compare(name, ours, expected, source, tolerance, reason)
    print(verdict)
    if not verdict.agrees:
        raise AssertionError(str(verdict))


def checks(rows: Iterable[Any], caption: str | None = None) -> None:
    """Many checks in one table, shown before the run stops where any fails.

    Parameters
    ----------
    rows : (name, ours, expected, source), or with tolerance and reason behind; or dicts of
        these names.
    caption : what is compared.
    """
    verdicts = [compare(**row) if isinstance(row, Mapping) else compare(*row) for row in rows]
    if not verdicts:
        raise ValueError("no checks are given; allowed: at least one")
    cells = tuple(
        (v.name, v.ours, v.expected, v.source, "✓ agrees" if v.agrees else "✗ differs")
        for v in verdicts
    )
    headings = ("quantity", "ours", "expected", "source", "verdict")
    _display(Table(headings, cells, (False, True, True, False, False), caption, "checks"))
    failed = [str(verdict) for verdict in verdicts if not verdict.agrees]
    if failed:
        raise AssertionError("; ".join(failed))


def compare(
    name: str,
    ours: Any,
    expected: Any,
    source: str,
    tolerance: float | None = None,
    reason: str | None = None,
) -> Verdict:
    """What `check` finds, without printing or stopping; the same parameters."""
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"source of {name!r} is {source!r}; allowed: who says so, in words")
    within = _tolerance(name, tolerance, reason)
    ours, expected = plain(ours), plain(expected)
    if within is not None:
        source = f"{source}; within {number(tolerance)}: {reason}"
    if _is_number(ours) and (_is_number(expected) or isinstance(expected, str)):
        return _compare_numbers(name, ours, expected, source, within)
    if hasattr(ours, "shape"):  # a scalar has become a Python number
        raise ValueError(f"{name!r} is an array of shape {tuple(ours.shape)}; allowed: one number")
    if isinstance(ours, (list, tuple)) and isinstance(expected, (list, tuple)):
        ours, expected = tuple(ours), tuple(expected)  # shapes
    agrees = type(ours) is type(expected) and bool(ours == expected)
    return Verdict(name, _words(ours), _words(expected), source, agrees)


def read_printed(text: str) -> Printed:
    """The number at the start of a text, with the digits that were printed.

    >>> float(read_printed("69G").value), float(read_printed("69G").half_digit)
    (69000000000.0, 500000000.0)
    """
    found = _PRINTED.fullmatch(text)
    if not found:
        raise ValueError(f"expected is {text!r}; allowed: text that starts with a number")
    digits = Decimal(found["digits"].replace(",", "").replace("−", "-"))
    sign, factor = "", Decimal(1)
    if found["binary"]:
        sign, factor = f"{found['binary']}i", Decimal(1024) ** (_SCALES[found["binary"]] // 3)
    elif found["scale"]:
        sign, factor = found["scale"], Decimal(10) ** _SCALES[found["scale"]]
    elif found["small"]:
        sign, factor = found["small"], Decimal(10) ** _SMALL[found["small"]]
    elif found["percent"]:
        sign, factor = "%", Decimal("0.01")
    half = Decimal(5).scaleb(int(digits.as_tuple().exponent) - 1)
    if sign and (unit := text[found.end("digits") :].strip()) != sign:
        sign = f" {unit}"  # "17 ms": the unit goes with its prefix
    return Printed(digits * factor, half * factor, factor, sign)


def _compare_numbers(
    name: str, ours: Any, expected: Any, source: str, within: Decimal | None
) -> Verdict:
    if isinstance(expected, str):
        printed = read_printed(expected)
        wanted, half = printed.value, printed.half_digit
        factor, sign, shown = printed.factor, printed.sign, expected
    else:
        wanted, factor, sign, shown = _decimal(expected), Decimal(1), "", _digits(expected)
        half = abs(wanted) * _RELATIVE if wanted.is_finite() else Decimal(0)
    allowed = half if within is None else within
    value = _decimal(ours)
    agrees = value.is_finite() and wanted.is_finite()
    agrees = agrees and abs(value - wanted) <= allowed + abs(wanted) * _NOISE
    text = _digits(ours) if factor == 1 else f"{_digits(float(value / factor))}{sign}"
    return Verdict(name, text, shown, source, bool(agrees))


def _tolerance(name: str, tolerance: float | None, reason: str | None) -> Decimal | None:
    if tolerance is None:
        if reason is not None:
            raise ValueError(f"a reason is given for {name!r}; allowed: together with tolerance=")
        return None
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(f"tolerance {tolerance} of {name!r} has no reason; say why with reason=")
    value = plain(tolerance)
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"tolerance of {name!r} is {tolerance!r}; allowed: a number from 0")
    return _decimal(value)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, Decimal)) and not isinstance(x, bool)


def _decimal(x: Any) -> Decimal:
    """The decimal that a float prints as: 34.45 is the edge between 34.4 and 34.5."""
    return Decimal(repr(x)) if isinstance(x, float) else Decimal(x)


def _digits(x: Any) -> str:
    """A number to six significant digits."""
    if isinstance(x, float) and math.isfinite(x) and x and abs(x) >= 1e7:
        return f"{significant(x, 6):.5e}".replace("e+", "e")
    return number(x, 6)


def _words(x: Any) -> str:
    return number(x, 6) if _is_number(x) or isinstance(x, bool) or x is None else str(x)


def _display(shown: Table) -> None:
    try:
        from IPython.display import display
    except ImportError:
        print(shown)
    else:
        display(shown)
