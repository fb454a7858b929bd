"""A model writes: continuations of prompts, many at once, with a KV cache.

Chapter: distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.model import FullCache, Transformer
from rooflm.roofline.numeric import shorten, size


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: Tensor,
    new_tokens: int,
    generator: torch.Generator | None = None,
    other: Transformer | None = None,
    share: float = 0.0,
) -> Tensor:
    """Prompts and their continuations.

    Parameters
    ----------
    prompts : (rows, tokens), one token at least.
    new_tokens : of each continuation; the token that ends a text ends none, a text follows.
    generator : of every draw, at temperature 1; None for the likeliest token at each place.
    other, share : a second model, and its share in the distribution that is drawn from at each
        place: MiniLLM's teacher-mixed sampling, share P + (1 - share) Q.

    Returns
    -------
    Tensor
        (rows, tokens + new_tokens), int64.

    Source: the mixture, arXiv 2306.08543, eq. 4.
    """
    size("new_tokens", new_tokens)
    if not 0 <= share <= 1 or (share > 0 and other is None):
        raise ValueError(f"share is {shorten(share)}; allowed: 0 to 1, and 0 without other")
    writers = [(model, FullCache(), 1 - share)]
    if other is not None and share > 0:
        writers.append((other, FullCache(), share))
    found = [prompts]
    for _ in range(new_tokens):
        parts = [w * m.logits(m.states(found[-1], c)[:, -1]).softmax(-1) for m, c, w in writers]
        chances = torch.stack(parts).sum(0)  # (rows, vocab)
        if generator is None:
            found.append(chances.argmax(-1, keepdim=True))
        else:
            found.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(found, dim=1)


def answer_logits(model: Transformer, rows: Tensor, prompt: int) -> Tensor:
    """The logits that predict what follows the prompts.

    Parameters
    ----------
    rows : (rows, prompt + n), as `sample` returns.

    Returns
    -------
    Tensor
        (rows, n, vocab).
    """
    return model.logits(model.states(rows[:, :-1])[:, prompt - 1 :])


def token_logs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log of the probability of tokens, (…), from logits, (…, vocab)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
