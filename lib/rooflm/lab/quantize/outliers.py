"""How far the largest activations stand out, and where they are.

Activations are rows of (tokens, channels). Two kinds of outliers break a shared scale: channels
that are large in every token (LLM.int8(), arXiv 2208.07339, section 4), and a few single entries,
mostly of the first token, that are hundreds of times larger than anything else ("massive
activations", arXiv 2402.17762).

Chapter: quantization methods.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rooflm.roofline.numeric import shorten


class Largest(NamedTuple):
    """The entry of largest magnitude.

    Parameters
    ----------
    token, channel : where it is.
    peak_over_rms : its magnitude over the root mean square of all entries.
    share : its part of the sum of all squares.
    """

    token: int
    channel: int
    peak_over_rms: float
    share: float


def largest(x: Tensor) -> Largest:
    """Where the largest entry is, and how far it stands out.

    Parameters
    ----------
    x : (…, channels), not empty; all but the last dimension count tokens.

    >>> import torch
    >>> largest(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    Largest(token=1, channel=1, peak_over_rms=1.6, share=0.64)
    """
    if not x.numel():
        raise ValueError(f"x is of shape {tuple(x.shape)}; allowed: one that is not empty")
    flat = x.detach().flatten(0, -2).double()
    token, channel = divmod(int(flat.abs().argmax()), flat.shape[1])
    square, power = flat[token, channel].square().item(), flat.square().mean().item()
    if not power:
        return Largest(token, channel, 1.0, 0.0)
    return Largest(token, channel, (square / power) ** 0.5, square / (power * flat.numel()))


def power_share(x: Tensor, part: float = 0.01) -> float:
    """The part of the power, the sum of all squares, that the strongest channels hold.

    Parameters
    ----------
    x : (…, channels).
    part : of the channels; rounded to whole ones, at least one.

    >>> import torch
    >>> power_share(torch.tensor([[3.0, 0.0], [0.0, -4.0]]), 0.5)
    0.64
    """
    if not 0 < part <= 1:
        raise ValueError(f"part is {shorten(part)}; allowed: above 0, up to 1")
    power = x.detach().flatten(0, -2).double().square().mean(0)
    total = power.sum().item()
    strongest = power.topk(max(1, round(part * len(power)))).values.sum().item()
    return strongest / total if total else 0.0
