"""Where attention goes: its weights, the share of the first tokens, of the best, and of what stays.

Chapter: throwing the cache away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rooflm.lab.model import FullCache, Rope, Transformer


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax weights; the last query sees every key, the one before it one less.

    Parameters
    ----------
    queries : (batch, heads, n, head_dim), rotated.
    keys : (batch, kv_heads, m, head_dim), rotated; query head j reads KV head j // (h/g).

    Returns
    -------
    Tensor
        (batch, kv_heads, heads / kv_heads, n, m).
    """
    b, h, n, d = queries.shape
    g, m = keys.shape[1:3]
    rows = queries.reshape(b, g, h // g * n, d)  # a KV head is read once for its whole group
    scores = (rows @ keys.transpose(-1, -2) / math.sqrt(d)).view(b, g, h // g, n, m)
    if n > 1:
        sees = torch.ones(n, m, dtype=torch.bool, device=keys.device).tril(m - n)
        scores = scores.masked_fill(~sees, -math.inf)
    return scores.softmax(-1)


class _Watched(FullCache):
    """A full cache that remembers the rotated queries and keys of its one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`."""
        self.pairs.append((rope(queries), rope(keys)))
        return super().attend(layer, queries, keys, values, rope)


@torch.no_grad()
def attention_maps(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The attention weights of each layer.

    Parameters
    ----------
    tokens : (batch, n).

    Returns
    -------
    list
        of (batch, kv_heads, heads / kv_heads, n, n), a row for each query; layer by layer.
    """
    cache = _Watched()
    model.states(tokens, cache)
    return [attention_weights(q, k) for q, k in cache.pairs]


def first_share(weights: Tensor, first: int = 1) -> Tensor:
    """The part of attention that goes to the first tokens, (heads,), mean of the later queries.

    Parameters
    ----------
    weights : (batch, kv_heads, group, n, n); the queries of the text's second half are counted.
    """
    late = weights[..., weights.shape[-2] // 2 :, :first].sum(-1)
    return late.mean((0, 3)).flatten()


def best_share(weights: Tensor, share: float) -> Tensor:
    """The part that the best positions of each KV head hold when the last queries look back.

    Parameters
    ----------
    weights : (batch, kv_heads, group, queries, positions).
    share : of the positions, such as 0.1; the best are those with the largest sums.

    Returns
    -------
    Tensor
        (batch, kv_heads).
    """
    paid = weights.sum((2, 3))
    count = max(1, round(share * paid.shape[-1]))
    return paid.topk(count, dim=-1).values.sum(-1) / paid.sum(-1)


def mass_kept(weights: Tensor, held: Tensor) -> Tensor:
    """The part of the queries' attention that falls on what was kept, (batch, kv_heads).

    Parameters
    ----------
    weights : (batch, kv_heads, group, queries, positions), of a full cache.
    held : (batch, kv_heads, kept), positions.
    """
    paid = weights.sum((2, 3))
    return paid.gather(-1, held).sum(-1) / paid.sum(-1)


def overlap(held: Tensor, other: Tensor) -> Tensor:
    """The part of what one cache kept that another kept as well, (batch, kv_heads).

    Two sets that were drawn independently, `m` of `n` positions each, share m / n.

    Parameters
    ----------
    held, other : (batch, kv_heads, kept), positions.
    """
    return (held[..., :, None] == other[..., None, :]).any(-1).double().mean(-1)
