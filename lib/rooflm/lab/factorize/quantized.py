"""Low rank and few bits together: factors that are quantized, and a correction of what is.

Three ways to spend a number of bytes:

- the weight itself in few bits, which is `quantize`'s subject and the control here;
- the factors in few bits (`quantize_factors`). The first is rounded or goes through GPTQ on the
  layer's inputs; the second is then fitted anew to what the rounded first hands on, by least
  squares, and goes through GPTQ on that;
- the weight in few bits and a low-rank correction of the error (`correct`), in FP16.

Rows of the second factor are as long as the rank, which a group seldom divides: they get one scale
each where it does not.

Sources: factors then quantized, ASVD, arXiv 2312.05821, section 4; the correction, LQER, arXiv
2402.02446, here with the optimum of `aware.whitened` in place of a diagonal scale.

Chapter: factorization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.factorize.aware import whitened
from rooflm.lab.factorize.pivot import Pivoted
from rooflm.lab.factorize.svd import Factors, truncate
from rooflm.lab.quantize.gptq import gptq
from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.sensitive import stored_bits
from rooflm.roofline.numeric import unknown

QUANTIZERS = ("round", "gptq")
CLIP = "mse"  # ranges of least squared error
GROUP = 64
INDEX_BITS = 16  # of an output's place, where rows are pivoted


class Coded(NamedTuple):
    """What is stored in place of a weight.

    Parameters
    ----------
    factors : dequantized.
    bits : all of it, scales and zero points included.
    """

    factors: Factors | Pivoted
    bits: int


def quantize_factors(
    factors: Factors | Pivoted,
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    quantizer: str = "gptq",
    group: int = GROUP,
) -> Coded:
    """Both factors in few bits.

    Parameters
    ----------
    factors : of the weight, from `truncate` or `pivot`.
    weight : (d_out, d_in), the layer's own: what the second factor is fitted to.
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    bits, group : of the grid.
    quantizer : "round", which fits nothing anew, or "gptq".
    """
    if quantizer not in QUANTIZERS:
        raise unknown("quantizer", quantizer, QUANTIZERS)
    if isinstance(factors, Pivoted):
        order, first, second = factors.order, factors.rows, factors.rest
        wanted = weight[order[len(first) :]]
    else:
        order, (first, second), wanted = None, factors, weight
    rank, d_in = first.shape
    inner = group if rank % group == 0 else 0
    stored = stored_bits(rank, d_in, bits, group) + stored_bits(len(second), rank, bits, inner)
    if quantizer == "round":
        first = round_to_nearest(first, bits, group, clip=CLIP)
        second = round_to_nearest(second, bits, inner, clip=CLIP)
    else:
        first = gptq(first, hessian, bits, group, clip=CLIP).weight
        between = first.double() @ hessian.double() @ first.double().T
        refitted = fit_second(wanted, first, hessian)
        second = gptq(refitted, between, bits, inner, clip=CLIP).weight
    if order is None:
        return Coded(Factors(first, second), stored)
    return Coded(Pivoted(first, second, order), stored + INDEX_BITS * len(order))


def fit_second(weight: Tensor, first: Tensor, hessian: Tensor) -> Tensor:
    """The second factor of least output error behind a first one.

    Parameters
    ----------
    weight : (d_out, d_in), what is to be computed.
    first : (rank, d_in), given.
    hessian : (d_in, d_in).

    Returns
    -------
    Tensor
        (d_out, rank): W H a^T (a H a^T)^-1, least squares on the outputs of the first.
    """
    a, seen = first.double(), hessian.double() @ first.double().T  # (d_in, rank)
    gram = a @ seen
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())
    return torch.linalg.solve(gram, weight.double() @ seen, left=False).float()


def correct(weight: Tensor, quantized: Tensor, hessian: Tensor, rank: int) -> Factors:
    """The low-rank weight to add to a quantized one, of least output error of its rank.

    Parameters
    ----------
    weight, quantized : (d_out, d_in).
    hessian : (d_in, d_in).
    rank : of the correction.

    Source: LQER, arXiv 2402.02446; the whitening as in `aware.whitened`.
    """
    return truncate(whitened(weight.double() - quantized.double(), hessian), rank)
