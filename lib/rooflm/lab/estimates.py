"""A mean over the tokens of a text, with its 95 % confidence interval.

The block of text is the sampling unit. Tokens are not: the tokens of a block share a scene, a
speaker and a context, so that what is measured on them rises and falls together, and an interval
from so many "independent" tokens would be too narrow. A mean over tokens (or bytes) is a ratio
of block sums; its variance comes from the residuals of the ratio, and the interval from Student's
t with blocks - 1 degrees of freedom. That is a closed form and needs no seed; a percentile
bootstrap over few blocks covers less than it claims.

Blocks are neighbours in one text, and a scene outlasts a block. So the variance is multiplied by
(1 + r) / (1 - r), where r is the correlation of the residuals of neighbours, if it is positive;
that is the factor of a series whose memory fades by r a step. Between blocks of 512 tokens of
*Persuasion* the teacher's losses have r = 0.35; taken as independent, they would give intervals
that cover 83 %, not 95 %.

Sources: Cochran, Sampling Techniques, 3rd ed., 1977, chapter 6 (ratio estimator); Kish, Survey
Sampling, 1965 (design effect); Bartlett, J. Royal Statistical Society 98 (1935), 536 (series with
memory); Wilson, JASA 22 (1927), 209 (interval of a share); Abramowitz and Stegun, 1964, eqs.
26.7.3 and 26.7.4 (Student's t).

Chapter: number formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from rooflm.roofline.numeric import size


@dataclass(frozen=True)
class Estimate:
    """A value and the 95 % confidence interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def signed(self, digits: int = 4) -> str:
        """The value with its sign and half the interval, for differences.

        >>> Estimate(0.0042, 0.0023, 0.0061).signed()
        '+0.0042 ± 0.0019'
        """
        return f"{self.value:+.{digits}f} ± {self.half:.{digits}f}"


def ratio_estimate(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Sum over sum, from pairs that were sampled together.

    Parameters
    ----------
    numerators, denominators : (blocks,), in the order of the text; such as bits and bytes.

    Raises
    ------
    ValueError
        for fewer than two blocks, or denominators that sum to nothing.
    """
    if len(numerators) < 2 or not denominators.sum() > 0:
        raise ValueError(
            f"{len(numerators)} blocks with {denominators.sum().item():g} in all; "
            "allowed: two or more, with more than 0"
        )
    y, x = numerators.double(), denominators.double()
    ratio = (y.sum() / x.sum()).item()
    half = t_quantile(len(y) - 1) * _ratio_variance(y, x, ratio) ** 0.5
    return Estimate(ratio, ratio - half, ratio + half)


def share_estimate(counts: Tensor, totals: Tensor) -> Estimate:
    """A share, sum of counts over sum of totals, within [0, 1].

    Wilson's interval, with the totals divided by the design effect: how many times the variance
    between blocks exceeds that of independent tokens. It has a width where all agree, too.

    Parameters
    ----------
    counts, totals : (blocks,), in the order of the text.
    """
    middle = ratio_estimate(counts, totals)  # checks, and the value
    y, x = counts.double(), totals.double()
    share, t = middle.value, t_quantile(len(y) - 1)
    independent = share * (1 - share) / x.sum().item()
    effect = max(1.0, _ratio_variance(y, x, share) / independent) if independent else 1.0
    n = x.sum().item() / effect
    center = (share + t * t / (2 * n)) / (1 + t * t / n)
    half = t / (1 + t * t / n) * (share * (1 - share) / n + (t / (2 * n)) ** 2) ** 0.5
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


@lru_cache(maxsize=256)
def t_quantile(degrees: int) -> float:
    """The t that 95 % of Student's distribution lie within, from -t to t.

    >>> round(t_quantile(1), 3), round(t_quantile(31), 3)
    (12.706, 2.04)
    """
    degrees = min(size("degrees", degrees), 1000)  # from there on within 0.1 % of the normal
    low, high = 0.0, 13.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if _t_within(t, degrees) < 0.95 else (low, t)
    return low


def _t_within(t: float, degrees: int) -> float:
    angle = math.atan(t / degrees**0.5)
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _ratio_variance(y: Tensor, x: Tensor, ratio: float) -> float:
    residuals = y - ratio * x
    squares = residuals.square().sum().item()
    if squares == 0:
        return 0.0
    n = len(y)
    # Taking the mean out lowers the correlation by about 1 / n.
    neighbours = (residuals[1:] @ residuals[:-1]).item() / squares + 1 / n
    kept = min(max(neighbours, 0.0), 0.9)
    return (1 + kept) / (1 - kept) * n / (n - 1) * squares / x.sum().item() ** 2
