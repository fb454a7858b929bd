"""A quantizer applied to every linear layer of a model, block by block.

`methods` has the quantizers and the recipe that chooses one. Embedding, head and norms stay as
they are. `quantize_model` returns a new model; rotation, smoothing and rounded activations combine
with any method.

Chapter: quantization methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.calibrate import (
    LINEARS,
    InputStatistics,
    fisher_information,
    inner_linear,
    visit_blocks,
)
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.lab.quantize import gptq, grids
from rooflm.lab.quantize.int8 import Int8Linear
from rooflm.lab.quantize.methods import METHODS, Knowledge, Recipe, Stored
from rooflm.lab.quantize.rotation import rotate_model
from rooflm.lab.quantize.smoothquant import input_peaks, smooth_model


class QuantizedModel(NamedTuple):
    """A model whose linear weights are what their codes stand for.

    Parameters
    ----------
    model : a new Transformer.
    bits_per_weight : stored bits over all quantized weights, scales and indices included.
    errors : by layer name, the squared output error over the squared output; {} without inputs.
    """

    model: Transformer
    bits_per_weight: float
    errors: dict[str, float]


class RoundedInput(nn.Module):
    """A linear layer that rounds its input first.

    Parameters
    ----------
    linear : what follows the rounding.
    bits, per, scale : as in `grids.quantize_activations`; a scale is a static one.
    """

    def __init__(
        self, linear: nn.Module, bits: int, per: str = "token", scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.linear, self.bits, self.per, self.scale = linear, bits, per, scale

    @property
    def weight(self) -> Tensor:
        """The linear layer's, (d_out, d_in)."""
        return self.linear.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return self.linear(grids.quantize_activations(x, self.bits, self.per, scale=self.scale))


# Called with the number of finished blocks and what has been stored so far, by layer name.
Progress = Callable[[int, Mapping[str, Stored]], None]


@torch.no_grad()
def quantize_model(
    model: Transformer,
    recipe: Recipe,
    rows: Tensor | None = None,
    done: Mapping[str, Stored] | None = None,
    progress: Progress | None = None,
    knowledge: Mapping[str, Knowledge] | None = None,
) -> QuantizedModel:
    """A copy of the model with every linear weight quantized.

    Parameters
    ----------
    rows : (rows, window), tokens to calibrate on; needed where something is to be known of the
        inputs. Each block is calibrated on what the quantized blocks before it hand on.
    done : what was stored before for some layers, which is taken as it is.
    progress : see `Progress`.
    knowledge : what `gather_knowledge` found on this model, in place of rows: quicker where many
        recipes are tried.

    Raises
    ------
    ValueError
        for a recipe that needs rows and gets none, knowledge of a model that is yet to be rotated
        or smoothed, or sizes that a group does not divide.
    """
    method = METHODS[recipe.method]
    _check_given(recipe, rows, knowledge)
    result = _changed(model, recipe, rows)
    stored, errors = dict(done or {}), {}
    for i, (block, known) in enumerate(_visited(result, method.fisher, rows, knowledge)):
        for name in LINEARS:
            linear, full = inner_linear(block, name), f"layers.{i}.{name}"
            weight, inputs = linear.weight.detach().clone(), known[name].inputs
            if full not in stored:
                stored[full] = method.quantize(weight, known[name], recipe)
            linear.weight.copy_(stored[full].weight)
            if inputs is not None:
                errors[full] = _relative_error(weight, linear.weight, inputs.hessian)
            if recipe.method == "llm-int8":
                _replace_inner(block, name, Int8Linear(weight))
            elif recipe.activations < 16:
                _replace_inner(block, name, _rounded_input(linear, inputs, recipe))
        if progress is not None:
            progress(i + 1, stored)
    count = sum(s.weight.numel() for s in stored.values())
    bits = sum(s.weight.numel() * s.bits_per_weight for s in stored.values()) / count
    return QuantizedModel(result, bits, errors)


@torch.no_grad()
def gather_knowledge(model: Transformer, rows: Tensor, fisher: bool = True) -> dict[str, Knowledge]:
    """What any method may know of each layer, gathered once, with every block as it is.

    Parameters
    ----------
    rows : (rows, window), tokens to calibrate on.
    fisher : whether to gather the Fisher information too, which takes a backward pass a row.

    Returns
    -------
    dict
        by the layer's name, such as "layers.0.q_proj".
    """
    return {
        f"layers.{i}.{name}": found
        for i, (_, known) in enumerate(_visited(model, fisher, rows, None))
        for name, found in known.items()
    }


def _check_given(
    recipe: Recipe, rows: Tensor | None, knowledge: Mapping[str, Knowledge] | None
) -> None:
    if knowledge is not None:
        if recipe.rotate or recipe.smooth is not None:
            raise ValueError("rotate or smooth with knowledge; allowed: change the model before")
    elif rows is None:
        method = METHODS[recipe.method]
        needs = {
            f"method {recipe.method}": method.inputs or method.fisher,
            "smooth": recipe.smooth is not None,
            "per static": recipe.activations < 16 and recipe.per == "static",
        }
        for what, needed in needs.items():
            if needed:
                raise ValueError(f"{what} needs calibration rows; none were given")


def _changed(model: Transformer, recipe: Recipe, rows: Tensor | None) -> Transformer:
    """A copy that computes the same: rotated, smoothed or as it is."""
    if recipe.rotate:
        return rotate_model(model, recipe.seed)
    if recipe.smooth is not None and rows is not None:
        return smooth_model(model, input_peaks(model, rows), recipe.smooth)
    return copy.deepcopy(model)


def _visited(
    model: Transformer,
    fisher: bool,
    rows: Tensor | None,
    knowledge: Mapping[str, Knowledge] | None,
) -> Iterator[tuple[TransformerBlock, dict[str, Knowledge]]]:
    """Each block with what is known of its layers; the caller may change it between two steps."""
    if rows is not None and knowledge is None:
        found = fisher_information(model, rows) if fisher else {}
        for i, (block, inputs) in enumerate(visit_blocks(model, rows)):
            yield (
                block,
                {x: Knowledge(inputs[x], found.get(f"layers.{i}.{x}")) for x in LINEARS},
            )
    else:
        before = knowledge or {}
        nothing = Knowledge(None, None)
        for i, block in enumerate(model.layers):
            yield block, {x: before.get(f"layers.{i}.{x}", nothing) for x in LINEARS}


def _rounded_input(
    linear: nn.Linear, inputs: InputStatistics | None, recipe: Recipe
) -> RoundedInput:
    if recipe.per != "static":
        return RoundedInput(linear, recipe.activations, recipe.per)
    assert inputs is not None
    scale = grids.static_scale(inputs.max_abs, recipe.activations)
    return RoundedInput(linear, recipe.activations, "tensor", scale)


def _relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    nothing = torch.zeros_like(weight)
    whole = gptq.output_error(weight, nothing, hessian)
    return gptq.output_error(weight, quantized, hessian) / whole if whole else 0.0


def _replace_inner(block: TransformerBlock, name: str, layer: nn.Module) -> None:
    outer = getattr(block, name)
    if isinstance(outer, nn.Linear):
        setattr(block, name, layer)
    else:
        while not isinstance(outer.linear, nn.Linear):
            outer = outer.linear
        outer.linear = layer
