"""The explorer of evicting caches: two of them side by side, from the stored map."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rooflm.roofline.numeric import unknown
from rooflm.show.explorer import Control, Explorer, figure_html, starting_at
from rooflm.show.frontier import Measured, frontier
from rooflm.show.tables import Table, table

MODELS = ("teacher", "smollm2")
METHODS = (
    "windowed", "window-only", "h2o", "tova", "snapkv", "snapkv-16-5", "random", "random-sinks",
)  # fmt: skip
BUDGETS = (256, 128, 64, 32, 16)
# {what the reader chooses: (the map's column, its heading)}
MEASURES = {
    "loss": ("difference", "loss added (bits per byte)"),
    "perplexity": ("perplexity", "perplexity"),
    "retrieval": ("exact", "share of facts retrieved"),
}


def eviction_explorer(first: str = "windowed", second: str = "h2o", **settings: Any) -> Explorer:
    """The explorer; in a live notebook its controls move. Nothing is measured: it reads the map.

    Parameters
    ----------
    first, second : the two methods.
    settings : where the other controls start: model, budget, measure.
    """
    controls = (
        Control("first", "Method", "choice", METHODS, "windowed"),
        Control("second", "Beside it", "choice", METHODS, "h2o"),
        Control("model", "Model", "choice", MODELS, "smollm2"),
        Control("budget", "Budget", "choice", BUDGETS, 128),
        Control("measure", "Measure", "choice", tuple(MEASURES), "loss"),
    )
    started = starting_at(controls, first=first, second=second, **settings)
    return Explorer(started, _verdict, _view)


def _verdict(first: str, second: str, model: str, budget: int, measure: str) -> str:
    """The two methods at the chosen budget in one sentence."""
    _check(first, second, model, budget, measure)
    rows = [_at(model, name, budget) for name in (first, second)]
    parts = [f"{n} {_words(row, measure)}" for n, row in zip((first, second), rows, strict=True)]
    start = f"{model}, {budget} of 512 positions, {MEASURES[measure][1]}"
    column = MEASURES[measure][0]
    if first == second or any(row is None or row[column] is None for row in rows):
        return f"{start}: {', '.join(parts)}."
    a, b = (row for row in rows if row is not None)
    low, high = f"{column}_low", f"{column}_high"
    apart = a[low] > b[high] or b[low] > a[high]
    return f"{start}: {', '.join(parts)}; the intervals {'part' if apart else 'overlap'}."


def _view(first: str, second: str, model: str, budget: int, measure: str) -> str:
    """Both methods at every budget that was measured, as a figure and a table."""
    _check(first, second, model, budget, measure)
    column, heading = MEASURES[measure]
    kinds = {name: _of(model, name) for name in dict.fromkeys((first, second))}
    ends = (column, f"{column}_low", f"{column}_high")
    series = {
        name: [Measured(row["budget"], *(row[x] for x in ends)) for row in rows]
        for name, rows in kinds.items()
        if rows and rows[0][column] is not None
    }
    if not series:
        raise ValueError(f"{measure} was not measured on {model}; allowed: loss, perplexity")
    caption = f"{model}: {heading}, 512 tokens read"
    scale = "log" if measure == "perplexity" else "linear"
    picture = frontier(series, "positions held", heading, yscale=scale, joined=True)
    return figure_html(picture, caption) + _table(kinds, budget, caption).html


def _table(kinds: Mapping[str, list[dict[str, Any]]], budget: int, caption: str) -> Table:
    rows = [
        (
            name, f"{row['budget']}{' (chosen)' if row['budget'] == budget else ''}",
            row["bytes_per_token"] * 512 / 1e3, _words(row, "loss"), _words(row, "perplexity"),
            _words(row, "retrieval"),
        )
        for name, of in kinds.items()
        for row in of
    ]  # fmt: skip
    columns = ["method", "held", "kB for 512 tokens", "loss added", "perplexity", "retrieved"]
    return table(rows, columns, caption=caption, digits=3)


@lru_cache(maxsize=2)
def _rows(model: str) -> tuple[dict[str, Any], ...]:
    from rooflm.lab.kvcache.sweep import load_map  # torch, which figures do without

    return tuple(load_map(model))


def _of(model: str, method: str) -> list[dict[str, Any]]:
    """A method's rows, the largest budget first."""
    rows = [row for row in _rows(model) if row["method"] == method and row["weights"] == "fp32"]
    return sorted(rows, key=lambda row: -row["budget"])


def _at(model: str, method: str, budget: int) -> dict[str, Any] | None:
    return next((row for row in _of(model, method) if row["budget"] == budget), None)


def _words(row: Mapping[str, Any] | None, measure: str) -> str:
    column = MEASURES[measure][0]
    if row is None or row[column] is None:
        return "not measured"
    value, low, high = (row[f"{column}{x}"] for x in ("", "_low", "_high"))
    if measure == "loss":
        return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
    if measure == "retrieval":
        return f"{value:.0%} ({low:.0%} to {high:.0%})"
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _check(first: str, second: str, model: str, budget: int, measure: str) -> None:
    for what, given, allowed in (
        ("method", first, METHODS),
        ("method", second, METHODS),
        ("model", model, MODELS),
        ("measure", measure, tuple(MEASURES)),
    ):
        if given not in allowed:
            raise unknown(what, given, allowed)
    if budget not in BUDGETS:
        raise ValueError(f"budget is {budget}; allowed: {', '.join(map(str, BUDGETS))}")
