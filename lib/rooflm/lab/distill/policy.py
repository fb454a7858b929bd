"""MiniLLM in small: the gradient of the sequence-level reverse KL, by policy gradient.

The divergence of whole sequences, KL(q || p), has a gradient with two parts. The single-step part
asks at each position for a better distribution there; it is the gradient of the reverse KL at that
position and needs no sampling of the token. The long part asks the token for prefixes from which
the rest goes well: the reward of what follows, log p - log q summed, times the gradient of the
token's log-probability. `on_policy` with the reverse KL is the first part alone.

Against the noise of the second part: the reward is divided by the number of tokens that it is
summed over (the paper's length normalization), and what other rows of the batch got at the same
place may be subtracted, which changes no expectation. Samples may be drawn from a mixture with the
teacher; then each position is weighed by q / mixture of its token, the paper's approximation, and
no longer unbiased. Of the paper are left out: clipping, several updates from one batch, and the
loss on other text.

Source: MiniLLM, arXiv 2306.08543, eqs. 1 to 6.

Chapter: distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.decode.writing import answer_logits, token_logs
from rooflm.lab.distill.divergences import reverse_kl
from rooflm.lab.distill.on_policy import PROMPT, ROW, own_samples
from rooflm.lab.model import Transformer
from rooflm.lab.train import Lesson, Plan


def rewards_to_go(rewards: Tensor, normalize: bool) -> Tensor:
    """What follows each position: the sum of the later rewards, or their mean.

    Parameters
    ----------
    rewards : (rows, n).

    Returns
    -------
    Tensor
        (rows, n); 0 at the last, which nothing follows.
    """
    later = rewards.flip(1).cumsum(1).flip(1) - rewards
    if not normalize:
        return later
    n = rewards.shape[1]
    return later / torch.arange(n - 1, -1, -1, device=rewards.device).clamp_min(1)


def policy_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    normalize: bool = True,
    baseline: bool = False,
    share: float = 0.0,
) -> Tensor:
    """A value at each position whose gradient is that of the sequence-level reverse KL.

    Without `normalize` and `share` the expectation of its gradient, summed over a row that the
    student drew, is exactly that of KL(q || p). The value itself says nothing.

    Parameters
    ----------
    student, teacher : logits, (rows, n, vocab), where the tokens were drawn.
    tokens : (rows, n), drawn from share P + (1 - share) Q.
    normalize : divide a reward by the number of tokens that it is summed over.
    baseline : subtract the other rows' mean reward at the same place.
    share : of the teacher in the sampling.

    Returns
    -------
    Tensor
        (rows, n).
    """
    ours, theirs = token_logs(student, tokens), token_logs(teacher, tokens)
    later = rewards_to_go((theirs - ours).detach(), normalize)
    rows = len(later)
    if baseline and rows > 1:
        later = (later - later.mean(0)) * rows / (rows - 1)  # less the mean of the others
    found = reverse_kl(student, teacher) - later * ours
    if share:
        chances = ours.detach().exp()
        found = found * (chances / (share * theirs.exp() + (1 - share) * chances))
    return found


def policy_gradient(
    teacher: Transformer,
    sources: tuple[Tensor, Tensor],
    plan: Plan,
    row: int = ROW,
    prompt: int = PROMPT,
    share: float = 0.0,
    normalize: bool = True,
    baseline: bool = True,
) -> Lesson:
    """`policy_loss` on the student's own samples, mean over the positions that it wrote."""

    def loss(model: Transformer, rows: Tensor) -> Tensor:
        with torch.no_grad():
            labels = answer_logits(teacher, rows, prompt)
        student, tokens = answer_logits(model, rows, prompt), rows[:, prompt:]
        return policy_loss(student, labels, tokens, normalize, baseline, share).mean()

    return Lesson(own_samples(sources, plan, row, prompt, teacher, share), loss)
