"""Which layers to take out whole: by how little they change the residual stream, or by position.

Block Influence is one minus the mean cosine of what enters a layer and what leaves it. It asks
for no gradient and no label. Its controls: the last layers, the first, random ones; and the loss
itself, measured without each layer in turn, which is what the others stand for.

Sources: ShortGPT, arXiv 2403.03853, section 3.1, eq. 1, and 3.2; that the loss without a layer
orders layers better than the cosine, arXiv 2605.14075.

Chapter: pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.finetune import next_token_loss
from rooflm.lab.model import Transformer


@torch.no_grad()
def block_influence(model: Transformer, rows: Tensor, batch: int = 4) -> Tensor:
    """One minus the mean cosine between a layer's input and its output, (layers,), float64.

    Parameters
    ----------
    rows : (rows, window), tokens of the calibration text.

    Source: arXiv 2403.03853, eq. 1.
    """
    sums = torch.zeros(len(model.layers), dtype=torch.float64)
    for part in rows.split(batch):
        x = model.embedding(part)
        for i, block in enumerate(model.layers):
            y = block(x, model.rope, None)
            sums[i] += functional.cosine_similarity(x, y, dim=-1).double().sum()
            x = y
    return 1 - sums / rows.numel()


@torch.no_grad()
def loss_without(model: Transformer, rows: Tensor, batch: int = 4) -> Tensor:
    """The loss without each layer in turn, nats a token, (layers,), float64; rows as above."""
    sums = torch.zeros(len(model.layers), dtype=torch.float64)
    layers = model.layers
    try:
        for i in range(len(layers)):
            model.layers = torch.nn.ModuleList([*layers[:i], *layers[i + 1 :]])
            for part in rows.split(batch):
                sums[i] += len(part) * next_token_loss(model, part).item()
    finally:
        model.layers = layers
    return sums / len(rows)


def without_lowest(scores: Tensor, removed: int) -> Tensor:
    """The indices of the layers that stay when the `removed` lowest go, in rising order.

    >>> without_lowest(torch.tensor([3.0, 1.0, 2.0]), 1).tolist()
    [0, 2]
    """
    if not isinstance(removed, int) or not 0 <= removed < len(scores):
        raise ValueError(f"removed is {removed}; allowed: 0 to {len(scores) - 1}")
    return scores.argsort(stable=True)[removed:].sort().values
