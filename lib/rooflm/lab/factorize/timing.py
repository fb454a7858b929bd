"""Two thin products over one: how long they take on this processor.

All ways of one number of tokens take turns, so that a processor that slows down for a while slows
down all of them; the ratio is that of the fastest turns.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from rooflm.lab.factorize.svd import FactorizedLinear, Factors
from rooflm.lab.machine import time_call
from rooflm.roofline.numeric import size


def factor_times(side: int, ranks: Iterable[int], tokens: int, runs: int = 5) -> dict[int, float]:
    """The time of two factors over that of a square matrix, by their rank.

    Parameters
    ----------
    side : of the matrix, in FP32, filled at random.
    tokens : rows of the input.
    runs : turns, after one to warm up.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size("tokens", tokens), side, generator=generator)
    layers: dict[int, nn.Module] = {0: nn.Linear(side, side, bias=False)}
    for rank in ranks:
        a = torch.randn(size("rank", rank), side, generator=generator)
        layers[rank] = FactorizedLinear(Factors(a, a.T.contiguous()))
    best = dict.fromkeys(layers, float("inf"))
    with torch.inference_mode():
        for turn in range(1 + size("runs", runs)):
            for rank, layer in layers.items():
                seconds = time_call(partial(layer, x), runs=1, warmup=0).best_s
                if turn:
                    best[rank] = min(best[rank], seconds)
    whole = best.pop(0)
    return {rank: seconds / whole for rank, seconds in best.items()}
