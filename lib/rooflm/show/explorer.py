"""The explorer of memory- and compute-bound operation.

One definition, `EXPLORER_CONTROLS` and `explore`, serves a live notebook, where ipywidgets move
the controls, and a page, where the setting at the start stands as figure and tables.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rooflm.roofline.analysis import ATTENTIONS, Report, analyze
from rooflm.roofline.config import model_names
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import hardware_names
from rooflm.roofline.model import ForwardPass
from rooflm.roofline.numeric import unknown
from rooflm.show.figures import roofline
from rooflm.show.tables import Table, operators, table
from rooflm.show.words import number, plain, report_words, si

WIDGET = "application/vnd.jupyter.widget-view+json"
HINT = "Run this notebook to move the controls."


@dataclass(frozen=True)
class Control:
    """Something that the reader sets.

    Attributes
    ----------
    name : the keyword of `explore`.
    label : what stands beside it.
    kind : "choice" of a list, or "steps" on a slider whose steps double.
    options : the values.
    default : the one at the start.
    """

    name: str
    label: str
    kind: str
    options: tuple[Any, ...]
    default: Any


def _doubling(first: int, last: int) -> tuple[int, ...]:
    values = [first]
    while values[-1] < last:
        values.append(2 * values[-1])
    return tuple(values)


EXPLORER_CONTROLS = (
    Control("model", "Model", "choice", tuple(model_names()), "meta-llama/Llama-2-7b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a6000"),
    Control("phase", "Phase", "choice", ("prefill", "decode"), "decode"),
    Control("batch", "Batch", "steps", _doubling(1, 1024), 1),
    Control("context", "Context", "steps", _doubling(128, 131072), 2048),
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
    s = {control.name: control.default for control in EXPLORER_CONTROLS}
    for name in settings:
        if name not in s:
            raise unknown("control", name, s)
    s |= settings
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
    return Explorer(model=model, device=device, **settings)


class Explorer:
    """A setting of the controls that shows itself: widgets where they live, else a figure.

    Attributes
    ----------
    controls : the controls, with this explorer's values at the start.
    """

    def __init__(self, **settings: Any) -> None:
        report, _ = explore(**settings)  # refuses what is wrong, here and not in the page
        settings |= {"model": report.model.name, "device": report.device.name}
        self.controls = tuple(
            _starting_at(control, settings.get(control.name, control.default))
            for control in EXPLORER_CONTROLS
        )
        self._box: Any = None

    @property
    def start(self) -> dict[str, Any]:
        """The setting at the start."""
        return {control.name: control.default for control in self.controls}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self.html, "text/plain": repr(self)}
        box = self.widget()
        if box is not None:
            view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
            bundle[WIDGET] = view
        return bundle

    def __repr__(self) -> str:
        return f"Explorer. {_verdict(explore(**self.start)[0])} {HINT}"

    @property
    def html(self) -> str:
        """The page's form: the setting at the start, without controls."""
        note = f"<p><strong>Explorer, at its default setting.</strong> {HINT}</p>"
        return f'<div class="explorer">{note}{self._view}</div>'

    @cached_property
    def _view(self) -> str:
        return view(**self.start)

    def widget(self) -> Any:
        """The live form, an ipywidgets VBox; None where ipywidgets is not installed."""
        if self._box is None:
            try:
                import ipywidgets
            except ImportError:
                return None
            self._box = _box(ipywidgets, self.controls, self._view)
        return self._box


def view(**settings: Any) -> str:
    """HTML of one setting: verdict, figure, totals, operators; or one line of what is wrong."""
    try:
        report, totals = explore(**settings)
    except ValueError as error:
        return f'<p role="alert">{html.escape(str(error))}</p>'
    figure = roofline(report.device, report)
    png = base64.b64encode(figure.png).decode("ascii")
    caption = html.escape(f"Operators of {report_words(report)}, under the roofs.")
    image = f'<img alt="{html.escape(figure.alt)}" src="data:image/png;base64,{png}">'
    return (
        f'<p role="status">{html.escape(_verdict(report))}</p>'
        f'<figure style="margin: 0">{image}'
        f'<figcaption style="color: inherit; font-weight: inherit">{caption}</figcaption></figure>'
        f"{_totals_table(report, totals).html}{operators(report).html}"
    )


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


def _starting_at(control: Control, value: Any) -> Control:
    """The control with that value at its start; a slider gains a step for it."""
    if control.kind == "steps":
        return replace(control, options=tuple(sorted({*control.options, value})), default=value)
    options = control.options if value in control.options else (value, *control.options)
    return replace(control, options=options, default=value)


def _box(widgets: Any, controls: tuple[Control, ...], start: str) -> Any:
    """Widgets for the controls over one HTML widget, which is written anew when one moves.

    Nothing is printed in a callback: notebooks compare what is printed.
    """
    made = {control.name: _widget(widgets, control) for control in controls}
    shown = widgets.HTML(value=start)

    def redraw(_: Any) -> None:
        shown.value = view(**{name: w.value for name, w in made.items()})

    for widget in made.values():
        widget.observe(redraw, names="value")
    row = widgets.HBox(list(made.values()), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([row, shown])


def _widget(widgets: Any, control: Control) -> Any:
    common = {
        "description": control.label,
        "tooltip": f"{control.label} of the forward pass",
        "style": {"description_width": "6em"},
        "layout": widgets.Layout(width="21em", max_width="100%"),
        "value": control.default,
    }
    if control.kind == "steps":
        options = [(number(value), value) for value in control.options]
        return widgets.SelectionSlider(options=options, continuous_update=False, **common)
    return widgets.Dropdown(options=list(control.options), **common)
