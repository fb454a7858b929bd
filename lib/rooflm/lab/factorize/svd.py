"""Low rank: a weight as the product of two thin factors, from its singular values.

A weight W of (d_out, d_in) becomes b @ a with a (rank, d_in) and b (d_out, rank): two products
where there was one, rank (d_out + d_in) numbers where there were d_out d_in. That is fewer up to
the break-even rank (`rooflm.roofline.low_rank`), which is half of the smaller side at least.

Every decomposition here is W = left diag(singular) right with the singular values in falling
order, so that any rank is a cut through it. In `decompose` left and right are orthonormal, and a
cut is nearest to W (Eckart and Young); in `aware` they are not, and it is nearest in another sense.

Sources: Eckart and Young, Psychometrika 1 (1936), 211; two factors that share the singular values'
roots, ASVD, arXiv 2312.05821.

Chapter: factorization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.roofline.numeric import shorten


class Factors(NamedTuple):
    """A weight as b @ a.

    Parameters
    ----------
    a, b : (rank, d_in) and (d_out, rank).
    """

    a: Tensor
    b: Tensor

    @property
    def weight(self) -> Tensor:
        """The product, (d_out, d_in)."""
        return self.b @ self.a


class Decomposition(NamedTuple):
    """A weight as left diag(singular) right, in float64.

    Parameters
    ----------
    left, right : (d_out, k) and (k, d_in), k the smaller side.
    singular : (k,), falling.
    """

    left: Tensor
    singular: Tensor
    right: Tensor


class FactorizedLinear(nn.Module):
    """Two linear layers in place of one.

    It has no attribute `linear`: whoever looks for the one matrix of a layer inside its wrappers
    (`calibrate.inner_linear`) is told so by an error, not by half a layer.

    Parameters
    ----------
    factors : the weights, copied and rounded to FP16.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        rank, d_in = factors.a.shape
        self.first = nn.Linear(d_in, rank, bias=False, device="meta")
        self.second = nn.Linear(rank, len(factors.b), bias=False, device="meta")
        for layer, weight in ((self.first, factors.a), (self.second, factors.b)):
            layer.weight = nn.Parameter(weight.detach().half().float(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight that the factors stand for, (d_out, d_in)."""
        return self.second.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return self.second(self.first(x))


def decompose(weight: Tensor) -> Decomposition:
    """The singular value decomposition of a weight (d_out, d_in)."""
    left, singular, right = torch.linalg.svd(check_matrix(weight).double(), full_matrices=False)
    return Decomposition(left, singular, right)


def truncate(found: Decomposition, rank: int) -> Factors:
    """The factors of a rank; each gets the roots of the singular values.

    Parameters
    ----------
    rank : 1 to the smaller side.

    Returns
    -------
    Factors
        float32.

    Raises
    ------
    ValueError
        for a rank out of range.
    """
    check_rank(rank, len(found.singular))
    root = found.singular[:rank].sqrt()
    return Factors(
        (root[:, None] * found.right[:rank]).float(), (found.left[:, :rank] * root).float()
    )


def tails(singular: Tensor) -> Tensor:
    """The squared error of every rank: the sum of the squares that a cut leaves out.

    Parameters
    ----------
    singular : (k,), falling.

    Returns
    -------
    Tensor
        (k + 1,), for ranks 0 to k; the last is 0.

    >>> tails(torch.tensor([3.0, 2.0, 1.0])).tolist()
    [14.0, 5.0, 1.0, 0.0]
    """
    squares = singular.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def random_factors(weight: Tensor, rank: int, seed: int = 0) -> Factors:
    """The control: a projection on random directions, the best that can be made of them.

    Parameters
    ----------
    weight : (d_out, d_in). The directions lie in its smaller side, where a rank keeps more.

    Returns
    -------
    Factors
        float32; on average they keep rank / min(d_out, d_in) of the squared norm.
    """
    d_out, d_in = check_matrix(weight).shape
    check_rank(rank, min(d_out, d_in))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(min(d_out, d_in), rank, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(noise).Q.to(weight.device)  # (smaller side, rank)
    w = weight.double()
    if d_in <= d_out:
        return Factors(directions.T.float(), (w @ directions).float())
    return Factors((directions.T @ w).float(), directions.float())


def factor_numbers(d_out: int, d_in: int, rank: int) -> int:
    """Numbers in the two factors of a rank.

    >>> factor_numbers(4096, 4096, 2048), 4096 * 4096
    (16777216, 16777216)
    """
    return rank * (d_out + d_in)


def check_matrix(weight: Tensor) -> Tensor:
    """Refuse what is no finite matrix, where it enters."""
    if weight.dim() != 2:
        raise ValueError(f"weight is of shape {tuple(weight.shape)}; allowed: (d_out, d_in)")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds an infinity or a NaN; allowed: finite numbers")
    return weight.detach()


def check_rank(rank: int, largest: int) -> None:
    """Refuse a rank that no cut has."""
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"rank is {shorten(rank)}; allowed: a whole number from 1 to {largest}")
