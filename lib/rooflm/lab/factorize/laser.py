"""LASER: one matrix of one layer cut to a low rank, to make a model better, not smaller.

The authors found that a model answers some questions better when the small singular values of a
well chosen matrix are gone. The matrix stays a matrix: nothing is saved. Which one to cut, and to
what share of its rank, is found by trying: `scan` lists what there is to try, and whoever picks
the best of so many has to measure it again on text that did not take part in the choice.

Source: LASER, arXiv 2312.13558. The authors choose on a fifth of the labelled questions and test
on the rest; their code cuts with a randomized decomposition, here it is exact.

Chapter: factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.factorize.svd import decompose, truncate
from rooflm.lab.model import Config, Transformer
from rooflm.roofline.numeric import shorten, unknown

SHARES = (0.6, 0.1)  # of the rank


@dataclass(frozen=True)
class Cut:
    """One intervention.

    Parameters
    ----------
    layer : 0 for the first block.
    matrix : a name in `LINEARS`.
    share : of the smaller side of the matrix, which is the rank that is kept.
    """

    layer: int
    matrix: str
    share: float

    def __post_init__(self) -> None:
        if self.matrix not in LINEARS:
            raise unknown("matrix", self.matrix, LINEARS)
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {shorten(self.share)}; allowed: above 0, up to 1")


def reduce_rank(weight: Tensor, share: float) -> Tensor:
    """The weight's nearest matrix with a share of its rank, as dense as before.

    Parameters
    ----------
    weight : (d_out, d_in).
    share : rank floor(share min(d_out, d_in)), 1 at least.

    Source: LASER, arXiv 2312.13558.
    """
    rank = max(1, int(share * min(weight.shape) + 1e-9))
    return truncate(decompose(weight), rank).weight


@torch.no_grad()
def laser(model: Transformer, cut: Cut) -> Transformer:
    """A copy of the model with one matrix cut.

    Raises
    ------
    ValueError
        for a layer that the model does not have.
    """
    if not 0 <= cut.layer < model.config.layers:
        raise ValueError(f"layer is {cut.layer}; allowed: 0 to {model.config.layers - 1}")
    result = copy.deepcopy(model)
    weight = plain_linear(result.layers[cut.layer], cut.matrix).weight
    weight.copy_(reduce_rank(weight, cut.share))
    return result


def scan(config: Config) -> Iterator[Cut]:
    """Every matrix of every layer at every share of `SHARES`."""
    for layer in range(config.layers):
        for matrix in LINEARS:
            for share in SHARES:
                yield Cut(layer, matrix, share)


@torch.no_grad()
def correct_tokens(model: Transformer, tokens: Tensor, window: int, batch: int = 8) -> Tensor:
    """How many tokens of each block the model foresees as the most likely one, (blocks,).

    Parameters
    ----------
    tokens : (tokens,), a text, cut into blocks as by `evaluate`.
    """
    rows = tokens.unfold(0, window + 1, window)
    right = [(model(part[:, :-1]).argmax(-1) == part[:, 1:]).sum(1) for part in rows.split(batch)]
    return torch.cat(right).double()
