"""The explorer of sparsity: what zeros save in bytes and in time, by how they are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rooflm.roofline.analysis import Report, analyze
from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.formats import Format, Precision, load_format
from rooflm.roofline.hardware import hardware_names
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import unknown
from rooflm.roofline.removal import shrink
from rooflm.roofline.sparsity import INDEXES, Layout, break_even_density
from rooflm.show.canvas import Figure
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    on_a_device,
    whole_setting,
)
from rooflm.show.figures import lines
from rooflm.show.tables import Table, table
from rooflm.show.words import fit_words, number, si

CONTEXT = 1024  # tokens of a prompt in prefill, of the whole sequence in decode
DENSE, TWO_FOUR, LAYERS = "dense", "2:4", "whole layers"
SPARSITY_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-2-7b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a100-80gb"),
    Control("values", "Values", "choice", ("fp16", "int8", "int4-g128"), "fp16"),
    Control("pattern", "Zeros as", "choice", (*INDEXES, TWO_FOUR, LAYERS), "bitmap"),
    Control("sparsity", "Zeros, %", "steps", (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95), 50),
    Control("phase", "Phase", "choice", ("prefill", "decode"), "decode"),
    Control("batch", "Batch", "steps", doubling(1, 1024), 1),
)
_SHARES = tuple(range(0, 100, 5))


def sparse_plans(**settings: Any) -> dict[str, Report]:
    """A pass of the setting with dense weights and with its share of zeros, stored in each way.

    2:4 has half of them zero whatever the setting; of whole layers the nearest number goes.
    Activations compute at INT8 beside INT8 weights, else at FP16.

    Parameters
    ----------
    settings : values of the controls; those left out are at their start.

    Raises
    ------
    ValueError
        for an unknown control or value.
    """
    s = _setting(settings)
    values, share = s["values"], s["sparsity"]
    names = {DENSE: values}
    names |= {x: f"{values}-{share}%-{x}" for x in _layouts(values)}
    names[TWO_FOUR] = f"{values}-{TWO_FOUR}"
    model = load_model(s["model"])
    plans = {name: _run(s, model, weights) for name, weights in names.items()}
    plans[LAYERS] = _run(s, _fewer_layers(model, share), values)
    return plans


def sparsity_explorer(
    model: str = "meta-llama/Llama-2-7b-hf", device: str = "nvidia-a100-80gb", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: values, pattern, sparsity, phase, batch.
    """
    return on_a_device(SPARSITY_CONTROLS, _verdict, _view, model, device, settings)


def _verdict(**s: Any) -> str:
    """The chosen way to store zeros in one sentence."""
    plans = sparse_plans(**s)
    chosen, dense = plans[s["pattern"]], plans[DENSE]
    name = s["model"].rsplit("/", 1)[-1]
    setting = f"{name} on {s['device']}, {s['phase']}, batch {number(s['batch'])}"
    ratio = float(dense.seconds / chosen.seconds)
    weights = f"{si(chosen.memory.weights, 'B')} of weights for {si(dense.memory.weights, 'B')}"
    times = f"{si(chosen.seconds, 's')} for {si(dense.seconds, 's')}"
    what = f"{_share_words(s)} as {s['pattern']}"
    if s["pattern"] == LAYERS:
        what = f"{chosen.model.layers} of {dense.model.layers} layers left"
    saves = chosen.memory.weights < dense.memory.weights * (1 - 1e-9)
    start = f"{setting}: {what}, {weights}"
    fit = fit_words(chosen)
    if ratio > 1.005:
        return f"{start} and {times}: {number(ratio, 3)} times as fast{fit}."
    if ratio < 0.995:
        return f"{start} and {times}: it costs time{fit}."
    if saves:
        return f"{start}, but {times}: no time is saved{fit}."
    return f"{start} and {times}: nothing is saved{fit}."


def _view(**s: Any) -> str:
    caption = f"Time of the pass over the dense one, {s['phase']}, batch {number(s['batch'])}."
    return figure_html(_figure(s), caption) + _table(s, sparse_plans(**s)).html


def _figure(s: dict[str, Any]) -> Figure:
    """Times over shares of zeros; densities go through the formulas as one array."""
    model, shares = load_model(s["model"]), np.array(_SHARES, dtype=float)
    dense = float(_run(s, model, s["values"]).seconds)
    values = load_format(s["values"])
    series = {}
    for name in _layouts(s["values"]):
        layout = Layout("sweep", 1 - shares / 100, INDEXES[name])
        report = _run(s, model, replace(values, name="sweep", layout=layout))
        series[name] = report.seconds / dense
    at_half = float(_run(s, model, f"{s['values']}-{TWO_FOUR}").seconds) / dense
    series[TWO_FOUR] = np.where(shares == 50, at_half, np.nan)
    left = [_fewer_layers(model, share) for share in _SHARES]
    series[LAYERS] = [float(_run(s, m, s["values"]).seconds) / dense for m in left]
    marks = {f"chosen, {s['sparsity']} %": float(s["sparsity"])}
    return lines(_SHARES, series, "zeros (%)", "time over that of dense weights", marks=marks)


def _table(s: dict[str, Any], plans: dict[str, Report]) -> Table:
    dense, rows = plans[DENSE], []
    value_bits = load_format(s["values"]).element_bits
    for name, report in plans.items():
        weights = report.precision.weights
        even = {TWO_FOUR: "50 % always", LAYERS: "the first"}.get(name, "")
        if name in INDEXES:
            density = break_even_density(value_bits, INDEXES[name])
            even = f"{number(100 * (1 - density), 3)} %" if density > 0 else "never"
        rates = {row.rate for row in report.operators if row.name == "lm_head"}
        rows.append(
            (
                f"{name}{' (chosen)' if name == s['pattern'] else ''}",
                number(weights.bits, 4),
                even,
                si(report.memory.weights, "B"),
                {True: "yes", False: "no", None: "unknown"}[report.fits],
                si(report.bytes, "B"),
                "/".join(rates),
                si(report.seconds, "s"),
                f"{number(float(dense.seconds / report.seconds), 3)} ×",
            )
        )
    columns = [
        "weights", "bits each", "saves bytes from", "in memory", "fits", "moved", "roof", "time",
        "speed",
    ]  # fmt: skip
    caption = f"{_share_words(s)}, by how they are stored; decoding the places costs nothing here"
    return table(rows, columns, caption=caption)


def _setting(settings: dict[str, Any]) -> dict[str, Any]:
    s = whole_setting(SPARSITY_CONTROLS, settings)
    patterns = (*INDEXES, TWO_FOUR, LAYERS)
    if s["pattern"] not in patterns:
        raise unknown("pattern", s["pattern"], patterns)
    if s["phase"] not in ("prefill", "decode"):
        raise unknown("phase", s["phase"], ("prefill", "decode"))
    share = s["sparsity"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 100:
        raise ValueError(f"sparsity is {share!r}; allowed: a percentage from 0, below 100")
    if s["pattern"] not in (*_layouts(s["values"]), TWO_FOUR, LAYERS):
        raise ValueError(f"{s['pattern']} holds 16-bit values; given {s['values']}")
    return s


def _layouts(values: str) -> list[str]:
    """The layouts that hold such values."""
    wide = load_format(values).element_bits == 16
    return [name for name in INDEXES if wide or name != "tiled-csl"]


def _run(s: dict[str, Any], model: Model, weights: str | Format) -> Report:
    phase = ForwardPass.prefill if s["phase"] == "prefill" else ForwardPass.decode
    activations = "int8" if s["values"] == "int8" else "fp16"
    precision = Precision(weights, activations)
    return analyze(model, s["device"], phase(s["batch"], CONTEXT), precision)


def _fewer_layers(model: Model, share: float) -> Model:
    """The model without that percentage of each kind of its layers, rounded; one is left."""
    left = [max(1, round(count * (1 - share / 100))) for count, _ in model.blocks]
    return shrink(model, layers=left)


def _share_words(s: dict[str, Any]) -> str:
    return f"{50 if s['pattern'] == TWO_FOUR else s['sparsity']} % zeros"
