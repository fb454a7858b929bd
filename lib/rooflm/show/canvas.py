"""What all figures share: a palette that survives grey and colour blindness, and the PNG.

Figures are drawn by matplotlib's Agg canvas alone, so that no pyplot state is touched and the
same input gives the same bytes. A `Figure` shows itself as PNG with alternative text.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rooflm.show.words import number

DPI = 128
WIDTH, HEIGHT = 5.4, 3.9  # inches: 691 pixels wide
LARGEST_WIDTH = 1000  # pixels

# Okabe and Ito's colours, in an order whose neighbours differ in lightness too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
INK = "#222222"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    "hatch.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    """A picture that displays itself.

    Attributes
    ----------
    png : the picture's bytes.
    alt : what it states, in words; also its text/plain, which nbval compares.
    """

    png: bytes
    alt: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png).decode("ascii"), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}

    def __repr__(self) -> str:
        return self.alt


@contextmanager
def blank(height: float = HEIGHT) -> Iterator[Axes]:
    """The axes of an empty figure, under the book's style whatever the caller has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.06)
        fig = MatplotlibFigure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
        FigureCanvasAgg(fig)
        yield fig.add_subplot()


def legend(ax: Axes, order: list[int] | None = None) -> None:
    """A legend below the axes, in as many columns as its labels leave room for."""
    handles, texts = ax.get_legend_handles_labels()
    order = list(range(len(texts))) if order is None else order
    longest = max(map(len, texts))
    ax.figure.legend(
        [handles[i] for i in order],
        [texts[i] for i in order],
        loc="outside lower center",
        ncols=3 if longest <= 14 else 2 if longest <= 30 else 1,
    )


def finish(ax: Axes, alt: str) -> Figure:
    """The figure of these axes as a shown object."""
    fill_ticks(ax)
    return Figure(render(ax.figure), alt)


def settle(ax: Axes) -> Any:
    """Lay the figure out once and for all, so that data coordinates have pixels; a renderer."""
    fig: Any = ax.figure
    fill_ticks(ax)
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    return FigureCanvasAgg(fig).get_renderer()


def render(fig: Any) -> bytes:
    """PNG bytes, without a date or the name of a program in them."""
    width = fig.get_size_inches()[0] * fig.dpi
    if width > LARGEST_WIDTH:
        fig.set_dpi(fig.dpi * LARGEST_WIDTH / width)
    canvas, buffer = FigureCanvasAgg(fig), io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def figure(fig: MatplotlibFigure, alt: str) -> Figure:
    """Show a matplotlib figure of one's own.

    Parameters
    ----------
    fig : the figure; if pyplot made it, pyplot forgets it, so that it is not shown twice.
    alt : what the picture states, at least a few words.

    Raises
    ------
    ValueError
        for alternative text under 20 characters.
    """
    if not isinstance(alt, str) or len(alt.strip()) < 20:
        raise ValueError(f"alt is {alt!r}; allowed: a sentence that says what the figure shows")
    fig.set_facecolor("#ffffff")
    shown = Figure(render(fig), alt.strip())
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)
    return shown


def scale(ax: Axes, axis: str, kind: str) -> None:
    """Make an axis linear or logarithmic, with plain numbers at its ticks."""
    if kind not in ("linear", "log", "log2"):
        raise ValueError(f"{axis}scale is {kind!r}; allowed: linear, log, log2")
    base = 2 if kind == "log2" else 10
    of_axis = ax.xaxis if axis == "x" else ax.yaxis
    if kind != "linear":
        getattr(ax, f"set_{axis}scale")("log", base=base)
        of_axis.set_major_locator(LogLocator(base=base, numticks=9))
        of_axis.set_minor_locator(NullLocator())  # half the time of drawing went into them
    of_axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.10g}"), 6)))


def fill_ticks(ax: Axes) -> None:
    """Give a logarithmic axis that spans few decades ticks at 2 and 5 too."""
    for of_axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        decades = getattr(of_axis.get_major_locator(), "_base", None) == 10
        if decades and limits[1] / limits[0] < 300:
            of_axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))


def fold(text: str, longest: int = 34) -> str:
    """A label on as many lines as it takes: broken after spaces, in long words after slashes.

    >>> fold("q/k/v/o_proj, lm_head", 14)
    'q/k/v/o_proj,\\nlm_head'
    """
    lines = [""]
    for word in re.findall(r"[^ ]*[ ]?", text):
        pieces = [word] if len(word) <= longest + 1 else re.findall(r"[^/]*/?", word)
        for piece in pieces:
            if lines[-1] and len((lines[-1] + piece).rstrip()) > longest:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
