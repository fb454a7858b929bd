"""Laws of the error: what a ruler and a float lose, from a few numbers and without a tensor.

A step of Delta leaves a squared error of Delta^2 / 12 where steps are small beside the spread of
the numbers. An integer grid has one step; a float's doubles with each power of two.

Conventions: sizes are relative to a root mean square of 1, errors are SQNRs in decibels.

Sources: Bennett, 1948, Bell System Technical Journal 27(3), 446-472 (Delta^2 / 12); the exact
integrals behind `range_sqnr`, `measure`.

Chapter: number formats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rooflm.lab.quantize.measure import normal_error


def decibels(error: float) -> float:
    """A squared error, relative to the mean square of the numbers, as an SQNR.

    >>> decibels(0.01)
    20.0
    """
    return -10 * math.log10(error)


def integer_law(bits: int, crest: float) -> float:
    """SQNR in dB of a symmetric integer grid that just holds its largest number.

    A step of max|x| / (2^(bits-1) - 1), and an error that is evenly spread over a step.

    Parameters
    ----------
    bits : of a code, 2 or more.
    crest : the largest magnitude over the root mean square.

    >>> round(integer_law(8, 3**0.5), 2)  # numbers that are evenly spread themselves
    48.1
    """
    return 10 * math.log10(12) + 20 * math.log10((2 ** (bits - 1) - 1) / crest)


def float_law(mantissa_bits: int) -> float:
    """SQNR in dB of normal numbers in floats of unlimited range, at whatever scale.

    Steps are 2^(floor(log2 |x|) - mantissa_bits), errors evenly spread over them. Where the
    powers of two stand beside the standard deviation changes less than 0.1 dB.

    >>> round(float_law(3), 1), round(float_law(2), 1)
    (31.5, 25.5)
    """
    starts = 2.0 ** torch.arange(-60, 8, dtype=torch.float64)  # of octaves, both signs
    held = 2 * (torch.special.ndtr(2 * starts) - torch.special.ndtr(starts))
    return 10 * math.log10(12 * 4**mantissa_bits / (held * starts.square()).sum().item())


def range_sqnr(levels: Tensor, reach: float) -> float:
    """SQNR in dB of normal numbers on levels whose largest stands at `reach`, exactly.

    Parameters
    ----------
    levels : (levels,), rising, before any scale.
    reach : standard deviations from 0 to the largest level; what lies beyond is clipped.

    >>> round(range_sqnr(torch.tensor([-1.0, 1.0]), 0.7979), 1)  # the best binary scale
    4.4
    """
    levels = torch.as_tensor(levels, dtype=torch.float64)
    return decibels(normal_error(levels / levels.max() * reach))
