"""What the chapter on eviction measures besides the map: loss along a text, rival choices.

Chapter: throwing the cache away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.evaluate import read_through
from rooflm.lab.kvcache.attention import mass_kept, overlap
from rooflm.lab.kvcache.evicting import choose_kept, draw_lots, lots_after, observed_scores
from rooflm.lab.machine import time_call
from rooflm.lab.model import Cache, FullCache, Transformer


@torch.no_grad()
def loss_along(
    model: Transformer, texts: Tensor, cache: Cache, piece: int = 32, chunk: int = 32
) -> Tensor:
    """Loss by place in the text, nats, (pieces,): the mean of `piece` tokens of all texts.

    Parameters
    ----------
    texts : (texts, tokens); the first token is not predicted.
    """
    logits = model.logits(read_through(model, texts[:, :-1], cache, chunk))
    losses = functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none")
    return losses.mean(0).view(-1, piece).mean(1)


def rival_choices(
    maps: Sequence[Tensor], seen: int, budget: int, recent: int
) -> dict[str, list[Tensor]]:
    """What different rules would keep of the same positions, layer by layer.

    Parameters
    ----------
    maps : attention weights of each layer, (batch, kv_heads, group, n, n), of a full cache.
    seen : positions to choose from; the queries after them are the future.

    Returns
    -------
    dict
        {rule: (batch, kv_heads, budget) for each layer}: SnapKV, sinks and window, two
        lotteries, one with four sinks, and the best for the future, which no rule can know.
    """
    b, g = maps[0].shape[:2]
    places = torch.arange(seen).expand(b, g, seen)

    def kept(scores: Iterable[Tensor]) -> list[Tensor]:
        return [choose_kept(x, budget, recent) for x in scores]

    layers = range(len(maps))
    return {
        "SnapKV": kept(observed_scores(w[..., seen - 8 : seen, :seen], 7) for w in maps),
        "sinks and window": kept((places + seen * (places < 4)).float() for _ in layers),
        "lottery": kept(draw_lots(0, i, places) for i in layers),
        "lottery and 4 sinks": kept(lots_after(4)(i, places) for i in layers),
        "another lottery": kept(draw_lots(1, i, places) for i in layers),
        "best for the future": kept(w[..., seen:, :seen].sum((2, 3)) for w in maps),
    }


def future_mass(maps: Sequence[Tensor], kept: Sequence[Tensor], seen: int) -> float:
    """The part of the future queries' attention to the past that falls on what was kept."""
    found = [mass_kept(w[..., seen:, :seen], k) for w, k in zip(maps, kept, strict=True)]
    return torch.stack(found).mean().item()


def shared(kept: Sequence[Tensor], other: Sequence[Tensor], recent: int) -> float:
    """The part of the positions before the `recent` ones that two choices share, all heads' mean.

    Parameters
    ----------
    kept, other : (batch, kv_heads, budget) for each layer, rising.
    """
    old = [(a[..., : a.shape[-1] - recent], b[..., : b.shape[-1] - recent])
           for a, b in zip(kept, other, strict=True)]  # fmt: skip
    return torch.stack([overlap(a, b) for a, b in old]).mean().item()


def noise_cache(model: Transformer, positions: int) -> FullCache:
    """A full cache that holds noise at so many positions, for timing."""
    c, cache = model.config, FullCache()
    for layer in range(c.layers):
        cache.extend(layer, *torch.randn(2, 1, c.kv_heads, positions, c.head_dim))
    return cache


@torch.no_grad()
def step_ms(model: Transformer, cache: Cache, runs: int = 7) -> float:
    """Milliseconds of a decode step of one sequence with a cache that is filled already."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    return 1e3 * time_call(lambda: model(token, cache), runs=runs).median_s
