"""What a model's layers keep for a token and for a sequence, and what reading it costs.

Two numbers describe the cache of a sequence once its windows are full: bytes that each further
token adds, and bytes that stay. From the second and the first follow the context at which the
cache outweighs the weights, and from its attention's row where decoding stands on a roofline.

Source: survey (arXiv 2402.16363), section 2.1 and Figure 11, for keys and values of every head.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from rooflm.roofline.analysis import Report, Row
from rooflm.roofline.capacity import largest
from rooflm.roofline.config import load_model
from rooflm.roofline.factorized import attention_of
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.mixers import LatentAttention
from rooflm.roofline.model import Block, Model
from rooflm.roofline.numeric import LARGEST_SIZE

LAYER_KINDS = ("full", "local", "latent", "state", "shared")


class CacheCost(NamedTuple):
    """What one sequence keeps.

    Parameters
    ----------
    token_bytes : that one more token adds, once every window is full.
    fixed_bytes : of full windows and of states.
    layers : how many layers of each of `LAYER_KINDS`; "local" have a window, chunks or a budget,
        "shared" read the cache of another layer.
    """

    token_bytes: float
    fixed_bytes: float
    layers: dict[str, int]


def cache_cost(
    model: Model | str | dict[str, Any], precision: Precision | None = None
) -> CacheCost:
    """The bytes that a sequence keeps, for each token and beside them.

    >>> cache_cost("meta-llama/Llama-2-7b-hf").token_bytes
    524288.0
    """
    model, p = load_model(model), precision_of(precision)
    far = LARGEST_SIZE // 2  # beyond any window
    last, next_ = (model.cache_elements(1, context) for context in (far, far + 1))
    token = next_.kv - last.kv
    fixed = last._replace(kv=last.kv - far * token)
    layers: Counter[str] = Counter(dict.fromkeys(LAYER_KINDS, 0))
    for count, block in model.blocks:
        if block.mixer is not None:
            layers[_kind(block)] += count
    held = fixed.nbytes(p.kv_cache.bytes, p.state.bytes, p.activations.bytes)
    return CacheCost(float(token * p.kv_cache.bytes), float(held), dict(layers))


def crossover(
    model: Model | str | dict[str, Any], precision: Precision | None = None, batch: int = 1
) -> int | None:
    """The longest context at which the caches of `batch` sequences do not outweigh the weights.

    Returns
    -------
    int or None
        tokens of each sequence, 0 where one token is too many; None where no context is.

    >>> crossover("meta-llama/Llama-2-13b-hf")
    31777
    """
    model, p = load_model(model), precision_of(precision)
    weights = model.parameters * p.weights.bytes
    formats = p.kv_cache.bytes, p.state.bytes, p.activations.bytes

    def lighter(context: int) -> bool:
        return bool(model.cache_bytes(batch, context, *formats) <= weights)

    found = largest(lighter)
    return None if found == LARGEST_SIZE else found


def attention_row(report: Report) -> Row:
    """The fused attention of a pass, of the layers in which it costs most.

    Raises
    ------
    ValueError
        for a pass without one: of states alone, or unfused.
    """
    rows = [row for row in report.operators if row.name == "fused_attention"]
    if not rows:
        raise ValueError(f"the pass of {report.model.name} has no fused attention")

    def work(row: Row) -> float:
        flops = row.flops
        return float(flops.max() if hasattr(flops, "max") else flops)

    return max(rows, key=work)


def _kind(block: Block) -> str:
    if isinstance(block.mixer, LatentAttention):
        return "latent"
    mixer = attention_of(block.mixer)
    if mixer is None:
        return "state"
    if not mixer.own_cache:
        return "shared"
    return "local" if mixer.window or mixer.chunk or mixer.keep else "full"
