"""Recovery: a short training of all that a pruned model has left, zeros kept at zero.

Sheared LLaMA prunes to a smaller shape and then goes on with pretraining. Here the second half is a
few minutes of next-token training on a text; the shape comes from `remove`, or the zeros from a
mask. A masked layer multiplies its weight by the mask in every pass, so that no gradient reaches
what is zero, whatever the optimizer keeps.

Sources: Sheared LLaMA, arXiv 2310.06694; AdamW, arXiv 1711.05101.

Chapter: pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.finetune import Progress, fit, next_token_loss
from rooflm.lab.model import Transformer


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


def zeros(model: Transformer) -> int:
    """How many weights of the blocks' linear layers are 0."""
    return sum(
        int(torch.count_nonzero(plain_linear(block, name).weight == 0))
        for block in model.layers
        for name in LINEARS
    )
