"""Drafts without a model: what followed the same words before.

The last tokens of the text are looked for in the text itself (prompt lookup, LLMA) or in another
text (REST); what came after them there is the draft. It costs no pass, and is right wherever text
repeats: quotations, code, answers about a document. A draft that was looked up is drawn from
nothing; its distribution is all on one token, so that `rejection.verify` keeps it with the target's
own chance of it.

Sources: LLMA, arXiv 2304.04487, section 3; REST, arXiv 2311.08252, section 3.

Chapter: parallel decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.decode.chances import Sampling, one_hot
from rooflm.lab.decode.speculative import Draft
from rooflm.roofline.numeric import size


class LookupDrafter:
    """Copies what followed the longest match of the text's end.

    Parameters
    ----------
    vocab : of the target.
    longest, shortest : tokens of a match, tried from the longest down.
    store : (tokens,), another text to look in, after the text itself; None for the text alone.
    """

    def __init__(
        self, vocab: int, longest: int = 3, shortest: int = 1, store: Tensor | None = None
    ) -> None:
        self.vocab = size("vocab", vocab)
        self.longest, self.shortest = size("longest", longest), size("shortest", shortest)
        if shortest > longest:
            raise ValueError(f"shortest is {shortest}; allowed: 1 to longest ({longest})")
        self.store = store

    def propose(
        self, text: Tensor, most: int, sampling: Sampling, generator: torch.Generator
    ) -> Draft:
        """As `Drafter.propose`: none where nothing matches."""
        for length in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            for where in (text[:-1], self.store):
                if where is not None:
                    tokens = following(where, text[-length:], most)
                    if len(tokens):
                        return self._draft(tokens)
        return self._draft(text[:0])

    def _draft(self, tokens: Tensor) -> Draft:
        return Draft(tokens, one_hot(tokens, torch.empty(len(tokens), self.vocab)))


def following(text: Tensor, words: Tensor, most: int) -> Tensor:
    """What stands after the last place of some words in a text, (up to most,); nothing without one.

    Parameters
    ----------
    text, words : (tokens,); a place counts if a token follows it.
    """
    if len(text) <= len(words):
        return text[:0]
    windows = text[:-1].unfold(0, len(words), 1)  # (places, words)
    places = (windows == words).all(1).nonzero()
    if not len(places):
        return text[:0]
    start = int(places[-1]) + len(words)
    return text[start : start + most]
