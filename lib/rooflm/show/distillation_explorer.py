"""The explorer of distillation: a Gaussian student of a teacher with two modes.

The line is cut into cells, so that teacher and students are distributions over as many "tokens"
and the laboratory's own divergences apply; the best student is found by trying all means and
spreads of a grid. beta 0 is the forward KL, 1 the reverse KL, between them the generalized
Jensen-Shannon divergence, which has both as its limits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rooflm.show.canvas import Figure
from rooflm.show.explorer import Control, Explorer, figure_html, starting_at, whole_setting
from rooflm.show.figures import lines
from rooflm.show.tables import Table, table
from rooflm.show.words import number

if TYPE_CHECKING:
    from torch import Tensor

DISTILLATION_CONTROLS = (
    Control("beta", "beta", "steps", (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0), 0.5),
    Control("distance", "Modes apart", "steps", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 4.0),
    Control("weight", "First mode", "steps", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), 0.6),
    Control("temperature", "Temperature", "steps", (0.5, 1.0, 2.0, 4.0), 1.0),
)
_WIDTH = 0.5  # standard deviation of a mode of the teacher
_REACH, _CELLS = 8.0, 257
_MEANS = np.linspace(-4.0, 4.0, 81)
_SPREADS = np.geomspace(0.25, 4.0, 49)


class Student(NamedTuple):
    """The Gaussian of least divergence, and how far it is from the teacher.

    Parameters
    ----------
    mean, spread : of the Gaussian.
    forward, reverse : KL from the teacher and from the student, nats.
    accepted : 1 - total variation, the share of its drafts that the teacher would accept.
    density : at the cells of the line, (cells,).
    """

    mean: float
    spread: float
    forward: float
    reverse: float
    accepted: float
    density: np.ndarray


def toy_students(**settings: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Student]]:
    """The line's cells, the teacher's density, and three students of it.

    Parameters
    ----------
    settings : values of the controls; those left out are at their start.

    Returns
    -------
    cells, teacher : (cells,) each.
    students : by "forward KL", the chosen beta in words and "reverse KL"; two of them where beta
        is 0 or 1. Their KLs are at temperature 1, whatever they were fitted at.

    Raises
    ------
    ValueError
        for an unknown control, or a value out of its range.
    """
    import torch

    s = _setting(settings)
    cells = torch.linspace(-_REACH, _REACH, _CELLS, dtype=torch.float64)
    teacher = _teacher(cells, s["distance"], s["weight"])
    means, spreads = torch.from_numpy(_MEANS), torch.from_numpy(_SPREADS)
    candidates = _gaussian(cells, means[:, None, None], spreads[:, None])
    found = {}
    for name, beta in _objectives(s["beta"]).items():
        loss = _divergence(beta, s["temperature"])(candidates, teacher)
        # Both modes are equally good where their weights are: the first is taken.
        best = int(torch.round(loss.flatten(), decimals=9).argmin())
        mean, spread = _MEANS[best // len(_SPREADS)], _SPREADS[best % len(_SPREADS)]
        found[name] = _student(candidates.flatten(0, 1)[best], teacher, float(mean), float(spread))
    return cells.numpy(), _density(teacher), found


def distillation_explorer(**settings: Any) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    settings : where the controls start: beta, distance, weight, temperature.
    """
    return Explorer(starting_at(DISTILLATION_CONTROLS, **settings), _verdict, _view)


def _verdict(**s: Any) -> str:
    """The chosen student in one sentence."""
    _, _, students = toy_students(**s)
    name = _words(s["beta"])
    found = students[name]
    modes = "One mode"
    if s["distance"]:
        half = number(s["distance"] / 2, 3)
        modes = f"Modes at -{half} and {half}, {s['weight']:.0%} in the first"
    return (
        f"{modes}; {name} at temperature {number(s['temperature'], 3)}: mean "
        f"{number(found.mean, 3)}, spread {number(found.spread, 3)}, which {_covers(found, s)}; "
        f"{found.accepted:.0%} of its drafts would be accepted."
    )


def _view(**s: Any) -> str:
    cells, teacher, students = toy_students(**s)
    caption = "Densities of the teacher and of the Gaussians of least divergence."
    return figure_html(_figure(s, cells, teacher, students), caption) + _table(s, students).html


def _covers(found: Student, s: dict[str, Any]) -> str:
    """What the student does with the teacher's modes, told by its own standard deviation."""
    modes = -s["distance"] / 2, s["distance"] / 2
    held = [abs(found.mean - mode) <= found.spread + _WIDTH for mode in modes]
    if all(held):
        return "covers both modes" if s["distance"] else "covers the mode"
    return "seeks one mode" if any(held) else "lies between the modes"


def _figure(
    s: dict[str, Any], cells: np.ndarray, teacher: np.ndarray, students: dict[str, Student]
) -> Figure:
    series = {"teacher": teacher} | {name: found.density for name, found in students.items()}
    shown = np.abs(cells) <= 6
    parts = [
        f"{name}: mean {number(x.mean, 3)}, spread {number(x.spread, 3)}, {_covers(x, s)}"
        for name, x in students.items()
    ]
    alt = (
        f"Densities. The teacher has modes {number(s['distance'], 3)} apart around 0, of width "
        f"{_WIDTH}. Students: {'; '.join(parts)}."
    )
    drawn = {name: density[shown] for name, density in series.items()}
    return lines(cells[shown], drawn, "x", "density", alt=alt)


def _table(s: dict[str, Any], students: dict[str, Student]) -> Table:
    rows = [
        (
            f"{name}{' (chosen)' if name == _words(s['beta']) else ''}",
            x.mean, x.spread, _covers(x, s), x.forward, x.reverse, f"{x.accepted:.1%}",
        )
        for name, x in students.items()
    ]  # fmt: skip
    columns = [
        "least", "mean", "spread", "what it does", "forward KL, nats", "reverse KL, nats",
        "accepted",
    ]  # fmt: skip
    return table(rows, columns, caption="The best Gaussian by each objective", digits=3)


def _objectives(beta: float) -> dict[str, float]:
    return {_words(x): x for x in (0.0, beta, 1.0)}


def _words(beta: float) -> str:
    return {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, f"JSD, beta {number(beta, 3)}")


def _divergence(beta: float, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from rooflm.lab.distill import divergences as of

    if beta == 0:
        return of.at_temperature(of.forward_kl, temperature)
    if beta == 1:
        return of.at_temperature(of.reverse_kl, temperature)
    return of.at_temperature(lambda q, p: of.generalized_jsd(q, p, beta), temperature)


def _gaussian(cells: Tensor, mean: Tensor | float, spread: Tensor | float) -> Tensor:
    """Logits of a Gaussian over the cells."""
    return -((cells - mean) ** 2) / (2 * spread**2)


def _teacher(cells: Tensor, distance: float, weight: float) -> Tensor:
    """Logits of a mixture of two Gaussians of one width."""
    import torch

    first, second = (_gaussian(cells, sign * distance / 2, _WIDTH) for sign in (-1, 1))
    return torch.log(weight * first.exp() + (1 - weight) * second.exp() + 1e-300)


def _student(logits: Tensor, teacher: Tensor, mean: float, spread: float) -> Student:
    from rooflm.lab.distill import divergences as of

    forward, reverse = of.forward_kl(logits, teacher), of.reverse_kl(logits, teacher)
    accepted = 1 - of.total_variation(logits, teacher)
    values = float(forward), float(reverse), float(accepted)
    return Student(mean, spread, *values, _density(logits))


def _density(logits: Tensor) -> np.ndarray:
    density: np.ndarray = (logits.softmax(-1) * (_CELLS - 1) / (2 * _REACH)).numpy()
    return density


def _setting(settings: dict[str, Any]) -> dict[str, Any]:
    s = whole_setting(DISTILLATION_CONTROLS, settings)
    for name, low, high in (
        ("beta", 0, 1),
        ("distance", 0, 6),
        ("weight", 0.5, 1),
        ("temperature", 0.1, 10),
    ):
        value = s[name]
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; allowed: {low} to {high}")
    return s
