"""Low rank on the roofline: a projection as two narrow ones, with an activation between them.

A weight of d_in x d_out that is stored as factors of rank r costs r (d_in + d_out) numbers and as
many multiplications a token instead of d_in d_out. What is not in that count: r numbers a token
are written by the first product and read by the second, and there are two kernels to start. So
there are three break-even ranks: of numbers, of bytes and of time.

A fused kernel would keep the activation on the chip: its break-even rank is that of the numbers.
`factorized` makes whole models of such pairs.

Source: survey (arXiv 2402.16363), section 3.4; ASVD, arXiv 2312.05821 (rank of a share).

Chapter: factorization.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from rooflm.roofline import operators as op
from rooflm.roofline.numeric import Number, maximum, minimum
from rooflm.roofline.operators import Operator


class Shape(NamedTuple):
    """A projection: its widths, and 1 where it has a bias."""

    d_in: Number
    d_out: Number
    bias: int = 0


def linear_pair(
    name: str, t: Number, shape: Shape, rank: Number, w: Number, a: Number
) -> list[Operator]:
    """A projection of t rows as two: d_in to rank, then rank to d_out.

    >>> [row.flops for row in linear_pair("q_proj", 1, Shape(4096, 4096), 1024, 2, 2)]
    [8388608, 8388608]
    """
    d_in, d_out, bias = shape
    first = op.linear(f"{name}_a", t, d_in, rank, 0, w, a)
    return [first, op.linear(f"{name}_b", t, rank, d_out, bias, w, a)]


def break_even_rank(d_in: Number, d_out: Number) -> Number:
    """The rank at which two factors hold as many numbers, and do as much work, as the matrix.

    >>> break_even_rank(4096, 4096)
    2048.0
    """
    return d_in * d_out / (d_in + d_out)


def break_even_rank_of_bytes(
    t: Number, d_in: Number, d_out: Number, w: Number, a: Number
) -> Number:
    """The rank at which both move as many bytes, for t rows of a bytes an element.

    The r numbers between the factors are written and read for every row:
    r (d_in + d_out) w + 2 t r a = d_in d_out w.

    >>> f"{break_even_rank_of_bytes(1, 4096, 4096, 2, 2):.1f}"
    '2047.5'
    """
    return d_in * d_out * w / ((d_in + d_out) * w + 2 * t * a)


def break_even_rank_of_time(
    t: Number,
    d_in: Number,
    d_out: Number,
    w: Number,
    a: Number,
    peak: Number,
    bandwidth: Number,
    overhead: Number = 0,
) -> Number:
    """The rank below which two products take less time than one, at the roofs.

    Parameters
    ----------
    t : rows, the tokens of a pass.
    w, a : bytes of a weight and of an activation.
    peak, bandwidth : the roofs in FLOP/s and B/s.
    overhead : t0, seconds for each kernel; the second one pays it again.

    Returns
    -------
    number
        0 or less where no rank is worth a second kernel.

    Both times are sums of max(F / P, Q / W) + t0, and of the two factors each is affine in the
    rank. A sum of maxima is the largest of the sums, so that the rank is the least of four roots.

    >>> f"{break_even_rank_of_time(1, 4096, 4096, 2, 2, 155e12, 768e9):.1f}"
    '2047.5'
    """
    dense = op.linear("", t, d_in, d_out, 0, w, a)
    moved = dense.weight_bytes + dense.activations_read + dense.activations_written
    time = maximum(dense.flops / peak, moved / bandwidth) - overhead

    def lines(width: Number) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
        """(slope, intercept) of a factor's time in the rank, under the compute and memory roof."""
        moving = (width * w + t * a) / bandwidth, t * width * a / bandwidth
        return (2 * t * width / peak, 0), moving

    roots = [(time - c1 - c2) / (s1 + s2) for s1, c1 in lines(d_in) for s2, c2 in lines(d_out)]
    return reduce(minimum, roots)


def rank_of_share(d_in: Number, d_out: Number, share: float) -> Number:
    """The largest rank whose factors hold at most that share of the matrix's numbers; 1 at least.

    Of whole widths a whole number, of symbols or arrays the formula without rounding.

    >>> rank_of_share(4096, 11008, 0.5)
    1492
    """
    rank = share * break_even_rank(d_in, d_out)
    if isinstance(rank, float):
        return max(1, int(rank + 1e-9))
    return rank
