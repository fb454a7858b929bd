"""Black-box distillation from ranked samples: the teacher says which text is better, no more.

The student, as it was at the start, answers a prompt several times. The judge reads the texts and
returns an order. What crosses over is, to the judge, texts, and back, for n of them, a permutation:
log2 n! bits. The judge here is the teacher, who prefers the text of which a byte costs it the
fewest nats; an order from a person or from another model would do as well.

The student then learns the order by its own log-probabilities, measured from the start model's: the
likelihood of the order under Plackett and Luce's model, for two samples the loss of DPO. The start
model belongs to the student, so that its logits need not cross over.

Sources: DPO, arXiv 2305.18290, and its appendix for rankings (Plackett-Luce).

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.decode.writing import answer_logits, sample, token_logs
from rooflm.lab.distill.on_policy import PROMPT, ROW
from rooflm.lab.model import Transformer
from rooflm.lab.train import Lesson, Plan, draw_rows, step_generator
from rooflm.roofline.numeric import size

SAMPLES, STRENGTH = 4, 0.1  # samples of a prompt; DPO's beta

# (model, step) to ranked rows and what they were worth at the start: see `ranked_batch`.
RankedBatch = Callable[[Transformer, int], tuple[Tensor, Tensor]]
# Texts that begin alike, to their places in the order, best first.
Judge = Callable[[Sequence[str]], list[int]]


def ranking_loss(scores: Tensor) -> Tensor:
    """-log of the chance of an order, if each place goes to one of those left by their scores.

    Parameters
    ----------
    scores : (…, n), in the order of the ranking, best first.

    Returns
    -------
    Tensor
        (…); for n = 2 it is -log sigmoid(first - second).

    Source: Plackett-Luce, as in arXiv 2305.18290's appendix.
    """
    left = scores.flip(-1).logcumsumexp(-1).flip(-1)  # over what no place has yet
    return (left - scores)[..., :-1].sum(-1)


def model_judge(teacher: Transformer) -> Judge:
    """The teacher as judge of texts: the fewer nats per byte a text costs it, the better."""

    @torch.no_grad()
    def judge(texts: Sequence[str]) -> list[int]:
        tokens = [text.encode(t) for t in texts]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # causal: pads last
        logs = token_logs(teacher(padded[:, :-1]), padded[:, 1:])
        costs = [
            -logs[i, : len(row) - 1].sum().item() / max(1, len(texts[i].encode("utf-8")))
            for i, row in enumerate(tokens)
        ]
        return sorted(range(len(texts)), key=lambda i: costs[i])

    return judge


def random_judge(seed: int = 0) -> Judge:
    """The control: an order that follows from the texts by chance alone."""

    def judge(texts: Sequence[str]) -> list[int]:
        number = seed + sum("".join(texts).encode("utf-8"))
        return torch.randperm(len(texts), generator=torch.Generator().manual_seed(number)).tolist()

    return judge


def ranked_batch(
    start: Transformer,
    judge: Judge,
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    samples: int = SAMPLES,
    row: int = ROW,
    prompt: int = PROMPT,
) -> RankedBatch:
    """The batch of a step: ranked rows of the start model, and its own log-probabilities.

    Returns
    -------
    Callable
        (model, step), the model unused, to (prompts, samples, row) tokens, best first, and
        (prompts, samples) nats that the start model gives the answers.
    """
    if size("samples", samples) < 2 or plan.tokens_per_step < samples * row:
        most = plan.tokens_per_step // row
        raise ValueError(f"samples is {samples}; allowed: 2 to {most}, the rows of a batch")

    def batch(_: Transformer, step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(plan, step)
        prompts = draw_rows(
            sources, plan.tokens_per_step // (row * samples), prompt, plan.austen, generator
        )
        written = sample(start, prompts.repeat_interleave(samples, 0), row - prompt, generator)
        groups = written.view(len(prompts), samples, row)
        orders = [judge([text.decode(answer) for answer in group]) for group in groups]
        ranked = torch.stack([g[order] for g, order in zip(groups, orders, strict=True)])
        with torch.no_grad():
            return ranked, _answer_logs(start, ranked, prompt)

    return batch


def ranked_lesson(batch: RankedBatch, prompt: int = PROMPT, strength: float = STRENGTH) -> Lesson:
    """The order of ranked samples, from scores strength (log q - log q at the start).

    Parameters
    ----------
    batch, prompt : as `ranked_batch` made it, and the tokens of a prompt there.
    """

    def loss(model: Transformer, ranked: Tensor, before: Tensor) -> Tensor:
        return ranking_loss(strength * (_answer_logs(model, ranked, prompt) - before)).mean()

    return Lesson(batch, loss)


def best_of_n(batch: RankedBatch, prompt: int = PROMPT) -> Lesson:
    """The next token of the best sample alone: the others are thrown away.

    Parameters
    ----------
    batch, prompt : as of `ranked_lesson`.
    """

    def loss(model: Transformer, ranked: Tensor, _: Tensor) -> Tensor:
        best = ranked[:, 0]
        return -_answer_logs(model, best, prompt).mean() / (best.shape[1] - prompt)

    return Lesson(batch, loss)


def _answer_logs(model: Transformer, rows: Tensor, prompt: int) -> Tensor:
    """log q of the answers, (…), of rows (…, row)."""
    flat = rows.flatten(0, -2)
    logs = token_logs(answer_logits(model, flat, prompt), flat[:, prompt:])
    return logs.sum(-1).view(rows.shape[:-1])
