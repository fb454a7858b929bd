"""The few functions that a formula needs beyond + - * /, for every kind of number.

A cost formula is evaluated on Python numbers, on NumPy arrays and on SymPy symbols. These
functions look at their arguments and call `max`, `numpy.maximum` or `sympy.Max`. Neither
NumPy nor SymPy is imported here: whoever hands in an array or a symbol has loaded its
package already, so it stands in `sys.modules`.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from typing import Any

# A Python int or float, a numpy.ndarray of float64, or a sympy.Expr.
Number = Any

LARGEST_SIZE = 2**40


def maximum(x: Number, y: Number) -> Number:
    """The larger of two numbers, elementwise for arrays, `Max` for symbols."""
    kind = type(x), type(y)
    if kind in _PLAIN_PAIRS:
        return x if x >= y else y
    if _is_symbol(x) or _is_symbol(y):
        return sys.modules["sympy"].Max(x, y)
    if is_array(x) or is_array(y):
        return sys.modules["numpy"].maximum(x, y)
    return max(x, y)


def minimum(x: Number, y: Number) -> Number:
    """The smaller of two numbers, elementwise for arrays, `Min` for symbols."""
    kind = type(x), type(y)
    if kind in _PLAIN_PAIRS:
        return x if x <= y else y
    if _is_symbol(x) or _is_symbol(y):
        return sys.modules["sympy"].Min(x, y)
    if is_array(x) or is_array(y):
        return sys.modules["numpy"].minimum(x, y)
    return min(x, y)


def ceil(x: Number) -> Number:
    """The smallest whole number that is not below x, elementwise for arrays."""
    if _is_symbol(x):
        return sys.modules["sympy"].ceiling(x)
    if is_array(x):
        return sys.modules["numpy"].ceil(x)
    return math.ceil(x)


def floor(x: Number) -> Number:
    """The largest whole number that is not above x, elementwise for arrays."""
    if _is_symbol(x):
        return sys.modules["sympy"].floor(x)
    if is_array(x):
        return sys.modules["numpy"].floor(x)
    return math.floor(x)


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; elementwise for an array of conditions."""
    if condition is True or condition is False:
        return yes if condition else no
    if is_array(condition) and condition.ndim:
        return sys.modules["numpy"].where(condition, yes, no)
    if _is_symbol(condition):
        sympy = sys.modules["sympy"]
        names = [sympy.Symbol(x) if isinstance(x, str) else x for x in (yes, no)]
        return sympy.Piecewise((names[0], condition), (names[1], True))
    return yes if condition else no


def is_array(x: object) -> bool:
    """Whether x is a NumPy array or a NumPy scalar."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, (numpy.ndarray, numpy.generic))


def size(name: str, value: Any, smallest: int = 1) -> Number:
    """Check a size where it enters: whole, from `smallest` to 2^40.

    Parameters
    ----------
    name : what the size counts, for the message.
    value : a whole Python number, an array of whole numbers, or a symbol.
    smallest : 1, or 0 for what may be absent.

    Returns
    -------
    The int itself, a float64 array (int64 would overflow in products at 405B sizes), or the
    symbol.

    Raises
    ------
    ValueError
        naming what was given and what is allowed.
    """
    if type(value) is int:
        if smallest <= value <= LARGEST_SIZE:
            return value
        raise _bad_size(name, value, smallest)
    if _is_symbol(value):
        if not getattr(value, "is_number", True):
            return value
        if not getattr(value, "is_Integer", False):
            raise _bad_size(name, value, smallest)
        value = int(value)
    if is_array(value) or isinstance(value, (list, tuple, range)) or _is_series(value):
        return _array_of_sizes(name, value, smallest)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _bad_size(name, value, smallest)
    if isinstance(value, float) and not value.is_integer():
        raise _bad_size(name, value, smallest)
    return size(name, int(value), smallest)


def positive(name: str, value: Any, unit: str) -> float:
    """Check a positive finite number (a peak, a bandwidth) where it enters."""
    number = value.item() if is_array(value) and value.ndim == 0 else value
    plain = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not plain or not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name} is {shorten(value)}; allowed: a positive number of {unit}")
    return float(number)


def unknown(what: str, given: object, allowed: Iterable[str], hint: str = "") -> ValueError:
    """The error for a name that is not one of `allowed`, with the nearest right ones."""
    names = {name.lower(): name for name in sorted(allowed)}
    key = str(given)[:80].lower()
    # What contains the given word comes first: "h100" means one of the H100s.
    near = [name for name in names if len(key) >= 3 and key in name][:6]
    near = near or difflib.get_close_matches(key, names, n=3, cutoff=0.65)
    if near:
        tail = "nearest: " + ", ".join(names[name] for name in near)
    elif len(names) <= 24:
        tail = "allowed: " + ", ".join(names.values())
    else:
        tail = f"{len(names)} are known"
    return ValueError(f"unknown {what} {shorten(given)}; {tail}{hint}")


def shorten(value: object, width: int = 60) -> str:
    """A one-line `repr` that never floods a message."""
    try:
        if isinstance(value, int) and abs(value) >= 10**40:
            return f"an integer of {value.bit_length()} bits"
        text = " ".join(repr(value[:200] if isinstance(value, (str, bytes)) else value).split())
    except (ValueError, RecursionError, MemoryError):
        return f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 1] + "…"


_PLAIN_PAIRS = {(x, y) for x in (int, float) for y in (int, float)}


def _is_symbol(x: object) -> bool:
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(x, sympy.Basic)


def _is_series(x: object) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, (pandas.Series, pandas.Index))


def _bad_size(name: str, value: object, smallest: int) -> ValueError:
    return ValueError(
        f"{name} is {shorten(value)}; allowed: a whole number from {smallest} to 2^40"
    )


def _array_of_sizes(name: str, value: Any, smallest: int) -> Number:
    import importlib  # arrays were asked for: NumPy is the caller's choice, not ours

    numpy = sys.modules.get("numpy") or importlib.import_module("numpy")
    try:
        array = numpy.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError
        array = array.astype(numpy.float64)
    except (TypeError, ValueError, OverflowError):
        raise _bad_size(name, value, smallest) from None
    wrong = ~((array >= smallest) & (array <= LARGEST_SIZE) & (array == numpy.floor(array)))
    if wrong.any():
        raise _bad_size(name, array[wrong].flat[0].item(), smallest)
    return array if array.ndim else int(array)
