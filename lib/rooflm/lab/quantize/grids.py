"""The uniform grid: integer codes, a scale and a zero point, fitted to groups of numbers.

A group of numbers shares one scale s and one zero point z; a code q stands for (q - z) s. A
scale is rounded up to FP16, as `roofline/formats.py` counts it, before any code is computed:
rounded up, so that the group's extremes stay on the grid and the error of a value that
clipping leaves alone is at most s/2. Halves round to even.

- Symmetric: z = 0, codes from -2^(bits-1) to 2^(bits-1) - 1, s = max|w| / (2^(bits-1) - 1).
  The lowest code serves only where `clip="mse"` has shrunk the scale.
- Asymmetric: codes from 0 to 2^bits - 1, z one of them, s = (max - min) / (2^bits - 1), with
  the range widened to contain 0, so that 0 is always exact.

Sources: Krishnamoorthi, arXiv 1806.08342, sections 2.1-2.2 (affine and symmetric grids);
Banner et al., arXiv 1810.05723 (clipping that minimizes the squared error), searched
here rather than derived from an assumed distribution; ZeroQuant, arXiv 2206.01861, section 4.1
(group-wise weights, token-wise activations).

Chapter: number formats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.roofline.numeric import shorten, unknown

LARGEST_FP16 = 65504.0
# Geometric, so that a range is searched equally finely whether its outlier is mild or extreme.
SHRINK_FACTORS = tuple(0.96**i for i in range(100))


class Grid(NamedTuple):
    """A uniform grid for every group.

    Parameters
    ----------
    scale : distance between neighbours, an FP16 value held in float32; broadcasts against the
        groups, e.g. (d_out, groups, 1).
    zero : the code that stands for 0, a whole number in float32, of the same shape.
    bits : bits of a code.
    symmetric : whether codes run from -2^(bits-1) with zero = 0, or from 0.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.lowest + 2**self.bits - 1


def to_groups(weight: Tensor, group: int) -> Tensor:
    """Rows cut into groups that share a scale.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements of a group, neighbours in a row; 0 for one group a row.

    Returns
    -------
    Tensor
        (d_out, d_in / group, group), a view of the weight where that is possible.

    Raises
    ------
    ValueError
        where the weight is no matrix or the group does not divide d_in.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else shorten(weight)
        raise ValueError(f"weight is {shape}; allowed: a matrix of (d_out, d_in), not empty")
    d_out, d_in = weight.shape
    whole = isinstance(group, int) and not isinstance(group, bool)
    if not whole or group < 0 or (group and d_in % group):
        raise ValueError(
            f"group is {shorten(group)}; allowed: a divisor of d_in = {d_in}, or 0 for whole rows"
        )
    return weight.reshape(d_out, -1, group or d_in)


def fit_grid(grouped: Tensor, bits: int, symmetric: bool = False, clip: str | None = None) -> Grid:
    """The grid of each group, a group being the last dimension.

    Parameters
    ----------
    grouped : (..., group), finite.
    bits : of a code, 1 to 8; a symmetric grid needs 2.
    symmetric : codes on both sides of 0, or a zero point.
    clip : None for the full range from minimum to maximum; "mse" for the range, shrunk by one
        of `SHRINK_FACTORS` about 0, whose squared error is smallest in that group.

    Returns
    -------
    Grid
        scale and zero of (..., 1), without gradient. Ranges beyond what an FP16 scale spans
        are clipped. A group of zeros has scale 1.

    Raises
    ------
    ValueError
        for bits, clip or numbers out of range.

    Source: arXiv 1806.08342, section 2; the search, arXiv 1810.05723.

    >>> grid = fit_grid(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2)
    >>> grid.scale.item(), grid.zero.item()
    (1.0, 1.0)
    """
    _check_bits(bits, symmetric)
    if clip not in (None, "mse"):
        raise unknown("clip", clip, ["mse"], "; None for the full range")
    if not torch.isfinite(grouped).all():
        raise ValueError("the numbers to quantize hold an infinity or a NaN; allowed: finite ones")
    grouped = grouped.detach()
    low = grouped.amin(-1, keepdim=True).clamp(max=0).float()
    high = grouped.amax(-1, keepdim=True).clamp(min=0).float()
    best = _grid_of_range(low, high, bits, symmetric)
    if clip is None:
        return best
    scale, zero = best.scale, best.zero
    error = _squared_error(grouped, best)
    for shrink in SHRINK_FACTORS[1:]:
        trial = _grid_of_range(low * shrink, high * shrink, bits, symmetric)
        trial_error = _squared_error(grouped, trial)
        better = trial_error < error
        scale = torch.where(better, trial.scale, scale)
        zero = torch.where(better, trial.zero, zero)
        error = torch.where(better, trial_error, error)
    return Grid(scale, zero, bits, symmetric)


def encode(grouped: Tensor, grid: Grid) -> Tensor:
    """The code of the nearest point of the grid, a whole number in float32.

    `grouped` has a shape that broadcasts with `grid.scale`. Values beyond the grid saturate.
    """
    return (torch.round(grouped / grid.scale) + grid.zero).clamp(grid.lowest, grid.highest)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The numbers that codes stand for: (q - z) s."""
    return (codes - grid.zero) * grid.scale


def project(grouped: Tensor, grid: Grid) -> Tensor:
    """Each number's nearest point on the grid: what is left after storing and reading it."""
    return decode(encode(grouped, grid), grid)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    clip: str | None = None,
    per_tensor: bool = False,
) -> Tensor:
    """A weight on its own uniform grid, every element rounded for itself.

    The baseline of every other method, which differ in how they choose the grid or in what
    they do about the error.

    Parameters
    ----------
    weight : (d_out, d_in).
    bits, symmetric, clip : as in `fit_grid`.
    group : elements that share a scale; 0 for one scale an output channel (row).
    per_tensor : one scale for the whole weight; `group` must then be 0.

    Returns
    -------
    Tensor
        (d_out, d_in), float32, the dequantized weight.

    Raises
    ------
    ValueError
        as in `to_groups` and `fit_grid`.
    """
    grouped = to_groups(weight, group).float()
    if per_tensor:
        if group:
            raise ValueError(f"group is {group} with per_tensor; allowed: 0")
        grouped = grouped.reshape(1, 1, -1)
    grid = fit_grid(grouped, bits, symmetric, clip)
    return project(grouped, grid).reshape(weight.shape)


def quantize_activations(
    x: Tensor,
    bits: int = 8,
    per: str = "token",
    symmetric: bool = True,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Activations on a uniform grid.

    Parameters
    ----------
    x : (..., d).
    bits, symmetric : as in `fit_grid`.
    per : "token" for one scale for each vector of d, "tensor" for one for all.
    scale : None: dynamic, fitted to x itself. A positive number, from `static_scale`: static
        and symmetric, the same for every x; what lies beyond saturates, and `per` is not used.

    Returns
    -------
    Tensor
        of the shape of x, float32, dequantized.

    Raises
    ------
    ValueError
        for an argument out of range.
    """
    if per not in ("token", "tensor"):
        raise unknown("granularity", per, ["token", "tensor"])
    x = x.float()
    if scale is not None:
        _check_bits(bits, symmetric)
        fixed = torch.as_tensor(scale, dtype=torch.float32)
        if not symmetric or not ((fixed > 0) & torch.isfinite(fixed)).all():
            given = "asymmetric" if not symmetric else shorten(scale)
            raise ValueError(f"static scale is {given}; allowed: positive, on a symmetric grid")
        return project(x, Grid(fixed, torch.zeros_like(fixed), bits, symmetric))
    flat = x if per == "token" else x.reshape(1, -1)
    return project(flat, fit_grid(flat, bits, symmetric)).reshape(x.shape)


def static_scale(samples: Tensor, bits: int = 8) -> Tensor:
    """The scale of a static activation quantizer: the largest magnitude seen in calibration.

    Parameters
    ----------
    samples : activations of any shape.
    bits : of a code, 2 to 8.

    Returns
    -------
    Tensor
        of no dimension: max|x| / (2^(bits-1) - 1), rounded up to FP16.
    """
    return fit_grid(samples.reshape(-1), bits, symmetric=True).scale.reshape(())


def round_up_to_fp16(x: Tensor) -> Tensor:
    """The smallest FP16 number that is not below x >= 0, in float32; at most 65504.

    Rounding up keeps a tiny scale from becoming 0 and a group's extremes within its codes.
    """
    x = x.float().clamp(max=LARGEST_FP16)
    half = x.half()
    # The bit pattern after a positive float's is the next larger float.
    stepped = half.view(torch.int16) + (half.float() < x).to(torch.int16)
    return stepped.view(torch.float16).float()


def _grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid that spans [low, high], low <= 0 <= high."""
    if symmetric:
        span, steps = torch.maximum(-low, high), 2 ** (bits - 1) - 1
    else:
        span, steps = high - low, 2**bits - 1
    scale = round_up_to_fp16(span / steps)
    scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros: any scale holds it
    zero = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(0, steps)
    return Grid(scale, zero, bits, symmetric)


def _squared_error(grouped: Tensor, grid: Grid) -> Tensor:
    return (project(grouped, grid) - grouped).square().sum(-1, keepdim=True)


def _check_bits(bits: int, symmetric: bool) -> None:
    smallest = 2 if symmetric else 1
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not whole or not smallest <= bits <= 8:
        kind = "symmetric" if symmetric else "asymmetric"
        raise ValueError(
            f"bits is {shorten(bits)}; allowed: a whole number from {smallest} to 8 ({kind} grid)"
        )
