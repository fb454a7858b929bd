"""A bench for quantizers: a model, a text to measure on, and a calibration that is done once.

`Bench.quantize` takes any recipe, `Bench.change` any function of a weight, `Bench.loss` any model;
so a chapter compares a method with its control in two lines. Inputs are gathered once for each
base (the model as it is, rotated, or smoothed): a method doesn't see what the quantized blocks
before it hand on, as it does in `apply.quantize_model` with rows.

Chapter: quantization methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab import text
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.evaluate import Comparison, Evaluation, compare, evaluate, prepare_reference
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.apply import QuantizedModel, gather_knowledge, quantize_model
from rooflm.lab.quantize.calibrate import (
    LINEARS,
    InputStatistics,
    calibration_rows,
    fisher_information,
    inner_linear,
)
from rooflm.lab.quantize.methods import METHODS, Knowledge, Recipe
from rooflm.lab.quantize.rotation import rotate_model
from rooflm.lab.quantize.smoothquant import smooth_model
from rooflm.lab.stored import read_checked, sha256
from rooflm.roofline.datafiles import data_path

TOKENS = 16_384
WINDOW = 256  # predictions in a block, and tokens in a row of the calibration text
ROWS = 16
CALIBRATION_TEXT = "emma"  # read in training; the held-out text stays unseen


class Base(NamedTuple):
    """A model that computes what the full one does, and what is known of its layers."""

    model: Transformer
    knowledge: Mapping[str, Knowledge]


class Bench:
    """A model with the text that its variants are measured on and what calibration found.

    Parameters
    ----------
    model : in full precision.
    held_out : (tokens,), cut into blocks of `WINDOW` predictions.
    rows : (rows, window), tokens to calibrate on.
    token_bytes : (vocab,), as of `text.token_bytes`.
    """

    def __init__(
        self, model: Transformer, held_out: Tensor, rows: Tensor, token_bytes: Tensor
    ) -> None:
        self.model, self.held_out, self.rows = model, held_out, rows
        self.token_bytes = token_bytes
        self.reference = prepare_reference(model, held_out, WINDOW)
        self.full = self.measure(model)
        self._bases: dict[tuple[Any, ...], Base] = {}
        self._fisher: dict[tuple[Any, ...], Base] = {}

    def measure(self, model: Transformer) -> Evaluation:
        """A variant on the held-out text, beside the full model."""
        return evaluate(model, self.held_out, self.token_bytes, WINDOW, self.reference)

    def loss(self, model: Transformer) -> Comparison:
        """Bits per byte that a variant loses to the full model, with a paired interval."""
        return compare(self.measure(model), self.full)

    def base(self, recipe: Recipe | None = None) -> Base:
        """The model as a recipe starts from it, rotated or smoothed, calibrated at first use."""
        recipe = recipe or Recipe()
        key = (recipe.rotate, recipe.smooth, recipe.seed if recipe.rotate else 0)
        if key not in self._bases:
            model = self.model
            if recipe.rotate:
                model = rotate_model(model, recipe.seed)
            elif recipe.smooth is not None:
                known = self.base().knowledge
                found = {name: k.inputs.max_abs for name, k in known.items() if k.inputs}
                model = smooth_model(model, found, recipe.smooth)
            self._bases[key] = Base(model, gather_knowledge(model, self.rows, fisher=False))
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

    @torch.no_grad()
    def change(
        self, quantize: Callable[[Tensor, InputStatistics], Tensor], kinds: Iterable[str] = LINEARS
    ) -> Transformer:
        """A copy of the model with other weights, for what no recipe says: controls, mixtures.

        Parameters
        ----------
        quantize : (weight, inputs) to the weight that is to stand in its place.
        kinds : the linear layers of a block to change; the others stay as they are.
        """
        result, known = copy.deepcopy(self.model), self.base().knowledge
        for i, block in enumerate(result.layers):
            for name in kinds:
                weight, inputs = (
                    inner_linear(block, name).weight,
                    known[f"layers.{i}.{name}"].inputs,
                )
                assert inputs is not None
                weight.copy_(quantize(weight.clone(), inputs))
        return result


@torch.no_grad()
def layer_inputs(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """What each linear layer reads, (tokens, d_in), by its name; and what enters each block.

    Parameters
    ----------
    rows : (rows, window), tokens. All inputs are kept: a few hundred tokens are enough to look at.

    Returns
    -------
    dict
        "layers.0.q_proj" and so on; "layers.0", … for the residual stream, (rows, window, hidden).
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, flat: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            found[name] = given[0].flatten(0, -2) if flat else given[0]

        return hook

    hooks = []
    for i, block in enumerate(model.layers):
        hooks.append(block.register_forward_pre_hook(keep(f"layers.{i}", False)))
        for name in LINEARS:
            linear = inner_linear(block, name)
            hooks.append(linear.register_forward_pre_hook(keep(f"layers.{i}.{name}", True)))
    model.states(rows)
    for hook in hooks:
        hook.remove()
    return found


def make_bench(name: str | Path = "teacher", tokens: int = TOKENS) -> Bench:
    """A checkpoint with the first tokens of *Persuasion*, calibrated on *Emma*.

    Parameters
    ----------
    name : of a checkpoint, or its folder.
    tokens : predictions to measure on; two blocks of `WINDOW` at least.
    """
    model = load_checkpoint(name)
    held_out = text.encode(text.load_text(text.HELD_OUT))[: tokens + 1]
    emma = text.encode(text.load_text(CALIBRATION_TEXT))
    rows = calibration_rows(emma, ROWS, WINDOW)
    return Bench(model, held_out, rows, text.token_bytes())


def checkpoint_digest(name: str | Path = "teacher") -> str:
    """The start of the SHA-256 of a checkpoint's weights."""
    folder = data_path("checkpoints", str(name)) if "/" not in str(name) else Path(name)
    return sha256(read_checked(folder / "model.safetensors"))[:12]
