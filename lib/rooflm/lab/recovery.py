"""Recovery: a short training of all that a smaller model has left, zeros kept at zero.

Sheared LLaMA prunes to a smaller shape and then goes on with pretraining. Here the second half is a
few minutes of next-token training on a text; the shape comes from `remove`, or the zeros from a
mask. A masked layer multiplies its weight by the mask in every pass, so that no gradient reaches
what is zero, whatever the optimizer keeps.

Sources: Sheared LLaMA, arXiv 2310.06694; AdamW, arXiv 1711.05101.

Pruned and factorized models recover on the same text in the same batches, so that their rows in
the maps can be set side by side.

Chapter: pruning; factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab import text
from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.finetune import Progress, fit, next_token_loss, text_batches
from rooflm.lab.model import Transformer

BATCH_ROWS, WINDOW = 8, 128


class MaskedLinear(nn.Module):
    """A linear layer whose weight is multiplied by a mask, (d_out, d_in), in every pass."""

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("mask", mask.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return functional.linear(x, self.weight * self.mask)


def recover(
    model: Transformer,
    batches: Iterable[Tensor],
    steps: int,
    learning_rate: float,
    keep_zeros: bool = True,
    progress: Progress | None = None,
) -> Transformer:
    """A copy of a pruned model, trained.

    Parameters
    ----------
    model : with plain linear layers; its zeros are its masks.
    batches, steps, learning_rate, progress : as in `finetune.fit`.
    keep_zeros : False trains every weight again, for a model that is small and not masked.

    Returns
    -------
    Transformer
        with plain layers, in evaluation mode; where `keep_zeros`, zero where `model` is.
    """
    result = copy.deepcopy(model)
    if keep_zeros:
        for block in result.layers:
            for name in LINEARS:
                weight = plain_linear(block, name).weight
                setattr(block, name, MaskedLinear(weight, weight != 0))
    fit(result.requires_grad_(True), batches, next_token_loss, steps, learning_rate, progress)
    if keep_zeros:
        for block in result.layers:
            for name in LINEARS:
                layer = getattr(block, name)
                plain = nn.Linear(*layer.weight.shape[::-1], bias=False, device="meta")
                plain.weight = nn.Parameter(layer.weight.detach() * layer.mask)
                setattr(block, name, plain)
    return result.eval().requires_grad_(False)


def recovered(
    model: Transformer,
    tokens: Tensor,
    steps: int,
    learning_rate: float,
    keep_zeros: bool = True,
    seed: int = 0,
) -> Transformer:
    """A model recovered on a text, `BATCH_ROWS` windows of `WINDOW` tokens a step, as FP16.

    Parameters
    ----------
    tokens : (tokens,), such as `recovery_text`.
    seed : of the windows that are drawn.
    """
    batches = text_batches(tokens, BATCH_ROWS, WINDOW, seed)
    return halved(recover(model, batches, steps, learning_rate, keep_zeros))


def recovery_text() -> Tensor:
    """What recovery reads, (tokens,): Austen's novels but for the one measured on."""
    return torch.cat([text.encode(text.load_text(name)) for name in text.AUSTEN])


def halved(model: Transformer) -> Transformer:
    """The model with all that its blocks' linear layers hold rounded to FP16, in place."""
    for layer in model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.copy_(layer.weight.half())
    return model


def zeros(model: Transformer) -> int:
    """How many weights of the blocks' linear layers are 0."""
    return sum(
        int(torch.count_nonzero(plain_linear(block, name).weight == 0))
        for block in model.layers
        for name in LINEARS
    )
