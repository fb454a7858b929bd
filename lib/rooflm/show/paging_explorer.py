"""The explorer of paging: how many requests a device holds at once, and what they waste."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rooflm.lab.kvcache.trace import mean_held
from rooflm.roofline.analysis import analyze
from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import hardware_names, load_hardware
from rooflm.roofline.memory import memory
from rooflm.roofline.model import ForwardPass
from rooflm.show.canvas import Figure
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    on_a_device,
    whole_setting,
)
from rooflm.show.figures import bars
from rooflm.show.tables import Table, table
from rooflm.show.words import number, si

PAGING_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-2-13b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a100-40gb"),
    Control("weights", "Weights", "choice", ("fp16", "fp8", "int8", "int4-g128"), "fp16"),
    Control("block_tokens", "Block", "steps", doubling(1, 512), 16),
    Control("prompt", "Mean prompt", "steps", doubling(16, 8192), 128),
    Control("output", "Mean answer", "steps", doubling(16, 8192), 256),
    Control("spread", "Spread", "choice", (0.0, 0.5, 0.8, 1.2), 0.8),
    Control("longest", "Longest", "steps", doubling(1024, 131072), 2048),
    Control("shared", "Shared start", "steps", (0, *doubling(64, 4096)), 0),
)


class Placed(NamedTuple):
    """What one way of placing requests comes to.

    batch : requests that run at once; used, reserved, internal, spare : shares of the slots;
    tokens_per_second : of a decode step at the roofs, 0 where nothing runs.
    """

    batch: int
    used: float
    reserved: float
    internal: float
    spare: float
    tokens_per_second: float


def paging_plans(**settings: Any) -> tuple[int, dict[str, Placed]]:
    """The slots of a setting, and what becomes of them under three ways to place requests.

    By means alone: every request holds what one does on average over time (`mean_held`), and no
    memory is lost between pieces, which flatters the contiguous ways.

    Parameters
    ----------
    settings : values of the controls; those left out are at their start.

    Raises
    ------
    ValueError
        for an unknown control or value, a device without a published capacity, or requests that
        are longer than the longest.
    """
    s = whole_setting(PAGING_CONTROLS, settings)
    model, device = load_model(s["model"]), load_hardware(s["device"])
    now, final = mean_held(s["prompt"], s["output"], s["spread"])
    if final > s["longest"]:
        raise ValueError(
            f"longest is {s['longest']}; allowed: at least {math.ceil(final)}, what a request "
            "holds at its end on average"
        )
    p = Precision(weights=s["weights"])
    capacity = device.memory_capacity
    if capacity is None:
        raise ValueError(f"the capacity of {device.name} is not published")
    free = capacity - memory(model, p, context=1).total
    slots = max(0, int(free // model.cache_bytes(1, 1, p.k)))
    size = s["block_tokens"]
    common = s["shared"] // size * size
    page = now + s["shared"] - common + (size - 1) / 2
    own = {
        "longest": s["longest"] + s["shared"],
        "known length": final + s["shared"],
        "paged": page,
    }
    plans = {}
    for name, held in own.items():
        batch = int(max(0, slots - (common if name == "paged" else 0)) // held)
        context = now + s["shared"]
        distinct = batch * context - (common * (batch - 1) if name == "paged" and batch else 0)
        reserved = 0 if name == "paged" else batch * (final - now)
        internal = batch * {
            "longest": s["longest"] - final, "known length": 0.0, "paged": (size - 1) / 2
        }[name]  # fmt: skip
        speed = 0.0
        if batch:
            step = ForwardPass.decode(batch, max(1, round(context)))
            speed = float(analyze(model, device, step, p).tokens_per_second)
        spare = slots - distinct - reserved - internal
        shares = [x / max(slots, 1) for x in (distinct, reserved, internal, spare)]
        plans[name] = Placed(batch, shares[0], shares[1], shares[2], shares[3], speed)
    return slots, plans


def paging_explorer(
    model: str = "meta-llama/Llama-2-13b-hf", device: str = "nvidia-a100-40gb", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: weights, block_tokens, prompt, output, spread,
        longest, shared.
    """
    return on_a_device(PAGING_CONTROLS, _verdict, _view, model, device, settings)


def _verdict(**s: Any) -> str:
    """The setting's answer in one sentence."""
    slots, plans = paging_plans(**s)
    name = s["model"].rsplit("/", 1)[-1]
    if not slots:
        return f"{name} in {s['weights']} leaves no room for a cache on {s['device']}."
    paged, longest = plans["paged"], plans["longest"]
    return (
        f"{name} on {s['device']}: {number(slots)} slots; {number(paged.batch)} requests in blocks "
        f"of {s['block_tokens']}, {number(longest.batch)} where each gets the longest; blocks "
        f"waste {paged.internal:.1%}."
    )


def _view(**s: Any) -> str:
    slots, plans = paging_plans(**s)
    if not slots:
        return ""
    caption = "Shares of the KV memory, by means; holes between pieces are not counted."
    return figure_html(_figure(plans), caption) + _table(slots, plans).html


def _figure(plans: dict[str, Placed]) -> Figure:
    parts = ("used", "reserved", "internal")
    series = {part: [100 * getattr(plan, part) for plan in plans.values()] for part in parts}
    return bars(list(plans), series, "share of the memory (%)")


def _table(slots: int, plans: dict[str, Placed]) -> Table:
    rows: list[tuple[Any, ...]] = [("requests at once", *(x.batch for x in plans.values()))]
    for part in ("used", "reserved", "internal", "spare"):
        rows.append((part, *(f"{getattr(plan, part):.1%}" for plan in plans.values())))
    speeds = (f"{number(plan.tokens_per_second, 3)}/s" for plan in plans.values())
    rows.append(("tokens at the roofs", *speeds))
    total = si(slots, "slots")
    return table(rows, ["quantity", *plans], caption=f"Three ways to place requests in {total}")
