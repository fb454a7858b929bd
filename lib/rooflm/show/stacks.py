"""Stacked bars: where the time and the bytes of a pass go, and what a deployment holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from rooflm.roofline.analysis import Report
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory
from rooflm.show import canvas
from rooflm.show.canvas import HATCHES, INK, PALETTE, Figure, blank, fold
from rooflm.show.points import short_names
from rooflm.show.words import PREFIXES, fit_words, scalar, si

QUANTITIES = {"seconds": ("time", "s"), "bytes": ("bytes moved", "B"), "flops": ("work", "FLOP")}
MOST_PARTS = 8
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def operator_bars(
    reports: Report | Mapping[str, Report], quantity: str = "seconds", alt: str | None = None
) -> Figure:
    """Where a pass goes: a bar a report, its operators (all layers) side by side.

    Parameters
    ----------
    reports : {label: report}, or one report.
    quantity : "seconds", "bytes" or "flops".
    alt : words in place of those made from the numbers.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; allowed: {', '.join(QUANTITIES)}")
    if isinstance(reports, Report):
        reports = {reports.model.name.rsplit("/", 1)[-1]: reports}
    what, unit = QUANTITIES[quantity]
    bars_by_label: dict[str, dict[str, float]] = {}
    for label, report in reports.items():
        parts: dict[str, float] = {}
        for row in report.operators:
            value = row.count * scalar(getattr(row, quantity), f"{quantity} of {row.name}")
            name = _family(row.name)
            parts[name] = parts.get(name, 0.0) + value
        bars_by_label[label + fit_words(report)] = parts
    return _stacked(_few_parts(bars_by_label), what, unit, alt)


def memory_bars(
    memories: Memory | Mapping[str, Memory],
    device: Hardware | str | None = None,
    alt: str | None = None,
) -> Figure:
    """What a deployment holds: weights, KV cache and activations, beside the device's capacity.

    Parameters
    ----------
    memories : {label: memory}, or one memory.
    device : the device whose capacity is drawn; None for none.
    alt : words in place of those made from the numbers.
    """
    if isinstance(memories, Memory):
        memories = {"memory": memories}
    found = load_hardware(device) if device is not None else None
    capacity = found.memory_capacity if found is not None else None
    parts = {
        label: {
            "weights": scalar(held.weights, "weights"),
            "KV cache": scalar(held.kv_cache, "kv_cache"),
            "activations": scalar(held.activations, "activations"),
        }
        for label, held in memories.items()
    }
    line, what = None, "memory"
    if found is not None and capacity is not None:
        line = (f"capacity of {found.name}", capacity)
    elif found is not None:
        what = f"memory; {found.name}'s capacity is not published"
    return _stacked(parts, what, "B", alt, line)


def _family(name: str) -> str:
    """Operators that are drawn as one: the factors of a projection with it."""
    if name.endswith(("_proj_a", "_proj_b")):
        name = name[:-2]
    if name in _PROJECTIONS:
        return short_names(_PROJECTIONS)
    if name in ("gate_proj", "up_proj", "down_proj"):
        return "gate/up/down_proj"
    if name.endswith("_norm"):
        return "norms"
    if name.endswith("_add"):
        return "adds"
    return name


def _few_parts(by_label: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The same bars with the smallest parts summed as "other", in one order for all."""
    largest: dict[str, float] = {}
    for parts in by_label.values():
        total = sum(parts.values()) or 1.0
        for name, value in parts.items():
            largest[name] = max(largest.get(name, 0.0), value / total)
    keep = [name for name in largest if largest[name] >= 0.005]
    keep = sorted(keep, key=lambda name: -largest[name])[: MOST_PARTS - 1]
    few = {}
    for label, parts in by_label.items():
        few[label] = {name: parts.get(name, 0.0) for name in keep}
        rest = sum(value for name, value in parts.items() if name not in keep)
        if set(largest) - set(keep):
            few[label]["other"] = rest
    return few


def _stacked(
    by_label: dict[str, dict[str, float]],
    what: str,
    unit: str,
    alt: str | None,
    line: tuple[str, float] | None = None,
) -> Figure:
    """Horizontal bars of stacked parts; `line` is a limit, (text, value)."""
    if not by_label:
        raise ValueError("there is nothing to draw; allowed: at least one bar")
    totals = {label: sum(parts.values()) for label, parts in by_label.items()}
    most = max([*totals.values(), line[1] if line else 0.0])
    power = 3 * int(np.floor(np.log10(most) / 3)) if most > 0 else 0
    names = list(next(iter(by_label.values())))
    with blank(1.5 + 0.55 * len(by_label) + 0.22 * ((len(names) + 2) // 2)) as ax:
        rows = np.arange(len(by_label))
        left = np.zeros(len(by_label))
        for i, name in enumerate(names):
            width = np.array([parts[name] for parts in by_label.values()]) / 10**power
            color = PALETTE[-1] if name == "other" else PALETTE[i % 7]
            ax.barh(rows, width, 0.62, left=left, label=name, color=color, edgecolor=INK,
                    linewidth=0.6, hatch=HATCHES[i % 8])  # fmt: skip
            left += width
        ends = [
            si(total, unit) + (", does not fit" if line and total > line[1] else "")
            for total in totals.values()
        ]
        if line:
            ax.axvline(line[1] / 10**power, color=INK, linestyle="--",
                       label=f"{line[0]}, {si(line[1], unit)}")  # fmt: skip
        ax.set_yticks(rows, [fold(label, 22) for label in by_label])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{what} ({PREFIXES[power]}{unit})")
        texts = ax.get_legend_handles_labels()[1]
        canvas.legend(ax, sorted(range(len(texts)), key=lambda i: texts[i] not in names))
        _write_totals(ax, [total / 10**power for total in totals.values()], ends)
        return canvas.finish(ax, alt or _stacked_alt(by_label, what, unit, line))


def _write_totals(ax: Axes, ends: list[float], texts: list[str]) -> None:
    """Write a text at the end of each bar, and make the axis long enough for the texts."""
    written = [
        ax.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=10,
                    in_layout=False, bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 1})
        for row, (end, text) in enumerate(zip(ends, texts, strict=True))
    ]  # fmt: skip
    renderer = canvas.settle(ax)
    room = ax.get_window_extent(renderer).width
    needed = [
        end * room / (room - text.get_window_extent(renderer).width - 16)
        for end, text in zip(ends, written, strict=True)
    ]
    ax.set_xlim(0, max([*needed, ax.get_xlim()[1]]))


def _stacked_alt(
    by_label: Mapping[str, Mapping[str, float]],
    what: str,
    unit: str,
    line: tuple[str, float] | None,
) -> str:
    parts = []
    for label, of_bar in by_label.items():
        total = sum(of_bar.values())
        over = ", does not fit" if line and total > line[1] else ""
        each = ", ".join(f"{name} {si(value, unit)}" for name, value in of_bar.items() if value)
        parts.append(f"{label}: {si(total, unit)} in all{over} ({each})")
    text = f"Stacked bars of {what}. " + "; ".join(parts)
    return text + (f"; {line[0]}: {si(line[1], unit)}." if line else ".")
