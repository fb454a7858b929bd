"""Which heads, channels and layers matter least, to first order: LLM-Pruner's criterion.

Removing a weight w changes the loss by about -g w, with g its gradient on a calibration text; a
trained model's gradient there is small and not zero. Weights that can only go together form a
group: an MLP channel is a row of gate and up and a column of down; a query head, rows of q and
columns of o; a KV group, rows of k and v and all query heads that read them; a layer, all of its
linear weights. The score of a group is the sum of |g w| over its weights ("element", as in the
paper's first-order variant of eq. 5), or |sum g w| ("vector", eq. 3).

Within a group the vector's signed sums over one factor are exact: for a channel, sum g w over the
column of down is the derivative of the loss by a gate that scales the channel, times 1.

Every layer keeps as many heads and channels as any other, so that the result is a model of one
width; which ones is for each layer to say. `remove` makes that model.

Source: LLM-Pruner, arXiv 2305.11627, section 3.1 (groups) and 3.2 (eq. 3 and 5).

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rooflm.lab.calibrate import LINEARS, differentiable, inner_linear
from rooflm.lab.finetune import next_token_loss
from rooflm.lab.model import Config, Transformer
from rooflm.roofline.numeric import unknown

SUMS = ("element", "vector")


def weight_gradients(model: Transformer, rows: Tensor, batch: int = 4) -> dict[str, Tensor]:
    """The gradient of the mean loss by each linear weight of the blocks.

    Parameters
    ----------
    rows : (rows, window), tokens of the calibration text; equal parts of `batch` rows.

    Returns
    -------
    dict
        "layers.0.q_proj": (d_out, d_in), and so on.
    """
    with differentiable(model) as weights:
        found = {name: torch.zeros_like(w) for name, w in weights.items()}
        for part in rows.split(batch):
            loss = next_token_loss(model, part) * len(part) / len(rows)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(found, gradients, strict=True):
                found[name] += gradient
    return found


def first_order(model: Transformer, rows: Tensor) -> list[dict[str, Tensor]]:
    """g w of each linear weight, (d_out, d_in), by layer and name."""
    gradients = weight_gradients(model, rows)
    return [
        {
            name: gradients[f"layers.{i}.{name}"] * inner_linear(block, name).weight.detach()
            for name in LINEARS
        }
        for i, block in enumerate(model.layers)
    ]


def channel_scores(products: Mapping[str, Tensor], how: str = "element") -> Tensor:
    """The score of each MLP channel of a layer, (intermediate,).

    Parameters
    ----------
    products : g w of the layer's weights by name, (d_out, d_in), as of `first_order`.
    how : "element" or "vector".
    """
    parts = products["gate_proj"], products["up_proj"], products["down_proj"].T
    return _sum(torch.cat(parts, 1), how)


def head_scores(products: Mapping[str, Tensor], config: Config, how: str = "element") -> Tensor:
    """The score of each query head of a layer, (heads,); arguments as of `channel_scores`."""
    rows = torch.cat((products["q_proj"], products["o_proj"].T), 1)  # (heads * head_dim, …)
    return _sum(rows.view(config.heads, -1), how)


def group_scores(products: Mapping[str, Tensor], config: Config, how: str = "element") -> Tensor:
    """The score of each KV group, with the query heads that read it, (kv_heads,)."""
    own = torch.cat((products["k_proj"], products["v_proj"]), 1).view(config.kv_heads, -1)
    readers = torch.cat((products["q_proj"], products["o_proj"].T), 1).view(config.kv_heads, -1)
    return _sum(torch.cat((own, readers), 1), how)


def layer_scores(products: list[dict[str, Tensor]], how: str = "element") -> Tensor:
    """The score of each layer, (layers,)."""
    rows = [torch.cat([layer[name].flatten() for name in LINEARS]) for layer in products]
    return _sum(torch.stack(rows), how)


def _sum(products: Tensor, how: str) -> Tensor:
    """One score for each row of g w."""
    if how not in SUMS:
        raise unknown("sum", how, SUMS)
    return products.abs().sum(1) if how == "element" else products.sum(1).abs()
