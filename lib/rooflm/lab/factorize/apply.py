"""A decomposition applied to every linear layer of a model.

`decompose_layers` does the work once, whatever is cut from it later; `factorize` cuts, and returns
a new model in which a layer is two (or stays as it is where its rank is full). Embedding, norms and
head stay as they are.

Chapter: factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.bench import Bench
from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.factorize.aware import asvd, output_gradients, two_sided, whitened
from rooflm.lab.factorize.pivot import PivotedLinear, pivot, pivot_numbers
from rooflm.lab.factorize.ranks import Shape
from rooflm.lab.factorize.svd import (
    Decomposition,
    FactorizedLinear,
    Factors,
    decompose,
    factor_numbers,
    random_factors,
    truncate,
)
from rooflm.lab.model import Transformer
from rooflm.roofline.numeric import unknown

METHODS = ("svd", "asvd", "whitened", "two-sided", "random")
NUMBER_BITS = 16  # FP16


class FactorizedModel(NamedTuple):
    """A model whose layers are products of two.

    Parameters
    ----------
    model : a new Transformer.
    bits : of all its linear layers, in FP16.
    """

    model: Transformer
    bits: int


def layer_shapes(bench: Bench) -> dict[str, Shape]:
    """(d_out, d_in) of every linear layer, by name."""
    shapes = {}
    for i, block in enumerate(bench.model.layers):
        for name in LINEARS:
            d_out, d_in = plain_linear(block, name).weight.shape
            shapes[f"layers.{i}.{name}"] = (d_out, d_in)
    return shapes


def decompose_layers(bench: Bench, method: str, alpha: float = 0.5) -> dict[str, Decomposition]:
    """Every linear layer's decomposition, by name.

    Parameters
    ----------
    method : "svd", "asvd", "whitened" or "two-sided".
    alpha : of ASVD.

    Raises
    ------
    ValueError
        for a method that decomposes nothing.
    """
    gradients: Mapping[str, Tensor] = {}
    if method == "two-sided":
        gradients = output_gradients(bench.model, bench.rows)
    found = {}
    for name in layer_shapes(bench):
        weight, inputs = bench.layer(name)
        if method == "svd":
            found[name] = decompose(weight)
        elif method == "asvd":
            found[name] = asvd(weight, inputs.mean_abs, alpha)
        elif method == "whitened":
            found[name] = whitened(weight, inputs.hessian)
        elif method == "two-sided":
            found[name] = two_sided(weight, inputs.hessian, gradients[name])
        else:
            raise unknown("method", method, METHODS[:-1])
    return found


def cut_layers(
    bench: Bench, found: Mapping[str, Decomposition] | None, ranks: Mapping[str, int], seed: int = 0
) -> dict[str, Factors]:
    """The factors of every layer whose rank is not full.

    Parameters
    ----------
    found : as of `decompose_layers`; None for the control, random directions.
    ranks : of the layers that are cut; one that is missing stays as it is.
    seed : of the control.
    """
    shapes = layer_shapes(bench)
    cut = {name: rank for name, rank in ranks.items() if rank < min(shapes[name])}
    if found is not None:
        return {name: truncate(found[name], rank) for name, rank in cut.items()}
    return {
        name: random_factors(bench.layer(name)[0], rank, seed + i)
        for i, (name, rank) in enumerate(cut.items())
    }


@torch.no_grad()
def factorize(
    model: Transformer, factors: Mapping[str, Factors], pivoted: bool = False
) -> FactorizedModel:
    """A copy of the model with factors in the place of weights.

    Parameters
    ----------
    model : of plain layers.
    factors : by the layer's name; a layer without stays as it is.
    pivoted : whether a layer is stored as `pivot` does.
    """
    result, bits = copy.deepcopy(model), 0
    for i, block in enumerate(result.layers):
        for name in LINEARS:
            weight = plain_linear(block, name).weight
            found = factors.get(f"layers.{i}.{name}")
            if found is None:
                bits += NUMBER_BITS * weight.numel()
                continue
            d_out, d_in = weight.shape
            rank = len(found.a)
            if pivoted:
                setattr(block, name, PivotedLinear(pivot(found)))
                bits += NUMBER_BITS * pivot_numbers(d_out, d_in, rank)
            else:
                setattr(block, name, FactorizedLinear(found))
                bits += NUMBER_BITS * factor_numbers(d_out, d_in, rank)
    return FactorizedModel(result, bits)
