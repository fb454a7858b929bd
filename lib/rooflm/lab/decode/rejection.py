"""Rejection sampling: a draft's tokens, kept so that the target's own distribution comes out.

A token x that was drawn from q is kept with chance min(1, p(x) / q(x)). One that isn't is drawn
anew from what p has more than q, max(0, p - q), scaled. Then x has distribution p exactly, whatever
q is, and is kept with chance sum min(p, q). If all n drafts are kept, the target's distribution
after them gives one more token for nothing.

Several drafts for one place (SpecInfer, SpecTr) are tried in turn: after a rejection the target's
distribution is what was left, and the next candidate is tried against that. Candidates drawn
without replacement have the draft's distribution without those that were tried.

Sources: arXiv 2211.17192, algorithm 1 and appendix A.1 (why it is exact); arXiv 2302.01318,
algorithm 2 and theorem 1; several drafts, SpecInfer, arXiv 2305.09781; without
replacement, recursive rejection sampling, arXiv 2402.14160; K-SEQ, SpecTr, arXiv 2310.15141.

Chapter: speculative decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.decode.chances import draw


class Verdict(NamedTuple):
    """How many drafts were kept, (…), and the token that follows them, (…)."""

    kept: Tensor
    token: Tensor


class Choice(NamedTuple):
    """Which candidate was kept, (…), -1 for none, and the token that comes out, (…)."""

    which: Tensor
    token: Tensor


def verify(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> Verdict:
    """Keep drafts from the left, as long as they pass.

    Parameters
    ----------
    p : (…, n + 1, vocab), the target's distributions at each draft and after the last.
    q : (…, n, vocab), the distributions that the drafts were drawn from.
    drafted : (…, n), whole numbers below vocab.

    Returns
    -------
    Verdict
        kept, 0 to n, and a token from the target's distribution after them, given the rejection.
    """
    n = drafted.shape[-1]
    if q.shape[:-1] != drafted.shape or p.shape != (*drafted.shape[:-1], n + 1, q.shape[-1]):
        raise ValueError(
            f"p is {tuple(p.shape)} and q {tuple(q.shape)} for drafts {tuple(drafted.shape)}; "
            "allowed: (…, n + 1, vocab) and (…, n, vocab) for (…, n)"
        )
    u = torch.rand(drafted.shape, generator=generator, dtype=p.dtype)
    target, draft = (x.gather(-1, drafted[..., None])[..., 0] for x in (p[..., :n, :], q))
    passed = u * draft < target  # as a product: the draft may have had no chance of it
    kept = passed.int().cumprod(-1).sum(-1)
    beyond = torch.cat([q, torch.zeros_like(p[..., :1, :])], -2)  # nothing was drafted after all n
    place = kept[..., None, None].expand(*kept.shape, 1, p.shape[-1])
    rest = residual(p.gather(-2, place), beyond.gather(-2, place))[..., 0, :]
    return Verdict(kept, draw(rest, generator))


def verify_candidates(
    p: Tensor, q: Tensor, candidates: Tensor, generator: torch.Generator
) -> Choice:
    """One place, several candidates, tried in turn.

    Parameters
    ----------
    p, q : (…, vocab), of the target and of the draft.
    candidates : (…, m), drawn from q one after the other without replacement.
    """
    which = torch.full(candidates.shape[:-1], -1, dtype=torch.int64)
    token = torch.zeros_like(which)
    for i, tried in enumerate(candidates.unbind(-1)):
        u = torch.rand(which.shape, generator=generator, dtype=p.dtype)
        target, draft = (x.gather(-1, tried[..., None])[..., 0] for x in (p, q))
        taken = (which < 0) & (u * draft < target)
        which, token = torch.where(taken, i, which), torch.where(taken, tried, token)
        p = residual(p, q)
        q = q.scatter(-1, tried[..., None], 0.0)
        q = q / q.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return Choice(which, torch.where(which < 0, draw(p, generator), token))


def verify_sequences(
    p: Tensor, q: Tensor, candidates: Tensor, generator: torch.Generator
) -> Choice:
    """One place, several candidates that were drawn independently: SpecTr's K-SEQ.

    Each is kept with chance min(1, p / (r q)), for the least r >= 1 at which what is left of the
    target is nowhere negative; the first that passes comes out.

    Parameters
    ----------
    p, q : (vocab,), of the target and of the draft.
    candidates : (…, k), drawn from q with replacement.

    Source: SpecTr, arXiv 2310.15141 (K-SEQ); r by bisection of 1 - (1 - b)^k = r b, with
    b = sum of min(q, p / r).
    """
    k = candidates.shape[-1]
    low, high = 1.0, float(k)
    for _ in range(60):
        r = (low + high) / 2
        b = float(torch.minimum(q, p / r).sum())
        low, high = (r, high) if 1 - (1 - b) ** k > r * b else (low, r)
    passing = torch.minimum(q, p / high)
    b = float(passing.sum())
    used = (1 - (1 - b) ** k) / b if b > 0 else 0.0
    rest = (p - passing * used).clamp(min=0)
    u = torch.rand(candidates.shape, generator=generator, dtype=p.dtype)
    passed = u * high * q[candidates] < p[candidates]
    which = torch.where(passed.any(-1), passed.int().argmax(-1), -1)
    drawn = draw(rest.expand(*which.shape, len(p)), generator)
    own = candidates.gather(-1, which.clamp(min=0)[..., None])[..., 0]
    return Choice(which, torch.where(which < 0, drawn, own))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What p has more than q, scaled to sum to 1, (…, vocab); p itself where it has nothing more.

    Where p and q are the same no draft is rejected, and the last case does not matter.
    """
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), p)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """The chance that a draft of q is kept, sum of min(p, q), (…), from (…, vocab)."""
    return torch.minimum(p, q).sum(-1)
