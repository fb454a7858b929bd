"""SqueezeLLM: a codebook for each row, found by weighted k-means.

A uniform grid spends its points evenly over the range, while most weights lie near 0. A
codebook of 2^bits values for each row puts the points where the weights are, and counts each
weight by how much the loss minds its error: the diagonal of the Fisher information, or of the
Hessian of the layer's output. Decoding is a look-up.

Conventions: in one dimension a cluster is an interval of the sorted row, so that running sums
give its mass and mean. The start is the best partition of short runs of neighbours into
clusters, by dynamic programming: the exact optimum where the row is no longer than
`RUNS_PER_CLUSTER` * 2^bits, close to it elsewhere. Lloyd's iteration then moves the borders
inside the runs, to a local optimum. Nothing is drawn at random. Centroids are rounded to FP16
before the codes are computed.

Sources: SqueezeLLM, arXiv 2306.07629, section 4.1, eq. 4-5; Lloyd, 1982, IEEE Transactions on
Information Theory 28(2), 129-137; the optimum in one dimension: Wang and Song, 2011, The R
Journal 3(2), 29-33; the density of points: Panter and Dite, 1951, Proceedings of the IRE 39(1),
44-48; one table for all groups: BOF4, arXiv 2505.06653.

Chapter: number formats; quantization methods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.grids import LARGEST_FP16, to_groups
from rooflm.roofline.numeric import shorten, size

# Runs of neighbours that the dynamic programme joins to clusters; its time grows with the square.
RUNS_PER_CLUSTER = 6
_ROWS_AT_ONCE = 64  # bounds the memory of the programme's tables


class Codebook(NamedTuple):
    """A weight whose rows have a codebook each.

    Parameters
    ----------
    weight : (d_out, d_in), dequantized.
    codes : (d_out, d_in), whole numbers in [0, 2^bits).
    centroids : (d_out, 2^bits), FP16 values in rising order.
    bits_per_weight : codes and centroids, over d_out * d_in.
    """

    weight: Tensor
    codes: Tensor
    centroids: Tensor
    bits_per_weight: float


def squeezellm(weight: Tensor, importance: Tensor, bits: int, iterations: int = 50) -> Codebook:
    """A weight on row-wise codebooks.

    Parameters
    ----------
    weight : (d_out, d_in).
    importance : (d_out, d_in) or (d_in,), 0 or more: how much a squared error counts, e.g. the
        mean squared gradient or the Hessian's diagonal. Ones for plain k-means.
    bits : of a code, 1 to 6: a larger codebook would weigh more than what it saves.
    iterations : at most so many of Lloyd's.

    Returns
    -------
    Codebook
        the weight, its codes and centroids.

    Raises
    ------
    ValueError
        for arguments out of range.

    Source: arXiv 2306.07629, section 4.1.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 6:
        raise ValueError(f"bits is {shorten(bits)}; allowed: a whole number from 1 to 6")
    size("iterations", iterations)
    counts = _importance_of(importance, weight)
    values, order = weight.double().sort(dim=1)
    counts = counts.gather(1, order)
    clusters = 2**bits
    runs = _runs(values, counts, RUNS_PER_CLUSTER * clusters)
    pieces = zip(*(t.split(_ROWS_AT_ONCE) for t in (values, counts, runs)), strict=True)
    edges = torch.cat([optimal_partition(v, c, r, clusters) for v, c, r in pieces])
    centroids = lloyd(values, counts, edges, iterations)
    centroids = centroids.clamp(-LARGEST_FP16, LARGEST_FP16).half().double()
    dequantized, codes = nearest(weight.double(), centroids)
    stored = bits + 16 * clusters / weight.shape[1]
    return Codebook(dequantized.to(weight.dtype), codes, centroids.to(weight.dtype), stored)


def block_table(weight: Tensor, group: int, bits: int, iterations: int = 300) -> Tensor:
    """One table of levels for all groups, each scaled by its largest magnitude, as NF4 is used.

    Numbers are taken relative to their group's largest magnitude, and counted by its square, so
    that the error of the weight itself is what gets small.

    Parameters
    ----------
    weight : (d_out, d_in): the weight that the table is for, or numbers that stand for many.
    group : elements that share a scale; 0 for a scale a row.
    bits : of a code, 1 to 6.
    iterations : at most so many of Lloyd's.

    Returns
    -------
    Tensor
        (2^bits,), rising, float64, within [-1, 1]; the outermost levels need not be -1 and 1.

    Source: BOF4, arXiv 2505.06653, the table of least mean squared error.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 6:
        raise ValueError(f"bits is {shorten(bits)}; allowed: a whole number from 1 to 6")
    grouped = to_groups(weight, group).double()
    peak = grouped.abs().amax(-1, keepdim=True)
    values, order = (grouped / torch.where(peak == 0, 1.0, peak)).flatten().sort()
    counts = peak.square().expand_as(grouped).flatten()[order][None]
    runs = _runs(values[None], counts, RUNS_PER_CLUSTER * 2**bits)
    edges = optimal_partition(values[None], counts, runs, 2**bits)
    return lloyd(values[None], counts, edges, iterations)[0]


def on_table(x: Tensor, table: Tensor, group: int, top: float | None = None) -> Tensor:
    """Numbers on one table of levels, scaled for each group by its largest magnitude.

    Parameters
    ----------
    x : any shape; groups are neighbours in it.
    table : (levels,), rising.
    group : numbers that share a scale, a divisor of the last dimension.
    top : what the largest magnitude is scaled to; None for the largest of the table.

    Returns
    -------
    Tensor
        of the shape of x, float32.

    >>> on_table(torch.tensor([[4.0, -1.0, 0.6, 8.0]]), torch.tensor([-1.0, 0.0, 1.0]), 2)
    tensor([[4., 0., 0., 8.]])
    """
    grouped = to_groups(x.reshape(-1, x.shape[-1]), group).float()
    scale = grouped.abs().amax(-1, keepdim=True) / float(table.abs().max() if top is None else top)
    scale = torch.where(scale == 0, 1.0, scale)
    table = table.float()
    codes = torch.bucketize(grouped / scale, (table[1:] + table[:-1]) / 2)
    return (table[codes] * scale).reshape(x.shape)


def optimal_partition(values: Tensor, counts: Tensor, runs: Tensor, clusters: int) -> Tensor:
    """The partition of a sorted row into intervals of least weighted squared error.

    Parameters
    ----------
    values : (rows, n), each row rising.
    counts : (rows, n), the weight of each value, 0 or more.
    runs : (rows, m + 1), rising from 0 to n: the places where an interval may begin or end.
    clusters : how many intervals; some may be empty.

    Returns
    -------
    Tensor
        (rows, clusters + 1), rising from 0 to n: the places that were taken.

    Source: Wang and Song, 2011.
    """
    mass, moment, energy = (s.gather(1, runs)[:, :, None] for s in _running_sums(values, counts))
    held = (mass - mass.mT).clamp(min=torch.finfo(mass.dtype).tiny)
    cost = (energy - energy.mT) - (
        moment - moment.mT
    ).square() / held  # of an interval (end, start)
    backwards = torch.ones_like(cost[0], dtype=torch.bool).triu(1)
    cost = cost.clamp(min=0).masked_fill(backwards, torch.inf)
    least, sources = cost[:, :, 0], []  # with one interval from the row's start
    for _ in range(clusters - 1):
        least, source = (least[:, None, :] + cost).min(2)
        sources.append(source)
    places = [torch.full_like(runs[:, :1], runs.shape[1] - 1)]
    for source in reversed(sources):
        places.append(source.gather(1, places[-1]))
    places.append(torch.zeros_like(places[0]))
    return runs.gather(1, torch.cat(places[::-1], 1))


def lloyd(values: Tensor, counts: Tensor, edges: Tensor, iterations: int) -> Tensor:
    """Lloyd's iteration on sorted rows: the mean of each cluster, then the nearest centroid.

    Parameters
    ----------
    values, counts : as in `optimal_partition`.
    edges : (rows, clusters + 1), rising from 0 to n: where the clusters begin and end.
    iterations : at most so many; it stops when no edge moves.

    Returns
    -------
    Tensor
        (rows, clusters), the centroids, rising. A cluster without mass keeps its place.

    Source: arXiv 2306.07629, eq. 5.
    """
    mass, moment, _ = _running_sums(values, counts)
    centroids = values.gather(1, edges[:, :-1].clamp(max=values.shape[1] - 1))
    for _ in range(iterations):
        held = mass.gather(1, edges).diff(dim=1)
        means = moment.gather(1, edges).diff(dim=1) / held
        centroids = torch.where(held > 0, means, centroids)
        middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
        moved = torch.cat([edges[:, :1], torch.searchsorted(values, middles), edges[:, -1:]], 1)
        if torch.equal(moved, edges):
            break
        edges = moved
    return centroids


def nearest(values: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each value and its code.

    Parameters
    ----------
    values : (rows, n).
    centroids : (rows, clusters), rising.

    Returns
    -------
    tuple of Tensor
        both (rows, n). A value halfway takes the lower one.
    """
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    codes = torch.searchsorted(middles, values.contiguous())
    return centroids.gather(1, codes), codes


def _running_sums(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of counts, counts * values and counts * values^2 before each place, (rows, n + 1)."""
    start = torch.zeros_like(values[:, :1])
    zeroth, first, second = (
        torch.cat([start, (counts * values**power).cumsum(1)], 1) for power in range(3)
    )
    return zeroth, first, second


def _runs(values: Tensor, counts: Tensor, runs: int) -> Tensor:
    """Sorted rows cut into runs of neighbours: (rows, runs + 1) places from 0 to n.

    Half of the cuts follow the density that suits many points best, the cube root of the
    importance times the values' own density, which between neighbours is 1/gap. The other
    half falls evenly on the gaps that are not 0, so that few distinct values are all told apart.
    """
    rows, n = values.shape
    if runs >= n:
        return torch.arange(n + 1, device=values.device).expand(rows, -1)
    gaps = values.diff(dim=1)
    between = (counts[:, 1:] + counts[:, :-1]) / 2
    held = between ** (1 / 3) * gaps ** (2 / 3)
    apart = (gaps > 0).double()
    share = sum(t / t.sum(1, keepdim=True).clamp(min=1e-300) for t in (held, apart))
    reached = share.cumsum(1)
    steps = torch.arange(1, runs, dtype=values.dtype, device=values.device) / runs
    cuts = torch.searchsorted(reached, reached[:, -1:] * steps) + 1
    first, last = torch.zeros_like(cuts[:, :1]), torch.full_like(cuts[:, :1], n)
    return torch.cat([first, cuts, last], 1)


def _importance_of(importance: Tensor, weight: Tensor) -> Tensor:
    """Importance as (d_out, d_in) in float64, its mean 1 in each row; all ones where it is 0."""
    if importance.shape not in (weight.shape, weight.shape[-1:]) or weight.dim() != 2:
        raise ValueError(
            f"importance is {tuple(importance.shape)}; allowed: {tuple(weight.shape)} or "
            f"({weight.shape[-1]},)"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds an infinity or a NaN; allowed: finite numbers")
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("the importance holds a negative or infinite number; allowed: 0 or more")
    counts = importance.double().expand(weight.shape)
    mean = counts.mean(1, keepdim=True)
    return torch.where(mean > 0, counts / mean, 1.0)
