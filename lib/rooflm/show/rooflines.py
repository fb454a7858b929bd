"""Rooflines: performance against arithmetic intensity, both logarithmic.

Chapter: the roofline model. The picture is Williams, Waterman and Patterson's, CACM 52(4),
2009; the survey draws it in its Figures 5 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from rooflm.roofline.analysis import Report
from rooflm.roofline.formats import load_format
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.show import canvas, labels
from rooflm.show.canvas import Figure
from rooflm.show.points import NEAR_LABELS, Point, group, merge, short_names
from rooflm.show.words import fit_words, number, pass_words, plan_words, report_words, si

TERA = 1e12


def roofline(
    device: Hardware | str,
    reports: Report | Mapping[str, Report] | None = None,
    formats: Sequence[str] = ("fp16",),
    title: str | None = None,
    alt: str | None = None,
    least: float = 0.0,
) -> Figure:
    """The roofs of a device, its ridge points, and the operators of forward passes under them.

    Parameters
    ----------
    device : a device, or its name.
    reports : a report, or {label: report}; their operators become points whose area is
        their share of the time of the pass. Operators at one place share a point; those
        without arithmetic (an embedding) have no place here.
    formats : number formats whose compute roofs are drawn; those that a report uses are added.
    title, alt : a heading, and words in place of those made from the numbers.
    least : share of the time of its pass from which a point is drawn; those below it are only
        named in the alternative text. The shares stay those of the whole pass.

    Raises
    ------
    ValueError
        for a device without the format or a wider one, a report of a sweep, or a least share
        that is not from 0 to 1.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"least is {least!r}; allowed: a share from 0 to 1")
    device = load_hardware(device)
    by_label = _by_label(reports)
    peaks = _peaks(device, formats, by_label)
    points = {label: group(report.operators) for label, report in by_label.items()}
    drawn = {
        label: [point for point in of_report if point.share >= least]
        for label, of_report in points.items()
    }
    every = [point for of_report in drawn.values() for point in of_report]
    ridges = [peak / device.bandwidth for peak in peaks.values()]
    low, high = _span(ridges, every)
    heading = canvas.fold(title, 56) if title else _title(device, by_label)
    with canvas.blank(canvas.HEIGHT + 0.2 * (len(by_label) + heading.count("\n"))) as ax:
        _frame(ax, low, high)
        lines = [
            _draw_roof(ax, device, peak, canvas.LINE_STYLES[i % 6], low, high)
            for i, peak in enumerate(peaks.values())
        ]
        for i, (label, of_report) in enumerate(drawn.items()):
            _draw_points(ax, label + fit_words(by_label[label]), of_report, i)
        if len(by_label) > 1:
            canvas.legend(ax)
        ax.set_title(heading, loc="left")
        floor = low * device.bandwidth / TERA / (4 if every else 1)
        ax.set_ylim(floor, max(peaks.values()) / TERA * 4)
        _name_roofs(ax, peaks, high)
        canvas.settle(ax)
        _name_bandwidth(ax, device, (low, min(ridges)), every)
        labels.place(ax, _labels(device, peaks, every), lines)
        return canvas.finish(ax, alt or _alt(device, peaks, by_label, points, least))


def roofs(
    devices: Sequence[Hardware | str], format: str = "fp16", alt: str | None = None
) -> Figure:
    """Several devices' roofs for one number format on one axis, with their ridge points.

    A device that lacks the format is drawn at the next wider one it has, named in the legend.

    Parameters
    ----------
    devices : devices, or their names.
    format : the number format of both operands.
    alt : words in place of those made from the numbers.
    """
    loaded = [load_hardware(device) for device in devices]
    rates = [_rate(device, format) for device in loaded]
    ridges = [peak / device.bandwidth for device, (_, peak) in zip(loaded, rates, strict=True)]
    low, high = _span(ridges, [])
    words = []
    with canvas.blank(canvas.HEIGHT + 0.2 * len(loaded)) as ax:
        _frame(ax, low, high)
        for i, (device, (name, peak)) in enumerate(zip(loaded, rates, strict=True)):
            used = "" if name == format.lower() else f" ({_format_words([name])})"
            words.append(
                f"{device.name}{used}: {si(device.bandwidth, 'B/s')}, {si(peak, 'FLOP/s')}, "
                f"ridge {number(ridges[i])} FLOP/B"
            )
            line = np.array([low, ridges[i], high])
            ax.plot(line, np.minimum(peak, line * device.bandwidth) / TERA, label=words[-1],
                    color=canvas.PALETTE[i % 6], linestyle=canvas.LINE_STYLES[i % 6],
                    marker=canvas.MARKERS[i % 8], markevery=[1])  # fmt: skip
        ax.set_title(f"Roofs for {_format_words([format])}, a marker at each ridge", loc="left")
        ax.figure.legend(loc="outside lower left", fontsize=9.5)
        text = f"Rooflines of {len(loaded)} devices for {_format_words([format])}. "
        return canvas.finish(ax, alt or text + "; ".join(words) + ".")


def _by_label(reports: Report | Mapping[str, Report] | None) -> dict[str, Report]:
    if reports is None:
        return {}
    if isinstance(reports, Mapping):
        return dict(reports)
    return {pass_words(reports.step): reports}


def _peaks(
    device: Hardware, formats: Sequence[str], reports: Mapping[str, Report]
) -> dict[str, float]:
    """FLOP/s by the name of the rate, for the asked formats and those that rows used."""
    names = {}
    for name in (formats,) if isinstance(formats, str) else formats:
        rate, peak = _rate(device, name)
        names[rate] = peak
    for report in reports.values():
        for row in report.operators:
            if row.rate in device.peaks:
                names.setdefault(row.rate, device.peaks[row.rate])
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _rate(device: Hardware, name: str) -> tuple[str, float]:
    """The rate for a format, or for a rate's own name, which "fp4" is only."""
    x = load_format("mxfp4" if name == "fp4" else name)
    return device.rate(x, x)


def _span(ridges: Sequence[float], points: Sequence[Point]) -> tuple[float, float]:
    """Lowest and highest intensity to draw."""
    every = [point.intensity for point in points]
    low = 0.5 * min(every) if every else min(1.0, 0.1 * min(ridges))
    return min(low, 0.5 * min(ridges)), max(8 * max(ridges), *(3 * x for x in every), 1.0)


def _frame(ax: Axes, low: float, high: float) -> None:
    canvas.scale(ax, "x", "log")
    canvas.scale(ax, "y", "log")
    ax.set_xlim(low, high)
    ax.set_xlabel("arithmetic intensity (FLOP/B)")
    ax.set_ylabel("performance (TFLOP/s)")


def _draw_roof(
    ax: Axes, device: Hardware, peak: float, style: object, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the two roofs of one format; return their corners."""
    x = np.array([low, peak / device.bandwidth, high])
    y = np.minimum(peak, x * device.bandwidth) / TERA
    ax.plot(x, y, color=canvas.INK, linestyle=style, zorder=2)
    ax.plot(x[1:2], y[1:2], "o", markersize=7, markerfacecolor="#ffffff", color=canvas.INK,
            zorder=4)  # fmt: skip
    return x, y


def _draw_points(ax: Axes, label: str, points: list[Point], i: int) -> None:
    ax.scatter(
        [point.intensity for point in points],
        [point.attainable / TERA for point in points],
        s=[point.area for point in points],
        marker=canvas.MARKERS[i % 8], color=canvas.PALETTE[i % 8], edgecolors=canvas.INK,
        linewidths=0.6, zorder=5, alpha=0.9,
    )  # fmt: skip
    ax.plot([], [], canvas.MARKERS[i % 8], color=canvas.PALETTE[i % 8], markersize=9,
            markeredgecolor=canvas.INK, label=label)  # fmt: skip


def _name_roofs(ax: Axes, peaks: Mapping[str, float], high: float) -> None:
    """Formats and peaks to the right of the axes, where no operator stands."""
    by_peak: dict[float, list[str]] = {}
    for name, peak in peaks.items():
        by_peak.setdefault(peak, []).append(name)
    for peak, names in by_peak.items():
        near = any(1 < other / peak < 1.7 for other in by_peak)
        ax.annotate(f"{_format_words(names)} {number(peak / TERA, 3)}", (high, peak / TERA),
                    (5, -4 if near else 0), textcoords="offset points", va="center", fontsize=10,
                    annotation_clip=False)  # fmt: skip


def _name_bandwidth(
    ax: Axes, device: Hardware, span: tuple[float, float], points: Sequence[Point]
) -> None:
    """The bandwidth along the memory roof, where the fewest operators stand."""
    low, ridge = span
    places = [low * (ridge / low) ** share for share in (0.65, 0.72, 0.58, 0.8, 0.5, 0.4, 0.3)]

    def room(place: float) -> float:  # in decades; more than half a one is enough
        return min([0.5, *(abs(math.log10(place / point.intensity)) for point in points)])

    x = np.array([low, max(places, key=room)])
    start, middle = ax.transData.transform(np.column_stack([x, x * device.bandwidth / TERA]))
    angle = math.degrees(math.atan2(middle[1] - start[1], middle[0] - start[0]))
    ax.annotate(si(device.bandwidth, "B/s"), (x[1], x[1] * device.bandwidth / TERA), (-3, 4),
                textcoords="offset points", rotation=angle, rotation_mode="anchor", ha="center",
                va="bottom", fontsize=10)  # fmt: skip


def _labels(
    device: Hardware, peaks: Mapping[str, float], points: Sequence[Point]
) -> list[labels.Label]:
    """What is written into the picture: ridge points, then operators, the longest first."""
    found = []
    for peak in sorted(set(peaks.values())):
        ridge = peak / device.bandwidth
        found.append(labels.Label(ridge, peak / TERA, f"ridge {number(ridge)}", 4, upward=True))
    for point in merge(sorted(points, key=lambda point: -point.share), NEAR_LABELS):
        text = canvas.fold(short_names(point.names), 26)
        radius = math.sqrt(min(point.area, 324) / math.pi)
        found.append(labels.Label(point.intensity, point.attainable / TERA, text, radius))
    return found


def _format_words(names: Sequence[str]) -> str:
    return "/".join(name.upper().replace("*", "×") for name in names)


def _title(device: Hardware, reports: Mapping[str, Report]) -> str:
    if len(reports) == 1:
        (report,) = reports.values()
        name = report.model.name.rsplit("/", 1)[-1]
        lines = [
            f"{name} on {device.name}",
            f"{pass_words(report.step)}; marker area: time",
            plan_words(report),
            fit_words(report).strip(" ()"),
        ]
        return "\n".join(canvas.fold(line, 56) for line in lines if line)
    return device.name + ("; marker area: time" if reports else "")


def _alt(
    device: Hardware,
    peaks: Mapping[str, float],
    reports: Mapping[str, Report],
    points: Mapping[str, list[Point]],
    least: float,
) -> str:
    parts = [si(device.bandwidth, "B/s")]
    for name, peak in peaks.items():
        ridge = number(peak / device.bandwidth)
        parts.append(f"{_format_words([name])} {si(peak, 'FLOP/s')}, ridge {ridge} FLOP/B")
    text = f"Roofline of {device.name}: " + ", ".join(parts)
    for label, of_report in points.items():
        words = report_words(reports[label])
        words = words if label in words else f"{label} ({words})"
        limit = max(least, 0.005)
        large = [point for point in of_report if point.share >= limit]
        text += f". {words}: " + "; ".join(_place_words(point) for point in large)
        small = [name for point in of_report if point.share < limit for name in point.names]
        left_out = "not drawn, " if least == limit else ""
        less = f"{left_out}under {number(100 * limit)} % of the time"
        text += f"; {less}: {short_names(small)}" if small else ""
    return text + "."


def _place_words(point: Point) -> str:
    names, intensity = short_names(point.names), number(point.intensity, 3)
    return f"{names} at {intensity} FLOP/B, {100 * point.share:.0f} % of the time"
