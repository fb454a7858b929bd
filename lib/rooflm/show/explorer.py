"""An explorer: controls, and what a setting of them shows.

One definition serves a live notebook, where ipywidgets move the controls, and a page, where the
setting at the start stands as figure and tables. `pass_explorer` and its neighbours define some.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rooflm.roofline.config import load_model
from rooflm.roofline.hardware import load_hardware
from rooflm.roofline.numeric import unknown
from rooflm.show.canvas import Figure
from rooflm.show.words import number

WIDGET = "application/vnd.jupyter.widget-view+json"
HINT = "Run this notebook to move the controls."


@dataclass(frozen=True)
class Control:
    """Something that the reader sets.

    Attributes
    ----------
    name : the keyword of the setting.
    label : what stands beside it.
    kind : "choice" of a list, or "steps" on a slider.
    options : the values.
    default : the one at the start.
    """

    name: str
    label: str
    kind: str
    options: tuple[Any, ...]
    default: Any


class Explorer:
    """A setting of the controls that shows itself: widgets where they live, else a figure.

    Parameters
    ----------
    controls : with their values at the start.
    verdict : from a setting, by keywords, to its answer in one sentence.
    view : from a setting to HTML. Both raise ValueError for a setting that can't be had.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        verdict: Callable[..., str],
        view: Callable[..., str],
    ) -> None:
        self.controls = tuple(controls)
        self._verdict, self._view = verdict, view
        verdict(**self.start)  # refuses what is wrong, here and not in the page
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
        return f"Explorer. {self._verdict(**self.start)} {HINT}"

    @property
    def html(self) -> str:
        """The page's form: the setting at the start, without controls."""
        note = f"<p><strong>Explorer, at its default setting.</strong> {HINT}</p>"
        return f'<div class="explorer">{note}{self._first}</div>'

    @cached_property
    def _first(self) -> str:
        return self.show(**self.start)

    def show(self, **setting: Any) -> str:
        """HTML of one setting: its verdict and view, or one line of what is wrong."""
        try:
            status = f'<p role="status">{html.escape(self._verdict(**setting))}</p>'
            return status + self._view(**setting)
        except ValueError as error:
            return f'<p role="alert">{html.escape(str(error))}</p>'

    def widget(self) -> Any:
        """The live form, an ipywidgets VBox; None where ipywidgets is not installed."""
        if self._box is None:
            try:
                import ipywidgets
            except ImportError:
                return None
            self._box = _box(ipywidgets, self)
        return self._box


def starting_at(controls: Sequence[Control], **start: Any) -> tuple[Control, ...]:
    """The controls with other values at the start; those left out are at their defaults.

    Raises
    ------
    ValueError
        for an unknown control.
    """
    at = whole_setting(controls, start)
    return tuple(_starting_at(c, at[c.name]) for c in controls)


def whole_setting(controls: Sequence[Control], given: Mapping[str, Any]) -> dict[str, Any]:
    """A setting with the controls that it leaves out at their defaults.

    Raises
    ------
    ValueError
        for an unknown control.
    """
    whole = {control.name: control.default for control in controls}
    for name in given:
        if name not in whole:
            raise unknown("control", name, whole)
    return whole | dict(given)


def on_a_device(
    controls: Sequence[Control],
    verdict: Callable[..., str],
    view: Callable[..., str],
    model: str,
    device: str,
    settings: Mapping[str, Any],
) -> Explorer:
    """An explorer that starts with a model on a device, by whatever names they go.

    Parameters
    ----------
    controls, verdict, view : as of `Explorer`.
    settings : where the other controls start.
    """
    names = {"model": load_model(model).name, "device": load_hardware(device).name}
    return Explorer(starting_at(controls, **{**settings, **names}), verdict, view)


def figure_html(figure: Figure, caption: str) -> str:
    """A figure of `canvas` as it stands in the view of an explorer."""
    png = base64.b64encode(figure.png).decode("ascii")
    image = f'<img alt="{html.escape(figure.alt)}" src="data:image/png;base64,{png}">'
    style = 'style="color: inherit; font-weight: inherit"'
    words = f"<figcaption {style}>{html.escape(caption)}</figcaption>"
    return f'<figure style="margin: 0">{image}{words}</figure>'


def doubling(first: int, last: int) -> tuple[int, ...]:
    """The options of a slider whose steps double."""
    values = [first]
    while values[-1] < last:
        values.append(2 * values[-1])
    return tuple(values)


def _starting_at(control: Control, value: Any) -> Control:
    """The control with that value at its start; a slider gains a step for it."""
    if control.kind == "steps":
        return replace(control, options=tuple(sorted({*control.options, value})), default=value)
    options = control.options if value in control.options else (value, *control.options)
    return replace(control, options=options, default=value)


def _box(widgets: Any, explorer: Explorer) -> Any:
    """Widgets for the controls over one HTML widget, which is written anew when one moves.

    Nothing is printed in a callback: notebooks compare what is printed.
    """
    made = {control.name: _widget(widgets, control) for control in explorer.controls}
    shown = widgets.HTML(value=explorer._first)

    def redraw(_: Any) -> None:
        shown.value = explorer.show(**{name: w.value for name, w in made.items()})

    for widget in made.values():
        widget.observe(redraw, names="value")
    row = widgets.HBox(list(made.values()), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([row, shown])


def _widget(widgets: Any, control: Control) -> Any:
    common = {
        "description": control.label,
        "tooltip": f"{control.label}: moves what is shown below",
        "style": {"description_width": "6em"},
        "layout": widgets.Layout(width="21em", max_width="100%"),
        "value": control.default,
    }
    if control.kind == "steps":
        options = [(number(value), value) for value in control.options]
        return widgets.SelectionSlider(options=options, continuous_update=False, **common)
    return widgets.Dropdown(options=list(control.options), **common)
