"""The explorer of memory- and compute-bound operation: one forward pass, and where it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rooflm.roofline.analysis import ATTENTIONS, Report, analyze
from rooflm.roofline.config import model_names
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import hardware_names
from rooflm.roofline.model import ForwardPass
from rooflm.roofline.numeric import unknown
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    starting_at,
    whole_setting,
)
from rooflm.show.figures import roofline
from rooflm.show.tables import Table, operators, table
from rooflm.show.words import number, plain, report_words, si

EXPLORER_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-2-7b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a6000"),
    Control("phase", "Phase", "choice", ("prefill", "decode"), "decode"),
    Control("batch", "Batch", "steps", doubling(1, 1024), 1),
    Control("context", "Context", "steps", doubling(128, 131072), 2048),
    Control(
        "weights", "Weights", "choice",
        ("fp16", "fp8", "int8", "int4-g128", "mxfp4", "nvfp4", "int2-g64"), "fp16",
    ),
    Control("activations", "Activations", "choice", ("fp16", "fp8", "int8"), "fp16"),
    Control("kv_cache", "KV cache", "choice", ("fp16", "fp8", "int8", "int4"), "fp16"),
    Control("attention", "Attention", "choice", ATTENTIONS, "flash"),
)  # fmt: skip


def explore(**settings: Any) -> tuple[Report, list[tuple[str, str]]]:
    """What the explorer shows for a setting of its controls; those left out are at the start.

    Returns
    -------
    report : the forward pass; in prefill the context is the prompt.
    rows : (quantity, value) of the totals, in words.

    Raises
    ------
    ValueError
        for an unknown control or value, or a format that the device has no rate for.
    """
    s = whole_setting(EXPLORER_CONTROLS, settings)
    phases = {"prefill": ForwardPass.prefill, "decode": ForwardPass.decode}
    if s["phase"] not in phases:
        raise unknown("phase", s["phase"], phases)
    step = phases[s["phase"]](s["batch"], s["context"])
    precision = Precision(s["weights"], s["activations"], s["kv_cache"])
    report = analyze(s["model"], s["device"], step, precision, attention=s["attention"])
    return report, _totals(report)


def explorer(
    model: str = "meta-llama/Llama-2-7b-hf", device: str = "nvidia-a6000", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: phase, batch, context, weights, activations,
        kv_cache, attention.
    """
    settings |= {"model": model, "device": device}
    report, _ = explore(**settings)
    settings |= {"model": report.model.name, "device": report.device.name}
    controls = starting_at(EXPLORER_CONTROLS, **settings)
    return Explorer(controls, lambda **s: _verdict(explore(**s)[0]), _view)


def _view(**settings: Any) -> str:
    """Figure, totals and operators of one setting."""
    report, totals = explore(**settings)
    caption = f"Operators of {report_words(report)}, under the roofs."
    shown = figure_html(roofline(report.device, report), caption)
    return f"{shown}{_totals_table(report, totals).html}{operators(report).html}"


def _verdict(report: Report) -> str:
    """The setting's answer in one sentence, a plan that does not fit first."""
    speed = (
        f"{si(report.seconds, 's')} at the roofs, {report.bound}-bound, "
        f"{number(float(report.tokens_per_second), 3)} tokens/s."
    )
    if plain(report.fits) is False:
        return f"{report_words(report)}. On more memory: {speed}"
    return f"{report_words(report)}: {speed}"


def _totals(report: Report) -> list[tuple[str, str]]:
    held, capacity = report.memory, report.device.memory_capacity
    fits = {True: "yes", False: "no", None: "capacity not published"}[plain(report.fits)]
    return [
        ("time of the pass, operator by operator", si(report.seconds, "s")),
        ("lower bound of any schedule", si(report.lower_bound, "s")),
        ("bound for most of the time", str(report.bound)),
        ("new tokens", f"{number(float(report.tokens_per_second), 3)} tokens/s"),
        ("work", si(report.flops, "FLOP")),
        ("bytes moved", si(report.bytes, "B")),
        ("memory for weights", si(held.weights, "B")),
        ("memory for the KV cache", si(held.kv_cache, "B")),
        ("memory for activations", si(held.activations, "B")),
        ("memory in all", si(held.total, "B")),
        ("capacity of the device", "not published" if capacity is None else si(capacity, "B")),
        ("fits", fits),
    ]


def _totals_table(report: Report, totals: list[tuple[str, str]]) -> Table:
    made = table(totals, columns=["quantity", "value"], caption=f"Totals: {report_words(report)}")
    return replace(made, right=(False, True))
