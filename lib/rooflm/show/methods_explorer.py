"""The explorer of quantization methods: two of them side by side, from the stored map."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rooflm.roofline.numeric import unknown
from rooflm.show.explorer import Control, Explorer, figure_html, starting_at
from rooflm.show.frontier import Measured, frontier
from rooflm.show.tables import Table, table
from rooflm.show.words import number

MODELS = ("teacher", "smollm2")
GROUPS = ("row", "64")
BITS = (8, 4, 3, 2)
# {what the reader chooses: (the map's column, its heading, its unit)}
MEASURES = {
    "loss": ("difference", "loss added", "bits per byte"),
    "divergence": ("divergence", "divergence from the full model", "nats per token"),
    "agreement": ("agreement", "same most likely token", "share"),
}


def methods_explorer(first: str = "round", second: str = "gptq", **settings: Any) -> Explorer:
    """The explorer; in a live notebook its controls move. Nothing is measured: it reads the map.

    Parameters
    ----------
    first, second : the two variants, such as "gptq clip=mse".
    settings : where the other controls start: model, bits, group, measure.
    """
    names = tuple(sorted({_variant(row) for model in MODELS for row in _rows(model)} - {"full"}))
    controls = (
        Control("first", "Method", "choice", names, "round"),
        Control("second", "Beside it", "choice", names, "gptq"),
        Control("model", "Model", "choice", MODELS, "teacher"),
        Control("bits", "Bits", "choice", BITS, 3),
        Control("group", "A scale for", "choice", GROUPS, "row"),
        Control("measure", "Measure", "choice", tuple(MEASURES), "loss"),
    )
    started = starting_at(controls, first=first, second=second, **settings)
    return Explorer(started, _verdict, _view)


def _verdict(first: str, second: str, model: str, bits: int, group: str, measure: str) -> str:
    """The two variants at the chosen width in one sentence."""
    _check(model, group, measure, bits)
    at = [_at(_of(model, name, group), bits) for name in (first, second)]
    parts = [
        f"{name} {_words(row, measure)}" for name, row in zip((first, second), at, strict=True)
    ]
    start = f"{model}, {bits} bits, {MEASURES[measure][1]}"
    a, b = at
    if a is None or b is None or measure != "loss" or first == second:
        return f"{start}: {', '.join(parts)}."
    apart = a["difference_low"] > b["difference_high"] or b["difference_low"] > a["difference_high"]
    return f"{start}: {', '.join(parts)}; the intervals {'part' if apart else 'overlap'}."


def _view(first: str, second: str, model: str, bits: int, group: str, measure: str) -> str:
    """Both variants at every width, as a figure and a table."""
    _check(model, group, measure, bits)
    column, heading, unit = MEASURES[measure]
    kinds = {name: _of(model, name, group) for name in dict.fromkeys((first, second))}
    series = {name: [_point(row, column) for row in rows] for name, rows in kinds.items()}
    picture = frontier(
        series, "bits stored per weight", f"{heading} ({unit})",
        yscale="linear" if measure == "agreement" else "log", joined=True,
    )  # fmt: skip
    caption = f"{model}: {heading}, a scale for each {_group_words(group)}"
    return figure_html(picture, caption) + _table(kinds, caption).html


def _table(kinds: Mapping[str, list[dict[str, Any]]], caption: str) -> Table:
    rows = [
        (
            name, row["bits"], row["bits_per_weight"], _words(row, "loss"), row["divergence"],
            f"{row['agreement']:.1%}", row["seconds"],
        )
        for name, of in kinds.items()
        for row in of
    ]  # fmt: skip
    columns = [
        "method", "bits", "stored", "loss added, bits per byte", "divergence", "agreement", "s",
    ]  # fmt: skip
    return table(rows, columns, caption=caption, digits=3)


@lru_cache(maxsize=2)
def _rows(model: str) -> tuple[dict[str, Any], ...]:
    from rooflm.lab.quantize.sweep import load_map  # torch, which figures do without

    return tuple(load_map(model))


def _variant(row: Mapping[str, Any]) -> str:
    """A method with its options, whatever its width."""
    return f"{row['method']} {row['options']}".strip()


def _of(model: str, variant: str, group: str) -> list[dict[str, Any]]:
    """A variant's rows at the chosen group, or at its own where it has but one."""
    rows = [row for row in _rows(model) if _variant(row) == variant]
    if not rows:
        known = sorted({_variant(row) for row in _rows(model)} - {"full"})
        raise ValueError(f"{variant} was not measured on {model}; there are: {', '.join(known)}")
    chosen = [row for row in rows if row["group"] == (0 if group == "row" else int(group))]
    return sorted(chosen or rows, key=lambda row: -row["bits_per_weight"])


def _at(rows: list[dict[str, Any]], bits: int) -> dict[str, Any] | None:
    """The row of that width, or the one row of a variant that has its own."""
    return next((row for row in rows if row["bits"] in (bits, None)), None)


def _point(row: Mapping[str, Any], column: str) -> Measured:
    if column != "difference":
        return Measured(row["bits_per_weight"], row[column])
    ends = row["difference_low"], row["difference_high"]
    return Measured(row["bits_per_weight"], row[column], *ends)


def _words(row: Mapping[str, Any] | None, measure: str) -> str:
    if row is None:
        return "not measured"
    if measure != "loss":
        return number(row[MEASURES[measure][0]], 3)
    value, low, high = (row[f"difference{x}"] for x in ("", "_low", "_high"))
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def _group_words(group: str) -> str:
    return "row" if group == "row" else f"{group} weights"


def _check(model: str, group: str, measure: str, bits: int) -> None:
    for what, given, allowed in (
        ("model", model, MODELS),
        ("group", group, GROUPS),
        ("measure", measure, tuple(MEASURES)),
    ):
        if given not in allowed:
            raise unknown(what, given, allowed)
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
