"""GPTQ: round one column after another and let the columns to the right make up for it.

The layer's output error on the calibration inputs is sum_rows e H e^T, with e = w - w_q and
H = inputs^T inputs / tokens. Rounding column j by itself moves the output; the columns that
are not rounded yet can move it back, and H says by how much. GPTQ takes the columns of all
rows in the same order, so that one Cholesky factor serves every row.

Conventions: H^-1 = U^T U with U upper triangular; row j of U holds, scaled by 1/U[j, j], what
OBQ would take from the inverse of the Hessian of the columns that remain. Everything runs in
float64: a code is a rounding decision, and one that flips with the order of a float32 sum would
change all columns to its right.

- Groups: the grid of a group is fitted when its first column comes up, on the weights as they
  have been updated by then. The lazy update ends its blocks where groups end, so that no grid
  is fitted on weights which still wait for an update.
- Activation order rounds the columns with the largest H[j, j] first. A column then keeps the
  group of its place in the matrix, and all grids are fitted before the first column is rounded:
  the result is stored with plain group scales, no permutation at inference.
- A column whose input was always 0 is rounded, and moves nothing.

Sources: GPTQ, arXiv 2210.17323, sections 3 (eq. 1-3) and 4 (algorithm 1); OBQ, arXiv 2208.11580,
section 5; `sweep` is the loop of SparseGPT too, arXiv 2301.00774, section 3.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.grids import Grid, decode, encode, fit_grid, project, to_groups
from rooflm.roofline.numeric import shorten, size

# Called with a column's place in the order and the up-to-date weights (d_out, width) from that
# column to the end of the block; returns the values (d_out,) that the column shall take.
Choose = Callable[[int, Tensor], Tensor]
# The grid of (d_out, group) weights, with scales of (d_out, 1).
Fit = Callable[[Tensor], Grid]


class Quantized(NamedTuple):
    """A weight on its grids.

    Parameters
    ----------
    weight : (d_out, d_in), dequantized, of the type of the weight that was given.
    codes : (d_out, d_in), whole numbers; that of 0 where a weight is kept in FP16.
    grid : scales and zero points of (d_out, groups, 1).
    """

    weight: Tensor
    codes: Tensor
    grid: Grid


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    act_order: bool = False,
    damp: float = 0.01,
    clip: str | None = None,
    block: int = 128,
    static_groups: bool = False,
) -> Quantized:
    """A weight quantized by GPTQ.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens; a factor does not matter.
    bits, group, symmetric, clip : the grid, as in `round_to_nearest`.
    act_order : round the columns with the largest inputs first; the grids of all groups are
        then fitted beforehand.
    damp : added to the diagonal, as a part of its mean.
    block : columns between two updates of all columns to the right; sets the speed only.
    static_groups : fit all grids beforehand without `act_order` too. On a full range it often
        wins at 2-3 bits, since the updates widen what a later grid has to span.

    Returns
    -------
    Quantized
        the weight, its codes and its grids.

    Raises
    ------
    ValueError
        for arguments out of range and for a Hessian that has no inverse.

    Source: arXiv 2210.17323, algorithm 1.
    """
    check_hessian(hessian, weight)
    fit = partial(fit_grid, bits=bits, symmetric=symmetric, clip=clip)
    order = torch.arange(len(hessian), device=weight.device) if static_groups else None
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    return round_and_compensate(weight, hessian, fit, group, order, damp=damp, block=block)


def round_and_compensate(
    weight: Tensor,
    hessian: Tensor,
    fit: Fit,
    group: int = 0,
    order: Tensor | None = None,
    kept: Tensor | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> Quantized:
    """The core that GPTQ, OWQ and SpQR share.

    Parameters
    ----------
    weight, hessian, group, damp, block : as in `gptq`.
    fit : the grid of (d_out, group) weights, with scales of (d_out, 1).
    order : the columns in the order of rounding; all grids are then fitted beforehand, on the
        weights as given. None: from left to right, each group's grid fitted when it comes up.
    kept : (d_out, d_in), true for weights that stay in FP16: they take up the errors of the
        columns before them, make none but FP16's, and count as 0 in the fit of their grid.

    Returns
    -------
    Quantized
        the weight, its codes and its grids.
    """
    check_hessian(hessian, weight)
    to_groups(weight, group)  # refuses what cannot be grouped
    d_in = weight.shape[1]
    width = group or d_in
    kept = torch.zeros_like(weight, dtype=torch.bool) if kept is None else kept
    dense = weight.double().masked_fill(kept, 0)
    grids: list[Grid] = []
    if order is None and group:
        block = max(1, size("block", block) // group) * group
    else:
        grids = [fit(part) for part in to_groups(dense, group).unbind(1)]
    order = torch.arange(d_in, device=weight.device) if order is None else order

    def choose(place: int, remaining: Tensor) -> Tensor:
        column = int(order[place])
        if column // width == len(grids):  # the first column of a group that has no grid yet
            members = slice(column, column + width)
            grids.append(fit(remaining[:, :width].masked_fill(kept[:, members], 0)))
        value = remaining[:, :1]
        nearest = project(value, grids[column // width])
        return torch.where(kept[:, column, None], value.half(), nearest)[:, 0]

    factor = inverse_factor(hessian[order][:, order], damp)
    swept = torch.empty_like(dense)
    swept[:, order] = sweep(weight.double()[:, order], factor, choose, block)

    grid = grids[0]._replace(
        scale=torch.stack([g.scale for g in grids], 1), zero=torch.stack([g.zero for g in grids], 1)
    )
    codes = encode(to_groups(swept.masked_fill(kept, 0), group), grid)
    on_grid = decode(codes, grid).reshape(swept.shape)
    return Quantized(
        torch.where(kept, swept, on_grid).to(weight.dtype), codes.reshape(swept.shape), grid
    )


def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1, in float64.

    Parameters
    ----------
    hessian : (d_in, d_in), symmetric, positive semi-definite.
    damp : 0 or more; 0 needs a Hessian that has an inverse.

    Returns
    -------
    Tensor
        (d_in, d_in). A column that was never excited, H[j, j] = 0, stands alone.

    Source: arXiv 2210.17323, section 4, step 3.
    """
    if not 0 <= damp < float("inf"):
        raise ValueError(f"damp is {shorten(damp)}; allowed: a finite number, 0 or more")
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += damp * diagonal.mean()
    diagonal[diagonal == 0] = 1
    # Factored from its last row upwards, H = R R^T with R upper triangular, so that R^-1 is U:
    # one factorization, where H^-1 and its own factor would be two.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(
            f"the hessian has no inverse with damp = {damp:g}; allowed: a larger damp, or "
            "more calibration tokens"
        )
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def sweep(weight: Tensor, factor: Tensor, choose: Choose, block: int = 128) -> Tensor:
    """Fix the columns from left to right; each one's error moves the columns to its right.

    Parameters
    ----------
    weight : (d_out, d_in), columns in the order of fixing; not changed.
    factor : (d_in, d_in), from `inverse_factor`.
    choose : called for each column with its place and the up-to-date weights (d_out, width)
        from it to the end of its block; returns the values (d_out,) it is fixed at.
    block : columns that are kept up to date one by one; those behind are updated in one
        product when the block is done. Sets the speed, and how far `choose` can look.

    Returns
    -------
    Tensor
        (d_out, d_in), the fixed values.

    Source: arXiv 2210.17323, algorithm 1.
    """
    weight = weight.clone()
    d_in = weight.shape[1]
    size("block", block)
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        errors = torch.empty_like(weight[:, start:stop])
        for j in range(start, stop):
            fixed = choose(j, weight[:, j:stop])
            error = (weight[:, j] - fixed) / factor[j, j]
            weight[:, j + 1 : stop] -= torch.outer(error, factor[j, j + 1 : stop])
            weight[:, j] = fixed
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """The squared error of the layer's output, summed over outputs, the mean over tokens.

    Parameters
    ----------
    weight, quantized : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens, undamped.

    Returns
    -------
    float
        mean over tokens of |x W^T - x W_q^T|^2. With zeros for `quantized` it is the power of
        the output itself.

    Source: arXiv 2210.17323, eq. 1, in the Hessian's form.
    """
    error = weight.double() - quantized.double()
    return float(((error @ hessian.double()) * error).sum())


def check_hessian(hessian: Tensor, weight: Tensor) -> None:
    """Refuse a Hessian that does not belong to the weight, where it enters."""
    d_in = weight.shape[-1]
    if not isinstance(hessian, Tensor) or tuple(hessian.shape) != (d_in, d_in):
        shape = tuple(hessian.shape) if isinstance(hessian, Tensor) else shorten(hessian)
        raise ValueError(f"hessian is {shape}; allowed: {(d_in, d_in)}, as wide as the weight")
    if not torch.isfinite(hessian).all() or (hessian.diagonal() < 0).any():
        raise ValueError("the hessian holds an infinity, a NaN or a negative square")
