"""How a budget of numbers is spread over the layers of a model.

A layer is a list of choices: a rank, what it stores, what it costs the model. The last choice is
the layer as it is. `uniform` gives every layer the same share (the control); `threshold` lets
every layer alone hurt the model by as much, which is ASVD's search; `allocate` takes the choices
with the least cost in all, if costs add up.

Costs of low rank are not convex: from the break-even rank on, the whole layer is for free. So
`allocate` walks the lower convex hull of every layer's choices, on which greedy steps in the order
of gain per number are optimal at every budget that a step ends on.

Sources: threshold, ASVD, arXiv 2312.05821, section 3.4; the hull, Everett, Operations Research 11
(1963), 399 (generalized Lagrange multipliers).

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from rooflm.lab.factorize.pivot import pivot_numbers, pivot_rank_of_share
from rooflm.lab.factorize.svd import factor_numbers, tails
from rooflm.roofline.low_rank import rank_of_share
from rooflm.roofline.numeric import shorten

Shape = tuple[int, int]  # d_out, d_in


class Choice(NamedTuple):
    """A rank with the numbers it stores and what it costs; the full rank is the matrix itself."""

    rank: int
    numbers: int
    cost: float


def uniform(shapes: Mapping[str, Shape], share: float, pivot: bool = False) -> dict[str, int]:
    """The same share of every layer; a share of 1 leaves all as they are.

    Parameters
    ----------
    shapes : (d_out, d_in) of each layer.
    share : of the numbers.
    pivot : whether layers are stored as `pivot` does, not as two factors.
    """
    if share == 1:
        return {name: min(shape) for name, shape in shapes.items()}
    if not 0 < share < 1:
        raise ValueError(f"share is {shorten(share)}; allowed: above 0, up to 1")
    if pivot:
        return {name: pivot_rank_of_share(*shape, share) for name, shape in shapes.items()}
    return {name: int(rank_of_share(*shape, share)) for name, shape in shapes.items()}


def choices(singular: Tensor, shape: Shape, pivot: bool = False) -> list[Choice]:
    """Every rank that saves something, with the tail of its singular values, and the matrix.

    Parameters
    ----------
    singular : of a decomposition in which the tail is what a cut costs.
    """
    d_out, d_in = shape
    errors = tails(singular).tolist()
    numbers = pivot_numbers if pivot else factor_numbers
    cut = [Choice(r, numbers(d_out, d_in, r), errors[r]) for r in range(1, min(shape))]
    saving = [choice for choice in cut if choice.numbers < d_out * d_in]
    return [*saving, Choice(min(shape), d_out * d_in, 0.0)]


def allocate(layers: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """The ranks of least cost in all within a budget.

    Parameters
    ----------
    layers : the choices of each; their numbers rise strictly.
    budget : numbers in all.

    Returns
    -------
    dict
        a rank for each layer. What is left of the budget after the last step that fits goes to
        single choices beyond the hull, in the order of the layers' gains.

    Raises
    ------
    ValueError
        for a budget below the smallest choices.
    """
    now = {name: given[0] for name, given in layers.items()}
    left = budget - sum(choice.numbers for choice in now.values())
    if left < 0:
        least = budget - left
        raise ValueError(
            f"budget is {shorten(budget)}; allowed: {least} or more, of the least ranks"
        )
    steps = [
        (-_slope(a, b), name, b)
        for name, given in layers.items()
        for a, b in pairwise(hull(given))
        if b.cost < a.cost
    ]
    steps.sort(key=lambda step: -step[0])  # within a layer they fall already
    stopped = set()
    for _, name, choice in steps:
        more = choice.numbers - now[name].numbers
        if more > left:  # and so are the layer's later steps
            stopped.add(name)
            continue
        now[name], left = choice, left - more
    for name in dict.fromkeys(name for _, name, _ in steps if name in stopped):
        fits = [c for c in layers[name] if c.numbers - now[name].numbers <= left]
        best = min(fits, key=lambda c: (c.cost, c.numbers))
        if best.cost < now[name].cost:
            left -= best.numbers - now[name].numbers
            now[name] = best
    return {name: choice.rank for name, choice in now.items()}


def hull(given: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of cost over numbers, which rise strictly."""
    kept: list[Choice] = []
    for choice in given:
        while len(kept) > 1 and _slope(kept[-2], choice) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(choice)
    return kept


def threshold(layers: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """ASVD's search: in each layer the smallest choice whose cost alone is below one threshold.

    Parameters
    ----------
    layers : the choices of each, with rising numbers; the cost is what the model loses where this
        layer alone is cut. A cost need not fall with the numbers: it is measured.
    budget : numbers in all, not exceeded.

    Source: arXiv 2312.05821, section 3.4; the binary search of the authors' code.
    """
    costs = sorted({choice.cost for given in layers.values() for choice in given})
    low, high = 0, len(costs)  # the cheapest threshold that keeps to the budget
    found: dict[str, Choice] | None = None
    while low < high:
        middle = (low + high) // 2
        tried = {name: _least(given, costs[middle]) for name, given in layers.items()}
        if sum(choice.numbers for choice in tried.values()) <= budget:
            high, found = middle, tried
        else:
            low = middle + 1
    if found is None:
        raise ValueError(f"budget is {shorten(budget)}; allowed: that of the smallest choices")
    return {name: choice.rank for name, choice in found.items()}


def _least(given: Sequence[Choice], most: float) -> Choice:
    """The smallest choice within a cost; the layer itself where none is."""
    fitting = [choice for choice in given if choice.cost <= most]
    return min(fitting, key=lambda c: c.numbers) if fitting else given[-1]


def _slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.numbers - a.numbers)
