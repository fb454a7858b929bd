"""Beam search over a paged cache: beams fork and die, and share the blocks of their common past.

Source: PagedAttention, arXiv 2309.06180, section 4.4 and Figure 9.

Chapter: paged attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.kvcache.paged import PagedCache, PagePool
from rooflm.lab.model import Transformer


class Beams(NamedTuple):
    """What a search found.

    tokens : (beams, steps), the best continuations, best first.
    scores : (beams,), the sums of their log-probabilities, nats.
    saved : share of the blocks that sharing made unnecessary, over all steps.
    """

    tokens: Tensor
    scores: Tensor
    saved: float


@torch.no_grad()
def beam_search(
    model: Transformer, pool: PagePool, prompt: Tensor, beams: int, steps: int
) -> Beams:
    """The most likely continuations that keeping `beams` of them at each step finds.

    Parameters
    ----------
    pool : of the model's config; its blocks are given back at the end.
    prompt : (tokens,).
    beams, steps : continuations kept, and tokens of each.

    Raises
    ------
    OutOfBlocks
        where the pool is too small.
    """
    trunk = PagedCache(pool)
    logs = model(trunk.admit(prompt), trunk)[:, -1].log_softmax(-1)
    scores, following = logs[0].topk(beams)
    found, kept = following[:, None], trunk.fork(beams)
    trunk.free()
    saved = whole = 0
    for _ in range(steps - 1):
        logs = model(kept.note(following[:, None]), kept)[:, -1].log_softmax(-1)
        scores, best = (scores[:, None] + logs).flatten().topk(beams)
        parents, following = best // logs.shape[1], best % logs.shape[1]
        kept.keep(parents.tolist())
        found = torch.cat([found[parents], following[:, None]], 1)
        blocks = beams * -(-kept.length // pool.manager.block_tokens)
        whole, saved = whole + blocks, saved + blocks - kept.nbytes // pool.block_bytes
    kept.free()
    return Beams(found, scores, saved / max(whole, 1))
