"""The observation behind AWQ: a few channels with large inputs matter, whatever their weights.

One per cent of the input channels stays in FP16 and the others are rounded. Chosen by the size of
their inputs they mend most of what rounding does to a model with activation outliers; chosen at
random, or by the size of their weights, they mend next to nothing. It is an experiment and no
format: a matrix of two number formats is slow to multiply with, which is why AWQ scales instead.

Convention: the grid of a group is fitted to all of its weights, the kept ones too.

Source: AWQ, arXiv 2306.00978, section 3.1 and table 1.

Chapter: quantization methods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.sensitive import stored_bits
from rooflm.roofline.numeric import shorten, unknown

CHOICES = ("inputs", "weights", "random")


class Salient(NamedTuple):
    """A weight of which some input channels are kept.

    Parameters
    ----------
    weight : (d_out, d_in), float32, dequantized, the kept channels in FP16.
    kept : (d_in,) bool.
    bits_per_weight : codes, scales, zero points, kept channels and their indices.
    """

    weight: Tensor
    kept: Tensor
    bits_per_weight: float


def keep_salient(
    weight: Tensor,
    mean_abs: Tensor,
    bits: int,
    group: int = 0,
    share: float = 0.01,
    chosen: str = "inputs",
    seed: int = 0,
) -> Salient:
    """Some input channels in FP16, the others rounded to nearest.

    Parameters
    ----------
    weight : (d_out, d_in).
    mean_abs : (d_in,), the mean of |x| of each input channel.
    bits, group : the grid, as in `round_to_nearest`.
    share : of the channels that are kept, at least one; 0 for none.
    chosen : "inputs" for the channels of largest mean input; the controls are "weights", of
        largest mean |w|, and "random".
    seed : of the random choice.

    Raises
    ------
    ValueError
        for a share or a choice out of range, or a mean of another width.

    Source: arXiv 2306.00978, section 3.1.
    """
    d_out, d_in = weight.shape
    if not 0 <= share <= 1:
        raise ValueError(f"share is {shorten(share)}; allowed: from 0 to 1")
    if mean_abs.shape != (d_in,):
        raise ValueError(f"mean_abs is {tuple(mean_abs.shape)}; allowed: ({d_in},)")
    if chosen == "inputs":
        scores = mean_abs
    elif chosen == "weights":
        scores = weight.abs().mean(0)
    elif chosen == "random":
        scores = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))
    else:
        raise unknown("choice", chosen, CHOICES)
    columns = max(1, round(share * d_in)) if share else 0
    kept = torch.zeros(d_in, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:columns]] = True
    rounded = round_to_nearest(weight, bits, group)
    mixed = torch.where(kept, weight.half().float(), rounded)
    stored = stored_bits(d_out, d_in, bits, group, columns=columns)
    return Salient(mixed, kept, stored / weight.numel())
