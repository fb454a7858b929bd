"""Every choice of codes of a tiny layer: what a greedy method is measured against.

A row of n weights on 2^bits values has 2^(bits n) choices, so that this serves rows of about four
weights and nothing of use. On those it is the optimum that GPTQ, which never goes back on a
column, is compared with.

Chapter: quantization methods.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rooflm.lab.quantize.gptq import check_hessian
from rooflm.lab.quantize.grids import Grid

MOST_CHOICES = 2**16


def row_errors(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """The squared output error of each row, e H e^T.

    Parameters
    ----------
    weight, quantized : (…, d_in).
    hessian : (d_in, d_in).

    Returns
    -------
    Tensor
        (…), float64.
    """
    e = weight.double() - quantized.double()
    return ((e @ hessian.double()) * e).sum(-1)


def best_of_all(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Each row's codes of least output error, by trying them all.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    grid : one scale a row, (d_out, 1, 1), as `gptq.Quantized` has it.

    Returns
    -------
    Tensor
        (d_out, d_in), float64, dequantized; the first of equal choices.

    Raises
    ------
    ValueError
        for more than `MOST_CHOICES` choices.
    """
    check_hessian(hessian, weight)
    d_in, levels = weight.shape[1], range(grid.lowest, grid.highest + 1)
    if len(levels) ** d_in > MOST_CHOICES:
        raise ValueError(
            f"a row of {d_in} weights in {grid.bits} bits has {len(levels) ** d_in} choices; "
            f"allowed: {MOST_CHOICES} at most"
        )
    codes = torch.tensor(list(itertools.product(levels, repeat=d_in)), dtype=torch.float64)
    values = (codes - grid.zero.double()) * grid.scale.double()  # (d_out, choices, d_in)
    best = row_errors(weight[:, None], values, hessian).argmin(1)
    return values[torch.arange(len(weight)), best]
