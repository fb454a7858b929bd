"""OWL: how sparse each block should be, by how many outliers it has.

A block in which many weights have a Wanda score far above the mean is pruned less, one with few is
pruned more; the mean over blocks, which are of one size, is what was asked for. All linear layers
of a block get the same sparsity.

Conventions: the published code's, whose shares span a range exactly two `spread` wide around the
mean sparsity. The shares are of the full model, gathered once.

Source: OWL, arXiv 2310.05175, and the authors' code.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rooflm.lab.prune.masks import check_sparsity
from rooflm.roofline.numeric import shorten

TIMES_THE_MEAN = 5.0
SPREAD = 0.08


def outlier_share(scores: Sequence[Tensor], times: float = TIMES_THE_MEAN) -> float:
    """The share of a block's weights whose score exceeds `times` the block's mean score.

    Parameters
    ----------
    scores : Wanda's, of the linear layers of a block, of any shapes.
    """
    together = torch.cat([s.flatten() for s in scores])
    return (together > times * together.mean()).double().mean().item()


def block_sparsities(
    shares: Sequence[float], sparsity: float, spread: float = SPREAD
) -> list[float]:
    """The sparsity of each block.

    Parameters
    ----------
    shares : of outliers, by block.
    sparsity : the mean to be reached.
    spread : half of the range of the results.

    Returns
    -------
    list
        least where outliers are most; all equal where the shares are.

    Raises
    ------
    ValueError
        where a block would have to lose everything, or less than nothing.

    >>> [round(x, 2) for x in block_sparsities([0.0, 0.1, 0.2], 0.5, spread=0.1)]
    [0.6, 0.5, 0.4]
    """
    check_sparsity(sparsity)
    if not 0 <= spread < 0.5:
        raise ValueError(f"spread is {shorten(spread)}; allowed: from 0 to below 0.5")
    found = torch.tensor(list(shares), dtype=torch.float64)
    range_ = (found.max() - found.min()).item()
    kept = found / range_ * 2 * spread if range_ else torch.zeros_like(found)
    result: list[float] = (sparsity - (kept - kept.mean())).tolist()
    if min(result) < 0 or max(result) >= 1:
        raise ValueError(
            f"a block would lose {max(result):.2f} of its weights and another {min(result):.2f}; "
            "allowed: a smaller spread"
        )
    return result
