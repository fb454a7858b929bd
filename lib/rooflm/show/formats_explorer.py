"""The explorer of number formats: a grid under the numbers, and the error that it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    starting_at,
    whole_setting,
)
from rooflm.show.grids import grids
from rooflm.show.tables import table
from rooflm.show.words import number

if TYPE_CHECKING:
    from rooflm.lab.quantize.trial import Trial

FORMATS_CONTROLS = (
    Control(
        "number_format", "Number format", "choice",
        ("int8, symmetric", "int8, zero point", "int4, symmetric", "int4, zero point",
         "int3, symmetric", "int3, zero point", "int2, symmetric", "int2, zero point",
         "fp8-e4m3", "fp8-e5m2", "nf4", "mxfp4", "nvfp4", "q4_1", "binary"), "int4, symmetric",
    ),
    Control("group", "Group", "steps", doubling(8, 256), 64),
    Control(
        "numbers", "Numbers", "choice",
        ("normal", "heavy-tailed", "teacher, layers.0.q_proj", "teacher, layers.2.gate_proj",
         "teacher, layers.5.down_proj"), "normal",
    ),
    Control("outlier", "Outlier, in σ", "steps", (0, 4, 8, 16, 32, 64), 0),
)  # fmt: skip
# The blocks that the standards ask for.
_OWN_GROUP = {"nf4": 64, "mxfp4": 32, "nvfp4": 16, "q4_1": 32}
_DECIBELS_A_BIT = 6.0206
_BINS = 61


def explore_formats(**settings: Any) -> Trial:
    """What the explorer shows for a setting of its controls; those left out are at the start."""
    from rooflm.lab.quantize.trial import try_format  # here: torch, which others do without

    s = whole_setting(FORMATS_CONTROLS, settings)
    return try_format(s["number_format"], s["group"], s["numbers"], s["outlier"])


def formats_explorer(number_format: str = "int4, symmetric", **settings: Any) -> Explorer:
    """The explorer of formats; in a live notebook its controls move.

    Parameters
    ----------
    number_format : where it starts.
    settings : where the other controls start: group, numbers, outlier.
    """
    controls = starting_at(FORMATS_CONTROLS, number_format=number_format, **settings)
    return Explorer(controls, _verdict, _view)


def _verdict(**setting: Any) -> str:
    found = explore_formats(**setting)
    name, group = setting["number_format"], setting["group"]
    words = f"{name}, {group} to a scale, {setting['numbers']}"
    if setting["outlier"]:
        words += f", one of {setting['outlier']} σ in each group"
    words += f": {_decibels(found.measured)} in {number(found.bits, 4)} bits a number"
    if found.predicted is not None:
        words += f"; for normal numbers {_decibels(found.predicted)} is predicted"
    own = _OWN_GROUP.get(name, group)
    return f"{words}." if own == group else f"{words}. The format's own block is {own}."


def _view(**setting: Any) -> str:
    found = explore_formats(**setting)
    peaks = found.numbers.abs().amax(1)
    reach = min(max(4.0, 1.05 * float(peaks.median())), 70.0)
    heights, edges = np.histogram(found.numbers.numpy().ravel(), _BINS, (-reach, reach))
    density = ((edges[1:] + edges[:-1]) / 2).tolist(), heights.tolist()
    levels = {setting["number_format"]: found.levels.tolist()}
    figure = grids(levels, "standard deviations", density, reach)
    shown = figure_html(figure, "The levels of one group, of median scale, under all numbers.")
    bound = _DECIBELS_A_BIT * found.bits
    known = found.predicted is not None
    rows = [
        ("stored bits a number, scales included", number(found.bits, 4)),
        ("SQNR, measured", _decibels(found.measured)),
        ("SQNR, predicted for normal numbers", _decibels(found.predicted) if known else "none"),
        ("largest of a group over its root mean square", number(found.crest, 3)),
        ("Shannon's bound at these bits, normal numbers", _decibels(bound)),
        ("below the bound", _decibels(bound - found.measured)),
    ]
    return shown + table(rows, ["quantity", "value"], caption="What the setting costs").html


def _decibels(value: Any) -> str:
    return f"{number(float(value), 3)} dB"
