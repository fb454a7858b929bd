"""What the chapter on quantization measures besides the map: errors by layout.

Chapter: KV cache quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rooflm.lab.kvcache.coded import Codec
from rooflm.lab.kvcache.distributions import (
    Captured,
    attention_weights,
    output_error,
    predicted_output_error,
    predicted_score_error,
    relative_error,
    rounding_variance,
    score_error,
)
from rooflm.lab.kvcache.kivi import Uniform


class LayoutErrors(NamedTuple):
    """Errors of one layout, means over layers.

    Parameters
    ----------
    keys, values : squared error as a part of the square.
    score_predicted, score : root mean square error of the scores, nats, from the ranges and of
        what was stored.
    output_predicted, output : squared error of attention's output as a part of its square, with
        the values rounded and the keys as they were.
    """

    keys: float
    score_predicted: float
    score: float
    values: float
    output_predicted: float
    output: float


def layout_errors(
    held: Captured, layers: Iterable[int], along: str, bits: int = 2, group: int = 32
) -> LayoutErrors:
    """What a uniform grid does to keys, scores, values and outputs.

    Parameters
    ----------
    held : of a text whose length is a multiple of `group`.
    layers : which ones to take the mean of.
    along, bits, group : as of `kivi.Uniform`.
    """
    codec, found = Uniform(bits, along, group), []
    for i in layers:
        q, k, v = held.queries[i], held.rotated[i], held.values[i]
        k_kept, v_kept = (codec.decode(codec.encode(x)) for x in (k, v))
        k_noise, v_noise = (rounding_variance(x, bits, along, group) for x in (k, v))
        found.append(
            (
                relative_error(k, k_kept),
                predicted_score_error(q, k, k_noise),
                score_error(q, k, k_kept),
                relative_error(v, v_kept),
                predicted_output_error(q, k, v, v_noise),
                output_error(q, k, v, (k, v_kept)),
            )
        )
    return LayoutErrors(*_means(found))


def spared_errors(
    held: Captured,
    layers: Iterable[int],
    along: str = "channel",
    bits: int = 2,
    group: int = 32,
    spared: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """The output's error from rounded values, where a few tokens are left as they were.

    Parameters
    ----------
    held, layers, along, bits, group : as in `layout_errors`.
    spared : tokens left alone: those that the layer's queries look at most, or as many by lot.
    seed : of the lot, the same tokens in all layers.
    """
    codec, found = Uniform(bits, along, group), []
    n = held.values[0].shape[2]
    by_lot = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:spared]
    for i in layers:
        q, k, v = held.queries[i], held.rotated[i], held.values[i]
        most = attention_weights(q, k).mean((0, 1, 2)).topk(spared).indices
        kept, errors = codec.decode(codec.encode(v)), []
        for places in (torch.arange(0), torch.arange(1), most, by_lot):
            mended = kept.clone()
            mended[:, :, places] = v[:, :, places]
            errors.append(output_error(q, k, v, (k, mended)))
        found.append(errors)
    names = ("nothing", "the first token", f"the {spared} most looked at", f"{spared} by lot")
    return dict(zip(names, _means(found), strict=True))


def sink_weights(held: Captured, start: int = 64) -> list[float]:
    """The mean weight on the first token, of each layer; queries before `start` do not count."""
    pairs = zip(held.queries, held.rotated, strict=True)
    return [attention_weights(q, k)[..., start:, 0].mean().item() for q, k in pairs]


def codec_costs(x: Tensor, codecs: Mapping[str, Codec]) -> list[tuple[str, float, float]]:
    """Rows for a table: name, stored bits a number, squared error as a part of the square."""
    rows = []
    for name, codec in codecs.items():
        stored = codec.encode(x)
        bits = 8 * sum(part.nbytes for part in stored) / x.numel()
        rows.append((name, bits, relative_error(x, codec.decode(stored))))
    return rows


def _means(found: list[Any]) -> list[float]:
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()
