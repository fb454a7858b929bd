"""The bench with a calibration for each base that a quantizer starts from.

`QuantizeBench.quantize` takes any recipe. Inputs are gathered once for each base (the model as it
is, rotated, or smoothed): a method doesn't see what the quantized blocks before it hand on, as it
does in `apply.quantize_model` with rows.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rooflm.lab.bench import TOKENS, Bench
from rooflm.lab.calibrate import fisher_information
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.apply import QuantizedModel, gather_knowledge, quantize_model
from rooflm.lab.quantize.methods import METHODS, Knowledge, Recipe
from rooflm.lab.quantize.rotation import rotate_model
from rooflm.lab.quantize.smoothquant import smooth_model


class Base(NamedTuple):
    """A model that computes what the full one does, and what is known of its layers."""

    model: Transformer
    knowledge: Mapping[str, Knowledge]


class QuantizeBench(Bench):
    """A bench that quantizes by recipe; its parameters are those of `Bench`."""

    def __init__(
        self, model: Transformer, held_out: Tensor, rows: Tensor, token_bytes: Tensor
    ) -> None:
        super().__init__(model, held_out, rows, token_bytes)
        self._bases: dict[tuple[Any, ...], Base] = {}
        self._fisher: dict[tuple[Any, ...], Base] = {}

    def base(self, recipe: Recipe | None = None) -> Base:
        """The model as a recipe starts from it, rotated or smoothed, calibrated at first use."""
        recipe = recipe or Recipe()
        key = (recipe.rotate, recipe.smooth, recipe.seed if recipe.rotate else 0)
        if key not in self._bases:
            model = self.model
            if recipe.rotate:
                model = rotate_model(model, recipe.seed)
            elif recipe.smooth is not None:
                found = {name: x.max_abs for name, x in self.inputs.items()}
                model = smooth_model(model, found, recipe.smooth)
            if model is self.model:
                known = {name: Knowledge(found, None) for name, found in self.inputs.items()}
            else:
                known = gather_knowledge(model, self.rows, fisher=False)
            self._bases[key] = Base(model, known)
        base = self._bases[key]
        if not METHODS[recipe.method].fisher:
            return base
        if key not in self._fisher:  # a backward pass, which few methods need
            fisher = fisher_information(base.model, self.rows)
            knowledge = {x: Knowledge(k.inputs, fisher[x]) for x, k in base.knowledge.items()}
            self._fisher[key] = Base(base.model, knowledge)
        return self._fisher[key]

    def quantize(self, recipe: Recipe) -> QuantizedModel:
        """The model quantized by a recipe, from what calibration found."""
        base = self.base(recipe)
        recipe = replace(recipe, rotate=False, smooth=None)
        return quantize_model(base.model, recipe, knowledge=base.knowledge)


def make_bench(name: str | Path = "teacher", tokens: int = TOKENS) -> QuantizeBench:
    """`QuantizeBench.load`."""
    return QuantizeBench.load(name, tokens)
