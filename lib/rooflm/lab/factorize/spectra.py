"""Singular values beside those of noise: how much of a weight is structure that a rank can hold.

The control of a spectrum is a matrix of independent entries of the same norm. Its singular values
follow a law that depends on its shape alone, in the limit of large matrices, which ours are close
to. `noise_spectrum` gives the law's quantiles. The control of a weight *on its inputs* is noise
that reads the same inputs (`left_out`): they alone make a spectrum steep.

Source: Marchenko and Pastur, Mathematics of the USSR-Sbornik 1 (1967), 457.

Chapter: factorization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.factorize.aware import cholesky
from rooflm.lab.factorize.svd import tails
from rooflm.lab.quantize.outliers import power_share
from rooflm.roofline.low_rank import rank_of_share
from rooflm.roofline.numeric import size

_STEPS = 20_000


class LeftOut(NamedTuple):
    """Parts of a squared norm that a rank leaves out.

    Parameters
    ----------
    weight, noise : of W, and of noise of its shape.
    outputs, noise_outputs : of W L and of noise times L, with L L^T = H of what the layer reads.
    """

    weight: float
    noise: float
    outputs: float
    noise_outputs: float


def noise_spectrum(d_out: int, d_in: int) -> Tensor:
    """Singular values of noise, the sum of whose squares is 1.

    Returns
    -------
    Tensor
        (min(d_out, d_in),), falling: the quantiles of the law.

    Source: Marchenko and Pastur (1967); with ratio c of the sides, the squares over their mean lie
    within (1 ± sqrt c)^2 and have the density sqrt((b - x)(x - a)) / (2 pi c x).
    """
    k = min(size("d_out", d_out), size("d_in", d_in))
    c = k / max(d_out, d_in)
    # x = 1 + c + 2 sqrt(c) cos(angle): the density in the angle is 2 sin^2 / (pi x), finite.
    angle = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) * math.pi / _STEPS
    squares = 1 + c + 2 * math.sqrt(c) * angle.cos()  # falling
    mass = (2 * angle.sin().square() / (math.pi * squares)).cumsum(0)
    wanted = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    found = squares[torch.searchsorted(mass / mass[-1], wanted)]
    return (found / found.sum()).sqrt()


def energy(singular: Tensor) -> Tensor:
    """The share of the squared norm that each rank keeps.

    Parameters
    ----------
    singular : (k,), falling.

    Returns
    -------
    Tensor
        (k + 1,), for ranks 0 to k; from 0 to 1.

    >>> energy(torch.tensor([3.0, 1.0])).tolist()
    [0.0, 0.9, 1.0]
    """
    left = tails(singular)
    return 1 - left / left[0]


def rank_of_energy(singular: Tensor, share: float) -> int:
    """The least rank that keeps a share of the squared norm.

    >>> rank_of_energy(torch.tensor([3.0, 1.0]), 0.95)
    2
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; allowed: 0 to 1")
    return int(torch.searchsorted(energy(singular), share - 1e-12))


def kept_at_break_even(weights: Sequence[Tensor]) -> tuple[float, float]:
    """The share of the squared norm that the break-even rank keeps, and that of noise.

    Parameters
    ----------
    weights : of one shape; the first number is their mean.
    """
    d_out, d_in = weights[0].shape
    rank = int(rank_of_share(d_in, d_out, 1.0))
    kept = [float(energy(torch.linalg.svdvals(w.double()))[rank]) for w in weights]
    return sum(kept) / len(kept), float(energy(noise_spectrum(d_out, d_in))[rank])


def left_out(weight: Tensor, hessian: Tensor, share: float, draws: int = 3) -> LeftOut:
    """What a rank leaves out of a weight and of its outputs, beside noise in the weight's place.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    share : of the numbers, which two factors of the rank take.
    draws : of noise, whose mean is taken.
    """
    d_out, d_in = weight.shape
    rank = int(rank_of_share(d_in, d_out, share))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(weight.shape, generator=generator).double() for _ in range(draws)]
    noise = [x.to(weight.device) for x in drawn]
    lower, weight = cholesky(hessian), weight.detach().double()

    def left(matrix: Tensor) -> float:
        tall = matrix.shape[0] > matrix.shape[1]
        squares = torch.linalg.eigvalsh(matrix.T @ matrix if tall else matrix @ matrix.T)  # rising
        return float(squares[:-rank].sum() / squares.sum())

    white = sum(left(x) for x in noise) / draws
    read = sum(left(x @ lower) for x in noise) / draws
    return LeftOut(left(weight), white, left(weight @ lower), read)


def strongest(inputs: Tensor, part: float = 0.01) -> tuple[float, float]:
    """What part of the inputs' power the strongest channels hold, and the strongest directions.

    Parameters
    ----------
    inputs : (tokens, d_in).
    part : of the channels, and as many directions; rounded to whole ones, at least one.
    """
    x, top = inputs.double(), max(1, round(part * inputs.shape[1]))
    squares = torch.linalg.eigvalsh(x @ x.T if x.shape[0] < x.shape[1] else x.T @ x)  # rising
    return power_share(inputs, part), float(squares[-top:].sum() / squares.sum())
