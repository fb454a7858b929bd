"""A bench: a model, a text to measure its variants on, and a calibration that is done once.

`Bench.loss` measures any model beside the full one, `Bench.layer` has a layer's weight with what
it reads, `Bench.change` puts other weights in their places: a chapter compares a method with its
control in two lines. All that compresses is measured on such a bench, on the same blocks of the
same text, so that any two of its results have a paired difference.

`decode_bytes` is the abscissa that quantized, pruned, distilled and factorized models share.

Chapter: quantization methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.calibrate import (
    LINEARS,
    InputStatistics,
    calibration_rows,
    inner_linear,
    visit_blocks,
)
from rooflm.lab.checkpoints import checkpoint_folder, load_checkpoint
from rooflm.lab.evaluate import Comparison, Evaluation, compare, evaluate, prepare_reference
from rooflm.lab.model import Config, Transformer
from rooflm.lab.smollm2 import FILE_SHA256, load_smollm2
from rooflm.lab.stored import read_checked, sha256

if TYPE_CHECKING:
    from typing_extensions import Self

TOKENS = 16_384
WINDOW = 256  # predictions in a block, and tokens in a row of the calibration text
ROWS = 16
SMOLLM2 = "smollm2"
# Of a map; SmolLM2 is twenty-five times the work.
MAP_TOKENS = {"teacher": TOKENS, SMOLLM2: 4096}
CALIBRATION_TEXT = "emma"  # read in training; the held-out text stays unseen


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

    @classmethod
    def load(cls, name: str | Path = "teacher", tokens: int = TOKENS) -> Self:
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
        return cls(model, held_out, rows, text.token_bytes(tokenizer))

    @property
    def tokens(self) -> int:
        """Predictions that a variant is measured on."""
        return int(self.full.blocks.tokens.sum())

    def measure(self, model: Transformer) -> Evaluation:
        """A variant on the held-out text, beside the full model."""
        return evaluate(model, self.held_out, self.token_bytes, WINDOW, self.reference)

    def loss(self, model: Transformer) -> Comparison:
        """Bits per byte that a variant loses to the full model, with a paired interval."""
        return compare(self.measure(model), self.full)

    @cached_property
    def inputs(self) -> dict[str, InputStatistics]:
        """What every linear layer of the full model reads, by name; gathered at first use."""
        return {
            f"layers.{i}.{name}": found
            for i, (_, known) in enumerate(visit_blocks(self.model, self.rows))
            for name, found in known.items()
        }

    def layer(self, name: str) -> tuple[Tensor, InputStatistics]:
        """A layer's weight, and what it reads: of "layers.3.down_proj", say."""
        _, index, kind = name.split(".")
        return inner_linear(self.model.layers[int(index)], kind).weight, self.inputs[name]

    @torch.no_grad()
    def change(
        self, change: Callable[[Tensor, InputStatistics], Tensor], kinds: Iterable[str] = LINEARS
    ) -> Transformer:
        """A copy of the model with other weights.

        Parameters
        ----------
        change : (weight, inputs) to the weight that is to stand in its place.
        kinds : the linear layers of a block to change; the others stay as they are.
        """
        result = copy.deepcopy(self.model)
        for i, block in enumerate(result.layers):
            for name in kinds:
                weight, inputs = self.layer(f"layers.{i}.{name}")
                inner_linear(block, name).weight.copy_(change(weight, inputs))
        return result


def decode_bytes(config: Config, linear_bits: float | None = None) -> float:
    """Bytes of weights that one decoded token reads, cache apart.

    Parameters
    ----------
    config : of the model as it runs, after whatever was removed from it.
    linear_bits : bits that all linear layers of the blocks take together, indices, scales and
        zeros included; None for FP16. Norms and the head, which is the embedding read whole, are
        FP16 always. The row that the embedding looks up is neglected (1 of `vocab`).
    """
    if linear_bits is None:
        linear_bits = 16.0 * linear_weights(config)
    norms = (2 * config.layers + 1) * config.hidden
    return linear_bits / 8 + 2.0 * (config.vocab * config.hidden + norms)


def linear_weights(config: Config) -> int:
    """Weights in the linear layers of all blocks."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * config.hidden * (queries + keys)
    return config.layers * (attention + 3 * config.hidden * config.intermediate)


def checkpoint_digest(name: str | Path = "teacher") -> str:
    """The start of the SHA-256 of a model's weights."""
    if str(name) == SMOLLM2:
        return FILE_SHA256[:12]
    return sha256(read_checked(checkpoint_folder(name) / "model.safetensors"))[:12]
