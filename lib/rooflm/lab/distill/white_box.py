"""White-box distillation on texts: the student reads what the teacher reads, and its logits.

An objective is a function of three things, the student's logits, the teacher's and the tokens
that follow; `OBJECTIVES` names those that the chapter trains.

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rooflm.lab.distill.divergences import (
    at_temperature,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    mix,
    reverse_kl,
    skew_kl,
)
from rooflm.lab.model import Transformer
from rooflm.lab.train import Lesson, Plan, draw

# (student logits, teacher logits, following tokens) to nats at each position.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "forward-kl": lambda student, teacher, _: forward_kl(student, teacher),
    "reverse-kl": lambda student, teacher, _: reverse_kl(student, teacher),
    "jsd": lambda student, teacher, _: generalized_jsd(student, teacher, 0.5),
    "skew-kl": lambda student, teacher, _: skew_kl(student, teacher, 0.1),
    "forward-kl-t2": lambda student, teacher, _: at_temperature(forward_kl, 2.0)(student, teacher),
    "forward-kl+text": lambda student, teacher, following: mix(
        cross_entropy(student, following), forward_kl(student, teacher)
    ),
}


def white_box(
    teacher: Callable[[Tensor], Tensor],
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    objective: Objective,
) -> Lesson:
    """An objective on texts.

    Parameters
    ----------
    teacher : (rows, window) to logits, such as a `Teacher`.
    sources, plan : what is drawn, as by `train.draw`: the batches are those of a run without a
        teacher.
    objective : such as `OBJECTIVES["forward-kl"]`.
    """

    def loss(model: Transformer, tokens: Tensor, following: Tensor) -> Tensor:
        with torch.no_grad():
            labels = teacher(tokens).flatten(0, 1)
        return objective(model(tokens).flatten(0, 1), labels, following.flatten()).mean()

    return Lesson(lambda _, step: draw(sources, plan, step), loss)
