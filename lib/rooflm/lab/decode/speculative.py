"""Speculative decoding: a drafter guesses n tokens, the target reads them all in one pass.

Decoding reads every weight for one token. A pass over n + 1 tokens reads them once too, and as
long as bytes bind it takes hardly longer. So cheap guesses are worth making: those that pass
`rejection.verify` are as if the target had drawn them, and each pass gives one token beyond them.

Whatever drafts is a `Drafter`: a smaller model here, n-grams of the text in `lookup`, heads of the
target elsewhere. What it knows of the text it finds in the text itself, which it is handed whole;
a model keeps a cache and rewinds it to where the text departs from what it has read.

Both functions decode one sequence. The loop is the same for greedy and for sampled tokens.

Sources: arXiv 2211.17192, algorithm 1; arXiv 2302.01318, algorithm 2.

Chapter: speculative decoding.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rooflm.lab.decode.chances import GREEDY, Sampling, chances, draw
from rooflm.lab.decode.rejection import verify
from rooflm.lab.model import FullCache, Transformer
from rooflm.roofline.numeric import size


class Draft(NamedTuple):
    """Guesses, (n,), and the distributions that they were drawn from, (n, vocab)."""

    tokens: Tensor
    chances: Tensor


class Drafter(Protocol):
    """What guesses how a text goes on."""

    def propose(
        self, text: Tensor, most: int, sampling: Sampling, generator: torch.Generator
    ) -> Draft:
        """At most `most` guesses after a text, (tokens,); none where it has none to make."""


class Decoded(NamedTuple):
    """What a decoding wrote, and how.

    Parameters
    ----------
    tokens : the prompt and what follows it, (tokens,).
    drafted, kept : for each pass of the target after the prompt's, guesses and those that stayed.
    """

    tokens: Tensor
    drafted: list[int]
    kept: list[int]

    @property
    def per_pass(self) -> float:
        """New tokens for each pass."""
        return sum(n + 1 for n in self.kept) / max(len(self.kept), 1)


@torch.no_grad()
def decode(
    model: Transformer,
    prompt: Tensor,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Decoded:
    """One token a pass.

    Parameters
    ----------
    prompt : (tokens,), one at least.
    generator : of the draws; greedy decoding needs none.
    """
    generator = generator or torch.Generator()
    text, cache = checked(prompt), FullCache()
    for _ in range(size("new_tokens", new_tokens)):
        states = model.states(text[None, cache.length :], cache)[:, -1]
        text = torch.cat([text, draw(chances(model.logits(states), sampling), generator)])
    return Decoded(text, [0] * new_tokens, [0] * new_tokens)


@torch.no_grad()
def speculate(
    model: Transformer,
    drafter: Drafter,
    prompt: Tensor,
    new_tokens: int,
    draft_tokens: int = 4,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Guesses of a drafter, verified by the model; the model's own distribution comes out.

    Parameters
    ----------
    prompt, generator : as of `decode`.
    draft_tokens : guesses for each pass, at most; fewer where the text ends before.
    """
    generator = generator or torch.Generator()
    size("draft_tokens", draft_tokens)
    text, cache = checked(prompt), FullCache()
    stop = len(text) + size("new_tokens", new_tokens)
    drafted: list[int] = []
    kept: list[int] = []
    while len(text) < stop:
        most = min(draft_tokens, stop - len(text) - 1)
        draft = drafter.propose(text, most, sampling, generator) if most else _none(model)
        n = len(draft.tokens)
        read = torch.cat([text[cache.length :], draft.tokens])
        states = model.states(read[None], cache)[0, -n - 1 :]
        p = chances(model.logits(states), sampling)
        found = verify(p, draft.chances, draft.tokens, generator)
        kept.append(int(found.kept))
        cache.rewind(len(text) + kept[-1])
        text = torch.cat([text, draft.tokens[: kept[-1]], found.token[None]])
        drafted.append(n)
    return Decoded(text, drafted, kept)


class ModelDrafter:
    """A model of the same vocabulary, one guess a pass.

    Parameters
    ----------
    model : smaller than the target, or a part of it.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._cache = FullCache()
        self._read = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def propose(
        self, text: Tensor, most: int, sampling: Sampling, generator: torch.Generator
    ) -> Draft:
        """As `Drafter.propose`: exactly `most` guesses."""
        known = common_start(self._read, text[:-1])
        self._cache.rewind(min(known, self._cache.length))
        tokens, found = text, []
        for _ in range(most):
            part = tokens[None, self._cache.length :]
            states = self.model.states(part, self._cache)[:, -1]
            found.append(chances(self.model.logits(states), sampling))
            tokens = torch.cat([tokens, draw(found[-1], generator)])
        self._read = tokens[: self._cache.length]
        return Draft(tokens[len(text) :], torch.cat(found))


def common_start(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with alike, (tokens,) each."""
    shorter = min(len(one), len(other))
    apart = (one[:shorter] != other[:shorter]).nonzero()
    return int(apart[0]) if len(apart) else shorter


def _none(model: Transformer) -> Draft:
    return Draft(torch.empty(0, dtype=torch.int64), torch.empty(0, model.config.vocab))


def checked(prompt: Tensor) -> Tensor:
    """A prompt, (tokens,), if it is one."""
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(f"prompt is of shape {tuple(prompt.shape)}; allowed: (tokens,), 1 or more")
    return prompt
