"""Bars and lines: where the time, the bytes or the memory of a plan goes, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rooflm.roofline.analysis import Report
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory
from rooflm.show import canvas
from rooflm.show.canvas import HATCHES, INK, MARKERS, PALETTE, Figure, blank, figure, fold
from rooflm.show.rooflines import roofline, roofs, short_names
from rooflm.show.words import PREFIXES, fit_words, number, scalar, si

__all__ = ["bars", "figure", "lines", "memory_bars", "operator_bars", "roofline", "roofs"]

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
    line = None
    if found is not None and capacity is not None:
        line = (f"capacity of {found.name}", capacity)
    return _stacked(parts, "memory", "B", alt, line)


def lines(
    x: Sequence[Any],
    series: Mapping[str, Sequence[Any]],
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    marks: Mapping[str, float] | None = None,
    alt: str | None = None,
) -> Figure:
    """Curves over one axis.

    Parameters
    ----------
    x : (points,) values of the horizontal axis.
    series : {label: (points,) values}; NaN leaves a gap.
    xlabel, ylabel : quantity and unit.
    xscale, yscale : "linear", "log" or "log2".
    marks : {text: x}, vertical lines.
    alt : words in place of those made from the numbers; give it where numbers are measured.
    """
    across = np.asarray(x, dtype=float)
    values = {label: np.asarray(y, dtype=float) for label, y in series.items()}
    for label, y in values.items():
        if y.shape != across.shape or y.ndim != 1:
            raise ValueError(f"{label} has shape {y.shape}; allowed: that of x, {across.shape}")
    with blank(3.7 + 0.22 * ((len(values) + 1) // 2 if len(values) > 1 else 0)) as ax:
        canvas.scale(ax, "x", xscale)
        canvas.scale(ax, "y", yscale)
        for i, (label, y) in enumerate(values.items()):
            marker = MARKERS[i % 8] if len(across) <= 24 else ""
            ax.plot(across, y, label=fold(label, 40), color=PALETTE[i % 8],
                    linestyle=canvas.LINE_STYLES[i % 6], marker=marker)  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        _draw_marks(ax, marks or {})
        if len(values) > 1:
            ax.figure.legend(loc="outside lower center", ncols=2)
        return canvas.finish(ax, alt or _lines_alt(across, values, xlabel, ylabel, marks or {}))


def bars(
    labels: Sequence[Any],
    series: Mapping[str, Sequence[Any]],
    ylabel: str,
    yscale: str = "linear",
    alt: str | None = None,
) -> Figure:
    """Bars side by side, a group for each label.

    Parameters
    ----------
    labels : (groups,) names under the axis.
    series : {label: (groups,) values}; None or NaN leaves the place empty.
    ylabel : quantity and unit.
    yscale : "linear" or "log".
    alt : words in place of those made from the numbers; give it where numbers are measured.
    """
    names = [str(label) for label in labels]
    values = {label: np.asarray(y, dtype=float) for label, y in series.items()}
    for label, y in values.items():
        if y.shape != (len(names),):
            raise ValueError(f"{label} has shape {y.shape}; allowed: ({len(names)},), as labels")
    width = 0.8 / max(len(values), 1)
    with blank(3.7 + 0.22 * ((len(values) + 1) // 2 if len(values) > 1 else 0)) as ax:
        canvas.scale(ax, "y", yscale)
        for i, (label, y) in enumerate(values.items()):
            at = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
            drawn = ax.bar(at, y, width * 0.92, label=fold(label, 40), color=PALETTE[i % 8],
                           edgecolor=INK, linewidth=0.6, hatch=HATCHES[i % 8])  # fmt: skip
            if len(names) * len(values) <= 10:
                texts = ["" if v != v else number(v, 3) for v in y]
                ax.bar_label(drawn, texts, fontsize=10, padding=2)
        ax.margins(y=0.1)
        ax.grid(axis="x", visible=False)
        turned = sum(len(name) for name in names) > 60
        ax.set_xticks(range(len(names)), [fold(name, 14) for name in names],
                      rotation=30 if turned else 0, ha="right" if turned else "center")  # fmt: skip
        ax.set_ylabel(ylabel)
        if len(values) > 1:
            ax.figure.legend(loc="outside lower center", ncols=2)
        return canvas.finish(ax, alt or _bars_alt(names, values, ylabel))


def _family(name: str) -> str:
    """Operators that are drawn as one."""
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
    """Horizontal bars of stacked parts; `line` is a limit, {text, value}."""
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
        for row, (total, text) in enumerate(zip(totals.values(), ends, strict=True)):
            ax.annotate(text, (total / 10**power, row), (4, 0), textcoords="offset points",
                        va="center", fontsize=10, in_layout=False,
                        bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 1})  # fmt: skip
        if line:
            ax.axvline(line[1] / 10**power, color=INK, linestyle="--",
                       label=f"{line[0]}, {si(line[1], unit)}")  # fmt: skip
        ax.set_xlim(0, most / 10**power * (1.05 + 0.016 * max(map(len, ends))))
        ax.set_yticks(rows, [fold(label, 22) for label in by_label])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{what} ({PREFIXES[power]}{unit})")
        handles, texts = ax.get_legend_handles_labels()
        order = sorted(range(len(texts)), key=lambda i: bool(line) and texts[i].startswith(line[0]))
        ax.figure.legend([handles[i] for i in order], [texts[i] for i in order],
                         loc="outside lower center", ncols=2)  # fmt: skip
        return canvas.finish(ax, alt or _stacked_alt(by_label, what, unit, line))


def _draw_marks(ax: Axes, marks: Mapping[str, float]) -> None:
    for i, (text, at) in enumerate(marks.items()):
        ax.axvline(at, color="#555555", linestyle=":", linewidth=1.4, zorder=1)
        ax.annotate(text, (at, 0.98 - 0.09 * i), (4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top", fontsize=10,
                    bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
                    )  # fmt: skip


def _lines_alt(
    x: np.ndarray, values: Mapping[str, np.ndarray], xlabel: str, ylabel: str, marks: Mapping
) -> str:
    parts = []
    for label, y in values.items():
        known = np.flatnonzero(np.isfinite(y))
        if len(known):
            first, last = number(float(y[known[0]]), 3), number(float(y[known[-1]]), 3)
            parts.append(f"{label} from {first} to {last}")
        else:
            parts.append(f"{label} has no values")
    text = (
        f"Lines of {ylabel} against {xlabel} from {number(float(x[0]), 4)} to "
        f"{number(float(x[-1]), 4)}: " + "; ".join(parts)
    )
    if marks:
        text += ". Marked: " + ", ".join(f"{t} at {number(float(a), 4)}" for t, a in marks.items())
    return text + "."


def _bars_alt(names: list[str], values: Mapping[str, np.ndarray], ylabel: str) -> str:
    parts = []
    for label, y in values.items():
        each = ", ".join(
            f"{name} {number(float(v), 3) if v == v else 'none'}"
            for name, v in zip(names, y, strict=True)
        )
        parts.append(f"{label}: {each}")
    return f"Bars of {ylabel}. " + "; ".join(parts) + "."


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
        each = ", ".join(f"{name} {si(value, unit)}" for name, value in of_bar.items())
        parts.append(f"{label}: {si(total, unit)} in all{over} ({each})")
    text = f"Stacked bars of {what}. " + "; ".join(parts)
    return text + (f"; {line[0]}: {si(line[1], unit)}." if line else ".")
