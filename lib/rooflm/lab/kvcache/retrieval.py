"""A retrieval task: one fact in a long text, asked for at the end.

Perplexity forgives a cache that has lost the distant past: few words depend on it. This task
does not. A line such as "The secret number of London is 48213." stands in a novel, at a chosen
depth; after some hundred tokens the text goes on with "The secret number of London is", and the
model must answer with five digits that occur nowhere else. An answer counts when each of its
tokens is the model's most likely one, given the true ones before it. Guessing digits succeeds once
in 100,000 times; a model that spreads its belief over the ten digits gives the answer a
log-probability of 5 ln(1/10) = -11.5 nats.

The text is read through the cache, `chunk` tokens at a time; from the question's last token on,
one token a pass, as in generation. So the whole answer comes from what the cache has kept.

SmolLM2-135M-Instruct with its full cache answers 24 of 24 cases at 512 tokens (95 % interval from
0.85) and 16 of 16 at 256; longer texts were not measured. The laboratory's teacher answered none of
64: it was trained briefly, on novels, and does not copy what it has seen once.

Sources: the pass key in "Landmark Attention", arXiv 2305.16300, section 4.2; depth of the fact
as a control, arXiv 2307.03172 ("Lost in the middle"), section 3.

Chapter: throwing the cache away; quantizing the cache.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.estimates import Estimate, ratio_estimate, share_estimate
from rooflm.lab.model import Cache, FullCache, Transformer
from rooflm.roofline.numeric import size

DIGITS = 5
PLACES = (
    "London", "Paris", "Berlin", "Rome", "Oxford", "Cambridge", "Dublin", "Madrid", "Vienna",
    "Boston", "Chicago", "Moscow", "Athens", "Lisbon", "Venice", "Florence", "Geneva", "Munich",
    "Hamburg", "Glasgow", "Manchester", "Liverpool", "Bristol", "Toronto",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Cases:
    """Texts of equal length, all with their fact in the same place.

    Parameters
    ----------
    tokens : (cases, context), filler, fact, filler, question and answer.
    fact : where the line with the fact stands.
    number : where in it the answer stands.
    question, answer : how many tokens they have; the answer is the end of the text.
    """

    tokens: Tensor
    fact: slice
    number: slice
    question: int
    answer: int

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.tokens.shape[1] - self.answer

    @property
    def distance(self) -> int:
        """Tokens from the start of the number in the fact to the answer."""
        return self.prompt - self.number.start


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What `retrieve` found.

    Parameters
    ----------
    exact : share of the cases that were answered.
    log_probability : of the whole true answer, nats, mean of the cases.
    answered, log_probabilities : of each case.
    nbytes : what the cache kept for each text when the answer began.
    """

    exact: Estimate
    log_probability: Estimate
    answered: Tensor
    log_probabilities: Tensor
    nbytes: float


def make_cases(
    tokenizer: Tokenizer,
    filler: Tensor,
    cases: int = 24,
    context: int = 512,
    depth: float = 0.5,
    seed: int = 0,
) -> Cases:
    """Texts with a fact at a depth, each with a place, a number and filler of its own.

    Parameters
    ----------
    filler : (tokens,), a text to take the filler from, as of `text.encode`.
    context : tokens of a case, question and answer included.
    depth : 0 puts the fact at the start, 1 just before the question.

    Raises
    ------
    ValueError
        for a depth that is not from 0 to 1, a context without room, or too little filler.
    """
    size("cases", cases, 2), size("context", context)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; allowed: a number from 0 to 1")
    draw = random.Random(seed)
    numbers = ["".join(draw.choices("0123456789", k=DIGITS)) for _ in range(cases)]
    places = _alike(tokenizer)
    rows = []
    for number in numbers:
        fact, question, answer = _lines(tokenizer, draw.choice(places), number)
        room = context - len(fact) - len(question) - len(answer)
        if room < 1 or len(filler) < room:
            least = len(fact) + len(question) + len(answer) + 1
            raise ValueError(
                f"context is {context} with {len(filler)} tokens of filler; allowed: a context of "
                f"{least} or more, and as much filler"
            )
        begin, before = draw.randrange(len(filler) - room + 1), round(depth * room)
        part = filler[begin : begin + room]
        rows.append(torch.cat([part[:before], fact, part[before:], question, answer]))
    inside = len(question)  # the fact begins with the words of the question
    place = slice(before, before + len(fact))
    where = slice(before + inside, before + inside + len(answer))
    return Cases(torch.stack(rows), place, where, len(question), len(answer))


@torch.no_grad()
def retrieve(
    model: Transformer,
    cases: Cases,
    make_cache: Callable[[], Cache] | None = None,
    chunk: int = 64,
    batch: int = 8,
) -> Retrieval:
    """Read the cases through a cache and see whether the model knows the fact.

    Parameters
    ----------
    make_cache : makes an empty cache; None for the full one.
    chunk : tokens a pass in reading; methods that drop or round act between passes.
    batch : cases at once.
    """
    size("chunk", chunk), size("batch", batch)
    rights, logs, held = [], [], 0
    for rows in cases.tokens.split(batch):
        cache = FullCache() if make_cache is None else make_cache()
        for part in rows[:, : cases.prompt - 1].split(chunk, dim=1):
            model.states(part, cache)
        right, log, kept = answer(model, rows, cases.prompt - 1, cases.answer, cache)
        rights.append(right.all(1))
        logs.append(log.sum(1))
        held += kept
    answered, total = torch.cat(rights).double(), torch.cat(logs)
    ones = torch.ones_like(total)
    return Retrieval(
        share_estimate(answered, ones),
        ratio_estimate(total, ones),
        answered,
        total,
        held / len(ones),
    )


@torch.no_grad()
def answer(
    model: Transformer, rows: Tensor, read: int, last: int, cache: Cache
) -> tuple[Tensor, Tensor, int]:
    """Go on token by token, with the true tokens, and see which of the last ones were foreseen.

    Parameters
    ----------
    rows : (cases, context), whole texts.
    read : tokens that the cache has seen.
    last : tokens at the end of the texts that are to be foreseen.

    Returns
    -------
    tuple
        whether each was the most likely one, (cases, last); its log-probability, (cases, last);
        the cache's bytes after the pass that foresees the first.
    """
    right, logs, held = [], [], 0
    begin = rows.shape[1] - last - 1
    for i in range(read, rows.shape[1] - 1):
        states = model.states(rows[:, i : i + 1], cache)
        if i < begin:
            continue
        if i == begin:
            held = cache.nbytes
        found = model.logits(states)[:, 0].log_softmax(-1)
        right.append(found.argmax(-1) == rows[:, i + 1])
        logs.append(found.gather(1, rows[:, i + 1 : i + 2])[:, 0].double())
    return torch.stack(right, 1), torch.stack(logs, 1), held


def _lines(tokenizer: Tokenizer, place: str, number: str) -> tuple[Tensor, Tensor, Tensor]:
    """The fact, the question and the answer as tokens; the fact is question, answer and an end."""
    question = text.encode(f"\n\nThe secret number of {place} is ", tokenizer)
    answer, end = text.encode(number, tokenizer), text.encode(".\n\n", tokenizer)
    return torch.cat([question, answer, end]), question, answer


def _alike(tokenizer: Tokenizer) -> list[str]:
    """The places whose question has the commonest number of tokens."""
    lengths = {place: len(_lines(tokenizer, place, "0")[1]) for place in PLACES}
    common = Counter(lengths.values()).most_common(1)[0][0]
    return [place for place in PLACES if lengths[place] == common]
