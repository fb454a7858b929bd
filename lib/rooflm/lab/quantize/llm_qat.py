"""Data-free distillation: a model writes text, and a quantized copy learns its own distributions.

A model in service has often been tuned on text that nobody else has. What it writes itself is
near to what it knows, and a whole distribution says more than one next token.

Sources: LLM-QAT, arXiv 2305.17888, "Data-free distillation" and "Quantization-aware training";
the count of greedy tokens as in its released code.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rooflm.lab.finetune import Progress, fit, row_batches
from rooflm.lab.model import FullCache, Transformer
from rooflm.roofline.numeric import size


@torch.no_grad()
def generate_data(
    model: Transformer, sequences: int, tokens: int, generator: torch.Generator
) -> Tensor:
    """Text that a model writes by itself, to be trained on in place of its training data.

    A sequence starts with a token drawn from the whole vocabulary. Its first 3, 4 or 5 tokens,
    the drawn one among them, go on with the likeliest token, which gives a sound beginning; the
    rest is drawn from the full softmax, which gives variety.

    Parameters
    ----------
    model : in full precision.
    sequences, tokens : how many, and of what length, at least 1.
    generator : of every draw.

    Returns
    -------
    Tensor
        (sequences, tokens), int64. A token that ends a text ends no sequence: a text follows.

    Source: LLM-QAT, arXiv 2305.17888, "Data-free distillation".
    """
    size("sequences", sequences), size("tokens", tokens)
    vocab = model.config.vocab
    greedy = torch.randint(3, 6, (sequences, 1), generator=generator)
    found = [torch.randint(vocab, (sequences, 1), generator=generator)]
    cache = FullCache()
    for position in range(1, tokens):
        logits = model(found[-1], cache)[:, -1]  # (sequences, vocab)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        likeliest = logits.argmax(-1, keepdim=True)
        found.append(torch.where(position < greedy, likeliest, drawn))
    return torch.cat(found, dim=1)


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy with another model's distributions as labels, nats a position.

    Its smallest value, where both agree, is the labels' entropy, not 0.

    Parameters
    ----------
    logits, teacher_logits : (…, vocab); no gradient flows to the second.

    Returns
    -------
    Tensor
        a scalar: -mean over positions of sum over tokens of p_teacher log p.

    Source: LLM-QAT, arXiv 2305.17888, "Quantization-aware training" (logits distillation).
    """
    labels = teacher_logits.detach().softmax(-1)
    return -(labels * logits.log_softmax(-1)).sum(-1).mean()


def distill(
    student: Transformer,
    teacher: Transformer,
    sequences: Tensor,
    steps: int,
    learning_rate: float,
    rows: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train a student, in place, on a teacher's next-token distributions.

    Parameters
    ----------
    student : such as `quantization_aware(teacher, 3)`; changed.
    teacher : in full precision.
    sequences : (sequences, tokens), such as `generate_data` writes.
    steps, learning_rate, progress : as in `fit`.
    rows, seed : sequences of a batch, and what draws them.

    Returns
    -------
    list
        the loss of each step.
    """
    loss = partial(_distillation_loss, teacher)
    return fit(student, row_batches(sequences, rows, seed), loss, steps, learning_rate, progress)


def _distillation_loss(teacher: Transformer, student: Transformer, batch: Tensor) -> Tensor:
    with torch.no_grad():
        labels = teacher(batch)
    return soft_cross_entropy(student(batch), labels)
