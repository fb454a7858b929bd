"""What every kind of fine-tuning shares: batches, a loss, a training loop, layers to replace.

`fit` changes the parameters that require a gradient, in place, and nothing else; whoever wants
to keep a model hands in a copy, which is what `quantization_aware`, `qlora` and the others
return. It draws no random number: what is random are the batches, which follow from a seed.

Sources: AdamW, arXiv 1711.05101.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.roofline.numeric import shorten, size

LARGEST_GRADIENT = 1.0  # a longer gradient, of all parameters together, is cut to this length
WARMUP_SHARE = 0.1  # of the steps

# Called with the number of finished steps and the last loss.
Progress = Callable[[int, float], None]
Loss = Callable[[Transformer, Tensor], Tensor]


def fit(
    model: Transformer,
    batches: Iterable[Tensor],
    loss: Loss,
    steps: int,
    learning_rate: float,
    progress: Progress | None = None,
) -> list[float]:
    """Train what requires a gradient, in place, with AdamW and no weight decay.

    The rate rises linearly over the first tenth of the steps and falls linearly to 0 at the end.

    Parameters
    ----------
    model : changed.
    batches : as many as there are steps, at least.
    loss : (model, batch) to a scalar, such as `next_token_loss`.
    steps : optimizer steps.
    learning_rate : its peak.
    progress : see `Progress`.

    Returns
    -------
    list
        the loss of each step's batch before the step.

    Raises
    ------
    ValueError
        for arguments out of range, a model with nothing to train, too few batches, or a loss
        that is no longer finite.
    """
    size("steps", steps)
    if not 0 < learning_rate < 1:
        given = shorten(learning_rate)
        raise ValueError(f"learning_rate is {given}; allowed: between 0 and 1")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient; see `unfrozen`")
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _share_of_rate(step, steps)
        value = loss(model, batch)
        losses.append(value.item())
        if not torch.isfinite(value):
            raise ValueError(f"the loss of step {step} is {losses[-1]}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        if progress is not None:
            progress(step + 1, losses[-1])
    optimizer.zero_grad(set_to_none=True)
    if len(losses) < steps:
        raise ValueError(f"there were {len(losses)} batches; needed: one for each of {steps} steps")
    return losses


def next_token_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Cross entropy of each token given those before it, nats a token.

    Parameters
    ----------
    batch : (rows, window + 1), tokens; the last is predicted only.
    """
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def text_batches(tokens: Tensor, rows: int, window: int, seed: int = 0) -> Iterator[Tensor]:
    """Windows of a text, without end; each starts anywhere with equal chance.

    Parameters
    ----------
    tokens : (tokens,), the text.
    rows, window : of a batch, which is (rows, window + 1).
    seed : of all the draws.

    Raises
    ------
    ValueError
        for a text that is too short.
    """
    size("rows", rows), size("window", window)
    if len(tokens) <= window:
        raise ValueError(f"the text has {len(tokens)} tokens; allowed: more than {window}")
    windows = tokens.unfold(0, window + 1, 1)  # (tokens - window, window + 1), a view
    return row_batches(windows, rows, seed)


def row_batches(sequences: Tensor, rows: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches (rows, length) of rows of (sequences, length), drawn with repetition, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sequences[torch.randint(len(sequences), (rows,), generator=generator)]


def unfrozen(model: Transformer) -> Transformer:
    """A copy in which every parameter is trained: full fine-tuning."""
    return copy.deepcopy(model).requires_grad_(True)


def change_layers(
    model: Transformer, change: Callable[[TransformerBlock, str], nn.Module]
) -> Transformer:
    """A copy, frozen, with every linear layer of its blocks changed; the head stays.

    Parameters
    ----------
    change : (block, name) to the new layer; the name is that of the operator, such as "q_proj",
        and the block's layer of that name the new one's to keep.
    """
    result = copy.deepcopy(model).requires_grad_(False)
    for block in result.layers:
        for name in LINEARS:
            setattr(block, name, change(block, name))
    return result


def replace_weights(model: Transformer, make: Callable[[str, Tensor], nn.Module]) -> Transformer:
    """`change_layers` of a model of plain layers, from the weights alone.

    Parameters
    ----------
    make : (name, weight) to the new layer; the weight is (d_out, d_in).

    Raises
    ------
    ValueError
        for a model in which another technique has replaced a layer before.
    """
    return change_layers(model, lambda b, name: make(name, plain_linear(b, name).weight.detach()))


def plain_layer(weight: Tensor) -> nn.Linear:
    """An `nn.Linear` of a weight (d_out, d_in), frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def _share_of_rate(step: int, steps: int) -> float:
    """From above 0 at the first step, over 1, to above 0 at the last."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
