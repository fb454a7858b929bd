"""Structured removal: the smaller model that is left when layers, heads or channels go.

What is removed whole needs no index and no kernel of its own: the same operators run on smaller
shapes, under either roof. A layer takes its cache along, a KV head its part of it.

Sources: LLM-Pruner, arXiv 2305.11627, section 3.1 (a head or a channel is a group: all that hangs
together with it goes too); Sheared LLaMA, arXiv 2310.06694 (layers, heads, channels and width).

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rooflm.roofline.config import load_model
from rooflm.roofline.model import Block, Model
from rooflm.roofline.numeric import Number, shorten, size


def shrink(
    model: Model | str | dict[str, Any],
    layers: Number | Sequence[int] | None = None,
    kv_heads: Number | None = None,
    intermediate: Number | None = None,
    hidden: Number | None = None,
) -> Model:
    """The model with so many of each left; None leaves them as they are.

    Parameters
    ----------
    layers : layers that are left; of a model with several kinds of layers, one number for each
        kind, in the order of `Model.blocks`.
    kv_heads : KV heads that are left in a layer. With a KV head go the query heads that read it.
    intermediate : channels that are left of an MLP.
    hidden : width that is left of the residual stream; heads keep theirs.

    Raises
    ------
    ValueError
        for more than there are, or for heads, channels or width of a layer that is not softmax
        attention with a dense MLP.

    >>> small = shrink("meta-llama/Llama-2-7b-hf", layers=24)
    >>> small.layers, f"{small.parameters / 1e9:.2f} billion"
    (24, '5.12 billion')
    """
    model = load_model(model)
    if layers is not None:
        model = replace(model, blocks=_fewer_layers(model, layers))
    if kv_heads is None and intermediate is None and hidden is None:
        return model
    blocks = tuple((n, _smaller(b, kv_heads, intermediate, hidden)) for n, b in model.blocks)
    width = model.hidden if hidden is None else hidden
    return replace(model, blocks=blocks, hidden=width)


def _fewer_layers(model: Model, layers: Number | Sequence[int]) -> tuple[tuple[int, Block], ...]:
    counts = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if len(counts) != len(model.blocks):
        kinds = ", ".join(f"{n} {_kind(block)}" for n, block in model.blocks)
        raise ValueError(
            f"layers is {shorten(layers)}; allowed for {model.name}: {len(model.blocks)} numbers, "
            f"one for each of {kinds}"
        )
    pairs = zip(counts, model.blocks, strict=True)
    kept = tuple((_at_most("layers", n, count, 0), block) for n, (count, block) in pairs)
    if not any(type(count) is not int or count for count, _ in kept):
        raise ValueError(f"layers is {shorten(layers)}; allowed: at least one in all")
    return tuple((count, block) for count, block in kept if type(count) is not int or count)


def _smaller(
    block: Block, kv_heads: Number | None, intermediate: Number | None, hidden: Number | None
) -> Block:
    mixer, mlp = block.dense("structured removal")
    if kv_heads is not None:
        left = _at_most("kv_heads", kv_heads, mixer.kv_heads)
        heads = left * mixer.heads
        exact = type(heads) is int and type(mixer.kv_heads) is int
        heads = heads // mixer.kv_heads if exact else heads / mixer.kv_heads
        mixer = replace(mixer, heads=heads, kv_heads=left)
    if intermediate is not None:
        left = _at_most("intermediate", intermediate, mlp.intermediate)
        mlp = replace(mlp, intermediate=left)
    if hidden is not None:
        left = _at_most("hidden", hidden, mixer.hidden)
        mixer, mlp = replace(mixer, hidden=left), replace(mlp, hidden=left)
    return replace(block, mixer=mixer, mlp=mlp)


def _at_most(name: str, left: Number, whole: Number, smallest: int = 1) -> Number:
    left = size(name, left, smallest)
    if type(left) is int and type(whole) is int and left > whole:
        raise ValueError(f"{name} is {left}; allowed: {smallest} to {whole}")
    return left


def _kind(block: Block) -> str:
    return " and ".join(type(part).__name__ for part in (block.mixer, block.mlp) if part)
