"""Decoding without a draft: the target's own guesses, put right pass by pass.

Greedy decoding solves a system of equations, token i = argmax after the tokens before it, from
left to right. *Jacobi* iteration starts with any n tokens and replaces all of them at once by what
the model says after the present ones. Those up to the first that changed are final, as each stands
after final ones. A pass fixes one at least, and more where a guess was right though what stood
before it was not.

*Lookahead* keeps the trajectories: the guesses of the last passes, read along diagonals, are
n-grams that the model itself has said. The rows of guesses keep their places after the text's end,
however far it has moved. A pass has two branches. One moves a window of guesses on by
one; the other verifies n-grams of the pool that begin with the text's last token. Both are trees
(`trees.TreeCache`): the window's first row is a trunk, and each diagonal a branch of it.

Sources: Jacobi decoding, arXiv 2305.10427, algorithm 1 (PJ) and 3 (HGJ); Lookahead, arXiv
2402.02057, section 3.

Chapter: parallel decoding.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from rooflm.lab.decode.speculative import Decoded, checked
from rooflm.lab.decode.trees import TreeCache
from rooflm.lab.model import FullCache, Transformer
from rooflm.roofline.numeric import size


@torch.no_grad()
def jacobi(model: Transformer, prompt: Tensor, new_tokens: int, block: int = 8) -> Decoded:
    """Greedy decoding by Jacobi iteration, `block` tokens at once.

    Parameters
    ----------
    prompt : (tokens,), one at least.
    block : guesses that are read beside the last token in each pass.

    Returns
    -------
    Decoded
        `drafted` are the guesses of each pass, `kept` those that were final already.
    """
    text, cache = checked(prompt), FullCache()
    size("block", block)
    stop = len(text) + size("new_tokens", new_tokens)
    guesses = text[-1:].repeat(block)
    drafted: list[int] = []
    kept: list[int] = []
    while len(text) < stop:
        n = min(block, stop - len(text) - 1)
        tried = guesses[:n]
        states = model.states(torch.cat([text[cache.length :], tried])[None], cache)[0, -n - 1 :]
        said = model.logits(states).argmax(-1)  # after the text, and after each guess
        right = int((said[:-1] == tried).int().cumprod(0).sum())
        text = torch.cat([text, said[: right + 1]])
        cache.rewind(len(text) - 1)
        rest = said[right + 1 :]  # said after wrong tokens: the next guesses
        last = rest[-1:] if len(rest) else text[-1:]
        guesses = torch.cat([rest, last.repeat(block - len(rest))])
        drafted.append(n)
        kept.append(right)
    return Decoded(text, drafted, kept)


class Pool:
    """N-grams that a model has said, by their first token, the latest last.

    Parameters
    ----------
    most : kept for each first token.
    """

    def __init__(self, most: int = 8) -> None:
        self.most = size("most", most)
        self._known: dict[int, deque[tuple[int, ...]]] = {}

    def add(self, words: tuple[int, ...]) -> None:
        """Take in an n-gram; of many with one first token the oldest goes."""
        known = self._known.setdefault(words[0], deque(maxlen=self.most))
        if words[1:] in known:
            known.remove(words[1:])
        known.append(words[1:])

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What was said after a token."""
        return list(self._known.get(token, ()))


@torch.no_grad()
def lookahead(
    model: Transformer,
    prompt: Tensor,
    new_tokens: int,
    window: int = 6,
    words: int = 4,
    candidates: int = 4,
) -> Decoded:
    """Greedy decoding with the n-grams of its own Jacobi trajectories.

    Parameters
    ----------
    window : W, positions ahead that are guessed.
    words : N, tokens of an n-gram; N - 1 rows of guesses are kept.
    candidates : n-grams that are verified in a pass, at most.

    Returns
    -------
    Decoded
        `drafted` counts all tokens of a pass beside the last of the text, `kept` those of the
        n-gram that was right.
    """
    if size("words", words) < 2:
        raise ValueError(f"words is {words}; allowed: 2 or more, a token and what follows it")
    text, cache, pool = checked(prompt), TreeCache(), Pool()
    stop = len(text) + size("new_tokens", new_tokens)
    size("candidates", candidates)
    rows = [text[-1:].repeat(size("window", window)) for _ in range(words - 1)]
    if len(text) > 1:
        model.states(text[None, :-1], cache)
    drafted: list[int] = []
    kept: list[int] = []
    while len(text) < stop:
        grams = pool.after(int(text[-1]))[-candidates:]
        tokens, parents, ends = _grow(text[-1:], rows, grams)
        cache.plant(parents)
        said = model.logits(model.states(tokens[None], cache)[0]).argmax(-1)
        path = _longest(tokens, said, grams)[: stop - len(text) - 1]
        cache.keep(len(text) - 1, [0, *path])
        text = torch.cat([text, tokens[path], said[path[-1] if path else 0][None]])
        new = said[ends]
        for j in range(window):  # a diagonal of the rows, and what was said after it
            pool.add((*(int(row[j]) for row in rows), int(new[j])))
        rows = [*rows[1:], new]
        drafted.append(len(tokens) - 1)
        kept.append(len(path))
    return Decoded(text, drafted, kept)


def _grow(
    last: Tensor, rows: list[Tensor], grams: list[tuple[int, ...]]
) -> tuple[Tensor, Tensor, list[int]]:
    """One pass as a tree: tokens, parents, and the nodes of the last row.

    After the root come the n-grams, each a chain, then the rows: the first a chain from the root,
    each later one a leaf on the diagonal, so that row k at place j follows row k - 1 there.
    """
    tokens, parents = [last], [-1]
    for gram in grams:
        tokens.append(torch.tensor(gram))
        parents += [0, *range(len(parents), len(parents) + len(gram) - 1)]
    before = [0, *range(len(parents), len(parents) + len(rows[0]) - 1)]
    for row in rows:
        tokens.append(row)
        start = len(parents)
        parents += before
        before = list(range(start, start + len(row)))
    return torch.cat(tokens), torch.tensor(parents), before


def _longest(tokens: Tensor, said: Tensor, grams: list[tuple[int, ...]]) -> list[int]:
    """The nodes of the n-gram of which most tokens are what the model says."""
    best: list[int] = []
    start = 1
    for gram in grams:
        nodes: list[int] = []
        for node in range(start, start + len(gram)):
            if tokens[node] != said[nodes[-1] if nodes else 0]:
                break
            nodes.append(node)
        best = max(best, nodes, key=len)
        start += len(gram)
    return best
