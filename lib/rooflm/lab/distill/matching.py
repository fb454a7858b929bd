"""Layers matched: the student's hidden states and attention maps are drawn to the teacher's.

The two models differ in width, so that hidden states are compared through a learned projection,
one for each pair of layers, which is dropped after training; in number of heads, so that what is
compared of attention is the mean over heads, again a distribution over positions; and in depth, so
that each student layer has its teacher layer (`layer_pairs`).

TED learns its filters beforehand, on the task and for both models; here one linear projection is
learned with the student. HomoDistil starts from the teacher's own weights and prunes; here the
student starts small.

Sources: TED, arXiv 2210.01351; HomoDistil, arXiv 2302.09632; attention maps as targets, MiniLM,
arXiv 2002.10957.

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rooflm.lab.distill.divergences import forward_kl
from rooflm.lab.kvcache.attention import attention_weights
from rooflm.lab.model import Config, Rope, Transformer, attend
from rooflm.lab.train import Lesson, Plan, draw

_LEAST = 1e-9  # a weight below it counts as this: no logarithm of 0


@dataclass(frozen=True, eq=False)
class Trace:
    """What one pass of a model showed, layer by layer.

    Parameters
    ----------
    hidden : the residual stream after each block, (rows, n, hidden).
    pairs : rotated queries (rows, heads, n, head_dim) and keys (rows, kv_heads, n, head_dim).
    """

    hidden: list[Tensor]
    pairs: list[tuple[Tensor, Tensor]]

    def attention(self, layer: int) -> Tensor:
        """Attention weights, mean over the heads, (rows, n, n); each row sums to 1."""
        return attention_weights(*self.pairs[layer]).flatten(1, 2).mean(1)


class _Looking:
    """In a cache's place: holds nothing, remembers queries and keys, lets gradients through."""

    length = nbytes = 0

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`."""
        self.pairs.append((rope(queries), rope(keys)))
        return attend(*self.pairs[-1], values)


def trace(model: Transformer, tokens: Tensor) -> Trace:
    """A pass over (rows, n) whose inner states are kept."""
    looking, x = _Looking(), model.embedding(tokens)
    hidden = []
    for layer in model.layers:
        x = layer(x, model.rope, looking)
        hidden.append(x)
    return Trace(hidden, looking.pairs)


def layer_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each student layer with the teacher layer at the same share of the depth, last with last.

    >>> layer_pairs(4, 6)
    [(0, 0), (1, 2), (2, 3), (3, 5)]
    """
    if not 0 < student_layers <= teacher_layers:
        raise ValueError(
            f"student_layers is {student_layers}; allowed: 1 to {teacher_layers}, the teacher's"
        )
    return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]


def hidden_loss(student: Tensor, teacher: Tensor, projection: Tensor) -> Tensor:
    """Squared error of the projected states, as a share of the teacher's mean square; a scalar.

    Parameters
    ----------
    student : (…, d).
    teacher : (…, D).
    projection : (D, d).
    """
    error = student @ projection.T - teacher
    return error.square().mean() / teacher.square().mean()


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of attention weights, nats, mean over the queries.

    Parameters
    ----------
    student, teacher : (…, n, n), distributions over the last axis; 0 where a query cannot look.
    """
    logs, theirs = (x.clamp_min(_LEAST).log() for x in (student, teacher))
    return (teacher * (theirs - logs)).sum(-1).mean()


def projections(student: Config, teacher: Config, seed: int = 0) -> nn.ParameterList:
    """A projection (D, d) for each student layer, as noise that keeps a vector's mean square."""
    generator = torch.Generator().manual_seed(seed)
    shape = teacher.hidden, student.hidden
    drawn = (torch.randn(shape, generator=generator) for _ in range(student.layers))
    return nn.ParameterList(nn.Parameter(x / student.hidden**0.5) for x in drawn)


def matching(
    teacher: Transformer,
    student: Config,
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    hidden_share: float = 1.0,
    attention_share: float = 1.0,
) -> Lesson:
    """Forward KL of the logits, plus the losses of the layers, mean over the pairs.

    Parameters
    ----------
    teacher, student : the model, and the config of the one that learns.
    sources, plan : what is drawn, as by `train.draw`.
    hidden_share, attention_share : factors of the two losses; 0 leaves one out.
    """
    pairs = layer_pairs(student.layers, teacher.config.layers)
    learned = projections(student, teacher.config, plan.seed)

    def loss(model: Transformer, tokens: Tensor, following: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = trace(teacher, tokens)
            labels = teacher.logits(theirs.hidden[-1])
        ours = trace(model, tokens)
        found = forward_kl(model.logits(ours.hidden[-1]), labels).mean()
        if hidden_share:
            found = found + hidden_share * _hidden(ours, theirs, pairs, list(learned))
        if attention_share:
            found = found + attention_share * _attention(ours, theirs, pairs)
        return found

    return Lesson(lambda _, step: draw(sources, plan, step), loss, learned)


def _hidden(
    ours: Trace, theirs: Trace, pairs: Sequence[tuple[int, int]], learned: Sequence[Tensor]
) -> Tensor:
    losses = [
        hidden_loss(ours.hidden[i], theirs.hidden[j], projection)
        for (i, j), projection in zip(pairs, learned, strict=True)
    ]
    return torch.stack(losses).mean()


def _attention(ours: Trace, theirs: Trace, pairs: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack(
        [attention_loss(ours.attention(i), theirs.attention(j)) for i, j in pairs]
    ).mean()
