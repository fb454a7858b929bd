"""Pruning applied to a model: block by block for weights, at once for heads, channels and layers.

`prune_model` zeroes the weights of every linear layer of the blocks, `remove_parts` makes a smaller
model; embedding, head and norms stay as they are. What is kept is rounded to FP16, as it would be
stored.

Chapter: pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab import recovery
from rooflm.lab.calibrate import LINEARS, InputStatistics, plain_linear, visit_blocks
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.lab.prune import depth, owl, scores, structured
from rooflm.lab.prune.exact import damped, refit
from rooflm.lab.prune.masks import make_mask
from rooflm.lab.prune.recipes import Recipe, Removal
from rooflm.lab.prune.remove import Structure, choose_channels, choose_heads, remove, smaller
from rooflm.lab.prune.sparsegpt import Pruned, compensate, sparsegpt
from rooflm.lab.recovery import halved


class PrunedModel(NamedTuple):
    """A model with zeros, and the masks of its linear layers by name, true where kept."""

    model: Transformer
    masks: dict[str, Tensor]


@torch.no_grad()
def prune_model(
    model: Transformer,
    recipe: Recipe,
    rows: Tensor | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
) -> PrunedModel:
    """A copy of the model with zeros in its linear layers, without recovery.

    Parameters
    ----------
    rows : (rows, window), tokens of the calibration text; magnitude and random need none.
    inputs : of the full model's layers, by name, for calibration="full" and OWL.
    """
    sparsities = [recipe.sparsity] * len(model.layers)
    if recipe.owl:
        sparsities = _owl(model, recipe, inputs)
    result, masks = copy.deepcopy(model), {}
    for i, (block, known) in enumerate(_visited(result, recipe, rows, inputs)):
        own = replace(recipe, sparsity=sparsities[i]) if recipe.owl else recipe
        for j, name in enumerate(LINEARS):
            weight = plain_linear(block, name).weight
            hessian = known[name].hessian if known else None
            found = prune_weight(weight, hessian, own, recipe.seed + 1000 * i + j)
            weight.copy_(found.weight.half())
            masks[f"layers.{i}.{name}"] = found.mask
    return PrunedModel(result, masks)


def prune_weight(weight: Tensor, hessian: Tensor | None, recipe: Recipe, seed: int = 0) -> Pruned:
    """One weight, (d_out, d_in), pruned by a recipe; the Hessian is that of its inputs."""
    if recipe.refit and hessian is not None:
        mask = prune_weight(weight, hessian, replace(recipe, refit=False), seed).mask
        return Pruned(refit(weight, damped(hessian), mask), mask)
    if hessian is None:
        if _needs_inputs(recipe):
            raise ValueError(f"{recipe.method} needs calibration rows; none were given")
        hessian = weight.new_zeros(weight.shape[1], weight.shape[1])
    if recipe.method == "sparsegpt":
        return sparsegpt(
            weight,
            hessian,
            recipe.sparsity,
            recipe.pattern,
            recipe.scope,
            recipe.bits,
            recipe.group,
        )
    if recipe.method == "dense":
        mask = torch.ones_like(weight, dtype=torch.bool)
    else:
        found = {
            "magnitude": lambda: scores.magnitude(weight),
            "wanda": lambda: scores.wanda(weight, hessian),
            "random": lambda: scores.draw(weight, seed),
        }[recipe.method]()
        mask = make_mask(found, recipe.sparsity, recipe.pattern, recipe.scope)
    if recipe.compensates:
        return compensate(weight, hessian, mask, recipe.bits, recipe.group)
    return Pruned(weight * mask, mask)


@torch.no_grad()
def remove_parts(model: Transformer, removal: Removal, rows: Tensor) -> Transformer:
    """A smaller model, without recovery.

    Parameters
    ----------
    rows : (rows, window), tokens of the calibration text.
    """
    if removal.criterion == "scratch":
        torch.manual_seed(removal.seed)
        structure = choose_parts(model, replace(removal, criterion="random"), rows)
        return Transformer(smaller(model.config, structure)).eval().requires_grad_(False)
    return halved(remove(model, choose_parts(model, removal, rows)))


@torch.no_grad()
def choose_parts(model: Transformer, removal: Removal, rows: Tensor) -> Structure:
    """What stays of a model, by a removal's criterion."""
    c, how = model.config, removal.criterion
    structure = Structure.whole(c)
    if how == "random":
        generator = torch.Generator().manual_seed(removal.seed)
        sizes = c.layers, (c.layers, c.kv_heads), (c.layers, c.heads), (c.layers, c.intermediate)
        by_layer, groups, heads, channels = (torch.rand(s, generator=generator) for s in sizes)
    elif how in ("first-order", "vector"):
        products = structured.first_order(model, rows)
        kind = "element" if how == "first-order" else "vector"
        by_layer = structured.layer_scores(products, kind)
        groups = torch.stack([structured.group_scores(p, c, kind) for p in products])
        heads = torch.stack([structured.head_scores(p, c, kind) for p in products])
        channels = torch.stack([structured.channel_scores(p, kind) for p in products])
    else:
        layers = depth.without_lowest(_layer_scores(model, how, rows), removal.layers)
        return replace(structure, layers=layers)
    kept = choose_channels(groups, c.kv_heads - removal.groups)
    return Structure(
        depth.without_lowest(by_layer, removal.layers),
        kept,
        choose_heads(heads, kept, c.heads // c.kv_heads - removal.heads, c.kv_heads),
        choose_channels(channels, c.intermediate - removal.channels),
    )


def recovered(model: Transformer, recipe: Recipe | Removal, tokens: Tensor) -> Transformer:
    """A pruned model after a recipe's recovery on a text, (tokens,); zeros of a recipe stay."""
    masked = isinstance(recipe, Recipe) and recipe.method != "dense"
    return recovery.recovered(model, tokens, recipe.steps, recipe.rate, masked, recipe.seed)


def _needs_inputs(recipe: Recipe) -> bool:
    blind = recipe.method in ("magnitude", "random")
    return not blind or recipe.compensates or recipe.refit


def _layer_scores(model: Transformer, criterion: str, rows: Tensor) -> Tensor:
    places = torch.arange(len(model.layers), dtype=torch.float64)
    if criterion == "influence":
        return depth.block_influence(model, rows)
    if criterion == "loss":
        return depth.loss_without(model, rows)
    return -places if criterion == "last" else places


def _owl(
    model: Transformer, recipe: Recipe, inputs: Mapping[str, InputStatistics] | None
) -> list[float]:
    if inputs is None:
        raise ValueError("owl needs the inputs of the full model; none were given")
    shares = []
    for i, block in enumerate(model.layers):
        found = [
            scores.wanda(plain_linear(block, name).weight, inputs[f"layers.{i}.{name}"].hessian)
            for name in LINEARS
        ]
        shares.append(owl.outlier_share(found))
    return owl.block_sparsities(shares, recipe.sparsity)


def _visited(
    model: Transformer,
    recipe: Recipe,
    rows: Tensor | None,
    inputs: Mapping[str, InputStatistics] | None,
) -> Iterator[tuple[TransformerBlock, Mapping[str, InputStatistics]]]:
    """Each block with what its layers read; nothing where nothing is to be known."""
    if not _needs_inputs(recipe):
        yield from ((block, {}) for block in model.layers)
    elif recipe.calibration == "full" and inputs is not None:
        for i, block in enumerate(model.layers):
            yield block, {name: inputs[f"layers.{i}.{name}"] for name in LINEARS}
    elif rows is None or recipe.calibration == "full":
        needed = "calibration rows" if rows is None else "the inputs of the full model"
        raise ValueError(f"{recipe.method} needs {needed}; none were given")
    else:
        yield from visit_blocks(model, rows)
