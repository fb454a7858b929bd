"""What the model loses where one layer alone is cut: measured, for ASVD's search of ranks.

Source: ASVD, arXiv 2312.05821, section 3.4; perplexity on the calibration text, each layer at each
of a few shares. The search itself is `ranks.threshold`; `ranks.allocate` takes the
same measurements.

Chapter: factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.factorize.pivot import pivot_numbers
from rooflm.lab.factorize.ranks import Choice, uniform
from rooflm.lab.factorize.svd import Decomposition, factor_numbers, truncate
from rooflm.lab.finetune import plain_layer
from rooflm.lab.model import Transformer

SHARES = tuple(x / 10 for x in range(1, 10))  # of the numbers; the authors' code has 0.4 to 0.9


@torch.no_grad()
def sensitivities(
    model: Transformer,
    rows: Tensor,
    found: Mapping[str, Decomposition],
    shares: Sequence[float] = SHARES,
    pivoted: bool = False,
) -> dict[str, list[Choice]]:
    """Every layer's choices, with the rise of the loss where it alone is cut.

    Parameters
    ----------
    model : of plain layers.
    rows : (rows, window), tokens of the calibration text.
    found : the decomposition of each layer, by name.
    shares : of the layer's numbers, rising.
    pivoted : whether the numbers are those of `pivot`.

    Returns
    -------
    dict
        costs in nats a token; the last choice is the layer as it is, at 0.
    """
    result: dict[str, list[Choice]] = {}
    numbers = pivot_numbers if pivoted else factor_numbers
    model = copy.deepcopy(model)
    states = model.embedding(rows[:, :-1])
    full = _loss(model, states, 0, rows)
    for i, block in enumerate(model.layers):
        for kind in LINEARS:
            layer, name = plain_linear(block, kind), f"layers.{i}.{kind}"
            d_out, d_in = layer.weight.shape
            ranks = dict.fromkeys(uniform({name: (d_out, d_in)}, x, pivoted)[name] for x in shares)
            tried = []
            for rank in ranks:
                setattr(block, kind, plain_layer(truncate(found[name], rank).weight))
                rise = _loss(model, states, i, rows) - full
                tried.append(Choice(rank, numbers(d_out, d_in, rank), rise))
            setattr(block, kind, layer)
            result[name] = [*tried, Choice(min(d_out, d_in), d_out * d_in, 0.0)]
        states = block(states, model.rope, None)
    return result


def _loss(model: Transformer, states: Tensor, start: int, rows: Tensor) -> float:
    """Nats a token, from what enters block `start`."""
    for block in list(model.layers)[start:]:
        states = block(states, model.rope, None)
    logits = model.logits(states).flatten(0, 1)
    return functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
