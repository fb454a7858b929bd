"""A few sensitive weights stay in FP16, the rest is quantized: OWQ by columns, SpQR by weights.

OWQ keeps the input channels ("weak columns") whose rounding costs most at the output. SpQR
keeps single weights, stores them as a sparse matrix, cuts the rest into small groups and
quantizes the groups' scales a second time. Both take the same number of random columns or
weights as a control: what is gained over it is what the measure of sensitivity is worth.

Conventions: the codes fill the whole matrix, with the code of 0 where a weight is kept, so
that groups stay regular. A kept weight is an FP16 number. With `method="gptq"` it has taken up
the errors of the columns before it, so it is no longer the original; kept columns come last in
the order of rounding, so that they take up all of them. `bits_per_weight` counts all that is
stored: codes, scales, zero points, kept values, indices.

The paper picks SpQR's outliers group by group, by a threshold, while it sweeps; here a given
share is picked beforehand over the whole layer, so that a control can keep as many.

Sources: OWQ, arXiv 2306.02272; SpQR, arXiv 2306.03078, section 3.1, eq. 2, and
section 4, algorithm 1.

Chapter: quantization methods.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.gptq import (
    Fit,
    Quantized,
    check_hessian,
    inverse_factor,
    round_and_compensate,
)
from rooflm.lab.quantize.grids import Grid, decode, encode, fit_grid, project, to_groups
from rooflm.roofline.numeric import shorten, size, unknown


class Kept(NamedTuple):
    """A weight of which a part is kept in FP16.

    Parameters
    ----------
    weight : (d_out, d_in), dequantized, with the kept weights in place.
    codes : (d_out, d_in), the code of 0 where a weight is kept.
    grid : scales and zero points of (d_out, groups, 1).
    kept : (d_out, d_in), true for the weights that are kept.
    bits_per_weight : all that is stored, over d_out * d_in.
    """

    weight: Tensor
    codes: Tensor
    grid: Grid
    kept: Tensor
    bits_per_weight: float


def keep_columns(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    columns: int,
    group: int = 0,
    symmetric: bool = False,
    method: str = "gptq",
    chosen: str = "sensitive",
    seed: int = 0,
    clip: str | None = None,
    damp: float = 0.01,
) -> Kept:
    """OWQ: some input channels in FP16, the others quantized by GPTQ or by rounding.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    bits, group, symmetric, clip : the grid, as in `round_to_nearest`; fitted without the kept
        columns, on the weights as given.
    columns : how many to keep, 0 to d_in.
    method : "gptq" or "round".
    chosen : "sensitive" for the columns of largest `column_sensitivity`, "random" for the
        control.
    seed : of the random choice.
    damp : as in `gptq`.

    Returns
    -------
    Kept
        the weight, its parts and the bits it takes.

    Raises
    ------
    ValueError
        for arguments out of range.

    Source: OWQ, arXiv 2306.02272.
    """
    check_hessian(hessian, weight)
    d_out, d_in = weight.shape
    if size("columns", columns, 0) > d_in:
        raise ValueError(f"columns is {columns}; allowed: 0 to d_in = {d_in}")
    if method not in ("gptq", "round"):
        raise unknown("method", method, ["gptq", "round"])
    scores = column_sensitivity(weight, hessian, bits, group, symmetric, clip)
    weak = _pick(scores, columns, chosen, seed)
    kept = weak.expand(d_out, d_in)
    fit = partial(fit_grid, bits=bits, symmetric=symmetric, clip=clip)
    if method == "gptq":
        order = torch.cat([torch.where(~weak)[0], torch.where(weak)[0]])
        parts = round_and_compensate(weight, hessian, fit, group, order, kept, damp)
    else:
        parts = _round_the_rest(weight, fit, group, kept)
    stored = stored_bits(d_out, d_in, bits, group, symmetric, columns=columns)
    return Kept(*parts, kept, stored / weight.numel())


def column_sensitivity(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    clip: str | None = None,
) -> Tensor:
    """H[j, j] * |w_j - w_q,j|^2: the output error if column j alone were rounded.

    On a full range the column that holds the extremes is on the grid and scores low; with
    `clip="mse"` it does not.

    Parameters
    ----------
    weight, hessian, bits, group, symmetric, clip : as in `keep_columns`.

    Returns
    -------
    Tensor
        (d_in,).

    Source: OWQ, arXiv 2306.02272, the sensitivity of a weight column.
    """
    grouped = to_groups(weight.double(), group)
    error = grouped - project(grouped, fit_grid(grouped, bits, symmetric, clip))
    return hessian.diagonal().double() * error.reshape(weight.shape).square().sum(0)


def spqr(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int = 16,
    outliers: float = 0.01,
    scale_bits: int = 3,
    scale_rows: int = 16,
    chosen: str = "sensitive",
    seed: int = 0,
    damp: float = 0.01,
) -> Kept:
    """SpQR: single outlier weights in FP16, small groups with quantized scales, GPTQ's sweep.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    bits : of a code, with a zero point in each group.
    group : elements that share a scale, not 0.
    outliers : share of the weights to keep, in [0, 1]; rounded to a whole number of weights.
    scale_bits, scale_rows : the second level: the scales of `scale_rows` neighbouring rows, a
        divisor of d_out, share a base and a step and are `scale_bits` codes. `scale_rows` 0:
        plain FP16 scales.
    chosen : "sensitive" for the weights of largest `outlier_gain`, "random" for the control.
    seed, damp : as in `keep_columns`.

    Returns
    -------
    Kept
        the weight, its parts and the bits it takes.

    Raises
    ------
    ValueError
        for arguments out of range.

    Source: arXiv 2306.03078, section 4, algorithm 1.
    """
    check_hessian(hessian, weight)
    d_out, d_in = weight.shape
    if not 0 <= outliers <= 1:
        raise ValueError(f"outliers is {shorten(outliers)}; allowed: a share from 0 to 1")
    if not isinstance(scale_bits, int) or not 1 <= scale_bits <= 8:
        raise ValueError(
            f"scale_bits is {shorten(scale_bits)}; allowed: a whole number from 1 to 8"
        )
    if scale_rows and d_out % size("scale_rows", scale_rows):
        raise ValueError(f"scale_rows is {scale_rows}; allowed: 0 or a divisor of {d_out}")
    count = round(outliers * weight.numel())
    cost = inverse_factor(hessian, damp).diagonal().square().reciprocal() / 2
    gain = outlier_gain(weight, cost, bits, size("group", group))
    kept = _pick(gain.flatten(), count, chosen, seed).reshape(d_out, d_in)

    def fit(grouped: Tensor) -> Grid:
        grid = fit_grid(grouped, bits)
        if not scale_rows:
            return grid
        idle = (grouped == 0).all(-1, keepdim=True)
        return grid._replace(scale=quantize_scales(grid.scale, idle, scale_bits, scale_rows))

    parts = round_and_compensate(weight, hessian, fit, group, kept=kept, damp=damp)
    stored = stored_bits(d_out, d_in, bits, group, False, 0, count, scale_bits, scale_rows)
    return Kept(*parts, kept, stored / weight.numel())


def outlier_gain(weight: Tensor, cost: Tensor, bits: int, group: int) -> Tensor:
    """How much a group's error falls when one of its weights is left out of it.

    The sum runs over the whole group, so that a weight which itself sits on the grid, as the
    largest one always does, still counts for the range that it forces on the others.

    Parameters
    ----------
    weight : (d_out, d_in).
    cost : (d_in,), the price of a unit of squared error in each column, 1 / (2 [H^-1]_jj).
    bits, group : the grid.

    Returns
    -------
    Tensor
        (d_out, d_in).

    Source: arXiv 2306.03078, eq. 2, and `outliers` of algorithm 1.
    """
    grouped = to_groups(weight.double(), group)  # (d_out, groups, group)
    price = cost.double().reshape(1, -1, grouped.shape[2])

    def group_error(values: Tensor) -> Tensor:
        rounded = project(values, fit_grid(values, bits))
        return (price * (values - rounded).square()).sum(-1)

    whole = group_error(grouped)
    gains = []
    for place in range(grouped.shape[2]):
        rest = grouped.clone()
        rest[..., place] = 0  # 0 widens no range and has no error: as good as absent
        gains.append(whole - group_error(rest))
    return torch.stack(gains, -1).reshape(weight.shape)


def quantize_scales(scale: Tensor, idle: Tensor, bits: int, rows: int) -> Tensor:
    """The second level: scales as codes on a grid of their own, for blocks of rows.

    Parameters
    ----------
    scale : (d_out, 1), positive: the scales of one group of columns.
    idle : (d_out, 1), true where the group holds only zeros: any scale will do there.
    bits, rows : bits of a code; rows, a divisor of d_out, that share a base and a step.

    Returns
    -------
    Tensor
        (d_out, 1), base + code * step with base and step in FP16, positive.

    Source: arXiv 2306.03078, section 4.
    """
    blocks, free = scale.reshape(-1, rows), idle.reshape(-1, rows)
    smallest = blocks.masked_fill(free, torch.inf).amin(1, keepdim=True)
    blocks = torch.where(free, smallest, blocks)
    blocks = torch.where(torch.isinf(blocks), 1.0, blocks)
    base = blocks.amin(1, keepdim=True)  # the smallest of FP16 numbers, so one itself
    step = ((blocks - base).amax(1, keepdim=True) / (2**bits - 1)).half().float()
    codes = ((blocks - base) / torch.where(step == 0, 1.0, step)).round().clamp(0, 2**bits - 1)
    return (base + codes * step).reshape(scale.shape)


def stored_bits(
    d_out: int,
    d_in: int,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    columns: int = 0,
    outliers: int = 0,
    scale_bits: int = 16,
    scale_rows: int = 0,
) -> int:
    """Bits of a quantized matrix of which a part is kept.

    Parameters
    ----------
    d_out, d_in, bits, group, symmetric : the matrix and its grid. Each group has a scale and,
        unless symmetric, a zero point of `bits`; one group a row counts too.
    columns : kept columns: FP16 values and one 16-bit index each.
    outliers : kept weights: FP16 value and 16-bit column index each, once there is one also
        32-bit row offsets, d_out + 1 of them (compressed sparse rows).
    scale_bits, scale_rows : with `scale_rows` 0 a scale is FP16; else `scale_bits`, and each
        block of rows adds an FP16 base and an FP16 step.

    Returns
    -------
    int
        bits.

    >>> stored_bits(64, 64, 4, group=64) / 64**2
    4.3125
    """
    groups = d_out * (d_in // (group or d_in))
    scales = groups * (scale_bits if scale_rows else 16)
    scales += 32 * groups // scale_rows if scale_rows else 0
    zeros = 0 if symmetric else groups * bits
    sparse = outliers * (16 + 16) + (32 * (d_out + 1) if outliers else 0)
    return d_out * d_in * bits + scales + zeros + columns * (16 * d_out + 16) + sparse


def _pick(scores: Tensor, count: int, chosen: str, seed: int) -> Tensor:
    """A mask over scores (n,): the `count` largest, or as many drawn at random."""
    if chosen == "sensitive":
        order = scores.argsort(descending=True, stable=True)
    elif chosen == "random":
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    else:
        raise unknown("choice", chosen, ["sensitive", "random"])
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[order[:count].to(scores.device)] = True
    return mask


def _round_the_rest(weight: Tensor, fit: Fit, group: int, kept: Tensor) -> Quantized:
    """Rounding alone: a kept weight is itself, in FP16."""
    grouped = to_groups(weight.double().masked_fill(kept, 0), group)
    grid = fit(grouped)
    codes = encode(grouped, grid)
    rounded = decode(codes, grid).reshape(weight.shape)
    dense = torch.where(kept, weight.half().double(), rounded).to(weight.dtype)
    return Quantized(dense, codes.reshape(weight.shape), grid)
