"""One layer pruned in every way, side by side: what a criterion knows, and what an update adds.

Chapter: pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.prune import exact, masks, scores
from rooflm.lab.prune.sparsegpt import compensate, sparsegpt
from rooflm.lab.quantize.gptq import output_error


def pruned_each_way(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.5, damp: float = 0.01
) -> dict[str, Tensor]:
    """A weight pruned within each row by each method, (d_out, d_in), by the method's name.

    "update" is SparseGPT's for a mask of another's, "least squares" the best values for a mask.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    sparsity : share of each row's weights that go.
    damp : of the updates and of least squares, as a part of the mean diagonal.
    """
    by = {"magnitude": scores.magnitude(weight), "Wanda": scores.wanda(weight, hessian)}
    kept = {name: masks.unstructured(score, sparsity, "row") for name, score in by.items()}
    ours = sparsegpt(weight, hessian, sparsity, per="row", damp=damp)
    solid = exact.damped(hessian, damp) if damp else hessian
    return {
        **{name: weight * mask for name, mask in kept.items()},
        "Wanda, update": compensate(weight, hessian, kept["Wanda"], damp=damp).weight,
        "Wanda, least squares": exact.refit(weight, solid, kept["Wanda"]),
        "SparseGPT": ours.weight,
        "SparseGPT, least squares": exact.refit(weight, solid, ours.mask),
    }


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """The squared error of the output over the squared output, both summed over outputs."""
    power = output_error(weight, torch.zeros_like(weight), hessian)
    return output_error(weight, pruned, hessian) / power


def random_layer(seed: int, d_out: int = 4, d_in: int = 12) -> tuple[Tensor, Tensor]:
    """A small layer whose inputs are mixed at random: weight (d_out, d_in) and Hessian, float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing, inputs = normal(d_in, d_in), normal(4 * d_in, d_in)
    inputs = inputs @ mixing
    return normal(d_out, d_in), inputs.T @ inputs / len(inputs)
