"""From logits to the distribution that the next token is drawn from.

A temperature sharpens or flattens it; the filters cut its tail: the k likeliest tokens, the fewest
whose chances sum to p, or those within a factor of the likeliest. What is left is scaled to sum
to 1. At temperature 0 the likeliest token has all of it (the first of several that are equal), so
that greedy decoding is a case of sampling, and what holds for sampling holds for it.

The filters come in the order top-k, top-p, min-p, each on what the one before it left, after the
temperature. Other software has other orders.

Sources: top-k, arXiv 1805.04833, section 5.4; top-p (nucleus), arXiv 1904.09751, section 3.1;
min-p, arXiv 2407.01082, section 3.

Chapter: speculative decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rooflm.roofline.numeric import shorten, size


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Parameters
    ----------
    temperature : logits are divided by it; 0 takes the likeliest token.
    top_k : how many tokens may be drawn; 0 for all.
    top_p : the chance that the tokens that may be drawn have together, at least.
    min_p : the least chance of a token that may be drawn, as a part of the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        size("top_k", self.top_k, smallest=0)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {shorten(self.temperature)}; allowed: 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {shorten(self.top_p)}; allowed: above 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {shorten(self.min_p)}; allowed: 0 to 1")


GREEDY = Sampling(temperature=0.0)
PLAIN = Sampling()


def chances(logits: Tensor, sampling: Sampling = PLAIN) -> Tensor:
    """The distribution of the next token.

    Parameters
    ----------
    logits : (…, vocab).

    Returns
    -------
    Tensor
        (…, vocab), each row summing to 1.
    """
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits)
    p = (logits / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < p.shape[-1]:
        p = p * (rank(p) < sampling.top_k)
    if sampling.top_p < 1:
        p = p / p.sum(-1, keepdim=True)
        ordered, places = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # what likelier tokens have already
        keep = torch.zeros_like(p, dtype=torch.bool)
        p = p * keep.scatter(-1, places, before < sampling.top_p)
    if sampling.min_p > 0:
        p = p * (p >= sampling.min_p * p.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True)


def rank(p: Tensor) -> Tensor:
    """How many entries stand before each, by falling size, the earlier first among equals."""
    places = p.sort(dim=-1, descending=True, stable=True).indices
    return places.argsort(-1)


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """All chance on one token: (…, vocab) from (…), in the type of `like`, (…, vocab)."""
    return torch.zeros_like(like).scatter(-1, tokens[..., None], 1.0)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row, (…), from (…, vocab), by the inverse of the cumulative sum.

    Rows need not sum to 1. A row of one token takes it, whatever is drawn.
    """
    total = p.cumsum(-1)
    u = torch.rand(p.shape[:-1], generator=generator, dtype=p.dtype, device=p.device)
    found = torch.searchsorted(total, (u * total[..., -1])[..., None], right=True)[..., 0]
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(-1)  # rounding may step over the end
    return torch.minimum(found, last)
