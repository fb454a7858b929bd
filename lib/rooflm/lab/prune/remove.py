"""Heads, channels and layers taken out: a smaller model, and its twin of zeros.

`Structure` says what stays. `remove` copies it into a `Transformer` of a smaller `Config`, which
any code of the laboratory and the roofline take as they take the large one. `blank` keeps the
sizes and sets to zero what `remove` takes out; both compute the same, which is the test of either.

Conventions: indices are those of the full model, in rising order. All layers keep as many heads of
as many KV groups and as many channels. A removed layer hands the residual stream on as it is.

Chapter: pruning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rooflm.lab.calibrate import LINEARS, inner_linear, plain_linear
from rooflm.lab.model import Config, Transformer
from rooflm.lab.prune.masks import keep_highest


@dataclass(frozen=True, eq=False)
class Structure:
    """What stays of a model.

    Parameters
    ----------
    layers : indices of the layers that stay.
    groups : (layers, kept KV heads), for every layer of the full model.
    heads : (layers, kept query heads), as many of each kept group.
    channels : (layers, kept MLP channels).
    """

    layers: Tensor
    groups: Tensor
    heads: Tensor
    channels: Tensor

    @classmethod
    def whole(cls, config: Config) -> Structure:
        """All of a model."""

        def every(count: int) -> Tensor:
            return torch.arange(count).expand(config.layers, count)

        layers = torch.arange(config.layers)
        return cls(layers, every(config.kv_heads), every(config.heads), every(config.intermediate))


def choose_channels(scores: Tensor, kept: int) -> Tensor:
    """The indices of the `kept` highest of each row, in rising order: (layers, kept)."""
    mask = keep_highest(scores, _count("kept", kept, scores.shape[1]))
    return mask.nonzero()[:, 1].view(len(scores), kept)


def choose_heads(scores: Tensor, groups: Tensor, kept: int, kv_heads: int) -> Tensor:
    """The query heads that stay: the `kept` highest in each KV group that stays.

    Parameters
    ----------
    scores : (layers, heads) of the full model.
    groups : (layers, kept groups).
    kept : query heads of a group.
    kv_heads : of the full model.

    Returns
    -------
    Tensor
        (layers, kept groups * kept).
    """
    size = scores.shape[1] // kv_heads
    grouped = scores.view(len(scores), kv_heads, size)
    ours = grouped.gather(1, groups[:, :, None].expand(-1, -1, size))
    best = keep_highest(ours, _count("kept", kept, size)).nonzero()[:, 2]
    return (best.view(*groups.shape, kept) + groups[:, :, None] * size).flatten(1)


@torch.no_grad()
def remove(model: Transformer, structure: Structure) -> Transformer:
    """A smaller model.

    Raises
    ------
    ValueError
        for a layer that another technique has replaced.
    """
    result = Transformer(smaller(model.config, structure)).eval().requires_grad_(False)
    for theirs, i in zip(result.layers, structure.layers.tolist(), strict=True):
        ours = model.layers[i]
        for name in LINEARS:
            rows, columns = _kept(model.config, structure, i, name)
            weight = plain_linear(ours, name).weight
            getattr(theirs, name).weight.copy_(weight[rows][:, columns])
        for name in ("attn_norm", "mlp_norm"):
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight)
    result.embedding.weight.copy_(model.embedding.weight)
    result.final_norm.weight.copy_(model.final_norm.weight)
    result.head = copy.deepcopy(model.head)
    return result


@torch.no_grad()
def blank(model: Transformer, structure: Structure) -> Transformer:
    """A model of the full sizes, with zeros in the place of what `remove` takes out."""
    result = copy.deepcopy(model)
    stay = set(structure.layers.tolist())
    for i, block in enumerate(result.layers):
        for name in LINEARS:
            weight = inner_linear(block, name).weight
            mask = torch.zeros_like(weight)
            if i in stay:
                rows, columns = _kept(model.config, structure, i, name)
                mask[rows[:, None], columns] = 1
            weight.mul_(mask)
    return result


def smaller(config: Config, structure: Structure) -> Config:
    """The config of what stays; heads keep their width."""
    counts = {
        "layers": len(structure.layers),
        "heads": structure.heads.shape[1],
        "kv_heads": structure.groups.shape[1],
        "intermediate": structure.channels.shape[1],
    }
    same = counts["heads"] * config.head_dim == config.hidden
    return replace(config, **counts, head_width=None if same else config.head_dim)


def _kept(config: Config, structure: Structure, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """The rows and columns of a layer's weight that stay."""
    hidden, channels = torch.arange(config.hidden), structure.channels[layer]
    queries = _positions(structure.heads[layer], config.head_dim)
    keys = _positions(structure.groups[layer], config.head_dim)
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (channels, hidden),
        "up_proj": (channels, hidden),
        "down_proj": (hidden, channels),
    }[name]


def _positions(heads: Tensor, width: int) -> Tensor:
    """The places of heads in a vector of heads times width."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _count(name: str, kept: int, most: int) -> int:
    if not isinstance(kept, int) or not 1 <= kept <= most:
        raise ValueError(f"{name} is {kept}; allowed: 1 to {most}")
    return kept
