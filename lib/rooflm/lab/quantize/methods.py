"""The quantizers of weights by their names, and the recipe that chooses one with its options.

Each takes a layer's weight and what is known of its inputs, and returns the weight that its codes
stand for and the bits they take. `apply` does so to every layer of a model. LLM.int8() rounds
weights and inputs while running; its weights stay here as they are.

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.calibrate import InputStatistics
from rooflm.lab.quantize import binary, codebook, codecs, gptq, grids, sensitive
from rooflm.lab.quantize.awq import awq
from rooflm.lab.quantize.billm import billm
from rooflm.lab.quantize.salient import keep_salient
from rooflm.roofline.numeric import shorten, unknown

# Where the scale of a rounded input comes from.
SCALES = ("token", "tensor", "static")


@dataclass(frozen=True)
class Recipe:
    """What is done to each weight.

    Parameters
    ----------
    method : a name in `METHODS`.
    bits : of a code, 2 to 8; binary methods have their own.
    group : neighbours in a row that share a scale; 0 for one scale a row. Of pb-llm and billm,
        the columns of a block, after which the columns to the right make up for its error; 0
        for none (pb-llm) or 128 (billm).
    symmetric : no zero points.
    clip : None for the full range, "mse" for the range of least squared error; AWQ also knows
        "output", the range of least output error.
    act_order : GPTQ alone: columns of large inputs first.
    keep : share of the weights that salient, owq, spqr and pb-llm keep in higher precision.
    number_format : for method "format", a name that `rooflm.load_format` knows.
    rotate : rotate the model by random Hadamard matrices first.
    activations : bits of every linear layer's input; 16 for none.
    seed : of the rotation and of whatever a method draws.
    per : of the inputs' scales: "token" or "tensor" (dynamic: one for each token, one for all of
        a batch), or "static" (one for all, from calibration).
    smooth : strength of SmoothQuant, applied first; None for none.
    control : the method without what it knows, to set beside it; `Method.control` says how.
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 0
    symmetric: bool = False
    clip: str | None = None
    act_order: bool = False
    keep: float = 0.01
    number_format: str = "nf4"
    rotate: bool = False
    activations: int = 16
    seed: int = 0
    per: str = "token"
    smooth: float | None = None
    control: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, list(METHODS))
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {shorten(self.bits)}; allowed: a whole number from 2 to 8")
        if self.activations not in (*range(2, 9), 16):
            raise ValueError(f"activations is {self.activations}; allowed: 2 to 8, or 16 for none")
        if self.control and not METHODS[self.method].control:
            allowed = ", ".join(name for name, method in METHODS.items() if method.control)
            raise ValueError(f"control is given for {self.method}; allowed for: {allowed}")
        clips = (None, "mse", "output") if self.method == "awq" else (None, "mse")
        if self.clip not in clips:
            raise unknown("clip", self.clip, [str(clip) for clip in clips])
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; allowed: 0 to 1")
        if self.per not in SCALES:
            raise unknown("scale of inputs", self.per, SCALES)
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth is {shorten(self.smooth)}; allowed: 0 to 1, or None")
        if self.smooth is not None and self.rotate:
            raise ValueError("smooth and rotate are both given; allowed: one, rotation undoes it")
        if self.method == "llm-int8" and self.activations < 16:
            raise ValueError("llm-int8 rounds its inputs itself; allowed: activations = 16")

    @property
    def keeps_architecture(self) -> bool:
        """Whether the quantized model has plain linear layers only, so that it can be stored."""
        return not self.rotate and self.activations == 16 and self.method != "llm-int8"


class Stored(NamedTuple):
    """A weight as its codes give it, (d_out, d_in), and the bits that it takes per element."""

    weight: Tensor
    bits_per_weight: float


class Knowledge(NamedTuple):
    """What a method may know of a layer: its inputs, and the Fisher information of its weight."""

    inputs: InputStatistics | None
    fisher: Tensor | None


class Method(NamedTuple):
    """A quantizer of one weight.

    Parameters
    ----------
    quantize : (weight, knowledge, recipe) to what is stored.
    inputs, fisher : whether it needs to know the inputs, the Fisher information.
    about : one line.
    control : what `Recipe.control` puts in place of the method's knowledge; "" where it has none.
    """

    quantize: Callable[[Tensor, Knowledge, Recipe], Stored]
    inputs: bool
    fisher: bool
    about: str
    control: str = ""


def _uniform_bits(weight: Tensor, recipe: Recipe) -> float:
    d_out, d_in = weight.shape
    bits = sensitive.stored_bits(d_out, d_in, recipe.bits, recipe.group, recipe.symmetric)
    return bits / weight.numel()


def _round(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    rounded = grids.round_to_nearest(weight, r.bits, r.group, r.symmetric, r.clip)
    return Stored(rounded, _uniform_bits(weight, r))


def _format(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    stored = codecs.stored_bytes(weight.shape, r.number_format)
    return Stored(codecs.to_format(weight, r.number_format), 8 * stored / weight.numel())


def _gptq(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    found = gptq.gptq(
        weight, _hessian(known), r.bits, r.group, r.symmetric, r.act_order, clip=r.clip
    )
    return Stored(found.weight, _uniform_bits(weight, r))


def _awq(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    assert known.inputs is not None
    magnitude, alpha = known.inputs.mean_abs, 0.5 if r.control else None
    found = awq(
        weight, _hessian(known), magnitude, r.bits, r.group, r.symmetric, alpha, clip=r.clip
    )
    return Stored(found.weight, _uniform_bits(weight, r))


def _salient(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    assert known.inputs is not None
    chosen = "random" if r.control else "inputs"
    found = keep_salient(weight, known.inputs.mean_abs, r.bits, r.group, r.keep, chosen, r.seed)
    return Stored(found.weight, found.bits_per_weight)


def _owq(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    columns = round(r.keep * weight.shape[1])
    found = sensitive.keep_columns(
        weight, _hessian(known), r.bits, columns, r.group, r.symmetric,
        chosen=_choice(r), seed=r.seed, clip=r.clip,
    )  # fmt: skip
    return Stored(found.weight, found.bits_per_weight)


def _spqr(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    found = sensitive.spqr(
        weight, _hessian(known), r.bits, r.group or 16, r.keep, chosen=_choice(r), seed=r.seed
    )
    return Stored(found.weight, found.bits_per_weight)


def _squeezellm(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    assert known.fisher is not None
    importance = torch.ones_like(known.fisher) if r.control else known.fisher
    found = codebook.squeezellm(weight, importance, r.bits)
    return Stored(found.weight, found.bits_per_weight)


def _binary(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    scale = binary.SCALE_BITS / (r.group or weight.shape[1])
    return Stored(binary.binarize(weight, r.group), 1 + scale)


def _ternary(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    scale = binary.SCALE_BITS / (r.group or weight.shape[1])
    return Stored(binary.ternarize(weight, r.group), 2 + scale)


def _pb_llm(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    criterion = "random" if r.control else "hessian"
    found = binary.pb_llm(weight, r.keep, criterion, _hessian(known), r.group, seed=r.seed)
    return Stored(found.weight, found.bits)


def _billm(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    found = billm(weight, _hessian(known), r.group or 128)
    return Stored(found.weight, found.bits)


def _llm_int8(weight: Tensor, known: Knowledge, r: Recipe) -> Stored:
    # The columns that are not rounded follow from each input, so nothing is rounded before.
    return Stored(weight, 8 + 16 / weight.shape[1])


def _choice(recipe: Recipe) -> str:
    return "random" if recipe.control else "sensitive"


def _hessian(known: Knowledge) -> Tensor:
    assert known.inputs is not None
    return known.inputs.hessian


METHODS: Mapping[str, Method] = {
    "round": Method(_round, False, False, "round to nearest"),
    "format": Method(_format, False, False, "round to a named number format"),
    "gptq": Method(_gptq, True, False, "GPTQ: round column by column, the rest compensates"),
    "salient": Method(
        _salient, True, False, "round, with the channels of large inputs in FP16", "random channels"
    ),
    "awq": Method(
        _awq, True, False, "AWQ: scale up the channels of large inputs, then round",
        "the exponent 1/2 for every layer",
    ),
    "owq": Method(
        _owq, True, False, "OWQ: GPTQ, with the most sensitive columns in FP16", "random columns"
    ),
    "spqr": Method(
        _spqr, True, False, "SpQR: small groups, with the outlying weights in FP16",
        "random weights",
    ),
    "squeezellm": Method(
        _squeezellm, False, True, "SqueezeLLM: a weighted codebook for each row",
        "every weight counts alike",
    ),
    "binary": Method(_binary, False, False, "signs times one scale"),
    "ternary": Method(_ternary, False, False, "-1, 0 or 1 times one scale"),
    "pb-llm": Method(
        _pb_llm, True, False, "PB-LLM: binary, with salient weights at 8 bits", "random weights"
    ),
    "billm": Method(_billm, True, False, "BiLLM: binary twice where it counts, else in two sets"),
    "llm-int8": Method(_llm_int8, False, False, "LLM.int8(): 8 bits but for outlier columns"),
}  # fmt: skip
