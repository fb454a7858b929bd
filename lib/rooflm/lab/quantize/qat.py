"""Quantization-aware training: the forward pass sees rounded numbers, the gradient does not.

Rounding has derivative 0 almost everywhere, so nothing could be learned through it. The
straight-through estimator replaces round(x) by x in the backward pass alone. What else there is
in `(clamp(round(w / s) + z) - z) s` keeps its own derivative, from which both rules follow:

- a weight gets the gradient of its rounded value where its code did not saturate, else 0;
- a step size s that is learned (LSQ) gets round(w/s) - w/s there, and the code at the ends.

LSQ clips before it rounds, so it stops the gradient half a step earlier than "did not saturate"
does; a range from minimum to maximum would then stop the gradient of its own ends.

LLM-QAT trains weights, activations and KV cache together (its data-free distillation is in
`llm_qat`). Weights are symmetric with a scale a row, activations and KV symmetric with a scale a
token; keys are rounded before RoPE and a token's heads share a scale, as its released code has it.

The released code of LLM-QAT drops the gradient of every number of magnitude 2 or more, although
its forward pass clips nothing; here the rule above holds.

Sources: straight-through estimator, arXiv 1308.3432; LSQ, arXiv 1902.08153, section 2
(eq. 3, and the gradient's scale and the initial step, section 2.2 and 2.1); LLM-QAT, arXiv
2305.17888, "Quantization-aware training".

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.finetune import change_layers, plain_layer, replace_weights
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.grids import Grid, fit_grid, round_up_to_fp16, to_groups
from rooflm.roofline.numeric import shorten

UNQUANTIZED = 16  # bits that stand for "as it is"
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16 number


class _StraightThrough(torch.autograd.Function):
    """Forward the second argument, backward to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replacement: Tensor) -> Tensor:
        return replacement.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def straight_through(x: Tensor, replacement: Tensor) -> Tensor:
    """The value of `replacement`, to the bit, with the gradient of x; both of one shape.

    >>> x = torch.tensor([0.4, 1.7], requires_grad=True)
    >>> y = straight_through(x, x.round())
    >>> y.square().sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 2.0], [0.0, 4.0])
    """
    return _StraightThrough.apply(x, replacement)


def project_straight_through(grouped: Tensor, grid: Grid) -> Tensor:
    """`grids.project`, to the bit, with a gradient for the numbers and for the grid's scale.

    Parameters
    ----------
    grouped : of a shape that broadcasts with `grid.scale`.
    grid : its scale may require a gradient.

    Returns
    -------
    Tensor
        of the shape of `grouped`.

    Source: LSQ, arXiv 1902.08153, eq. 1-3 and 5.
    """
    ratio = grouped / grid.scale
    codes = straight_through(ratio, ratio.round()) + grid.zero
    return (codes.clamp(grid.lowest, grid.highest) - grid.zero) * grid.scale


def fake_quantize(
    weight: Tensor, bits: int, group: int = 0, symmetric: bool = True, clip: str | None = None
) -> Tensor:
    """`grids.round_to_nearest` that a gradient passes; the grid follows the weight, as a constant.

    Parameters
    ----------
    weight : (d_out, d_in).
    bits, group, symmetric, clip : as there.

    Returns
    -------
    Tensor
        (d_out, d_in), on the grid to the bit.
    """
    grouped = to_groups(weight, group)
    grid = fit_grid(grouped, bits, symmetric, clip)
    return project_straight_through(grouped, grid).reshape(weight.shape)


def fake_quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """Activations, keys or values (…, d) on a symmetric grid with a dynamic scale a token."""
    return project_straight_through(x, fit_grid(x, bits, symmetric=True))


def initial_step(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """The step size from which LSQ starts: 2 mean|w| / sqrt(2^(bits-1) - 1) in each group.

    Returns
    -------
    Tensor
        (d_out, d_in / group, 1), at least `SMALLEST_SCALE`.

    Source: LSQ, arXiv 1902.08153, section 2.1.
    """
    grouped = to_groups(weight, group)
    fit_grid(grouped[:1, :1], bits, symmetric=True)  # refuses bits out of range
    step = 2 * grouped.abs().mean(-1, keepdim=True) / (2 ** (bits - 1) - 1) ** 0.5
    return step.clamp(min=SMALLEST_SCALE)


def learned_step_quantize(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """A weight on a symmetric grid whose step size is a parameter (LSQ).

    Parameters
    ----------
    weight : (d_out, d_in).
    step : (d_out, d_in / group, 1), rounded up to FP16 in the forward pass. Its gradient is
        divided by sqrt(group (2^(bits-1) - 1)), which balances it against the weights' under
        plain gradient descent; Adam, which divides by the gradient's size, cancels it.
    bits : of a code, 2 to 8.

    Returns
    -------
    Tensor
        (d_out, d_in).

    Source: LSQ, arXiv 1902.08153, eq. 1-3 and section 2.2.
    """
    grouped = to_groups(weight, weight.shape[1] // step.shape[1])
    balance = (grouped.shape[-1] * (2 ** (bits - 1) - 1)) ** -0.5
    stored = straight_through(step, round_up_to_fp16(step.detach().clamp(min=SMALLEST_SCALE)))
    if stored.requires_grad:
        stored.register_hook(lambda gradient: gradient * balance)
    grid = Grid(stored, torch.zeros_like(step), bits, symmetric=True)
    return project_straight_through(grouped, grid).reshape(weight.shape)


class QuantizationAwareLinear(nn.Module):
    """A linear layer whose numbers are rounded in the forward pass; 16 bits are left as they are.

    Parameters
    ----------
    weight : (d_out, d_in), trained in full precision.
    bits, group, symmetric, clip : of the weight, as in `fake_quantize`.
    learned : whether the step size is trained too; then symmetric and without clip.
    input_bits, output_bits : of the activations that enter and, for keys and values, leave.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group: int = 0,
        symmetric: bool = True,
        clip: str | None = None,
        learned: bool = False,
        input_bits: int = UNQUANTIZED,
        output_bits: int = UNQUANTIZED,
    ) -> None:
        super().__init__()
        if learned and (not symmetric or clip is not None):
            raise ValueError("a learned step size is for a symmetric grid without clip")
        self.bits, self.group, self.symmetric, self.clip = bits, group, symmetric, clip
        self.input_bits, self.output_bits = input_bits, output_bits
        self.weight = nn.Parameter(weight.detach().clone())
        self.step = nn.Parameter(initial_step(weight, bits, group)) if learned else None

    def quantized(self) -> Tensor:
        """The weight as its codes stand for it, (d_out, d_in)."""
        if self.bits == UNQUANTIZED:
            return self.weight
        if self.step is not None:
            return learned_step_quantize(self.weight, self.step, self.bits)
        return fake_quantize(self.weight, self.bits, self.group, self.symmetric, self.clip)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        if self.input_bits != UNQUANTIZED:
            x = fake_quantize_tokens(x, self.input_bits)
        y = functional.linear(x, self.quantized())
        return y if self.output_bits == UNQUANTIZED else fake_quantize_tokens(y, self.output_bits)


def quantization_aware(
    model: Transformer,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    clip: str | None = None,
    learned: bool = False,
    activation_bits: int = UNQUANTIZED,
    kv_bits: int = UNQUANTIZED,
) -> Transformer:
    """A copy to train, whose blocks' linear layers compute with rounded numbers.

    Parameters
    ----------
    model : of plain layers; embedding, norms and head stay in full precision, and are trained.
    bits, group, symmetric, clip, learned : of the weights, as in `QuantizationAwareLinear`.
    activation_bits, kv_bits : of every linear layer's input, and of keys and values.

    Raises
    ------
    ValueError
        for bits other than 1 to 8 or 16, or sizes that the group does not divide.
    """
    for name, given in (("bits", bits), ("activation_bits", activation_bits), ("kv_bits", kv_bits)):
        if isinstance(given, bool) or given not in (*range(1, 9), UNQUANTIZED):
            raise ValueError(f"{name} is {shorten(given)}; allowed: 1 to 8, or 16 for none")

    def make(name: str, weight: Tensor) -> nn.Module:
        into_cache = kv_bits if name in ("k_proj", "v_proj") else UNQUANTIZED
        return QuantizationAwareLinear(
            weight, bits, group, symmetric, clip, learned, activation_bits, into_cache
        )

    result = replace_weights(model, make).requires_grad_(True)
    with torch.no_grad():
        result(torch.zeros(1, 1, dtype=torch.int64))  # refuses here what the grids would refuse
    return result


@torch.no_grad()
def frozen(model: Transformer) -> Transformer:
    """A copy of a model that `quantization_aware` made, its weights rounded once and for all.

    Layers become plain `nn.Linear`, where activations are not rounded too.
    """
    return change_layers(model, lambda block, name: _frozen_layer(getattr(block, name)))


def _frozen_layer(layer: QuantizationAwareLinear) -> nn.Module:
    if layer.input_bits == layer.output_bits == UNQUANTIZED:
        return plain_layer(layer.quantized())
    rounded = QuantizationAwareLinear(
        layer.quantized(),
        UNQUANTIZED,
        input_bits=layer.input_bits,
        output_bits=layer.output_bits,
    )
    return rounded.requires_grad_(False)
