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
from torch import Tensor

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
from rooflm.lab.smollm2 import FILE_SHA256, load_smollm2
from rooflm.lab.stored import read_checked, sha256
from rooflm.roofline.datafiles import data_path

TOKENS = 16_384
WINDOW = 256  # predictions in a block, and tokens in a row of the calibration text
ROWS = 16
SMOLLM2 = "smollm2"
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

    def layer(self, name: str) -> tuple[Tensor, InputStatistics]:
        """A layer's weight, and what it reads: of "layers.3.down_proj", say."""
        _, index, kind = name.split(".")
        inputs = self.base().knowledge[name].inputs
        assert inputs is not None
        return inner_linear(self.model.layers[int(index)], kind).weight, inputs

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
        result = copy.deepcopy(self.model)
        for i, block in enumerate(result.layers):
            for name in kinds:
                weight, inputs = self.layer(f"layers.{i}.{name}")
                inner_linear(block, name).weight.copy_(quantize(weight, inputs))
        return result


def make_bench(name: str | Path = "teacher", tokens: int = TOKENS) -> Bench:
    """A model with the first tokens of *Persuasion*, calibrated on *Emma*.

    Parameters
    ----------
    name : "smollm2", the name of a checkpoint, or its folder.
    tokens : predictions to measure on; two blocks of `WINDOW` at least.
    """
    if str(name) == SMOLLM2:
        model, tokenizer = load_smollm2()
    else:
        model, tokenizer = load_checkpoint(name), text.load_tokenizer()
    held_out = text.encode(text.load_text(text.HELD_OUT), tokenizer)[: tokens + 1]
    emma = text.encode(text.load_text(CALIBRATION_TEXT), tokenizer)
    rows = calibration_rows(emma, ROWS, WINDOW)
    return Bench(model, held_out, rows, text.token_bytes(tokenizer))


def checkpoint_digest(name: str | Path = "teacher") -> str:
    """The start of the SHA-256 of a model's weights."""
    if str(name) == SMOLLM2:
        return FILE_SHA256[:12]
    folder = data_path("checkpoints", str(name)) if "/" not in str(name) else Path(name)
    return sha256(read_checked(folder / "model.safetensors"))[:12]
