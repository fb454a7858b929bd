"""SparseGPT: remove one column's weights after another and let the columns to the right adapt.

The loop is GPTQ's: `gptq.sweep` fixes the columns of all rows from left to right and moves what
is not fixed yet, so that the output changes as little as it can. GPTQ fixes a weight at the nearest
point of a grid; here it is fixed at 0 where the mask says so, and elsewhere left as it is, or, in
the joint form, rounded.

What the update reaches. When column j goes, the columns to its right move to the least squares
answer to all that was fixed so far. A kept column is fixed too when its turn comes, before the
weights to its right have gone, and no longer adapts to their loss ("weight freezing"). So the
result is the least squares answer on the kept weights where all pruned columns of a row stand left
of its kept ones, and else near it and never below its error. `exact` has the least squares answer.

Conventions: the mask of a block is chosen when its first column comes up, by the score of
`scores.surgeon` on weights as updated by then. Unstructured, a block is `block` columns wide and
scores are compared over all rows (`per="layer"`, the paper's) or within a row; in an n:m pattern it
is m columns. The grids of the joint form are fitted beforehand on a weight that was pruned without
rounding: pruning moves weights beyond the range of the original ones, which the authors' code fits
them to. Damping, 1 % of the mean diagonal, is the paper's.

Source: SparseGPT, arXiv 2301.00774, section 3: 3.1 (eq. 3-6), 3.2-3.3 (masks), 3.4 (algorithm 1),
3.5 (eq. 7).

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.prune import masks
from rooflm.lab.prune.scores import surgeon
from rooflm.lab.quantize.gptq import check_hessian, inverse_factor, sweep
from rooflm.lab.quantize.grids import Grid, fit_grid, project, to_groups

# From scores (d_out, width) of a block of columns to the mask of their weights, true where kept.
Rule = Callable[[Tensor], Tensor]


class Pruned(NamedTuple):
    """A weight of which a part is 0: the weight and its mask, (d_out, d_in), true where kept."""

    weight: Tensor
    mask: Tensor


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float = 0.5,
    pattern: str = "",
    per: str = "layer",
    bits: int | None = None,
    group: int = 0,
    damp: float = 0.01,
    block: int = 128,
) -> Pruned:
    """A weight pruned by SparseGPT.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens; a factor does not matter.
    sparsity : share of weights that go, in every block of columns; a pattern has its own.
    pattern : "" for none, or "n:m", such as "2:4".
    per : what a block's scores are compared over: "layer", all rows, or "row".
    bits, group : of the grid that kept weights are rounded to; None for no rounding.
    damp : added to the diagonal, as a part of its mean.
    block : columns whose mask is chosen at once; with a pattern it sets the speed only.

    Returns
    -------
    Pruned
        the weight, of the type that was given, and its mask.

    Source: arXiv 2301.00774, algorithm 1.
    """
    width, rule = block, partial(masks.unstructured, sparsity=sparsity, per=per)
    if pattern:
        n, m = masks.read_pattern(pattern)
        width, rule = m, partial(masks.n_of_m, n=n, m=m)
    found = prune_and_compensate(weight, hessian, rule, width, None, damp, block)
    if bits is None:
        return found
    grid = fit_grid(to_groups(found.weight, group), bits)
    return prune_and_compensate(weight, hessian, rule, width, grid, damp, block)


def compensate(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    bits: int | None = None,
    group: int = 0,
    damp: float = 0.01,
) -> Pruned:
    """SparseGPT's update for a mask that another method has chosen, with or without rounding.

    Parameters
    ----------
    mask : (d_out, d_in), true where a weight is kept.
    weight, hessian, bits, group, damp : as in `sparsegpt`.
    """
    if bits is None:
        return prune_and_compensate(weight, hessian, mask, damp=damp)
    grid = fit_grid(to_groups(compensate(weight, hessian, mask, damp=damp).weight, group), bits)
    return prune_and_compensate(weight, hessian, mask, grid=grid, damp=damp)


def prune_and_compensate(
    weight: Tensor,
    hessian: Tensor,
    rule: Rule | Tensor,
    width: int = 128,
    grid: Grid | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> Pruned:
    """The core: GPTQ's sweep with weights fixed at 0.

    Parameters
    ----------
    weight, hessian, damp : as in `sparsegpt`.
    rule : the mask itself, (d_out, d_in), or what chooses the mask of `width` columns.
    width : columns whose mask is chosen at once.
    grid : scales and zero points of (d_out, groups, 1) to which kept weights are rounded.
    block : columns between two updates of all columns to the right.
    """
    check_hessian(hessian, weight)
    d_in = weight.shape[1]
    factor = inverse_factor(hessian, damp)
    scale = factor.diagonal()
    mask = rule.clone() if isinstance(rule, Tensor) else torch.ones_like(weight, dtype=torch.bool)

    def choose(place: int, remaining: Tensor) -> Tensor:
        if not isinstance(rule, Tensor) and place % width == 0:
            scores = surgeon(remaining[:, :width], scale[place : place + width])
            mask[:, place : place + width] = rule(scores)
        value = remaining[:, 0]
        if grid is not None:
            value = project(value[:, None], _column(grid, place, d_in))[:, 0]
        return torch.where(mask[:, place], value, 0.0)

    block = max(1, block // width) * width  # no mask is chosen before its columns are updated
    swept = sweep(weight.double(), factor, choose, block)
    return Pruned(swept.to(weight.dtype), mask)


def _column(grid: Grid, place: int, d_in: int) -> Grid:
    """The grid of one column: scales and zero points of (d_out, 1)."""
    group = place * grid.scale.shape[1] // d_in
    return grid._replace(scale=grid.scale[:, group], zero=grid.zero[:, group])
