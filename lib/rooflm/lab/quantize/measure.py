"""How far a format's numbers lie from the weights, and how far they must lie on normal ones.

The signal-to-quantization-noise ratio compares any two formats on any tensor. For numbers drawn
from a normal distribution it needs no tensor: the expected error of a table of levels is a sum
of integrals with closed forms, and a scale fitted to the largest of n numbers adds one
integral, over that largest number.

    levels l, borders m halfway between them:  D = sum over levels of  int (x - l)^2 phi(x) dx

Conventions: sizes are relative to a standard deviation of 1; a group's largest magnitude M has
the distribution function erf(M / sqrt(2))^n, and the other n - 1 numbers are normal, cut off at
M on both sides.

Sources: Max, 1960, IRE Transactions on Information Theory 6(1), 7-12 (optimal levels and their
table); Panter and Dite, 1951, Proceedings of the IRE 39(1), 44-48 (levels as dense as the cube
root of the density, from which `lloyd_max` starts); order statistics, David and Nagaraja, 2003.

Chapter: number formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rooflm.lab.quantize.codecs import store
from rooflm.lab.quantize.float_codecs import FloatFormat
from rooflm.roofline.numeric import shorten, size

_NODES = 4096  # of the integral over the largest number
_FAR = 38.0  # beyond it the normal density is 0 in float64


def sqnr(x: Tensor, kept: Tensor) -> float:
    """The signal-to-quantization-noise ratio in decibels, 10 log10(sum x^2 / sum (x - kept)^2).

    Parameters
    ----------
    x : the numbers, any shape.
    kept : what is left of them, of the same shape.

    Returns
    -------
    float
        infinite where nothing was lost.

    Raises
    ------
    ValueError
        for tensors of two shapes.

    >>> round(sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 4)
    20.0
    """
    if x.shape != kept.shape:
        raise ValueError(f"kept is {tuple(kept.shape)}; allowed: {tuple(x.shape)}, as x")
    x, kept = x.double(), kept.double()
    noise = (x - kept).square().sum().item()
    return 10 * math.log10(x.square().sum().item() / noise) if noise else math.inf


def row_sqnr(x: Tensor, kept: Tensor) -> Tensor:
    """`sqnr` of each row, (rows,), in float64; arguments as there."""
    noise = (x.double() - kept.double()).square().sum(-1)
    return 10 * torch.log10(x.double().square().sum(-1) / noise)


def sqnr_after(weights: Iterable[Tensor], quantize: Callable[[Tensor], Tensor]) -> float:
    """The `sqnr` of several weights taken together, after a function has changed each."""
    energy = noise = 0.0
    for weight in weights:  # one at a time: what is small stays near the core
        kept = quantize(weight).double()
        energy += weight.double().square().sum().item()
        noise += (weight.double() - kept).square().sum().item()
    return 10 * math.log10(energy / noise) if noise else math.inf


def format_cost(weights: Iterable[Tensor], name: str) -> tuple[float, float]:
    """What a number format stores of some weights, and how close it stays to them.

    Parameters
    ----------
    weights : matrices, (d_out, d_in) each; the noise of all is compared with the energy of all.
    name : a name that `load_format` knows.

    Returns
    -------
    tuple of float
        stored bits per weight, scales counted, and the `sqnr` in decibels.
    """
    weights, size_of = list(weights), []

    def keep(weight: Tensor) -> Tensor:
        kept = store(weight, name)
        size_of.append(kept.bytes)
        return kept.values

    found = sqnr_after(weights, keep)
    return 8 * sum(size_of) / sum(weight.numel() for weight in weights), found


def crest(x: Tensor) -> Tensor:
    """The crest factor of each row, (rows,): its largest magnitude over its root mean square.

    >>> crest(torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, -1.0, 1.0, 1.0]])).tolist()
    [2.0, 1.0]
    """
    return (x.abs().amax(-1) / x.double().square().mean(-1).sqrt()).float()


def normal_error(levels: Tensor) -> float:
    """The expected squared error of a standard normal number at its nearest level.

    Parameters
    ----------
    levels : (levels,), rising.

    Source: Max, 1960.

    >>> round(normal_error(torch.tensor([-0.7979, 0.7979])), 4)  # 1 - 2/pi
    0.3634
    """
    rows = _rising(levels)[None]
    return _error_between(rows, torch.tensor([[-_FAR]]), torch.tensor([[_FAR]])).item()


def absmax_error(
    levels: Tensor, group: int, scale: Callable[[Tensor], Tensor] | None = None
) -> float:
    """The expected squared error of standard normal numbers in groups scaled by their largest.

    Parameters
    ----------
    levels : (levels,), rising, before any scale: codes, the points of a small float, NF4's table.
    group : numbers that share a scale.
    scale : from the group's largest magnitude, (nodes,), to its scale; None for the scale that
        takes it to the largest level.

    Returns
    -------
    float
        an expectation over groups, per number.

    >>> one_bit = absmax_error(torch.tensor([-1.0, 1.0]), group=1)  # a scale for each number
    >>> round(one_bit, 9)
    0.0
    """
    levels = _rising(levels)
    peaks = largest(group)
    scales = peaks / levels.abs().max() if scale is None else scale(peaks).double()
    scaled = scales[:, None] * levels  # (nodes, levels)
    low, high = -peaks[:, None], peaks[:, None]
    inside = torch.erf(peaks / math.sqrt(2))
    others = _error_between(scaled, low, high) / inside
    # The largest itself, on either side.
    own = sum((scaled - end).square().amin(1) for end in (low, high)) / 2
    return ((own + (group - 1) * others) / group).mean().item()


def largest(group: int, nodes: int = _NODES) -> Tensor:
    """The largest magnitude of `group` standard normal numbers: its quantiles, evenly spread.

    The mean over them of any function is that function's expectation.

    Parameters
    ----------
    group : numbers.
    nodes : quantiles.

    Returns
    -------
    Tensor
        (nodes,), rising, float64.

    >>> round(largest(1).square().mean().item(), 2), round(largest(256).mean().item(), 2)
    (1.0, 3.04)
    """
    size("group", group)
    shares = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    # erf(M / sqrt 2) = shares^(1/n). Its complement is what erfc keeps digits of.
    beyond = -torch.expm1(shares.log() / group)
    return -torch.special.ndtri(beyond / 2)


def lloyd_max(count: int, iterations: int = 10_000) -> Tensor:
    """The levels of least squared error for a standard normal number.

    Each level is the mean of its cell, each border lies halfway between two levels.

    Parameters
    ----------
    count : of levels, 1 to 64.
    iterations : at most so many.

    Returns
    -------
    Tensor
        (count,), rising, float64.

    Source: Max, 1960.

    >>> lloyd_max(4)
    tensor([-1.5104, -0.4528,  0.4528,  1.5104], dtype=torch.float64)
    """
    if not isinstance(count, int) or not 1 <= count <= 64:
        raise ValueError(f"count is {shorten(count)}; allowed: a whole number from 1 to 64")
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri(shares)
    ends = torch.tensor([[-_FAR]]), torch.tensor([[_FAR]])
    for _ in range(iterations):
        below, above = _borders(levels[None], *ends)
        held = torch.special.ndtr(above) - torch.special.ndtr(below)
        before, levels = levels, ((_density(below) - _density(above)) / held)[0]
        levels = (levels - levels.flip(0)) / 2  # symmetric, as the density is
        if (levels - before).abs().max() < 1e-12:
            break
    return levels


def float_bits(x: float, form: FloatFormat) -> str:
    """The bits of a number that a float format holds: sign, exponent, mantissa.

    Parameters
    ----------
    x : a finite number of the format.
    form : such as `float_codecs.E4M3`.

    Raises
    ------
    ValueError
        for a number that the format does not hold.

    >>> from rooflm.lab.quantize.float_codecs import E4M3
    >>> float_bits(-0.4375, E4M3)  # -(1 + 6/8) 2^(5 - 7)
    '1 0101 110'
    """
    lowest, width = form.lowest_exponent, form.mantissa_bits
    exponent = max(math.frexp(x)[1] - 1, lowest)
    steps = abs(x) / 2.0 ** (exponent - width)  # whole numbers, from 2^width on normal ones
    if steps != int(steps) or abs(x) > form.largest:
        raise ValueError(f"{form.name} does not hold {x!r}")
    field = exponent - lowest + 1 if steps >= 2**width else 0
    # Biases are 2^(k-1) - 1 for k bits of exponent, which the lowest exponent tells.
    sign = int(math.copysign(1, x) < 0)
    return f"{sign} {field:0{(1 - lowest).bit_length() + 1}b} {int(steps) % 2**width:0{width}b}"


def _rising(levels: Tensor) -> Tensor:
    levels = torch.as_tensor(levels, dtype=torch.float64)
    if levels.dim() != 1 or not len(levels) or (levels.diff() <= 0).any():
        raise ValueError(f"levels of shape {tuple(levels.shape)}; allowed: (levels,), rising")
    return levels


def _error_between(levels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The integral of (x - nearest level)^2 phi(x) from low to high, for each row of levels."""
    below, above = _borders(levels, low, high)
    held = torch.special.ndtr(above) - torch.special.ndtr(below)
    first = _density(below) - _density(above)  # integral of x phi
    second = held + below * _density(below) - above * _density(above)  # of x^2 phi
    return (second - 2 * levels * first + levels.square() * held).sum(1)


def _borders(levels: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where each level's cell begins and ends, within [low, high]."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    low, high = (x.double().expand(len(levels), 1) for x in (low, high))
    inner = middles.clamp(low, high)
    return torch.cat([low, inner], 1), torch.cat([inner, high], 1)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
