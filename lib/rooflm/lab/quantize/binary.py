"""One bit a weight, and what has to be added to it: ternary weights and PB-LLM.

Signs times one scale are the least that a weight can be. The best scale of a set of weights is
the mean of their magnitudes (least squares), and the error left is their variance about it,
sum w^2 - (sum |w|)^2 / n. The methods split a row into sets with a scale of their own: zeros and
the rest (ternary), a few salient weights at 8 bits and the rest (PB-LLM), and more (`billm.py`).

Conventions: the sign of 0 is +1, since one bit has no third value. A scale belongs to a row, or to
a row's part in a group or block, and is an FP16 number, rounded up as in `grids.py`. `bits` counts
all that is stored, per weight: codes, masks and scales. PB-LLM's own count (eq. 3: "at most 2.7
bits" for 10 % at 8 bits) has the mask and leaves out the scales.

Sources: binary, XNOR-Net, arXiv 1603.05279, section 3.1; ternary, TWN, arXiv 1605.04711, section
2.3, eq. 3-6 and its rule 0.75 E|W|, and BitNet b1.58, arXiv 2402.17764, section 2, eq. 1-3;
PB-LLM, arXiv 2310.00034, sections 3.2 (eq. 3) and 3.3; saliency, Optimal Brain Surgeon, as in
OBQ, arXiv 2208.11580, section 3.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.gptq import check_hessian, inverse_factor
from rooflm.lab.quantize.grids import fit_grid, project, round_up_to_fp16, to_groups
from rooflm.roofline.numeric import shorten, size, unknown

SCALE_BITS = 16


class PartlyBinary(NamedTuple):
    """A weight of binary and salient parts.

    Parameters
    ----------
    weight : (d_out, d_in), float32, dequantized.
    salient : the weights that got more than a bit, (d_out, d_in) bool.
    bits : stored per weight: codes, masks and scales.
    """

    weight: Tensor
    salient: Tensor
    bits: float


def binarize(weight: Tensor, group: int = 0) -> Tensor:
    """Signs times the mean magnitude of each row or group: the least-squares optimum.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements that share a scale; 0 for one scale a row.

    Returns
    -------
    Tensor
        (d_out, d_in), float32; 1 + 16/group bits a weight.

    Source: arXiv 1603.05279, section 3.1.

    >>> binarize(torch.tensor([[1.0, -3.0, 0.0, 4.0]]))
    tensor([[ 2., -2.,  2.,  2.]])
    """
    grouped = to_groups(weight, group).float()
    everything = torch.ones_like(grouped, dtype=torch.bool)
    return binarize_where(grouped, everything).reshape(weight.shape)


def binarize_where(weight: Tensor, mask: Tensor) -> Tensor:
    """Signs times the mean magnitude of the masked elements; 0 elsewhere.

    Parameters
    ----------
    weight, mask : (…, n) and bool; the last dimension shares a scale.

    Returns
    -------
    Tensor
        (…, n), float32.
    """
    sums = weight.double().abs().masked_fill(~mask, 0).sum(-1, keepdim=True)
    scale = round_up_to_fp16(sums / mask.sum(-1, keepdim=True).clamp(min=1))
    return torch.where(weight < 0, -scale, scale).masked_fill(~mask, 0)


def ternarize(weight: Tensor, group: int = 0, rule: str = "least squares") -> Tensor:
    """-1, 0 or 1 times the scale of each row or group.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements that share a scale; 0 for one scale a row.
    rule : which weights become 0, and the scale of the others. "least squares": the pair of least
        squared error, found by trying every number of zeros. "twn": |w| <= 0.75 mean|w| becomes
        0 (the optimum for normal weights), the scale is the mean of the other magnitudes.
        "absmean": BitNet's, |w| <= mean|w| / 2 becomes 0, the scale is mean|w|, zeros counted;
        `codecs.ternary` is the same with one scale for the whole weight.

    Returns
    -------
    Tensor
        (d_out, d_in), float32; 2 + 16/group bits a weight, packed.

    Source: arXiv 1605.04711, eq. 3-6; arXiv 2402.17764, eq. 1-3.
    """
    grouped = to_groups(weight, group).float()
    magnitude = grouped.abs()
    mean = magnitude.double().mean(-1, keepdim=True)
    if rule == "absmean":
        scale = round_up_to_fp16(mean)
        codes = torch.round(grouped / torch.where(scale == 0, 1.0, scale)).clamp(-1, 1)
        return (codes * scale).reshape(weight.shape)
    if rule == "twn":
        kept = magnitude > 0.75 * mean
    elif rule == "least squares":  # of k kept, the largest k take away most: (sum of them)^2 / k
        ranked, order = magnitude.double().sort(dim=-1, descending=True, stable=True)
        taken = ranked.cumsum(-1).square() / torch.arange(1, ranked.shape[-1] + 1)
        ranks = torch.arange(ranked.shape[-1]).expand_as(order)
        rank_of = torch.empty_like(order).scatter_(-1, order, ranks)
        kept = rank_of <= taken.argmax(-1, keepdim=True)
    else:
        raise unknown("rule", rule, ["least squares", "twn", "absmean"])
    return binarize_where(grouped, kept).reshape(weight.shape)


def hessian_saliency(weight: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """w_ij^2 / [H^-1]_jj: what the layer's squared error grows by if w_ij is forced to 0.

    The other weights of its row then take the values that make up for it best (OBS).

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    damp : added to the diagonal, as a part of its mean.

    Returns
    -------
    Tensor
        (d_out, d_in), float32.
    """
    check_hessian(hessian, weight)
    inverse_diagonal = inverse_factor(hessian, damp).square().sum(0)
    return (weight.double().square() / inverse_diagonal).float()


def most_salient(score: Tensor, fraction: float) -> Tensor:
    """The mask of the round(fraction * n) elements of largest score, the first of equal ones.

    >>> most_salient(torch.tensor([[1.0, 3.0], [2.0, 3.0]]), 0.5)
    tensor([[False,  True],
            [False,  True]])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {shorten(fraction)}; allowed: from 0 to 1")
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    order = score.flatten().argsort(descending=True, stable=True)
    mask[order[: round(fraction * score.numel())]] = True
    return mask.view(score.shape)


def pb_llm(
    weight: Tensor,
    fraction: float,
    criterion: str = "magnitude",
    hessian: Tensor | None = None,
    block: int = 0,
    salient_bits: int = 8,
    seed: int = 0,
) -> PartlyBinary:
    """Keep a fraction of the weights at 8 bits and binarize the others.

    Parameters
    ----------
    weight : (d_out, d_in).
    fraction : of all weights, salient; round(fraction * d_out * d_in) of them exactly.
    criterion : "magnitude" |w|; "hessian", `hessian_saliency`; "random", the control.
    hessian : (d_in, d_in); for that criterion, and for blocks.
    block : 0: scales of whole rows, every weight for itself. Else blocks of so many columns
        from left to right, with scales of their own, and the columns to the right make up for
        each block's error (`compensate_blocks`).
    salient_bits : of a salient weight, symmetric with a scale of its own beside the binary one.
    seed : of the random criterion.

    Returns
    -------
    PartlyBinary
        bits are salient_bits * f + (1 - f), 1 for the bitmap unless f is 0 or 1, and the scales.

    Raises
    ------
    ValueError
        for a fraction, criterion or block out of range, or a missing Hessian.

    Source: arXiv 2310.00034, sections 3.2 and 3.3.
    """
    if criterion not in ("magnitude", "hessian", "random"):
        raise unknown("criterion", criterion, ["magnitude", "hessian", "random"])
    if hessian is None and (criterion == "hessian" or block):
        raise ValueError("hessian is None; allowed with that criterion or blocks: (d_in, d_in)")
    if criterion == "random":
        score = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    elif criterion == "hessian":
        score = hessian_saliency(weight, hessian)
    else:
        score = weight.abs()
    salient = most_salient(score, fraction)

    def quantize(part: Tensor, columns: slice) -> Tensor:
        return _partly_binarize(part, salient[:, columns], salient_bits)

    d_out, d_in = weight.shape
    if block:
        quantized = compensate_blocks(weight, hessian, quantize, block)
    else:
        quantized = quantize(weight.float(), slice(None))
    count, kinds = int(salient.sum()), len(salient.unique())
    codes = salient_bits * count + salient.numel() - count
    bitmap = salient.numel() if kinds == 2 else 0
    scales = SCALE_BITS * kinds * d_out * (-(-d_in // block) if block else 1)
    return PartlyBinary(quantized, salient, (codes + bitmap + scales) / salient.numel())


def compensate_blocks(
    weight: Tensor,
    hessian: Tensor,
    quantize: Callable[[Tensor, slice], Tensor],
    block: int,
    damp: float = 0.01,
    compensate: bool = True,
) -> Tensor:
    """Quantize blocks of columns from left to right; those to the right make up for the error.

    Given the values that a block is fixed at, the columns to its right move to where the layer's
    squared output error is least. It is GPTQ with blocks in place of columns.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in).
    quantize : called with a block (d_out, width), float32, and its columns; returns its values.
    block : columns of a block; the last one may be narrower.
    compensate : False to leave the columns to the right as they are.

    Returns
    -------
    Tensor
        (d_out, d_in), float32.

    Source: arXiv 2402.04291, algorithm 1; arXiv 2210.17323, eq. 4-5, Q a set of columns.
    """
    check_hessian(hessian, weight)
    size("block", block)
    factor = inverse_factor(hessian, damp)
    remaining, fixed = weight.double().clone(), torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, weight.shape[1], block):
        here, behind = slice(start, start + block), slice(start + block, None)
        fixed[:, here] = quantize(remaining[:, here].float(), here)
        if compensate:
            error = remaining[:, here] - fixed[:, here]
            share = torch.linalg.solve_triangular(factor[here, here], error, upper=True, left=False)
            remaining[:, behind] -= share @ factor[here, behind]
    return fixed


def _partly_binarize(weight: Tensor, salient: Tensor, bits: int) -> Tensor:
    kept = weight.masked_fill(~salient, 0)
    kept = project(kept, fit_grid(kept, bits, symmetric=True))
    return torch.where(salient, kept, binarize_where(weight, ~salient))
