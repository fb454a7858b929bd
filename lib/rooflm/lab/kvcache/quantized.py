"""Every quantized cache by its name.

`QUANTIZED[name](model, tokens)` calibrates on some text, where the method needs that, and
returns a function that makes an empty cache. `bits_per_number` is what an additional token
costs in the long run; sinks and recent positions come on top, and `cache.nbytes` counts them.

Chapter: KV cache quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from rooflm.lab.kvcache.binary_kv import PartlyBinary
from rooflm.lab.kvcache.coded import CodedCache
from rooflm.lab.kvcache.distributions import capture, channel_spread
from rooflm.lab.kvcache.kivi import kivi
from rooflm.lab.kvcache.kvquant import calibrate_kvquant, kvquant
from rooflm.lab.kvcache.scaled import Float8, Integers, MagnitudeScaled, Rotated
from rooflm.lab.kvcache.wkvquant import calibrate_wkvquant, wkvquant
from rooflm.lab.model import Transformer

Factory = Callable[[], CodedCache]
Method = Callable[[Transformer, Tensor], Factory]

GROUP = RESIDUAL = 32


def _kivi(model: Transformer, tokens: Tensor, bits: int, **options: str) -> Factory:
    group = min(GROUP, model.config.head_dim)
    return partial(kivi, bits, group, RESIDUAL, **options)  # type: ignore[arg-type]


def _kvquant(
    model: Transformer, tokens: Tensor, bits: int, share: float = 0.01, weighted: bool = True
) -> Factory:
    captured = capture(model, _rows(model, tokens), gradients=weighted)
    return partial(kvquant, calibrate_kvquant(captured, bits, share, weighted=weighted))


def _wkvquant(model: Transformer, tokens: Tensor, bits: int) -> Factory:
    captured = capture(model, _rows(model, tokens))
    codecs = calibrate_wkvquant(captured, bits, model.config.head_dim, sinks=1)
    return partial(wkvquant, codecs)


def _integers(model: Transformer, tokens: Tensor, bits: int) -> Factory:
    return partial(CodedCache, Integers(bits), Integers(bits))


def _float8(model: Transformer, tokens: Tensor) -> Factory:
    return partial(CodedCache, Float8(), Float8())


def _rotated(model: Transformer, tokens: Tensor, bits: int) -> Factory:
    codec = Rotated(Integers(bits), model.config.head_dim)
    return partial(CodedCache, codec, codec)


def _turbo(model: Transformer, tokens: Tensor, bits: int) -> Factory:
    codec = Rotated(MagnitudeScaled(bits), model.config.head_dim)
    return partial(CodedCache, codec, codec)


def _scaled(model: Transformer, tokens: Tensor, bits: int) -> Factory:
    held = capture(model, _rows(model, tokens))
    keys, values = (
        [MagnitudeScaled(bits, _sizes(x[:, :, 1:])) for x in layers]
        for layers in (held.rotated, held.values)
    )
    return partial(CodedCache, keys, values)


def _binary(model: Transformer, tokens: Tensor, share: float, chosen: str = "magnitude") -> Factory:
    group = min(64, model.config.head_dim)
    # As KIVI directs its grids: keys by channel, whose means are far from 0, values by token.
    keys = PartlyBinary(share, "channel", group, centred=True, chosen=chosen)
    values = PartlyBinary(share, "token", group, chosen=chosen)
    return partial(CodedCache, keys, values, residual=RESIDUAL)


QUANTIZED: Mapping[str, Method] = {
    "int8-token": partial(_integers, bits=8),
    "fp8": _float8,
    "int4-token": partial(_integers, bits=4),
    "kivi-4": partial(_kivi, bits=4),
    "kivi-2": partial(_kivi, bits=2),
    **{
        f"k-{keys}-v-{values}-{bits}": partial(_kivi, bits=bits, keys=keys, values=values)
        for bits in (4, 2)
        for keys, values in (("token", "token"), ("channel", "channel"), ("token", "channel"))
    },
    "kvquant-4": partial(_kvquant, bits=4),
    "kvquant-3": partial(_kvquant, bits=3),
    "kvquant-2": partial(_kvquant, bits=2),
    "kvquant-3-dense": partial(_kvquant, bits=3, share=0.0),
    "kvquant-3-unweighted": partial(_kvquant, bits=3, weighted=False),
    "wkvquant-4": partial(_wkvquant, bits=4),
    "binary-10": partial(_binary, share=0.1),
    "binary-10-random": partial(_binary, share=0.1, chosen="random"),
    "scaled-4": partial(_scaled, bits=4),
    "scaled-3": partial(_scaled, bits=3),
    "rotated-4": partial(_rotated, bits=4),
    "turbo-4": partial(_turbo, bits=4),
    "turbo-3": partial(_turbo, bits=3),
    "turbo-2": partial(_turbo, bits=2),
}


def _rows(model: Transformer, tokens: Tensor) -> Tensor:
    """A text cut into rows of what the model was trained on, at most 512 tokens each."""
    if tokens.dim() == 2:
        return tokens
    length = min(512, model.config.window, len(tokens))
    return tokens[: len(tokens) // length * length].view(-1, length)


def _sizes(x: Tensor) -> Tensor:
    return channel_spread(x.transpose(0, 1).flatten(1, 2)[None])[:, :, None].clamp(min=1e-6)
