"""BiLLM: binarize salient columns twice, and the other weights in two sets.

In every block of columns: the columns on which the output depends most are binarized, and what is
left of them is binarized again (four values a row); the other weights, whose magnitudes are
bell-shaped, are split at one break point into a concentrated and a sparse set, each binarized.
Columns to the right then make up for the block's error, as in GPTQ.

Conventions: as in `binary.py`. The paper's "1.08 bits" is 1 plus the salient fraction (N_param of
eq. 14). Its N_storing adds a bit a weight, for the side of the break point, and a mark a column.
Four FP16 scales a row and block of 128, which neither counts, are 0.5 bits more. `bits` counts all
of it: 2 bits for every weight (two signs, or a sign and a side), 1/d_out for the marks, the scales.

Source: BiLLM, arXiv 2402.04291, sections 3.1 (eq. 3-8), 3.2 (eq. 9-13) and 3.3 (eq. 14, algorithm
1). Not as in the paper: a weight's score is divided by [H^-1]_jj, as OBS derives it, where eq. 3
squares it; a block's error is made up for exactly (least squares), where algorithm 1 divides by a
diagonal.

Chapter: quantization methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.quantize.binary import (
    SCALE_BITS,
    PartlyBinary,
    binarize_where,
    compensate_blocks,
    hessian_saliency,
)
from rooflm.roofline.numeric import size


def billm(
    weight: Tensor,
    hessian: Tensor,
    block: int = 128,
    most_columns: int = 30,
    points: int = 100,
    compensate: bool = True,
) -> PartlyBinary:
    """Binarize salient columns twice and the others in two sets, block after block.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    block : columns that share a search and, by row, four scales.
    most_columns : of a block, that may be salient.
    points : break points tried in a block.
    compensate : whether the columns to the right make up for a block's error.

    Returns
    -------
    PartlyBinary
        `salient` holds whole columns within a block. Bits: 2 for a salient weight; 1 and 1 that
        says on which side of the break point for the others; a mark for every column of a block;
        two FP16 scales a row and block for each kind. The paper's N_param is 1 + the salient
        fraction.

    Raises
    ------
    ValueError
        for sizes out of range or a Hessian that does not fit.

    Source: arXiv 2402.04291, section 3 and algorithm 1.
    """
    size("most_columns", most_columns, smallest=0), size("points", points)
    score = hessian_saliency(torch.ones(1, weight.shape[1]), hessian)[0]  # 1 / [H^-1]_jj
    salient = torch.zeros(weight.shape, dtype=torch.bool)
    stored = 0

    def quantize(part: Tensor, columns: slice) -> Tensor:
        nonlocal stored
        order = (part.square().sum(0) * score[columns]).argsort(descending=True, stable=True)
        chosen = find_salient_columns(part, order, most_columns)
        salient[:, columns] = chosen
        (rows, width), count = part.shape, int(chosen.sum())
        stored += rows * (2 * count + 2 * (width - count)) + width
        stored += SCALE_BITS * rows * 2 * ((count > 0) + (count < width))
        return _binarize_block(part, chosen, points)

    quantized = compensate_blocks(weight, hessian, quantize, block, compensate=compensate)
    return PartlyBinary(quantized, salient, stored / weight.numel())


def residual_binarize(weight: Tensor, columns: Tensor | None = None) -> Tensor:
    """Binarize each row, then binarize what is left of it, and add the two.

    Parameters
    ----------
    weight : (d_out, d_in).
    columns : (d_in,) bool, the columns that count; the others become 0. None for all.

    Returns
    -------
    Tensor
        (d_out, d_in), float32: four values a row, 2 bits a weight.

    Source: arXiv 2402.04291, eq. 6-7.
    """
    counted = torch.ones(weight.shape[1], dtype=torch.bool) if columns is None else columns
    mask = counted.expand_as(weight)
    first = binarize_where(weight.float(), mask)
    return first + binarize_where(weight.float() - first, mask)


def find_salient_columns(weight: Tensor, order: Tensor, most: int) -> Tensor:
    """The most salient columns, as many as make the best set of their own, each set binarized once.

    Parameters
    ----------
    weight : (d_out, width), a block.
    order : (width,), the columns, the most salient first.
    most : columns that may be chosen.

    Returns
    -------
    Tensor
        (width,) bool, the first k of the order, with the k from 0 to `most` of least error.

    Source: arXiv 2402.04291, eq. 5.
    """
    counts = torch.arange(min(most, len(order)) + 1)
    sums = _running_sums(weight.double().abs()[:, order])
    first, rest = sums[:, counts], sums[:, -1:] - sums[:, counts]
    # Scales of mean magnitude take (sum |w|)^2 / n off the squared sum of a set.
    taken = first.square() / counts.clamp(min=1) + rest.square() / (len(order) - counts).clamp(
        min=1
    )
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: int(taken.sum(0).argmax())]] = True
    return chosen


def find_break_point(weight: Tensor, eligible: Tensor, points: int = 100) -> float:
    """The magnitude at which to split a block so that two scales a row leave least error.

    Parameters
    ----------
    weight, eligible : (d_out, width) and bool: the block, and the weights that count.
    points : magnitudes tried, evenly spaced among the sorted ones, the largest (no split)
        included; as many as weights make the search exhaustive.

    Returns
    -------
    float
        p: |w| <= p is concentrated, |w| > p sparse; 0 where nothing is eligible.

    Source: arXiv 2402.04291, eq. 11-13.
    """
    magnitude = weight.double().abs()
    ranked = magnitude[eligible].sort().values
    if not len(ranked):
        return 0.0
    steps = torch.arange(1, points + 1)
    tried = ranked[(steps * len(ranked) + points - 1) // points - 1]
    rows = magnitude.masked_fill(~eligible, float("inf")).sort(dim=1).values
    inner = torch.searchsorted(rows, tried.repeat(len(rows), 1), right=True)  # |w| <= p, by row
    outer = eligible.sum(1, keepdim=True) - inner
    sums = _running_sums(rows.masked_fill(rows.isinf(), 0))
    concentrated, total = sums.gather(1, inner), sums[:, -1:]
    taken = concentrated.square() / inner.clamp(min=1)
    taken += (total - concentrated).square() / outer.clamp(min=1)
    return tried[taken.sum(0).argmax()].item()


def _running_sums(x: Tensor) -> Tensor:
    """(d_out, n) to the sums of the first 0, 1, …, n of each row, (d_out, n + 1)."""
    return torch.cat((torch.zeros_like(x[:, :1]), x.cumsum(1)), 1)


def _binarize_block(weight: Tensor, salient: Tensor, points: int) -> Tensor:
    others = (~salient).expand_as(weight)
    sparse = weight.abs() > find_break_point(weight, others, points)
    concentrated = binarize_where(weight, others & ~sparse)
    return (
        residual_binarize(weight, salient) + concentrated + binarize_where(weight, others & sparse)
    )
