"""The explorer of cache bits: a decode step with the cache in each format, its time and memory."""

from __future__ import annotations

from typing import Any

from rooflm.roofline.analysis import Report, analyze
from rooflm.roofline.config import model_names
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import hardware_names, load_hardware
from rooflm.roofline.model import ForwardPass
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    on_a_device,
    whole_setting,
)
from rooflm.show.stacks import memory_bars
from rooflm.show.tables import Table, table
from rooflm.show.words import number, plain, si

KV_FORMATS = ("fp16", "fp8", "int8", "int4-g32", "int2-g32", "int2-g128")
KV_BITS_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-2-13b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a6000"),
    Control("batch", "Batch", "steps", doubling(1, 1024), 16),
    Control("context", "Context", "steps", doubling(128, 1048576), 4096),
    Control("weights", "Weights", "choice", ("fp16", "int8", "int4-g128", "int2-g64"), "int4-g128"),
    Control("kv_cache", "KV cache", "choice", KV_FORMATS, "int4-g32"),
)  # fmt: skip


def kv_bits_steps(**settings: Any) -> dict[str, Report]:
    """A decode step of the setting with an FP16 cache and with the chosen one, and in FP16 alone.

    Parameters
    ----------
    settings : values of the controls; those left out are at their start.

    Raises
    ------
    ValueError
        for an unknown control or value.
    """
    s = whole_setting(KV_BITS_CONTROLS, settings)
    step = ForwardPass.decode(s["batch"], s["context"])
    plans = {"FP16": ("fp16", "fp16")}
    plans[f"{s['weights']}, KV fp16"] = (s["weights"], "fp16")
    plans[f"{s['weights']}, KV {s['kv_cache']}"] = (s["weights"], s["kv_cache"])
    return {
        name: analyze(s["model"], s["device"], step, Precision(weights, "fp16", cache))
        for name, (weights, cache) in plans.items()
    }


def cache_share(report: Report) -> float:
    """The part of the moved bytes that belongs to the KV cache."""
    moved = sum(row.count * row.kv_bytes for row in report.operators)
    return float(plain(moved)) / float(plain(report.bytes))


def kv_bits_explorer(
    model: str = "meta-llama/Llama-2-13b-hf", device: str = "nvidia-a6000", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: batch, context, weights, kv_cache.
    """
    return on_a_device(KV_BITS_CONTROLS, _verdict, _view, model, device, settings)


def _verdict(**s: Any) -> str:
    """The setting's answer in one sentence."""
    *_, before, after = kv_bits_steps(**s).values()
    name = s["model"].rsplit("/", 1)[-1]
    words = (
        f"{name} on {after.device.name}, {s['batch']} of {s['context']:,} tokens, weights "
        f"{s['weights']}: a cache in {s['kv_cache']} instead of FP16 takes a step from "
        f"{si(before.seconds, 's')} to {si(after.seconds, 's')}"
    )
    return f"{words}; with it the plan {_fit(after)}."


def _view(**s: Any) -> str:
    """Memory bars of the three plans, and what each costs."""
    steps = kv_bits_steps(**s)
    device = load_hardware(s["device"])
    figure = memory_bars({name: report.memory for name, report in steps.items()}, device)
    caption = "Memory of a decode step, by what it holds."
    return figure_html(figure, caption) + _table(steps).html


def _table(steps: dict[str, Report]) -> Table:
    rows = [
        ("bits of a number in the cache", *(number(r.precision.k * 8, 4) for r in steps.values())),
        ("time of a step, at the roofs", *(si(r.seconds, "s") for r in steps.values())),
        ("tokens a second", *(number(float(r.tokens_per_second), 3) for r in steps.values())),
        ("of the bytes moved, KV cache", *(f"{cache_share(r):.0%}" for r in steps.values())),
        ("weights", *(si(r.memory.weights, "B") for r in steps.values())),
        ("KV cache", *(si(r.memory.kv_cache, "B") for r in steps.values())),
        ("in all", *(si(r.memory.total, "B") for r in steps.values())),
        ("this device", *(_fit(r) for r in steps.values())),
    ]
    return table(rows, ["a decode step", *steps], caption="Three ways to store the same model")


def _fit(report: Report) -> str:
    words = {True: "fits", False: "does not fit", None: "perhaps fits (capacity not published)"}
    return words[plain(report.fits)]
