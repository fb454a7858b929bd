"""Trees of drafts: several guesses for a place, all verified in one pass.

A chain of drafts is lost after its first wrong token. A tree has other tokens at hand: a node's
children are different guesses for the token after it. One pass of the target reads all nodes; each
attends to the text and to its own ancestors, at the position of its depth (tree attention). Then a
walk from the root keeps a child where `rejection.verify_candidates` does. What is kept is a path,
whose keys and values stay in the cache.

Children are drawn from the draft's distribution without replacement. Where the likeliest token is
taken, they are the likeliest ones of the draft.

Sources: tree attention and verification, SpecInfer, arXiv 2305.09781; children without
replacement, arXiv 2402.14160.

Chapter: speculative decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.decode.chances import GREEDY, Sampling, chances, draw
from rooflm.lab.decode.rejection import verify_candidates
from rooflm.lab.decode.speculative import Decoded, checked, common_start
from rooflm.lab.model import FullCache, Rope, Transformer, attend
from rooflm.roofline.numeric import size


class DraftTree(NamedTuple):
    """Guesses as a tree; the root is the last token of the text.

    Parameters
    ----------
    tokens : (nodes,), the root's first; a node stands after its parent, and the children of one in
        the order in which they were drawn.
    parents : (nodes,), -1 for the root.
    chances : (nodes, vocab), what a node's children were drawn from; rows of leaves are unused.
    """

    tokens: Tensor
    parents: Tensor
    chances: Tensor


class TreeCache(FullCache):
    """A full cache that reads a tree in one pass, and keeps a path of it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Tensor | None = None

    def plant(self, parents: Tensor) -> None:
        """The next pass reads nodes, (nodes,): each sees what is held, its ancestors and itself."""
        self._seen = ancestors(parents)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`, along the branches of a planted tree."""
        if self._seen is None:
            return super().attend(layer, queries, keys, values, rope)
        start = self._filled[layer] if layer < len(self._filled) else 0
        places = start + self._seen.sum(1) - 1  # a node's depth
        all_keys, all_values = self.extend(layer, rope.at(keys, places), values)
        held = torch.ones(len(places), start, dtype=torch.bool)
        mask = torch.cat([held, self._seen], 1)
        return attend(rope.at(queries, places), all_keys, all_values, mask)

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """Of the tree that was read from position `start` on, keep a path; forget the others."""
        places = start + torch.tensor(nodes, dtype=torch.int64)
        for buffers in (self._keys, self._values):
            for buffer in buffers:
                buffer[:, :, start : start + len(places)] = buffer[:, :, places]
        self._seen = None
        self.rewind(start + len(places))


def ancestors(parents: Tensor) -> Tensor:
    """Which nodes each node sees, itself and those above it, (nodes, nodes), bool."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents.tolist()):
        if parent >= node:
            raise ValueError(f"node {node} has parent {parent}; allowed: one that stands before it")
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


class TreeDrafter:
    """Grows a tree with a draft model, one pass for each level.

    Parameters
    ----------
    model : of the target's vocabulary.
    widths : children of each node, by level: (3, 2) are 3 guesses, and 2 after each of them.
    """

    def __init__(self, model: Transformer, widths: Sequence[int]) -> None:
        self.model, self.widths = model, tuple(size("widths", w) for w in widths)
        if not self.widths:
            raise ValueError("widths is empty; allowed: one number for each level")
        self._cache = TreeCache()
        self._read = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def grow(
        self, text: Tensor, levels: int, sampling: Sampling, generator: torch.Generator
    ) -> DraftTree:
        """The tree after a text, (tokens,), of at most so many levels."""
        held = text[:-1]
        self._cache.rewind(min(common_start(self._read, held), self._cache.length))
        if self._cache.length < len(held):
            self.model.states(held[None, self._cache.length :], self._cache)
        self._read = held
        tokens, parents = text[-1:], torch.tensor([-1])
        found = torch.zeros(1, self.model.config.vocab, dtype=self.model.embedding.weight.dtype)
        leaves = torch.tensor([0])
        for width in self.widths[:levels]:
            self._cache.plant(parents)  # read again from the root: levels are few
            states = self.model.states(tokens[None], self._cache)[0, leaves]
            self._cache.keep(len(held), [])
            logits = self.model.logits(states)
            q = chances(logits, sampling)
            chosen = children(logits, q, width, sampling, generator)  # (leaves, width)
            found[leaves] = q
            leaves, last = len(tokens) + torch.arange(chosen.numel()), leaves
            tokens = torch.cat([tokens, chosen.flatten()])
            parents = torch.cat([parents, last.repeat_interleave(chosen.shape[1])])
            found = torch.cat([found, torch.zeros(chosen.numel(), found.shape[1]).to(found)])
        return DraftTree(tokens, parents, found)


def children(
    logits: Tensor, q: Tensor, width: int, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Guesses for what follows, (rows, width), from the draft's logits and chances, (rows, vocab).

    Drawn without replacement; where the likeliest token is taken, the likeliest ones.
    """
    width = min(width, q.shape[-1])
    if sampling.temperature == 0:
        return logits.topk(width, dim=-1).indices
    width = min(width, int((q > 0).sum(-1).min()))
    found, left = [], q
    for _ in range(width):
        found.append(draw(left, generator))
        left = left.scatter(-1, found[-1][:, None], 0.0)
    return torch.stack(found, 1)


def walk(
    p: Tensor, tree: DraftTree, sampling: Sampling, generator: torch.Generator
) -> tuple[list[int], int]:
    """The path of nodes that is kept, the root apart, and the token that follows it.

    Parameters
    ----------
    p : (nodes, vocab), the target's distribution after each node.
    """
    node = 0
    path: list[int] = []
    while True:
        below = (tree.parents == node).nonzero()[:, 0]
        if not len(below):
            return path, int(draw(p[node], generator))
        found = verify_candidates(p[node], tree.chances[node], tree.tokens[below], generator)
        if found.which < 0:
            return path, int(found.token)
        node = int(below[found.which])
        path.append(node)


@torch.no_grad()
def speculate_tree(
    model: Transformer,
    drafter: TreeDrafter,
    prompt: Tensor,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Decoded:
    """As `speculative.speculate`, with a tree of drafts for each pass.

    `drafted` counts the tree's nodes without its root, `kept` the length of the path.
    """
    generator = generator or torch.Generator()
    text, cache = checked(prompt), TreeCache()
    stop = len(text) + size("new_tokens", new_tokens)
    drafted: list[int] = []
    kept: list[int] = []
    if len(text) > 1:
        model.states(text[None, :-1], cache)
    while len(text) < stop:
        tree = drafter.grow(text, stop - len(text) - 1, sampling, generator)
        cache.plant(tree.parents)
        states = model.states(tree.tokens[None], cache)[0]
        p = chances(model.logits(states), sampling)
        path, token = walk(p, tree, sampling, generator)
        cache.keep(len(text) - 1, [0, *path])
        text = torch.cat([text, tree.tokens[path], torch.tensor([token])])
        drafted.append(len(tree.tokens) - 1)
        kept.append(len(path))
    return Decoded(text, drafted, kept)
