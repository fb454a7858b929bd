"""A low-rank weight without the numbers that its two factors hold twice.

Of rank r, a weight has r independent rows, and every other row is a combination of them: the r
rows as they are and (d_out - r) x r coefficients, r (d_out + d_in - r) numbers in all. Two factors
hold r^2 more, since b @ a = (b m)(m^-1 a) for any invertible m. Nothing is lost by this, and rows
and coefficients are fewer than the matrix's own numbers at every rank that is not full. What comes
with them is an order of the outputs, an index of 16 bits for each, which is counted here as one
number more. With it there is a break-even rank again, d - sqrt(d) for a square matrix of side d.

Source: pivoting factorization, arXiv 2501.19090; rows chosen by a pivoted QR decomposition,
Golub and Van Loan, Matrix Computations, section 5.4.

Chapter: factorization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.factorize.svd import Factors
from rooflm.roofline.numeric import shorten


class Pivoted(NamedTuple):
    """A weight as some of its rows and the rest in terms of them.

    Parameters
    ----------
    rows : (rank, d_in), rows of the weight.
    rest : (d_out - rank, rank); rest @ rows are the other rows.
    order : (d_out,), whole numbers: which row of the weight each of [rows; rest @ rows] is.
    """

    rows: Tensor
    rest: Tensor
    order: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight, (d_out, d_in)."""
        stacked = torch.cat([self.rows, self.rest @ self.rows])
        return torch.empty_like(stacked).index_copy_(0, self.order, stacked)


class PivotedLinear(nn.Module):
    """A linear layer that computes some outputs, and the others from them.

    Parameters
    ----------
    pivoted : the weights, copied and rounded to FP16.
    """

    place: Tensor

    def __init__(self, pivoted: Pivoted) -> None:
        super().__init__()
        rank, d_in = pivoted.rows.shape
        self.first = nn.Linear(d_in, rank, bias=False, device="meta")
        self.second = nn.Linear(rank, len(pivoted.rest), bias=False, device="meta")
        for layer, weight in ((self.first, pivoted.rows), (self.second, pivoted.rest)):
            layer.weight = nn.Parameter(weight.detach().half().float(), requires_grad=False)
        self.register_buffer("place", pivoted.order.argsort())

    @property
    def weight(self) -> Tensor:
        """The weight that this stands for, (d_out, d_in)."""
        rows = self.first.weight
        return torch.cat([rows, self.second.weight @ rows])[self.place]

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        some = self.first(x)
        return torch.cat([some, self.second(some)], -1)[..., self.place]


def pivot(factors: Factors) -> Pivoted:
    """The same weight as rows of it and coefficients.

    Rows are chosen one by one, each the one that is farthest from the span of those before, by
    Gram-Schmidt on the rows of b; coefficients then stay of a moderate size.

    Parameters
    ----------
    factors : of full rank, with no more rank than outputs.

    Returns
    -------
    Pivoted
        float32.

    Raises
    ------
    ValueError
        for factors whose rank is less than they have columns.

    Source: arXiv 2501.19090.
    """
    b, a = factors.b.double(), factors.a.double()
    basis = torch.linalg.qr(a.T).R.T  # |row of b @ a| = |row of b @ basis|
    left = b @ basis
    least = 1e-12 * float(left.square().sum(1).max())  # the rows are float32
    chosen: list[int] = []
    for _ in range(b.shape[1]):
        norms = left.square().sum(1)
        norms[chosen] = -1.0
        best = int(norms.argmax())
        if norms[best] <= least:
            raise ValueError(f"the factors have rank {len(chosen)}, not {b.shape[1]}")
        direction = left[best] / norms[best].sqrt()
        left = left - torch.outer(left @ direction, direction)
        chosen.append(best)
    others = [i for i in range(len(b)) if i not in set(chosen)]
    rest = torch.linalg.solve(b[chosen], b[others], left=False)
    rows = b[chosen] @ a
    return Pivoted(rows.float(), rest.float(), torch.tensor(chosen + others))


def pivot_numbers(d_out: int, d_in: int, rank: int) -> int:
    """Numbers that a rank takes: r (d_out + d_in - r), and the place of every output.

    >>> pivot_numbers(256, 256, 128) - 256, 256 * 256
    (49152, 65536)
    """
    return rank * (d_out + d_in - rank) + d_out


def pivot_rank_of_share(d_out: int, d_in: int, share: float) -> int:
    """The largest rank that takes at most a share of the matrix's numbers; 1 at least.

    >>> pivot_rank_of_share(256, 256, 0.5)
    74
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {shorten(share)}; allowed: above 0, up to 1")
    both, budget = d_out + d_in, share * d_out * d_in - d_out
    return max(1, int((both - (both * both - 4 * budget) ** 0.5) / 2 + 1e-9))
