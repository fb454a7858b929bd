"""Fine-tuning on a quantized base: QLoRA, LoftQ and QA-LoRA.

All three freeze a quantized model and train low-rank adapters (`lora`). They differ in where
training starts and in what is left at the end:

- QLoRA starts from the base, whose quantization error the adapter has to learn away. The
  adapter does not merge into the codes: it is served beside them, or merged in 16 bits, or
  rounded again.
- LoftQ starts from an adapter that already holds the largest part of the quantization error.
- QA-LoRA trains an adapter so poor that it merges into the zero points: what is served is a
  group-quantized weight, and no adapter.

Sources: QLoRA, arXiv 2305.14314, section 3; LoftQ, arXiv 2310.08659, section 3.2, algorithm 1;
QA-LoRA, arXiv 2309.14717, section 3.3, algorithm 1.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.calibrate import LINEARS
from rooflm.lab.finetune import change_layers, plain_layer, replace_weights
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.codecs import store, stored_bytes, to_format
from rooflm.lab.quantize.grids import encode, fit_grid, to_groups
from rooflm.lab.quantize.lora import (
    FrozenLinear,
    GridLinear,
    LoraLinear,
    check_rank,
    initial_adapter,
)
from rooflm.roofline.numeric import size


class QuantizedLowRank(NamedTuple):
    """A weight as quantized + b @ a.

    Parameters
    ----------
    quantized : (d_out, d_in).
    a, b : (rank, d_in) and (d_out, rank).
    """

    quantized: Tensor
    a: Tensor
    b: Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank, as two factors of equal weight, from the SVD.

    Parameters
    ----------
    matrix : (d_out, d_in).
    rank : 0 to the smaller side.

    Returns
    -------
    tuple
        a (rank, d_in) and b (d_out, rank); b @ a is nearest in the Frobenius norm.

    Source: Eckart and Young (1936).
    """
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def loftq_init(
    weight: Tensor, quantize: Callable[[Tensor], Tensor], rank: int, iterations: int = 5
) -> QuantizedLowRank:
    """Quantized base and adapter that together are near the weight.

    Quantize what the adapter leaves, fit the adapter to what quantization leaves, and again.
    The second step never raises the error; the first may, since the grid is fitted anew.

    Parameters
    ----------
    weight : (d_out, d_in).
    quantize : such as `lambda w: to_format(w, "nf4")`.
    rank : of the adapter; 0 gives the plain quantizer.
    iterations : at least 1; one is the SVD of the plain quantizer's error.

    Returns
    -------
    QuantizedLowRank
        float32.

    Raises
    ------
    ValueError
        for a rank or iterations out of range.

    Source: LoftQ, arXiv 2310.08659, eq. 6-8 (sections 3.1 and 3.2), algorithm 1.
    """
    to_groups(weight, 0)  # refuses what is no matrix
    check_rank(rank, *weight.shape)
    size("iterations", iterations)
    weight = weight.detach().float()
    correction = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = quantize(weight - correction)
        a, b = low_rank(weight - quantized, rank)
        correction = b @ a
    return QuantizedLowRank(quantized, a, b)


def qa_lora_merge(
    zero: Tensor, scale: Tensor, a: Tensor, b: Tensor, scaling: float = 1.0
) -> Tensor:
    """Zero points that absorb an adapter which adds one number to each group of each row.

    (q - z) s + d = (q - (z - d/s)) s: codes and scales stay, zero points become real numbers.

    Parameters
    ----------
    zero, scale : (d_out, groups, 1).
    a, b : (rank, groups) and (d_out, rank).
    scaling : factor of the adapter.

    Returns
    -------
    Tensor
        (d_out, groups, 1), the new zero points.

    Source: QA-LoRA, arXiv 2309.14717, section 3.3 (there beta = -z s takes the update).
    """
    return zero - scaling * (b @ a)[:, :, None] / scale


def lora(
    model: Transformer, rank: int, generator: torch.Generator, scaling: float = 1.0
) -> Transformer:
    """A copy with adapters on a base in FP16 (LoRA): the control of the quantized ones."""
    return qlora(model, rank, generator, "fp16", scaling)


def qlora(
    model: Transformer,
    rank: int,
    generator: torch.Generator,
    number_format: str = "nf4-dq",
    scaling: float = 1.0,
) -> Transformer:
    """A copy with adapters on a quantized base; only the adapters are trained.

    Parameters
    ----------
    model : of plain layers.
    rank, scaling : of the adapters.
    generator : of their start.
    number_format : of the base, a name that `rooflm.load_format` knows; the paper's is NF4 in
        blocks of 64 with double quantization.

    Raises
    ------
    ValueError
        for a rank or a format that does not fit the weights.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    def make(name: str, weight: Tensor) -> LoraLinear:
        a, b = initial_adapter((len(weight), weight.shape[1]), rank, generator)
        stored = store(weight, number_format)
        base = FrozenLinear(stored.values, stored.bytes)
        return LoraLinear(base, a, b, scaling)

    return replace_weights(model, make)


def loftq(
    model: Transformer,
    rank: int,
    number_format: str = "nf4-dq",
    iterations: int = 5,
    scaling: float = 1.0,
) -> Transformer:
    """A copy like `qlora`'s that starts from `loftq_init`; arguments and errors as in both."""

    def make(name: str, weight: Tensor) -> LoraLinear:
        found = loftq_init(weight, lambda w: to_format(w, number_format), rank, iterations)
        base = FrozenLinear(found.quantized, stored_bytes(weight.shape, number_format))
        return LoraLinear(base, found.a, found.b / scaling, scaling)

    return replace_weights(model, make)


def qa_lora(
    model: Transformer,
    rank: int,
    generator: torch.Generator,
    bits: int = 4,
    group: int = 32,
    clip: str | None = None,
    scaling: float = 1.0,
) -> Transformer:
    """A copy with pooled adapters on an asymmetric grid, to be merged by `merged`.

    Parameters
    ----------
    model : of plain layers.
    rank, scaling : of the adapters, which are (rank, groups) and (d_out, rank).
    generator : of their start.
    bits, group, clip : of the grid, as in `grids.fit_grid`; the paper's group is 32. The paper
        has GPTQ choose the codes; here they are rounded to nearest.

    Raises
    ------
    ValueError
        for a rank, bits or a group that does not fit the weights.

    Source: QA-LoRA, arXiv 2309.14717, section 3.3, algorithm 1.
    """

    def make(name: str, weight: Tensor) -> LoraLinear:
        grouped = to_groups(weight, group)
        grid = fit_grid(grouped, bits, symmetric=False, clip=clip)
        base = GridLinear(encode(grouped, grid), grid.scale, grid.zero, bits, zero_bits=bits)
        pool = grouped.shape[-1]
        a, b = initial_adapter((len(weight), weight.shape[1]), rank, generator, pool)
        return LoraLinear(base, a, b, scaling, pool)

    return replace_weights(model, make)


@torch.no_grad()
def merged(model: Transformer) -> Transformer:
    """A copy of an adapted model, frozen, without its adapters.

    QA-LoRA's go into the zero points, stored in FP16 from then on; others into plain weights,
    which are FP16 again and may be rounded once more.

    Raises
    ------
    ValueError
        for a model without adapters.
    """
    return change_layers(model, lambda block, name: _merged_layer(getattr(block, name)))


class Footprint(NamedTuple):
    """What the linear layers of a model's blocks take, and what training takes.

    Parameters
    ----------
    weights : numbers in the weights that the layers stand for.
    trainable : parameters of the whole model that require a gradient.
    base_bytes : of the layers' weights as stored; 2 a number where they are plain.
    adapter_bytes : of the adapters in FP16, beside the base.
    """

    weights: int
    trainable: int
    base_bytes: int
    adapter_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, adapters included, for each number of the weights."""
        return 8 * (self.base_bytes + self.adapter_bytes) / self.weights

    @property
    def training_bytes(self) -> int:
        """Base, and 16 for each trainable: value, gradient and AdamW's two moments in FP32.

        Activations, embedding and norms are not counted. Where the layers themselves are
        trained, the base holds what will be stored, beside the values in training.
        """
        return self.base_bytes + 16 * self.trainable


def footprint(model: Transformer) -> Footprint:
    """Counted from the layers of `lora`, `qlora`, `loftq`, `qa_lora`, `merged` or plain ones."""
    layers = [getattr(block, name) for block in model.layers for name in LINEARS]
    adapters = [p for x in layers if isinstance(x, LoraLinear) for p in (x.a, x.b)]
    bases = [x.base if isinstance(x, LoraLinear) else x for x in layers]
    return Footprint(
        weights=sum(x.weight.numel() for x in bases),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        base_bytes=sum(getattr(x, "stored_bytes", 2 * x.weight.numel()) for x in bases),
        adapter_bytes=2 * sum(p.numel() for p in adapters),
    )


def _merged_layer(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, LoraLinear):
        raise ValueError(f"the layer is a {type(layer).__name__}; allowed: a LoraLinear")
    base = layer.base
    if not isinstance(base, GridLinear):
        return plain_layer(layer.weight.half().float())
    zero = qa_lora_merge(base.zero, base.scale, layer.a, layer.b, layer.scaling)
    return GridLinear(base.codes, base.scale, zero.half().float(), base.bits, zero_bits=16)
