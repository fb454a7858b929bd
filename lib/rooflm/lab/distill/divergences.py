"""How far one next-token distribution is from another: the objectives of distillation.

All are plain functions of logits, (…, vocab) each, the student's first; they return nats at each
position, (…). Gradients flow to the student; whoever makes the teacher's logits keeps them out of
the graph. P is the teacher, Q the student.

Forward KL weighs a token by the teacher's probability: a token that the teacher may say and the
student will not costs much, so that the student covers all modes. Reverse KL weighs it by the
student's: what the student says and the teacher would not costs much, so that the student seeks
modes. The generalized Jensen-Shannon divergence lies between, and the total variation is what
speculative decoding pays: a draft token is accepted with probability 1 - TV.

Sources: soft targets, temperature and its factor, arXiv 1503.02531, section 2; word-level
distillation, arXiv 1606.07947; reverse KL for language models, arXiv 2306.08543; generalized
JSD, arXiv 2306.13649, eq. 1; skewed KL, arXiv 2402.03898; acceptance, arXiv 2211.17192.

Chapter: distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.roofline.numeric import shorten

# (student logits, teacher logits) to nats, as every function here.
Divergence = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(student: Tensor, following: Tensor) -> Tensor:
    """-log Q of the tokens that stand in the text, (…): the hard label's loss."""
    flat = functional.cross_entropy(student.flatten(0, -2), following.flatten(), reduction="none")
    return flat.view(following.shape)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P || Q) = sum of P log(P / Q); mode covering."""
    return skew_kl(student, teacher, 0.0)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Q || P) = sum of Q log(Q / P); mode seeking."""
    logs = student.log_softmax(-1)
    return (logs.exp() * (logs - teacher.log_softmax(-1))).sum(-1)


def skew_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(P || skew P + (1 - skew) Q): for a skew above 0 never more than -log(skew).

    Source: DistiLLM, arXiv 2402.03898.
    """
    _share("skew", skew, ends=True)
    logs, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    return (theirs.exp() * (theirs - _mixture(theirs, logs, skew))).sum(-1)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q.

    It is symmetric at 1/2 and never more than the entropy of a coin of bias beta. It vanishes at
    both ends, where only its ratio has a limit: divided by beta it goes to the forward KL as beta
    goes to 0, divided by 1 - beta to the reverse KL as beta goes to 1.

    Source: GKD, arXiv 2306.13649, eq. 1.
    """
    _share("beta", beta, ends=False)
    logs, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    mixed = _mixture(theirs, logs, beta)
    terms = beta * theirs.exp() * (theirs - mixed) + (1 - beta) * logs.exp() * (logs - mixed)
    return terms.sum(-1)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the sum of |P - Q|, which is 1 - sum of min(P, Q), the share of rejected drafts.

    Source: speculative decoding, arXiv 2211.17192 (the acceptance rate of one position).
    """
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """A divergence of softened distributions, times T^2.

    Both logits are divided by T, which shrinks the gradient, for large T by 1 / T^2; the factor
    brings it back, so that a mix with a hard loss keeps its proportions when T changes.

    Source: arXiv 1503.02531, section 2.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {shorten(temperature)}; allowed: a positive number")

    def softened(student: Tensor, teacher: Tensor) -> Tensor:
        return temperature**2 * divergence(student / temperature, teacher / temperature)

    return softened


def mix(hard: Tensor, soft: Tensor, hard_share: float = 0.5) -> Tensor:
    """hard_share of the text's loss, the rest of the teacher's; any equal shapes."""
    _share("hard_share", hard_share, ends=True)
    return hard_share * hard + (1 - hard_share) * soft


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share exp(first) + (1 - share) exp(second))."""
    if share in (0.0, 1.0):
        return first if share else second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _share(name: str, value: float, ends: bool) -> None:
    if not (0 <= value <= 1 if ends else 0 < value < 1):
        allowed = "0 to 1" if ends else "between 0 and 1, without the ends"
        raise ValueError(f"{name} is {shorten(value)}; allowed: {allowed}")
