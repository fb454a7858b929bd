"""The explorer of what fits: weights, cache and activations against the memory of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rooflm.roofline.capacity import largest_batch, largest_context
from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import Hardware, hardware_names, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import Model
from rooflm.roofline.numeric import LARGEST_SIZE
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    starting_at,
    whole_setting,
)
from rooflm.show.figures import memory_bars
from rooflm.show.tables import table
from rooflm.show.words import number, si

FITS_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-3.1-8B"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-h100-sxm"),
    Control(
        "weights", "Weights", "choice",
        ("fp16", "fp8", "int8", "int4-g128", "mxfp4", "nvfp4", "int2-g64"), "fp16",
    ),
    Control("kv_cache", "KV cache", "choice", ("fp16", "fp8", "int8", "int4", "int2-g64"), "fp16"),
    Control("batch", "Batch", "steps", doubling(1, 1024), 1),
    Control("context", "Context", "steps", doubling(1024, 1048576), 131072),
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """What a setting holds, and how far it could go; None where a capacity is not published."""

    model: Model
    device: Hardware
    batch: int
    context: int
    memory: Memory
    token_bytes: float
    largest_batch: int | None
    largest_context: int | None


def explore_fits(**settings: Any) -> Fit:
    """What the explorer shows for a setting of its controls; those left out are at the start.

    `token_bytes` is what one more token of every sequence adds to the cache of one.

    Raises
    ------
    ValueError
        for an unknown control or value.
    """
    s = whole_setting(FITS_CONTROLS, settings)
    model, device = load_model(s["model"]), load_hardware(s["device"])
    p = Precision(weights=s["weights"], kv_cache=s["kv_cache"])
    batch, context = s["batch"], s["context"]
    held = memory(model, p, batch, context)
    next_token = memory(model, p, 1, context + 1).kv_cache - memory(model, p, 1, context).kv_cache
    return Fit(
        model, device, batch, context, held, next_token,
        largest_batch(model, device, p, context), largest_context(model, device, p, batch),
    )  # fmt: skip


def fits_explorer(
    model: str = "meta-llama/Llama-3.1-8B", device: str = "nvidia-h100-sxm", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: weights, kv_cache, batch, context.
    """
    found = explore_fits(model=model, device=device, **settings)
    settings |= {"model": found.model.name, "device": found.device.name}
    return Explorer(starting_at(FITS_CONTROLS, **settings), _verdict, _view)


def _verdict(**settings: Any) -> str:
    """The setting's answer in one sentence."""
    found = explore_fits(**settings)
    held, capacity = found.memory, found.device.memory_capacity
    name = found.model.name.rsplit("/", 1)[-1]
    sizes = f"batch {number(found.batch)}, context {number(found.context)}"
    words = f"{name} on {found.device.name}, {sizes}: {si(held.total, 'B')}"
    if capacity is None:
        return f"{words}; the device's capacity is not published."
    if held.fits(found.device):
        return f"{words} of {si(capacity, 'B')}, fits with {si(capacity - held.total, 'B')} free."
    if not found.largest_context and held.weights > capacity:
        return f"{words} of {si(capacity, 'B')}, DOES NOT FIT: the weights alone are too large."
    return f"{words} of {si(capacity, 'B')}, DOES NOT FIT: {si(held.total - capacity, 'B')} short."


def _view(**settings: Any) -> str:
    """The bar and the limits of one setting."""
    found = explore_fits(**settings)
    held = found.memory
    name = found.model.name.rsplit("/", 1)[-1]
    figure = memory_bars({name: held}, found.device)
    shown = figure_html(figure, "What a decode step of this setting must hold.")
    rows = [
        ("weights", si(held.weights, "B")),
        ("KV cache and states", si(held.kv_cache, "B")),
        ("activations", si(held.activations, "B")),
        ("share of cache and states", f"{100 * held.kv_cache / held.total:.1f} %"),
        ("cache of one more token of a sequence", si(found.token_bytes, "B")),
        (f"largest batch at context {number(found.context)}", _limit(found.largest_batch)),
        (f"largest context at batch {number(found.batch)}", _limit(found.largest_context)),
    ]
    return shown + table(rows, ["quantity", "value"], caption="What is held, and what fits").html


def _limit(value: int | None) -> str:
    if value is None:
        return "capacity not published"
    if value == LARGEST_SIZE:
        return "no limit"
    return number(value) if value else "0: nothing fits"
