"""How keys and values are spread over channels and tokens, and what a grid would lose there.

Everything here works on what a model's attention is handed: keys and values, (batch, kv_heads,
positions, head_dim) in each layer, keys before and after their rotation.

The expected squared error of a uniform grid is s^2 / 12 for a step s, where steps are small
beside the spread (Bennett). With s = range / (2^bits - 1) for each group it follows from the
ranges alone, before anything is rounded: `predicted_error`.

Sources: KIVI, arXiv 2402.02750, section 3.2 (outlier channels of keys, none in values); KVQuant,
arXiv 2401.18079, section 3.2 (before and after RoPE); Bennett, 1948, Bell System Technical
Journal 27(3), 446-472.

Chapter: KV cache quantization.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.kvcache.kivi import Uniform, fit_range, from_groups, to_groups
from rooflm.lab.model import Rope, Transformer, attend


@dataclass(eq=False, repr=False)
class Captured:
    """A cache that keeps every key and value of one pass, and can ask for their gradients.

    Attributes
    ----------
    keys, rotated, values : of each layer, (batch, kv_heads, positions, head_dim): keys before
        and after RoPE, and values.
    queries : of each layer, (batch, heads, positions, head_dim), after RoPE.
    key_gradients, value_gradients : of the loss with respect to keys before RoPE and values;
        empty unless `capture(gradients=True)`.
    """

    keys: list[Tensor] = field(default_factory=list)
    rotated: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    key_gradients: list[Tensor] = field(default_factory=list)
    value_gradients: list[Tensor] = field(default_factory=list)
    _probes: list[Tensor] | None = None
    length: int = 0
    nbytes: int = 0

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """Plain attention over the new positions, which are kept."""
        assert layer == len(self.keys), "one pass only"
        if self._probes is not None:  # zeros: their gradients are those of keys and values
            probes = [torch.zeros_like(t).requires_grad_() for t in (keys, values)]
            self._probes += probes
            keys, values = keys + probes[0], values + probes[1]
        turned, queries = rope(keys, 0), rope(queries, 0)
        self.keys.append(keys.detach())
        self.rotated.append(turned.detach())
        self.values.append(values.detach())
        self.queries.append(queries.detach())
        return attend(queries, turned, values)


def capture(model: Transformer, tokens: Tensor, gradients: bool = False) -> Captured:
    """Keys and values of a text.

    Parameters
    ----------
    tokens : (batch, positions), read in one pass.
    gradients : whether also to differentiate the loss, the sum over all predictions in nats.
    """
    held = Captured(_probes=[] if gradients else None)
    with torch.set_grad_enabled(gradients):
        states = model.states(tokens, held)
        if gradients:
            logits = model.logits(states[:, :-1]).flatten(0, 1)
            loss = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
            assert held._probes is not None
            found = torch.autograd.grad(loss, held._probes)
            held.key_gradients, held.value_gradients = list(found[::2]), list(found[1::2])
    held._probes = None
    return held


def channel_spread(x: Tensor) -> Tensor:
    """Root mean square of each channel over positions, (batch, kv_heads, head_dim)."""
    return x.square().mean(2).sqrt()


def token_spread(x: Tensor) -> Tensor:
    """Root mean square of each token over channels, (batch, kv_heads, positions)."""
    return x.square().mean(3).sqrt()


def unevenness(x: Tensor) -> tuple[float, float]:
    """How unequal channels are, and tokens: the largest over the median root mean square.

    Parameters
    ----------
    x : (batch, kv_heads, positions, head_dim).

    Returns
    -------
    tuple of float
        of channels and of tokens, each the mean over heads.

    >>> x = torch.ones(1, 1, 4, 3)
    >>> x[..., 2] = 5
    >>> unevenness(x)
    (5.0, 1.0)
    """
    found = []
    for spread in (channel_spread(x), token_spread(x)):
        middle = spread.median(-1).values.clamp(min=1e-12)
        found.append((spread.amax(-1) / middle).mean().item())
    return found[0], found[1]


def predicted_error(x: Tensor, bits: int, along: str, group: int) -> float:
    """Squared error of a uniform grid, as a part of the mean square, from the ranges alone.

    Parameters
    ----------
    x : (batch, kv_heads, positions, head_dim).
    bits, along, group : as of `kivi.Uniform`; what is left after whole groups is dropped.

    Returns
    -------
    float
        the mean of s^2 / 12 over groups, over the mean of x^2.

    Source: Bennett, 1948.
    """
    grouped = to_groups(_whole(x, along, group), along, group)
    step = fit_range(grouped, bits).scale.double()
    return (step.square().mean() / 12 / grouped.double().square().mean()).item()


def measured_error(x: Tensor, bits: int, along: str, group: int) -> float:
    """The same, of what storing and reading really leaves."""
    x = _whole(x, along, group)
    codec = Uniform(bits, along, group)
    return relative_error(x, codec.decode(codec.encode(x)))


def relative_error(x: Tensor, kept: Tensor) -> float:
    """Sum of squared differences over the sum of squares."""
    return ((kept - x).double().square().sum() / x.double().square().sum()).item()


def rounding_variance(x: Tensor, bits: int, along: str, group: int) -> Tensor:
    """The variance that rounding should give each number, s^2 / 12 of its own group.

    Parameters
    ----------
    x : (batch, kv_heads, positions, head_dim), positions in whole groups.

    Returns
    -------
    Tensor
        of the shape of x.
    """
    grouped = to_groups(x, along, group)
    return from_groups((fit_range(grouped, bits).scale.square() / 12).expand_as(grouped), along)


def predicted_score_error(queries: Tensor, keys: Tensor, variance: Tensor) -> float:
    """Root mean square error of the scores q.k / sqrt(d), in nats, if errors are independent.

    Parameters
    ----------
    queries : (batch, heads, positions, head_dim), rotated.
    keys, variance : (batch, kv_heads, positions, head_dim), rotated, and of their errors.
    """
    d, (_, variance) = queries.shape[-1], _for_heads(queries, keys, variance)
    return _causal(queries.square() @ variance.mT / d).sqrt().item()


def score_error(queries: Tensor, keys: Tensor, kept: Tensor) -> float:
    """The same, of keys that were stored and read."""
    d, (keys, kept) = queries.shape[-1], _for_heads(queries, keys, kept)
    return _causal((queries @ (kept - keys).mT).square() / d).sqrt().item()


def predicted_output_error(
    queries: Tensor, keys: Tensor, values: Tensor, variance: Tensor
) -> float:
    """Squared error of the output, as a part of its square, from the variance of values alone.

    An output is a sum of values with attention's weights; independent errors add up with the
    squares of these weights. A position that many queries look at is a position that counts.

    Parameters
    ----------
    queries : (batch, heads, positions, head_dim), rotated.
    keys, values, variance : (batch, kv_heads, positions, head_dim), keys rotated, the variance of
        the values' errors.
    """
    weights = attention_weights(queries, keys)
    values, variance = _for_heads(queries, values, variance)
    noise = (weights.square() @ variance).double().sum()
    return (noise / (weights @ values).double().square().sum()).item()


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """What each query looks at, (batch, heads, positions, positions); rows sum to 1."""
    keys = _for_heads(queries, keys)[0]
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def output_error(
    queries: Tensor, keys: Tensor, values: Tensor, kept: tuple[Tensor, Tensor]
) -> float:
    """Squared error of attention's output with other keys and values, as a part of its square.

    Parameters
    ----------
    queries : (batch, heads, positions, head_dim), rotated, one for each position.
    keys, values : (batch, kv_heads, positions, head_dim), keys rotated.
    kept : what is read in their place.
    """
    return relative_error(attend(queries, keys, values), attend(queries, *kept))


def _for_heads(queries: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each KV head once for every query head that reads it."""
    return [t.repeat_interleave(queries.shape[1] // t.shape[1], dim=1) for t in tensors]


def _causal(x: Tensor) -> Tensor:
    """The mean over pairs of a query and a position that it may look at."""
    seen = torch.ones_like(x[0, 0], dtype=torch.bool).tril()
    return x[..., seen].double().mean()


def _whole(x: Tensor, along: str, group: int) -> Tensor:
    if along == "token":
        return x
    return x[:, :, : x.shape[2] - x.shape[2] % group]
