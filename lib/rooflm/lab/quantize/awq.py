"""AWQ: scale up the input channels that carry large activations before rounding.

The channels of a weight whose inputs are large matter most. Multiplying such a channel by
s > 1 before rounding and its input by 1/s changes nothing in exact arithmetic; on the grid it
divides the channel's rounding error by s as long as the scale of its group stays what it was.
The scales are s = m^alpha, m the mean |x| of each input channel, with alpha searched between 0
(no scaling) and 1, so that the layer's true output error is smallest.

Conventions: m is the mean of |x| over calibration tokens, never the largest |x|, which is
SmoothQuant's. Scales are normalized so that sqrt(max * min) = 1, which keeps weights near their
size; an input below `SMALLEST_INPUT` times the largest counts as that. A core returns the weight
as it acts on the unscaled input: the stored one with its columns divided by s. At inference 1/s
is folded into whatever makes the input.

Sources: AWQ, arXiv 2306.00978, section 3.2, eq. 4-5, and the weight clipping that is named
after them (the error it lowers is measured at the output here).

Chapter: quantization methods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.gptq import check_hessian, output_error
from rooflm.lab.quantize.grids import fit_grid, project, round_to_nearest, to_groups
from rooflm.roofline.numeric import shorten, size, unknown

# Of the largest mean input: what a dead channel is taken for.
SMALLEST_INPUT = 1e-4
# Parts of a group's range that the clip search tries.
CLIP_RANGES = tuple(1 - i / 20 for i in range(11))


class Scaled(NamedTuple):
    """A weight that AWQ has scaled and rounded.

    Parameters
    ----------
    weight : (d_out, d_in), acts on the input as it is: stored / scales.
    stored : (d_out, d_in), on its grid; acts on the input divided by `scales`.
    scales : (d_in,), of sqrt(max * min) = 1.
    alpha : the exponent that was found, or given.
    """

    weight: Tensor
    stored: Tensor
    scales: Tensor
    alpha: float


def awq(
    weight: Tensor,
    hessian: Tensor,
    mean_abs: Tensor,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    alpha: float | None = None,
    steps: int = 20,
    clip: str | None = None,
) -> Scaled:
    """A weight quantized by AWQ.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens: what the output error is measured with.
    mean_abs : (d_in,), the mean of |x| of each input channel.
    bits, group, symmetric : the grid, as in `round_to_nearest`.
    alpha : None to search 0, 1/steps, ..., 1; a number in [0, 1] to fix it, as a control.
    steps : how fine the search is.
    clip : None; "mse" as in `fit_grid`; "output" for the range of each group whose output
        error is smallest.

    Returns
    -------
    Scaled
        the weight, its stored form, the scales and alpha. On the calibration data its output
        error is never above that of alpha = 0, which is plain rounding.

    Raises
    ------
    ValueError
        for arguments out of range.

    Source: arXiv 2306.00978, eq. 4-5.
    """
    check_hessian(hessian, weight)
    if clip not in (None, "mse", "output"):
        raise unknown("clip", clip, ["mse", "output"], "; None for the full range")
    fits = tuple(mean_abs.shape) == weight.shape[1:]
    if not fits or not ((mean_abs >= 0) & torch.isfinite(mean_abs)).all():
        raise ValueError(
            f"mean_abs is of shape {tuple(mean_abs.shape)}; allowed: ({weight.shape[1]},), "
            "finite numbers, 0 or more"
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {shorten(alpha)}; allowed: a number from 0 to 1, or None")
    exponents = [i / size("steps", steps) for i in range(steps + 1)] if alpha is None else [alpha]

    def scaled_by(exponent: float) -> Scaled:
        scales = channel_scales(mean_abs, exponent, weight)
        if clip == "output":
            unscaled = hessian / torch.outer(scales, scales)  # the inputs are divided by s
            stored = clip_to_output(weight * scales, unscaled, bits, group, symmetric)
        else:
            stored = round_to_nearest(weight * scales, bits, group, symmetric, clip)
        return Scaled(stored / scales, stored, scales, exponent)

    return min(
        map(scaled_by, exponents),
        key=lambda found: output_error(weight, found.weight, hessian),
    )


def channel_scales(mean_abs: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The scales s = m^alpha (eq. 5), normalized to sqrt(max * min) = 1.

    Parameters
    ----------
    mean_abs : (d_in,), 0 or more, finite.
    alpha : 0 for scales of exactly 1.
    weight : (d_out, d_in), for its width and type.

    Returns
    -------
    Tensor
        (d_in,).
    """
    largest = mean_abs.max()
    if largest == 0:
        return torch.ones_like(weight[0])
    scales = (mean_abs / largest).clamp(min=SMALLEST_INPUT).to(weight.dtype) ** alpha
    return scales / (scales.max() * scales.min()).sqrt()


def clip_to_output(
    weight: Tensor, hessian: Tensor, bits: int, group: int = 0, symmetric: bool = False
) -> Tensor:
    """Round on the range of each group that keeps the group's own output error smallest.

    Parameters
    ----------
    weight, hessian, bits, group, symmetric : as in `awq`. Of the Hessian only the squares on
        the diagonal are used, a block of (group, group) for each group.

    Returns
    -------
    Tensor
        (d_out, d_in), dequantized: for each group the best of `CLIP_RANGES`, parts of its full
        range.

    Source: arXiv 2306.00978, section 3.2, "Searching to scale", at its end.
    """
    grouped = to_groups(weight, group)  # (d_out, groups, group)
    width = grouped.shape[2]
    starts = range(0, weight.shape[1], width)
    squares = torch.stack([hessian[i : i + width, i : i + width] for i in starts])
    best, least = grouped, torch.full_like(grouped[..., :1], torch.inf)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    for part in CLIP_RANGES:
        grid = fit_grid(grouped.clamp(part * low, part * high), bits, symmetric)
        trial = project(grouped, grid)
        error = trial - grouped
        moved = torch.einsum("ogi,gij->ogj", error, squares)
        cost = (moved * error).sum(-1, keepdim=True)
        best = torch.where(cost < least, trial, best)
        least = torch.minimum(cost, least)
    return best.reshape(weight.shape)
