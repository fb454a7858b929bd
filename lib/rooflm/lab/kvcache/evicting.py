"""Caches that choose what to throw away, by attention: H2O, TOVA, SnapKV; and by lot.

After each pass a layer holds at most `budget` positions, the last `recent` among them; the others
are those with the highest scores. What scores are made of is the method:

- `H2OCache`: all attention that a position has been paid so far (heavy hitters);
- `TOVACache`: what the last query alone pays it, the mean of all heads, one choice for a layer;
- `SnapKVCache`: what the last `window` tokens of the prompt pay it and its neighbours; the prompt
  is compressed once, and what is generated afterwards stays;
- `PriorityCache`: any function of the position; at its default a random number, the control.

The choice is made for each KV head by itself. With grouped queries the attention weights of the
h/g query heads that read a KV head are added up: H2O and SnapKV were written for as many KV heads
as query heads and don't say. Keys stay rotated by their positions in the text. The papers evict
after each token; a pass of n tokens evicts n at once here, so that chunks of one token are the
papers' algorithm and within a longer chunk all its tokens are seen.

Sources: H2O, arXiv 2306.14048, section 4.1, algorithm 1; TOVA, arXiv 2401.06104, section 4;
SnapKV, arXiv 2404.14469, sections 4.1 (votes) and 4.3 (pooling); uniform sample of a stream,
Vitter, ACM TOMS 11 (1985), 37.

Chapter: throwing the cache away.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.kvcache.attention import attention_weights
from rooflm.lab.model import Rope
from rooflm.roofline.numeric import size


def choose_kept(scores: Tensor, budget: int, recent: int) -> Tensor:
    """The last `recent` positions and, of those before, the ones with the highest scores.

    Parameters
    ----------
    scores : (…, positions), in the order of the text.

    Returns
    -------
    Tensor
        (…, min(budget, positions)), indices, rising.
    """
    positions = scores.shape[-1]
    if positions <= budget:
        return torch.arange(positions, device=scores.device).expand(scores.shape)
    must = torch.arange(positions, device=scores.device) >= positions - recent
    return scores.masked_fill(must, math.inf).topk(budget, dim=-1).indices.sort(dim=-1).values


def observed_scores(weights: Tensor, pool: int) -> Tensor:
    """What a window of queries pays each position and its neighbours (SnapKV, sections 4.1, 4.3).

    Parameters
    ----------
    weights : (batch, kv_heads, group, queries, positions), of the window's queries.
    pool : positions in a moving average, odd; one that is singled out takes its neighbours along.

    Returns
    -------
    Tensor
        (batch, kv_heads, positions).
    """
    paid = weights.sum((2, 3))
    return functional.avg_pool1d(paid, pool, stride=1, padding=pool // 2)


@dataclass(eq=False)
class _Held:
    keys: Tensor  # (batch, kv_heads, positions, head_dim), rotated
    values: Tensor
    places: Tensor  # (batch, kv_heads, positions), in the text
    scores: Tensor  # (batch, kv_heads, positions)
    queries: Tensor | None = None  # (batch, heads, up to window, head_dim): SnapKV, until it chose
    seen: int = 0

    def keep(self, chosen: Tensor) -> None:
        """Leave the chosen, (batch, kv_heads, kept); the rest is not referred to any longer."""
        b, g, kept = chosen.shape
        if kept == self.keys.shape[2]:
            return
        row, head = (torch.arange(n, device=chosen.device) for n in (b, g))
        where = row[:, None, None], head[:, None], chosen
        self.keys, self.values = self.keys[where], self.values[where]
        self.places, self.scores = (x.gather(2, chosen) for x in (self.places, self.scores))


class _EvictingCache(ABC):
    """What the caches of this module share; `_score` and `_evict` are the method's."""

    def __init__(self, budget: int, recent: int) -> None:
        self.budget, self.recent = size("budget", budget), size("recent", recent, 0)
        if recent > budget:
            raise ValueError(f"recent is {recent}; allowed: 0 to the budget, {budget}")
        self._layers: list[_Held] = []

    @property
    def length(self) -> int:
        """Tokens seen, kept or not."""
        return self._layers[-1].seen if self._layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, of their places and scores, and of kept queries."""
        return sum(
            sum(x.nbytes for x in (held.keys, held.values, held.places, held.scores))
            + (held.queries.nbytes if held.queries is not None else 0)
            for held in self._layers
        )

    def held(self, layer: int = 0) -> Tensor:
        """Positions in the text of what is kept, (batch, kv_heads, positions), rising."""
        return self._layers[layer].places.long()

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`; evicts when the output is made."""
        b, g, n, _ = keys.shape
        if layer == len(self._layers):
            none = keys.new_empty(b, g, 0)
            empty = keys[:, :, :0]
            self._layers.append(_Held(empty, values[:, :, :0], none.int(), none.float()))
        held = self._layers[layer]
        self._before(held, n)
        start, held.seen = held.seen, held.seen + n
        q = rope(queries, start)
        places = torch.arange(start, held.seen, dtype=torch.int32).expand(b, g, n)
        held.keys = torch.cat([held.keys, rope(keys, start)], 2)
        held.values = torch.cat([held.values, values], 2)
        held.places = torch.cat([held.places, places.to(keys.device)], 2)
        weights = attention_weights(q, held.keys)
        old = functional.pad(held.scores, (0, n))
        held.scores = self._score(layer, old, weights, held.places)
        out = (weights.flatten(2, 3) @ held.values).reshape(queries.shape)
        self._after(held, q)
        return out

    def _before(self, held: _Held, new: int) -> None:
        """What happens before a pass of `new` tokens: nothing, as a rule."""
        return

    def _after(self, held: _Held, queries: Tensor) -> None:
        """What happens after a pass with these rotated queries: the surplus goes."""
        held.keep(choose_kept(held.scores, self.budget, self.recent))

    @abstractmethod
    def _score(self, layer: int, old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        """Scores of all positions, (batch, kv_heads, positions), from those before the pass.

        Parameters
        ----------
        old : the scores before, 0 for the new positions.
        weights : as of `attention_weights`.
        places : (batch, kv_heads, positions), in the text.
        """


class H2OCache(_EvictingCache):
    """Heavy hitters: the positions with the largest sums of attention, and the recent ones.

    Parameters
    ----------
    budget : positions held after a pass.
    recent : how many of them are the last ones; None for half, as in the paper.
    """

    def __init__(self, budget: int, recent: int | None = None) -> None:
        super().__init__(budget, budget // 2 if recent is None else recent)

    def _score(self, layer: int, old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        return old + weights.sum((2, 3))


class TOVACache(_EvictingCache):
    """Token omission via attention: what the last query looks at least goes, recent or not.

    Parameters
    ----------
    budget : positions held after a pass.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(budget, 0)

    def _score(self, layer: int, old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        return weights[:, :, :, -1].mean((1, 2))[:, None].expand_as(old).contiguous()


class PriorityCache(_EvictingCache):
    """A fixed priority for every position; at its default a lottery, the control of the others.

    Parameters
    ----------
    budget : positions held after a pass.
    recent : how many of them are the last ones; None for half.
    priority : (layer, places) to numbers of the shape of places, (batch, kv_heads, positions);
        None for a random number that each position draws once, for every layer and head anew: what
        is kept is a uniform sample of what has been seen, however long ago.
    seed : of the lottery.
    """

    def __init__(
        self,
        budget: int,
        recent: int | None = None,
        priority: Callable[[int, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, budget // 2 if recent is None else recent)
        self.priority, self.seed = priority, seed

    def _score(self, layer: int, old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        if self.priority is None:
            return draw_lots(self.seed, layer, places)
        return self.priority(layer, places).to(old.dtype)


class SnapKVCache(_EvictingCache):
    """The prompt compressed once, by what its last tokens look at; what follows is added.

    Parameters
    ----------
    budget : positions of the prompt that stay.
    window : tokens at the prompt's end that observe and stay.
    pool : positions in the moving average, odd.
    prompt : its tokens; compressed in the pass that reaches them. None: at the first pass of a
        single token, which is how generation begins.
    again : compress after every pass in place of once, for texts read through a bounded cache.
    """

    def __init__(
        self,
        budget: int,
        window: int = 8,
        pool: int = 7,
        prompt: int | None = None,
        again: bool = False,
    ) -> None:
        super().__init__(budget, min(size("window", window), budget))
        if size("pool", pool) % 2 == 0:
            raise ValueError(f"pool is {pool}; allowed: an odd number")
        self.window, self.pool, self.again = window, pool, again
        self.prompt = size("prompt", prompt) if prompt is not None else None

    def _before(self, held: _Held, new: int) -> None:
        if new == 1 and self.prompt is None and not self.again:
            self._compress(held, last=True)

    def _after(self, held: _Held, queries: Tensor) -> None:
        if held.queries is None and held.seen > queries.shape[2]:
            return  # compressed before
        kept = queries if held.queries is None else torch.cat([held.queries, queries], 2)
        held.queries = kept[:, :, -self.window :].clone()
        if self.again:
            self._compress(held, last=False)
        elif self.prompt is not None and held.seen >= self.prompt:
            self._compress(held, last=True)

    def _compress(self, held: _Held, last: bool) -> None:
        """Choose by the kept queries; the last time they leave, too."""
        if held.queries is not None and held.keys.shape[2] > self.budget:
            weights = attention_weights(held.queries, held.keys)
            held.scores = observed_scores(weights, self.pool)
            held.keep(choose_kept(held.scores, self.budget, self.recent))
        if last and held.seen:
            held.queries = None

    def _score(self, layer: int, old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        return old


def lots_after(sinks: int, seed: int = 0) -> Callable[[int, Tensor], Tensor]:
    """A priority for `PriorityCache`: the first tokens stay, the others draw lots."""

    def priority(layer: int, places: Tensor) -> Tensor:
        return draw_lots(seed, layer, places).masked_fill(places < sinks, 2.0)

    return priority


def draw_lots(seed: int, layer: int, places: Tensor) -> Tensor:
    """A random number from 0 to 1 for each position, the same whenever it is asked for.

    Parameters
    ----------
    places : (batch, kv_heads, positions), in the text; every head of every row has its own lots.

    Mixed by a 32-bit integer hash of shifts and multiplications.
    """
    b, g, _ = places.shape
    head = torch.arange(b * g, device=places.device).view(b, g, 1)
    x = _mix(_mix(_mix(places.long()) ^ (head + 1)) ^ (1000 * seed + layer + 1))
    return x.double().div(2.0**32).float()


def _mix(x: Tensor) -> Tensor:
    mask = 2**32 - 1
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
