"""How much a weight matters: the criteria of unstructured pruning, as scores of a matrix.

The higher a weight's score, the longer it is kept. Magnitude looks at the weight alone. Wanda
multiplies it by the size of what it reads. Both score each weight as if it were the only one to go
and nothing made up for it. The score of the optimal brain surgeon is the least error that is left
when one weight goes and others make up for it. The random score is the control.

Sources: magnitude, Han et al., arXiv 1506.02626; Wanda, arXiv 2306.11695, section 3;
the optimal brain surgeon, Hassibi and Stork, NIPS 5, 1992, in the form of SparseGPT, arXiv
2301.00774, section 3.1, eq. 3, and section 3.4, algorithm 1.

Chapter: pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, (d_out, d_in)."""
    return weight.abs()


def wanda(weight: Tensor, hessian: Tensor) -> Tensor:
    """|w_ij| times the norm of input j.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens, of which the diagonal is used: the squared
        norms of the inputs, up to a factor that changes no order.

    Returns
    -------
    Tensor
        (d_out, d_in). Its square is what the output loses in the mean over tokens, if this weight
        alone goes and nothing makes up for it.

    Source: arXiv 2306.11695, section 3.
    """
    return weight.abs() * hessian.diagonal().sqrt().to(weight.dtype)


def surgeon(weight: Tensor, scale: Tensor) -> Tensor:
    """(w_ij / U_jj)^2: the least error without this weight, the columns to its right adapting.

    Parameters
    ----------
    weight : (…, columns).
    scale : (columns,), of the diagonal of `gptq.inverse_factor`. U_jj^2 is the first element of
        the inverse of the Hessian of column j and those to its right: the columns to the left are
        fixed by then. It is not the diagonal of the whole inverse.

    Source: arXiv 2301.00774, section 3.4, algorithm 1.
    """
    return (weight / scale).square()


def draw(weight: Tensor, seed: int = 0) -> Tensor:
    """Random scores, (d_out, d_in): the control."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight)
