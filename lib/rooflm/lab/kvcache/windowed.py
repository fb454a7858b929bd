"""A sliding window with attention sinks: the first few tokens stay, and the last `window`.

A language model puts much of its attention on the first tokens, whatever they say: softmax must
spend its mass somewhere, and those are seen by all. A window that slides past them takes that
place away, and the model breaks down; keeping four of them mends it. What lies between sinks and
window is gone, and no later question brings it back.

Positions are counted within the cache: a sink stands at 0 to sinks - 1, the current token never
beyond sinks + window - 1, so that no distance occurs that training has not seen, however long the
text is. Rotary scores depend on distances only, and those within the window are unchanged; so what
moves is the query's distance to the sinks. Keys are kept before rotation.

A query sees exactly the sinks and the last `window` positions, itself included, however the text
is cut into passes. Between passes sinks + window positions are held.

Sources: StreamingLLM, arXiv 2309.17453, section 3 (3.2 for positions within the cache).

Chapter: throwing the cache away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflm.lab.model import Rope
from rooflm.roofline.numeric import size


@dataclass(eq=False)
class _Held:
    sink_keys: Tensor  # (batch, kv_heads, up to sinks, head_dim), before rotation
    sink_values: Tensor
    keys: Tensor  # (batch, kv_heads, up to window, head_dim), before rotation
    values: Tensor
    seen: int


class WindowedCache:
    """Sinks and a window.

    Parameters
    ----------
    window : last positions that a query sees, itself included.
    sinks : first tokens of the text that stay; 0 is the plain window.
    original : count positions in the text, not within the cache.
    """

    def __init__(self, window: int, sinks: int = 4, original: bool = False) -> None:
        self.window, self.sinks = size("window", window), size("sinks", sinks, 0)
        self.original = original
        self._layers: list[_Held] = []

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._layers[-1].seen if self._layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the sinks and the window in all layers."""
        parts = ("sink_keys", "sink_values", "keys", "values")
        return sum(getattr(held, name).nbytes for held in self._layers for name in parts)

    def held(self, layer: int = 0) -> Tensor:
        """Positions in the text of what is kept, (positions,), rising."""
        held = self._layers[layer]
        first = held.seen - held.keys.shape[2]
        recent = torch.arange(first, held.seen)
        return torch.cat([torch.arange(held.sink_keys.shape[2]), recent])

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`."""
        if layer == len(self._layers):
            k, v = keys[:, :, :0], values[:, :, :0]
            self._layers.append(_Held(k, v, k, v, 0))
        held, start, n = self._layers[layer], self._layers[layer].seen, keys.shape[2]
        new_sinks = max(0, min(self.sinks - start, n))
        held.sink_keys = torch.cat([held.sink_keys, keys[:, :, :new_sinks]], 2)
        held.sink_values = torch.cat([held.sink_values, values[:, :, :new_sinks]], 2)
        k = torch.cat([held.keys, keys[:, :, new_sinks:]], 2)
        v = torch.cat([held.values, values[:, :, new_sinks:]], 2)
        held.seen = start + n
        out = attend_window(
            queries, held.sink_keys, held.sink_values, k, v, rope,
            start=start, window=self.window, original=self.original,
        )  # fmt: skip
        held.keys, held.values = (x[:, :, -self.window :].clone() for x in (k, v))
        return out


def attend_window(
    queries: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    keys: Tensor,
    values: Tensor,
    rope: Rope,
    start: int,
    window: int,
    original: bool = False,
) -> Tensor:
    """Each query over the sinks and its own window, positions counted within the cache.

    Parameters
    ----------
    queries : (batch, heads, n, head_dim), before rotation, of positions start to start + n - 1.
    sink_keys, sink_values : (batch, kv_heads, sinks, head_dim), of positions 0 to sinks - 1.
    keys, values : (batch, kv_heads, m, head_dim), of the last m positions, the new ones included,
        none of them a sink.
    original : the sinks' distance is that in the text.

    Returns
    -------
    Tensor
        (batch, heads, n, head_dim).
    """
    b, h, n, d = queries.shape
    g, s, m = keys.shape[1], sink_keys.shape[2], keys.shape[2]
    place = torch.arange(start, start + n)  # of the queries, in the text
    of_key = torch.arange(start + n - m, start + n)
    first = int(of_key[0]) if m else start  # slots of the window count from its first key
    capped = place if original else place.clamp(max=s + window - 1)
    near = rope.at(queries, (place - first).clamp(min=0)).reshape(b, g, h // g * n, d)
    to_window = (near @ rope(keys).transpose(-1, -2)).view(b, g, h // g, n, m)
    far = rope.at(queries, capped).reshape(b, g, h // g * n, d)
    to_sinks = (far @ rope(sink_keys).transpose(-1, -2)).view(b, g, h // g, n, s)
    distance = place[:, None] - of_key
    sees = (distance >= 0) & (distance < window)
    sees_sink = place[:, None] >= torch.arange(s)
    scores = torch.cat([to_sinks, to_window], -1) / math.sqrt(d)
    scores = scores.masked_fill(~torch.cat([sees_sink, sees], -1), -math.inf)
    both = torch.cat([sink_values, values], 2)
    return (scores.softmax(-1).flatten(2, 3) @ both).reshape(b, h, n, d)
