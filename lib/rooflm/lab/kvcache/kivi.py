"""KIVI: keys on a grid per channel, values on a grid per token, 2 or 4 bits.

A group of numbers shares a scale s and a minimum m; a code q stands for m + q s. The range need
not contain 0, other than in `quantize.grids`: channels of keys lie far from 0, and codes for
numbers that never occur would be wasted. A group is `group` neighbouring tokens of one channel
("channel"), or `group` neighbouring channels of one token ("token"). All four pairings of keys
and values exist; KIVI is keys by channel and values by token.

The minimum is rounded down to FP16 and the scale up, before any code is computed, so that
no number is off by more than s/2. A group of equal numbers has codes 0 (KIVI's own code divides 0
by 0 there: `quant/new_pack.py` at commit 150def8).

The paper's residual part of keys holds 0 to R - 1 tokens, whatever is left of the last whole R,
and that of values exactly R; here both hold R to R + group - 1, so that R = 0 is the plain method.

Source: KIVI, arXiv 2402.02750, section 3 (the four pairings; grid; residual part).

Chapter: KV cache quantization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.kvcache.coded import CodedCache
from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.quantize.grids import LARGEST_FP16, round_up_to_fp16
from rooflm.roofline.numeric import shorten, size, unknown

ALONG = ("channel", "token")


class Range(NamedTuple):
    """The grid of each group: m + q s; both (…, 1), FP16 values in float32."""

    scale: Tensor
    minimum: Tensor


def fit_range(grouped: Tensor, bits: int) -> Range:
    """The grid from a group's minimum to its maximum.

    Parameters
    ----------
    grouped : (…, group), finite.
    bits : of a code, 1 to 8.

    Returns
    -------
    Range
        the scale is 0 for a group of equal numbers that FP16 holds.

    Source: arXiv 2402.02750, section 3.1; rounding, ours.

    >>> fit_range(torch.tensor([[1.0, 4.0]]), 2)
    Range(scale=tensor([[1.]]), minimum=tensor([[1.]]))
    """
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low = low.float().clamp(-LARGEST_FP16, LARGEST_FP16)
    minimum = torch.where(low < 0, -round_up_to_fp16(-low), _round_down_to_fp16(low))
    return Range(round_up_to_fp16((high.float() - minimum) / (2**bits - 1)), minimum)


def encode(grouped: Tensor, grid: Range, bits: int) -> Tensor:
    """The code of the nearest point, (…, group), whole numbers in float32."""
    step = torch.where(grid.scale == 0, 1.0, grid.scale)
    return ((grouped - grid.minimum) / step).round_().clamp_(0, 2**bits - 1)


def decode(codes: Tensor, grid: Range) -> Tensor:
    """What codes stand for: m + q s, float32."""
    return codes.to(torch.float32, copy=True).mul_(grid.scale).add_(grid.minimum)


def to_groups(x: Tensor, along: str, group: int) -> Tensor:
    """Keys or values cut into groups.

    Parameters
    ----------
    x : (batch, kv_heads, positions, head_dim).
    along : "channel" for `group` tokens of one channel, "token" for channels of one token.
    group : a divisor of the positions or of head_dim.

    Returns
    -------
    Tensor
        (batch, kv_heads, positions / group, head_dim, group) for "channel", (batch, kv_heads,
        positions, head_dim / group, group) for "token".
    """
    if along == "channel":
        return x.unflatten(2, (-1, group)).transpose(-1, -2)
    return x.unflatten(3, (-1, group))


def from_groups(grouped: Tensor, along: str) -> Tensor:
    """Undoes `to_groups`."""
    if along == "channel":
        return grouped.transpose(-1, -2).flatten(2, 3)
    return grouped.flatten(3, 4)


class Uniform:
    """The codec of a uniform grid: packed codes, scales and minima.

    Parameters
    ----------
    bits : of a code, 1 to 8.
    along : "channel" or "token".
    group : numbers that share a grid.

    Raises
    ------
    ValueError
        for a value out of range.
    """

    def __init__(self, bits: int, along: str, group: int = 32) -> None:
        if along not in ALONG:
            raise unknown("direction", along, ALONG)
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"bits is {shorten(bits)}; allowed: a whole number from 1 to 8")
        self.bits, self.along, self.group = bits, along, size("group", group)

    @property
    def block(self) -> int:
        """Positions that are encoded together."""
        return self.group if self.along == "channel" else 1

    @property
    def bits_per_number(self) -> float:
        """Stored bits, scales and minima included."""
        return self.bits + 32 / self.group

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to codes, scales and minima."""
        if x.shape[3] % self.group and self.along == "token":
            raise ValueError(f"group is {self.group}; allowed: a divisor of head_dim, {x.shape[3]}")
        grouped = to_groups(x, self.along, self.group)
        grid = fit_range(grouped, self.bits)
        codes = pack(encode(grouped, grid, self.bits), self.bits)
        return codes, grid.scale.half(), grid.minimum.half()

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        codes, scale, minimum = stored
        grid = Range(scale.float(), minimum.float())
        return from_groups(decode(unpack(codes, self.bits), grid), self.along)


def kivi(
    bits: int = 2,
    group: int = 32,
    residual: int = 32,
    keys: str = "channel",
    values: str = "token",
    value_bits: int | None = None,
    **options: int | bool | torch.dtype,
) -> CodedCache:
    """An empty cache of KIVI, or of one of the three other pairings.

    Parameters
    ----------
    bits : of keys and values; `value_bits` for other values.
    group : numbers that share a grid.
    residual : recent positions in FP16, 32 or 128 in the paper.
    keys, values : "channel" or "token".
    options : of `CodedCache`.
    """
    codecs = Uniform(bits, keys, group), Uniform(value_bits or bits, values, group)
    return CodedCache(*codecs, residual=residual, **options)  # type: ignore[arg-type]


def _round_down_to_fp16(x: Tensor) -> Tensor:
    """The largest FP16 number that is not above x >= 0, in float32."""
    half = x.half()
    stepped = half.view(torch.int16) - (half.float() > x).to(torch.int16)
    return stepped.view(torch.float16).float()
