"""Early exit: which layer a token may leave at, and a threshold that keeps its promise.

After every layer the final norm and the head make logits of what the residual stream holds so far.
If they are *confident*, the layers above are skipped. Confidence here is the gap between the two
likeliest tokens, the likeness of a layer's output to its input, or a trained classifier's word. A
token leaves at the first layer whose confidence reaches a threshold; the lower the threshold, the
earlier, and the more often what it says is not what the whole model would have said.

How low may it be? `lowest_threshold` walks down from the highest and stops at the first that fails
a test of "the risk is at most delta". Then with chance 1 - epsilon over the calibration texts, the
threshold's risk on texts of the same kind is at most delta, whatever the model (Learn then Test,
with fixed sequence testing: no correction for many tests is needed, as the walk ends at a failure).

Sources: CALM, arXiv 2207.07061 (the measures, and calibration); Learn then Test, arXiv 2110.01052;
the p-value of Hoeffding and Bentkus, arXiv 2101.02703.

Chapter: early exit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.model import Transformer
from rooflm.roofline.numeric import shorten


@torch.no_grad()
def layer_states(model: Transformer, tokens: Tensor) -> Tensor:
    """The residual stream before the first layer and after each, (layers + 1, batch, n, hidden).

    Parameters
    ----------
    tokens : (batch, n).
    """
    found = [model.embedding(tokens)]
    for layer in model.layers:
        found.append(layer(found[-1], model.rope, None))
    return torch.stack(found)


def softmax_gap(logits: Tensor) -> Tensor:
    """The likeliest token's chance less the second's, (…), 0 to 1, from (…, vocab)."""
    best = logits.softmax(-1).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def saturation(states: Tensor) -> Tensor:
    """The cosine of a layer's output with its input, (layers, …), from (layers + 1, …, hidden)."""
    return functional.cosine_similarity(states[1:], states[:-1], dim=-1)


def first_confident(confidence: Tensor, threshold: float) -> Tensor:
    """The layer that a token leaves at, (…), counted from 0; the last where none is confident.

    Parameters
    ----------
    confidence : (layers, …).
    """
    reached = confidence >= threshold
    reached[-1] = True
    return reached.int().argmax(0)


def disagreement(choices: Tensor, exits: Tensor) -> Tensor:
    """Whether what is said at the exit is not what the last layer says, (…), 0 or 1.

    Parameters
    ----------
    choices : (layers, …), the likeliest token after each layer.
    exits : (…), as of `first_confident`.
    """
    said = choices.gather(0, exits[None])[0]
    return (said != choices[-1]).to(torch.float64)


def lowest_threshold(
    risks: Sequence[float], samples: int, delta: float, epsilon: float = 0.05
) -> int | None:
    """The number of the lowest threshold that may be trusted, or None if not even the first may.

    Parameters
    ----------
    risks : mean risk on the calibration samples, each within 0 to 1, of thresholds from the highest
        (safest) down.
    samples : independent samples that each mean is of: texts, not tokens.
    delta : the risk that is allowed.
    epsilon : the chance with which the promise may be broken.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {shorten(value)}; allowed: between 0 and 1")
    trusted = None
    for i, risk in enumerate(risks):
        if p_value(risk, samples, delta) > epsilon:
            break
        trusted = i
    return trusted


def p_value(risk: float, samples: int, delta: float) -> float:
    """How likely a mean risk as low as this is, at most, if the true one is above delta.

    The smaller of Hoeffding's bound, exp(-n kl(risk, delta)), and Bentkus's, e times the chance
    that a binomial of n and delta is at most ceil(n risk).
    """
    n = samples
    if not 0 <= risk <= 1 or n < 1:
        raise ValueError(f"risk is {shorten(risk)} of {n} samples; allowed: 0 to 1, of 1 or more")
    if risk >= delta:
        return 1.0
    bits = 0.0 if risk == 0 else risk * math.log(risk / delta)
    bits += (1 - risk) * math.log((1 - risk) / (1 - delta))
    hoeffding = math.exp(-n * bits)
    most = math.ceil(n * risk - 1e-9)
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(delta) + (n - k) * math.log1p(-delta)
        for k in range(most + 1)
    )  # fmt: skip
    bentkus = math.e * sum(math.exp(x) for x in logs)
    return min(1.0, hoeffding, bentkus)
