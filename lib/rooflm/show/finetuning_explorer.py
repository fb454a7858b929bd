"""The explorer of fine-tuning: what training holds in memory, and which devices hold it."""

from __future__ import annotations

from typing import Any

from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.hardware import Hardware, hardware_names, load_hardware
from rooflm.roofline.numeric import unknown
from rooflm.roofline.training import TrainingMemory, training_memory
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

_DENSE = tuple(name for name in model_names() if load_model(name).is_dense)
FINETUNING_CONTROLS = (
    Control("model", "Model", "choice", _DENSE, "meta-llama/Llama-2-70b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a6000"),
    Control(
        "base", "Frozen base", "choice",
        ("fp16", "int8", "nf4", "nf4-dq", "int3-g64", "int2-g64"), "nf4-dq",
    ),
    Control("rank", "Rank", "steps", doubling(1, 256), 64),
    Control("batch", "Batch", "steps", doubling(1, 256), 1),
    Control("tokens", "Tokens", "steps", doubling(128, 8192), 512),
    Control("activations", "Activations", "choice", ("checkpointed", "all kept"), "checkpointed"),
)  # fmt: skip
_PARTS = {
    "frozen": "frozen base",
    "trained": "in training: values, gradients, moments",
    "activations": "activations for the backward pass",
    "logits": "logits and their gradient",
}


def finetuning_plans(**settings: Any) -> dict[str, TrainingMemory]:
    """Three ways to fine-tune the model of a setting: all of it, LoRA, and on the chosen base.

    Parameters
    ----------
    settings : values of the controls; those left out are at their start.

    Raises
    ------
    ValueError
        for an unknown control or value, or a rank that the model is too narrow for.
    """
    s = whole_setting(FINETUNING_CONTROLS, settings)
    if s["activations"] not in ("checkpointed", "all kept"):
        raise unknown("way to hold activations", s["activations"], ("checkpointed", "all kept"))
    how = s["batch"], s["tokens"], s["activations"] == "checkpointed"
    plans = {"full": ("fp16", None), "LoRA on fp16": ("fp16", s["rank"])}
    plans[f"adapter on {s['base']}"] = (s["base"], s["rank"])
    return {name: training_memory(s["model"], *plan, *how) for name, plan in plans.items()}


def finetuning_explorer(
    model: str = "meta-llama/Llama-2-70b-hf", device: str = "nvidia-a6000", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: base, rank, batch, tokens, activations.
    """
    return on_a_device(FINETUNING_CONTROLS, _verdict, _view, model, device, settings)


def _verdict(**s: Any) -> str:
    """The setting's answer in one sentence."""
    held = list(finetuning_plans(**s).values())[-1]
    device = load_hardware(s["device"])
    name = s["model"].rsplit("/", 1)[-1]
    return (
        f"{name} on {s['base']} with adapters of rank {s['rank']}: {si(held.total, 'B')} in "
        f"training, {_fit(held, device)} {device.name}."
    )


def _fit(held: TrainingMemory, device: Hardware) -> str:
    words = {True: "fits", False: "does not fit", None: "perhaps fits (capacity not published)"}
    return words[held.fits(device)]


def _view(**s: Any) -> str:
    """Bars of the three plans, their parts, and the devices that hold each."""
    plans = finetuning_plans(**s)
    device = load_hardware(s["device"])
    name = s["model"].rsplit("/", 1)[-1]
    caption = f"Memory of fine-tuning {name}, by what it holds, GB."
    return figure_html(_figure(plans), caption) + _table(plans, device).html


def _figure(plans: dict[str, TrainingMemory]) -> Figure:
    series = {
        words.split(":")[0]: [getattr(held, part) / 1e9 or None for held in plans.values()]
        for part, words in _PARTS.items()
    }
    return bars(list(plans), series, "memory (GB)", "log")


def _table(plans: dict[str, TrainingMemory], device: Hardware) -> Table:
    rows = [
        (words, *(si(getattr(held, part), "B") for held in plans.values()))
        for part, words in _PARTS.items()
    ]
    rows.append(("in all", *(si(held.total, "B") for held in plans.values())))
    rows.append(("parameters in training", *(number(x.trainable) for x in plans.values())))
    rows.append((f"{device.name}, {_capacity(device)}", *(_fit(x, device) for x in plans.values())))
    count = [sum(bool(held.fits(name)) for name in hardware_names()) for held in plans.values()]
    rows.append((f"devices of {len(hardware_names())} that hold it", *map(str, count)))
    return table(rows, ["memory", *plans], caption="Three ways to fine-tune")


def _capacity(device: Hardware) -> str:
    held = device.memory_capacity
    return "capacity not published" if held is None else si(held, "B")
