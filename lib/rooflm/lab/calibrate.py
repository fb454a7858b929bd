"""What compression needs to know of a layer's inputs, gathered from a model on a text.

The blocks are visited in order. Each is run as it is, and the inputs of its linear layers are
summed up; the caller may then change the block, and it is run again, so that the next block is
calibrated on what the changed ones hand to it (GPTQ, arXiv 2210.17323, section 5, "Setup").

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.model import Rope, Transformer, TransformerBlock

# Layers that read the same input share its statistics.
SHARED_INPUTS = {
    "q_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
LINEARS = tuple(name for names in SHARED_INPUTS.values() for name in names)


class InputStatistics(NamedTuple):
    """A layer's inputs X, (tokens, d_in), summed up.

    Parameters
    ----------
    hessian : X^T X / tokens, (d_in, d_in): the Hessian of the squared output error, up to 2.
    mean_abs, max_abs : of each channel, (d_in,).
    tokens : rows of X.
    """

    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int


class _Gatherer:
    """Sums X^T X, |X| and max|X| over batches, as a forward pre-hook."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.absolute: Tensor | float = 0.0
        self.largest: Tensor | None = None
        self.tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        largest = x.abs().amax(0)
        self.gram = self.gram + x.T @ x
        self.absolute = self.absolute + x.abs().sum(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.tokens += len(x)

    def summary(self) -> InputStatistics:
        assert isinstance(self.gram, Tensor) and isinstance(self.absolute, Tensor)
        assert self.largest is not None
        return InputStatistics(
            self.gram / self.tokens, self.absolute / self.tokens, self.largest, self.tokens
        )


def inner_linear(block: TransformerBlock, name: str) -> nn.Linear:
    """The `nn.Linear` of a layer, inside whatever wraps it under the attribute `linear`."""
    layer = getattr(block, name)
    while not isinstance(layer, nn.Linear):
        layer = layer.linear
    return layer


def plain_linear(block: TransformerBlock, name: str) -> nn.Linear:
    """The block's layer of that name, which must be an `nn.Linear` that nothing has replaced.

    A quantized or wrapped layer would not follow a change of its weight exactly.

    Raises
    ------
    ValueError
        for a layer of any other type.
    """
    linear = getattr(block, name)
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__}; allowed: an unquantized nn.Linear")
    return linear


def calibration_rows(tokens: Tensor, rows: int, window: int, seed: int = 0) -> Tensor:
    """Windows drawn at random from a text, (rows, window)."""
    if len(tokens) < window:
        raise ValueError(f"the text has {len(tokens)} tokens; allowed: at least {window}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - window + 1, (rows,), generator=generator)
    return torch.stack([tokens[s : s + window] for s in starts.tolist()])


@torch.no_grad()
def visit_blocks(
    model: Transformer, rows: Tensor, batch: int = 4
) -> Iterator[tuple[TransformerBlock, dict[str, InputStatistics]]]:
    """Each block with the statistics of its linear layers' inputs, by layer name.

    Parameters
    ----------
    model : its blocks may be changed between two steps of the iteration.
    rows : (rows, window), tokens of the calibration text.
    """
    states = [model.embedding(part) for part in rows.split(batch)]
    for block in model.layers:
        gatherers = {name: _Gatherer() for name in SHARED_INPUTS}
        hooks = [
            inner_linear(block, name).register_forward_pre_hook(gatherer)
            for name, gatherer in gatherers.items()
        ]
        _run(block, states, model.rope)
        for hook in hooks:
            hook.remove()
        found = {name: gatherer.summary() for name, gatherer in gatherers.items()}
        yield (
            block,
            {name: found[first] for first, names in SHARED_INPUTS.items() for name in names},
        )
        states = _run(block, states, model.rope)


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
    try:
        model.states(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def fisher_information(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """The mean squared gradient of each linear weight, by its name, over rows of a text.

    Parameters
    ----------
    rows : (rows, window), tokens; the loss of a row is the sum over its predictions.

    Returns
    -------
    dict
        "layers.0.q_proj": (d_out, d_in), and so on: the diagonal of the empirical Fisher matrix,
        which stands for the Hessian's (SqueezeLLM, arXiv 2306.07629, section 4.1).
    """
    with differentiable(model) as weights:
        found = {name: torch.zeros_like(w) for name, w in weights.items()}
        for row in rows:
            logits = model(row[None, :-1])[0]
            loss = functional.cross_entropy(logits, row[1:], reduction="sum")
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(found, gradients, strict=True):
                found[name] += gradient.square() / len(rows)
    return found


@contextmanager
def differentiable(model: Transformer) -> Iterator[dict[str, Tensor]]:
    """The linear weights of the blocks by name, "layers.0.q_proj" and so on, open to gradients."""
    weights = {
        f"layers.{i}.{name}": inner_linear(block, name).weight
        for i, block in enumerate(model.layers)
        for name in LINEARS
    }
    before = [w.requires_grad for w in weights.values()]
    try:
        with torch.enable_grad():
            for w in weights.values():
                w.requires_grad_(True)
            yield dict(weights)
    finally:
        for w, needed in zip(weights.values(), before, strict=True):
            w.requires_grad_(needed)


def _run(block: Callable[..., Tensor], states: list[Tensor], rope: Rope) -> list[Tensor]:
    return [block(x, rope, None) for x in states]
