"""WKVQuant: weights and cache at 4 bits together, the cache on a grid of two dimensions.

The first dimension is static: each channel is shifted by its middle and divided by half of its
width, both from calibration, so that channels are alike. The second is dynamic: each token gets
a uniform grid of its own, for `group` channels, when it comes. Nothing waits for a block. The
token of the running step is read as it came and rounded only as part of the past ("past-only
quantization", which every `CodedCache` does).

Here shifts and scales are measured; the paper learns them, from the errors of several blocks
at once. Keys are taken after RoPE. Weights at 4 bits are `quantize.apply.quantize_model`'s
part: a model with such weights and this cache is W4KV4.

Source: WKVQuant, arXiv 2402.12065, section 3 (past-only quantization; two-dimensional
quantization).

Chapter: KV cache quantization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rooflm.lab.kvcache.coded import Codec, CodedCache
from rooflm.lab.kvcache.distributions import Captured
from rooflm.lab.kvcache.kivi import Uniform


def channel_ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half of the width of each channel.

    Parameters
    ----------
    x : (batch, kv_heads, positions, head_dim).

    Returns
    -------
    shift, scale
        (1, kv_heads, 1, head_dim) each; the scale of a constant channel is 1.

    Source: arXiv 2402.12065, section 3, the static dimension.
    """
    low, high = x.amin((0, 2), keepdim=True), x.amax((0, 2), keepdim=True)
    half = (high - low) / 2
    return (high + low) / 2, torch.where(half > 0, half, 1.0)


class Smoothed:
    """A codec of numbers whose channels are shifted and scaled first.

    Parameters
    ----------
    inner : what codes them then.
    shift, scale : (1, kv_heads, 1, head_dim), constants of the layer.
    """

    def __init__(self, inner: Codec, shift: Tensor, scale: Tensor) -> None:
        self.inner, self.shift, self.scale = inner, shift, scale

    @property
    def block(self) -> int:
        """Positions that are encoded together."""
        return self.inner.block

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to what the inner codec stores."""
        return self.inner.encode((x - self.shift) / self.scale)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        return self.inner.decode(stored) * self.scale + self.shift


def calibrate_wkvquant(
    captured: Captured, bits: int = 4, group: int = 64, sinks: int = 0
) -> tuple[list[Codec], list[Codec]]:
    """The codecs of all layers, keys after RoPE and values.

    Parameters
    ----------
    captured : keys and values of calibration text.
    bits : of a code.
    group : channels of a token that share a grid, a divisor of head_dim.
    sinks : first positions that calibration leaves out: they are unlike all others.
    """
    found: tuple[list[Codec], list[Codec]] = ([], [])
    for codecs, layers in zip(found, (captured.rotated, captured.values), strict=True):
        for x in layers:
            ranges = channel_ranges(x[:, :, sinks:])
            codecs.append(Smoothed(Uniform(bits, "token", group), *ranges))
    return found


def wkvquant(
    codecs: tuple[Sequence[Codec], Sequence[Codec]], **options: int | bool | torch.dtype
) -> CodedCache:
    """An empty cache of WKVQuant: what `calibrate_wkvquant` returns, nothing left uncoded."""
    return CodedCache(*codecs, **options)  # type: ignore[arg-type]
