"""The optimum that greedy pruning is measured against: least squares, and all masks of a tiny row.

For a given mask the best values of the kept weights are a least squares problem, one for each row
of the weight, since every row keeps other columns. It takes an inversion a row, which is what
SparseGPT avoids. The best mask can be found by trying them all, on rows of a dozen weights.

Source: SparseGPT, arXiv 2301.00774, section 3.1, eq. 2.

Chapter: pruning.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from rooflm.lab.quantize.exhaustive import row_errors
from rooflm.lab.quantize.gptq import check_hessian
from rooflm.roofline.numeric import size

MOST_MASKS = 2**14


def refit(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Each row's kept weights at the values of least output error.

    With K the kept columns of a row w and P the pruned ones, w_K + H_KK^-1 H_KP w_P.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens, invertible.
    mask : (d_out, d_in), true where a weight is kept.

    Returns
    -------
    Tensor
        (d_out, d_in), of the weight's type.

    Source: arXiv 2301.00774, eq. 2.
    """
    check_hessian(hessian, weight)
    h, result = hessian.double(), torch.zeros_like(weight, dtype=torch.float64)
    for row, kept, out in zip(weight.double(), mask, result, strict=True):
        out[kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ row)
    return result.to(weight.dtype)


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """The Hessian with a part of its mean diagonal added to it, as `gptq.inverse_factor` has it."""
    diagonal = hessian.double().diagonal()
    return hessian.double() + (damp * diagonal.mean() + (diagonal == 0).double()).diag()


def best_masks(weight: Tensor, hessian: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Each row's mask of least error after `refit`, by trying them all.

    Parameters
    ----------
    weight, hessian : as in `refit`.
    kept : weights that a row keeps.

    Returns
    -------
    weight, mask : (d_out, d_in), refitted, float64; and true where a weight is kept.

    Raises
    ------
    ValueError
        for more than `MOST_MASKS` masks a row.
    """
    d_out, d_in = weight.shape
    if not 1 <= size("kept", kept) <= d_in or math.comb(d_in, kept) > MOST_MASKS:
        raise ValueError(
            f"kept is {kept} of {d_in}; allowed: 1 to {d_in}, and {MOST_MASKS} masks at most"
        )
    columns = torch.tensor(list(itertools.combinations(range(d_in), kept)))
    masks = torch.zeros(len(columns), d_in, dtype=torch.bool).scatter_(1, columns, True)
    h = hessian.double()
    within = h[columns[:, :, None], columns[:, None, :]]  # (masks, kept, kept)
    fitted = torch.zeros(len(columns), d_out, d_in, dtype=torch.float64)
    solved = torch.linalg.solve(within, h[columns] @ weight.double().T)  # (masks, kept, d_out)
    fitted.scatter_(2, columns[:, None].expand(-1, d_out, -1), solved.mT)
    best = row_errors(weight, fitted, hessian).argmin(0)
    return fitted[best, torch.arange(d_out)], masks[best]
