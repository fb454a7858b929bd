"""KVQuant: keys before their rotation, a learned table of levels, and a few numbers apart.

What distinguishes it from a uniform grid per group, KIVI's way:

- Keys are coded *before* RoPE, which mixes channels of different sizes in pairs. Their ranges,
  one a channel, come from calibration: nothing has to wait for its group, nothing is stored
  beside the codes.
- Values get a range for each token, computed as it comes, over the heads together.
- The 2^bits levels of a layer are the weighted k-means of its normalized numbers, each counted
  by its sensitivity: the squared gradient of the loss (Fisher information) times the square of
  its range. `codebook.squeezellm` finds them.
- In each token the 1 % that lie farthest out are kept apart in FP16, with their places. Keys:
  those farthest beyond the calibrated range of their channel (the range leaves out half of that
  share on either side); the number a token is fixed, as in the authors' later kernels. Values:
  the range is that of the numbers left.
- The first token, to which most heads attend, stays in FP16 (`CodedCache(sinks=1)`).

Left out: Q-Norm, which shifts the levels at 2 bits.

Source: KVQuant, arXiv 2401.18079, sections 3.1-3.6.

Chapter: KV cache quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.kvcache.coded import CodedCache
from rooflm.lab.kvcache.distributions import Captured
from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.quantize.codebook import squeezellm
from rooflm.lab.quantize.grids import round_up_to_fp16


def weighted_levels(normalized: Tensor, sensitivity: Tensor, bits: int) -> Tensor:
    """The levels of least weighted squared error.

    Parameters
    ----------
    normalized : any shape, numbers within about [-1, 1].
    sensitivity : of the same shape, 0 or more.
    bits : of a code, 1 to 6.

    Returns
    -------
    Tensor
        (2^bits,), rising, FP16 values in float32.

    Source: arXiv 2401.18079, section 3.3, eq. 1.
    """
    return squeezellm(normalized.reshape(1, -1), sensitivity.reshape(1, -1), bits).centroids[0]


def nearest_codes(x: Tensor, levels: Tensor) -> Tensor:
    """The code of each number's nearest level, int64."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def farthest(excess: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of (…, n) in each row, rising, (…, count), int64."""
    return excess.topk(count, dim=-1).indices.sort(dim=-1).values


def to_tokens(x: Tensor) -> Tensor:
    """(batch, kv_heads, positions, head_dim) as whole tokens, (batch, 1, positions, g * d)."""
    return x.transpose(1, 2).flatten(2)[:, None]


def from_tokens(x: Tensor, heads: int) -> Tensor:
    """Undoes `to_tokens`."""
    return x[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)


def outliers_of_token(width: int, share: float) -> int:
    """How many numbers of a token are kept apart: the share, at least one unless it is 0."""
    return max(1, round(share * width)) if share else 0


class TableCodec:
    """Codes on a table of levels, with the farthest numbers of each token kept apart.

    Parameters
    ----------
    levels : (2^bits,), rising.
    bits : of a code.
    apart : numbers of a token that are kept apart.
    heads : KV heads.
    middle, half : (kv_heads * head_dim,) each, the calibrated range of each channel as its middle
        and half of its width; None for a range of each token.
    """

    block = 1

    def __init__(
        self,
        levels: Tensor,
        bits: int,
        apart: int,
        heads: int,
        middle: Tensor | None = None,
        half: Tensor | None = None,
    ) -> None:
        self.levels, self.bits, self.apart, self.heads = levels, bits, apart, heads
        self.middle, self.half = middle, half

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes, then places and numbers of outliers, then a token's own range."""
        tokens = to_tokens(x)
        stored: list[Tensor] = []
        if self.middle is not None and self.half is not None:
            normalized = (tokens - self.middle) / self.half
            places = farthest(normalized.abs(), self.apart)
        else:
            middle, half, places = token_ranges(tokens, self.apart)
            normalized = (tokens - middle) / half
            stored = [middle.half(), half.half()]
        codes = pack(nearest_codes(normalized, self.levels), self.bits)
        kept = tokens.gather(-1, places).half()
        return (codes, places.to(torch.int16), kept, *stored)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        codes, places, kept, *ranges = stored
        middle, half = (r.float() for r in ranges) if ranges else (self.middle, self.half)
        tokens = self.levels[unpack(codes, self.bits).int()] * half + middle
        return from_tokens(tokens.scatter(-1, places.long(), kept.float()), self.heads)


def token_ranges(tokens: Tensor, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """The range of each token without its farthest numbers, and their places.

    Parameters
    ----------
    tokens : (batch, 1, positions, width).
    apart : numbers left out, those farthest from the token's median.

    Returns
    -------
    middle, half, places
        (batch, 1, positions, 1) twice, FP16 values in float32; (batch, 1, positions, apart).
    """
    # From the middle of the whole range the two ends would be equally far.
    places = farthest((tokens - tokens.median(-1, keepdim=True).values).abs(), apart)
    inside = torch.zeros_like(tokens, dtype=torch.bool).scatter(-1, places, True)
    low = tokens.masked_fill(inside, torch.inf).amin(-1, keepdim=True)
    high = tokens.masked_fill(inside, -torch.inf).amax(-1, keepdim=True)
    middle = ((low + high) / 2).half().float()
    half = round_up_to_fp16(torch.maximum(high - middle, middle - low))
    return middle, torch.where(half == 0, 1.0, half), places


def fit_keys(keys: Tensor, sensitivity: Tensor, bits: int, share: float) -> TableCodec:
    """The codec of a layer's keys: ranges of channels, then levels.

    Parameters
    ----------
    keys, sensitivity : (batch, kv_heads, positions, head_dim), keys before RoPE of calibration
        text without its sinks, and squared gradients.
    bits, share : of a code; of numbers kept apart.

    Source: arXiv 2401.18079, sections 3.1, 3.3 and 3.4.
    """
    tokens, weights = (to_tokens(t)[:, 0].flatten(0, 1) for t in (keys, sensitivity))
    ends = torch.tensor([share / 2, 1 - share / 2])
    low, high = torch.quantile(tokens, ends, dim=0)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp(min=1e-6)
    normalized = (tokens - middle) / half
    inside = normalized.abs() <= 1
    levels = weighted_levels(normalized.clamp(-1, 1), weights * half.square() * inside, bits)
    apart = outliers_of_token(tokens.shape[1], share)
    return TableCodec(levels, bits, apart, keys.shape[1], middle, half)


def fit_values(values: Tensor, sensitivity: Tensor, bits: int, share: float) -> TableCodec:
    """The codec of a layer's values: levels only, a token's range is found as it comes."""
    tokens, weights = to_tokens(values), to_tokens(sensitivity)
    apart = outliers_of_token(tokens.shape[-1], share)
    middle, half, places = token_ranges(tokens, apart)
    weights = (weights * half.square()).scatter(-1, places, 0.0)
    levels = weighted_levels(((tokens - middle) / half).clamp(-1, 1), weights, bits)
    return TableCodec(levels, bits, apart, values.shape[1])


def calibrate_kvquant(
    captured: Captured, bits: int, share: float = 0.01, sinks: int = 1, weighted: bool = True
) -> tuple[list[TableCodec], list[TableCodec]]:
    """The codecs of all layers, keys and values.

    Parameters
    ----------
    captured : keys and values of calibration text, with gradients unless not `weighted`.
    bits, share, sinks : of a code; kept apart; first positions that are never coded.
    weighted : False counts every number alike, the control.
    """
    found: tuple[list[TableCodec], list[TableCodec]] = ([], [])
    for layer in range(len(captured.keys)):
        for codecs, fit, numbers, grads in (
            (found[0], fit_keys, captured.keys, captured.key_gradients),
            (found[1], fit_values, captured.values, captured.value_gradients),
        ):
            x = numbers[layer][:, :, sinks:]
            weight = grads[layer][:, :, sinks:].square() if weighted else torch.ones_like(x)
            codecs.append(fit(x, weight, bits, share))
    return found


def kvquant(
    codecs: tuple[list[TableCodec], list[TableCodec]],
    sinks: int = 1,
    **options: int | bool | torch.dtype,
) -> CodedCache:
    """An empty cache of KVQuant: what `calibrate_kvquant` returns, keys before RoPE."""
    return CodedCache(*codecs, sinks=sinks, before_rope=True, **options)  # type: ignore[arg-type]
