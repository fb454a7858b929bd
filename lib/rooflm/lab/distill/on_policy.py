"""On-policy distillation (GKD): the student writes, the teacher scores every position of it.

A student that has learned on texts has never seen its own mistakes; when it runs freely, it reads
them. Here each batch begins with prompts of real text, the student goes on with them, and both
models' distributions are compared on what it wrote. No gradient flows through the drawing of the
tokens, so that only the distributions are taught, not which prefixes to reach; `policy` adds that
part.

Source: GKD, arXiv 2306.13649, section 3 (its lambda is 1 here: all of a batch is the student's).

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rooflm.lab.decode.writing import answer_logits, sample
from rooflm.lab.distill.divergences import Divergence
from rooflm.lab.model import Transformer
from rooflm.lab.train import Lesson, Plan, draw_rows, step_generator
from rooflm.roofline.numeric import size

PROMPT, ROW = 16, 128  # tokens of a prompt, and of a row with what follows it


def own_samples(
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    row: int = ROW,
    prompt: int = PROMPT,
    teacher: Transformer | None = None,
    share: float = 0.0,
) -> Callable[[Transformer, int], tuple[Tensor]]:
    """The batch of a step: rows that the model itself has written, (tokens_per_step / row, row).

    Parameters
    ----------
    sources : prompts are drawn from them, as rows of text are by `train.draw`.
    row, prompt : tokens of a row, and of its prompt, which is text.
    teacher, share : see `writing.sample`.
    """
    size("prompt", prompt)
    if not prompt < row <= plan.tokens_per_step:
        raise ValueError(f"row is {row}; allowed: {prompt + 1} to {plan.tokens_per_step}")

    def batch(model: Transformer, step: int) -> tuple[Tensor]:
        generator = step_generator(plan, step)
        rows = plan.tokens_per_step // row
        prompts = draw_rows(sources, rows, prompt, plan.austen, generator)
        return (sample(model, prompts, row - prompt, generator, teacher, share),)

    return batch


def on_policy(
    teacher: Transformer,
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    divergence: Divergence,
    row: int = ROW,
    prompt: int = PROMPT,
) -> Lesson:
    """A divergence on the student's own samples, mean over the positions that it wrote."""

    def loss(model: Transformer, rows: Tensor) -> Tensor:
        with torch.no_grad():
            labels = answer_logits(teacher, rows, prompt)
        return divergence(answer_logits(model, rows, prompt), labels).mean()

    return Lesson(own_samples(sources, plan, row, prompt), loss)
