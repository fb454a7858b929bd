"""Rooflines: performance against arithmetic intensity, both logarithmic.

Chapter: the roofline model. The picture is Williams, Waterman and Patterson's, CACM 52(4),
2009; the survey's is its Figures 3, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from rooflm.roofline.analysis import Report, Row
from rooflm.roofline.formats import load_format
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.show import labels
from rooflm.show.canvas import (
    HEIGHT, INK, LINE_STYLES, MARKERS, PALETTE, Figure, blank, finish, label_length, scale,
)  # fmt: skip
from rooflm.show.words import fit_words, number, pass_words, report_words, scalar, si

TERA = 1e12


@dataclass(frozen=True)
class Point:
    """Operators that share a place on the roofline: intensity in FLOP/B, attainable in FLOP/s."""

    names: tuple[str, ...]
    intensity: float
    attainable: float
    seconds: float


def roofline(
    device: Hardware | str,
    reports: Report | Mapping[str, Report] | None = None,
    formats: Sequence[str] = ("fp16",),
    title: str | None = None,
    alt: str | None = None,
) -> Figure:
    """The roofs of a device, its ridge points, and the operators of forward passes under them.

    Parameters
    ----------
    device : a device, or its name.
    reports : a report, or {label: report}; their operators become points whose area is
        their share of the time of the pass. Operators at one place share a point.
    formats : number formats whose compute roofs are drawn; those that a report uses are added.
    title, alt : a heading, and words in place of those made from the numbers.
    """
    device = load_hardware(device)
    by_label = _by_label(reports)
    roofs = _roofs(device, formats, by_label)
    points = {label: group(report) for label, report in by_label.items()}
    low, high = _span([device], list(roofs.values()), points)
    with blank(HEIGHT + 0.25 * (len(by_label) > 1)) as ax:
        _frame(ax, low, high)
        lines = _draw_roofs(ax, device, roofs, low, high)
        for number_, (label, of_report) in enumerate(points.items()):
            _draw_points(ax, label + fit_words(by_label[label]), of_report, number_)
        if len(by_label) > 1:
            ax.figure.legend(loc="outside lower center", ncols=min(len(by_label), 2))
        ax.set_title(title or _title(device, by_label), loc="left")
        ax.set_ylim(_floor(device, low, points), max(roofs.values()) / TERA * 4)
        _write(ax, device, points, lines, roofs, low, high)
        return finish(ax, alt or _alt(device, roofs, by_label, points))


def roofs(
    devices: Sequence[Hardware | str], format: str = "fp16", alt: str | None = None
) -> Figure:
    """Several devices' roofs for one number format on one axis, with their ridge points.

    A device that lacks the format is drawn at the next wider one it has, named in the legend.
    """
    loaded = [load_hardware(device) for device in devices]
    x = load_format(format)
    rates = [device.rate(x, x) for device in loaded]
    low, high = _span(loaded, [peak for _, peak in rates], {})
    words = []
    with blank(HEIGHT + 0.2 * len(loaded)) as ax:
        _frame(ax, low, high)
        for i, (device, (name, peak)) in enumerate(zip(loaded, rates, strict=True)):
            ridge = peak / device.bandwidth
            color, style = PALETTE[i % 6 if len(loaded) <= 6 else i % 8], LINE_STYLES[i % 6]
            other = "" if name == x.computes_as else f" ({_format_words(name)})"
            text = (
                f"{device.name}{other}: {si(device.bandwidth, 'B/s')}, {si(peak, 'FLOP/s')}, "
                f"ridge {number(ridge)} FLOP/B"
            )
            intensity = np.array([low, ridge, high])
            performance = np.minimum(peak, intensity * device.bandwidth) / TERA
            ax.plot(intensity, performance, color=color, linestyle=style, label=text)
            ax.plot([ridge], [peak / TERA], marker=MARKERS[i % 8], color=color, linestyle="none")
            words.append(text)
        ax.set_title(f"Roofs for {_format_words(format)}; a marker at each ridge point", loc="left")
        ax.figure.legend(loc="outside lower left", fontsize=9.5)
        return finish(ax, alt or f"Rooflines for {_format_words(format)}: " + "; ".join(words))


def group(report: Report) -> list[Point]:
    """The operators of a pass by place, the longest first; those without arithmetic left out.

    Places closer than 5 % in both directions are one: markers would hide one another.
    """
    found: list[list[Row]] = []
    for row in report.operators:
        intensity = scalar(row.intensity, f"intensity of {row.name}")
        attainable = scalar(row.attainable, f"attainable of {row.name}")
        if not intensity > 0:
            continue
        for rows in found:
            near = abs(np.log(intensity / rows[0].intensity)) < 0.05
            if near and abs(np.log(attainable / rows[0].attainable)) < 0.05:
                rows.append(row)
                break
        else:
            found.append([row])
    points = [_point(rows) for rows in found]
    return sorted(points, key=lambda point: -point.seconds)


def short_names(names: Sequence[str]) -> str:
    """Names with a common ending written once.

    >>> short_names(["q_proj", "k_proj", "lm_head", "attn_norm", "mlp_norm"])
    'q/k_proj, lm_head, attn/mlp_norm'
    """
    by_ending: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        start, _, ending = name.rpartition("_")
        if start and ending in ("proj", "norm", "add", "matmul", "embedding"):
            by_ending.setdefault(f"_{ending}", []).append(start)
        else:
            by_ending.setdefault(name, []).append("")
    return ", ".join("/".join(starts) + ending for ending, starts in by_ending.items())


def _point(rows: list[Row]) -> Point:
    seconds = [row.count * float(row.seconds) for row in rows]
    longest = rows[int(np.argmax(seconds))]
    names = tuple(dict.fromkeys(row.name for row in rows))
    return Point(names, float(longest.intensity), float(longest.attainable), sum(seconds))


def _by_label(reports: Report | Mapping[str, Report] | None) -> dict[str, Report]:
    if reports is None:
        return {}
    if isinstance(reports, Mapping):
        return dict(reports)
    return {pass_words(reports.step): reports}


def _roofs(
    device: Hardware, formats: Sequence[str], reports: Mapping[str, Report]
) -> dict[str, float]:
    """FLOP/s by the name of the rate, for the asked formats and those that rows used."""
    if isinstance(formats, str):
        formats = (formats,)
    found = {}
    for name in formats:
        x = load_format(name)
        rate, peak = device.rate(x, x)
        found[rate] = peak
    for report in reports.values():
        for row in report.operators:
            if row.rate in device.peaks:
                found.setdefault(row.rate, device.peaks[row.rate])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _span(
    devices: Sequence[Hardware], peaks: Sequence[float], points: Mapping[str, list[Point]]
) -> tuple[float, float]:
    """Lowest and highest intensity to draw, at decades or their halves."""
    every = [point.intensity for of_report in points.values() for point in of_report]
    ridges = [peak / device.bandwidth for device in devices for peak in peaks]
    low = min([0.5, *(0.5 * x for x in every)]) if every else 1.0
    high = max([8 * max(ridges), *(3 * x for x in every)])
    return low, high


def _frame(ax: Axes, low: float, high: float) -> None:
    scale(ax, "x", "log")
    scale(ax, "y", "log")
    ax.set_xlim(low, high)
    ax.set_xlabel("arithmetic intensity (FLOP/B)")
    ax.set_ylabel("performance (TFLOP/s)")


def _draw_roofs(
    ax: Axes, device: Hardware, roofs: Mapping[str, float], low: float, high: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    lines = []
    for i, peak in enumerate(roofs.values()):
        ridge = peak / device.bandwidth
        x = np.array([low, ridge, high])
        y = np.minimum(peak, x * device.bandwidth) / TERA
        ax.plot(x, y, color=INK, linestyle=LINE_STYLES[i % 6], zorder=2)
        ax.plot([ridge], [peak / TERA], marker="o", markersize=7, markerfacecolor="#ffffff",
                color=INK, zorder=4)  # fmt: skip
        lines.append((x, y))
    return lines


def _draw_points(ax: Axes, label: str, points: list[Point], i: int) -> None:
    total = sum(point.seconds for point in points) or 1.0
    ax.scatter(
        [point.intensity for point in points],
        [point.attainable / TERA for point in points],
        s=[_area(point.seconds / total) for point in points],
        marker=MARKERS[i % 8], color=PALETTE[i % 8], edgecolors=INK, linewidths=0.6,
        label=label_length(label), zorder=5, alpha=0.9,
    )  # fmt: skip


def _area(share: float) -> float:
    """Marker area in square points; never so small that the marker is lost."""
    return 24 + 300 * share


def _write(
    ax: Axes,
    device: Hardware,
    points: Mapping[str, list[Point]],
    lines: list[tuple[np.ndarray, np.ndarray]],
    roofs: Mapping[str, float],
    low: float,
    high: float,
) -> None:
    """Labels: roofs, ridge points, then operators."""
    for name, peak in roofs.items():
        text = f"{_format_words(name)} {si(peak, 'FLOP/s')}"
        ax.annotate(text, (high, peak / TERA), (-2, 4), textcoords="offset points",
                    ha="right", va="bottom", fontsize=10)  # fmt: skip
    bandwidth = labels.Label(low, device.bandwidth * low / TERA, "")
    ax.figure.canvas.draw()
    start = ax.transData.transform((bandwidth.x, bandwidth.y))
    end = ax.transData.transform((10 * low, device.bandwidth * 10 * low / TERA))
    angle = float(np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0])))
    middle = low * (min(roofs.values()) / device.bandwidth / low) ** 0.62
    ax.annotate(si(device.bandwidth, "B/s"), (middle, middle * device.bandwidth / TERA), (-4, 4),
                textcoords="offset points", rotation=angle, rotation_mode="anchor", ha="center",
                va="bottom", fontsize=10)  # fmt: skip
    wanted = []
    for peak in roofs.values():
        ridge = peak / device.bandwidth
        wanted.append(labels.Label(ridge, peak / TERA, f"ridge {number(ridge)}"))
    for of_report in points.values():
        total = sum(point.seconds for point in of_report) or 1.0
        for point in of_report:
            radius = (_area(point.seconds / total) / np.pi) ** 0.5
            text = label_length(short_names(point.names), 26)
            wanted.append(labels.Label(point.intensity, point.attainable / TERA, text, radius))
    labels.place(ax, wanted, lines)


def _floor(device: Hardware, low: float, points: Mapping[str, list[Point]]) -> float:
    """Lower end of the axis in TFLOP/s, with room below the points for their labels."""
    lowest = low * device.bandwidth / TERA
    return lowest / 4 if points else lowest


def _format_words(name: str) -> str:
    return name.upper().replace("*", "×")


def _title(device: Hardware, reports: Mapping[str, Report]) -> str:
    if len(reports) == 1:
        (report,) = reports.values()
        name = report.model.name.rsplit("/", 1)[-1]
        what = f"{pass_words(report.step)}{fit_words(report)}"
        return f"{name} on {device.name}: {what}\nmarker area: share of the time"
    return f"{device.name}" + ("; marker area: share of the time" if reports else "")


def _alt(
    device: Hardware,
    roofs: Mapping[str, float],
    reports: Mapping[str, Report],
    points: Mapping[str, list[Point]],
) -> str:
    parts = [si(device.bandwidth, "B/s")]
    for name, peak in roofs.items():
        ridge = number(peak / device.bandwidth)
        parts.append(f"{_format_words(name)} {si(peak, 'FLOP/s')}, ridge {ridge} FLOP/B")
    text = f"Roofline of {device.name}: " + ", ".join(parts)
    for label, of_report in points.items():
        total = sum(point.seconds for point in of_report) or 1.0
        places = [
            f"{short_names(p.names)} at {number(p.intensity, 3)} FLOP/B "
            f"({100 * p.seconds / total:.0f} % of the time)"
            for p in of_report
        ]
        text += f"; {_label_words(label, reports[label])}: " + ", ".join(places)
    return text + "."


def _label_words(label: str, report: Report) -> str:
    words = report_words(report)
    return words if label in words else f"{label} ({words})"
