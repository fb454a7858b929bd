"""From scores to masks: which weights stay, at a given sparsity and in a given pattern.

A mask is true where a weight is kept. *Sparsity* is the share of weights that go. Unstructured
masks compare the weights of a row or of the whole layer with each other; n:m masks keep exactly n
of every m neighbours along the inputs, so that a device can count on where they are. Of equal
scores the one further left is kept; the number of kept weights is exact.

Sources: per row or per layer, Wanda, arXiv 2306.11695, section 3; 2:4, Mishra et al., arXiv
2104.08378. SparseGPT's n counts the zeros; in 2:4 and 4:8 it is the same.

Chapter: pruning.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rooflm.roofline.numeric import shorten, unknown

SCOPES = ("row", "layer")
_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


def unstructured(scores: Tensor, sparsity: float, per: str = "row") -> Tensor:
    """The mask that keeps the weights of highest scores.

    Parameters
    ----------
    scores : (d_out, d_in).
    sparsity : share of weights that go, from 0 to below 1; rounded to whole weights.
    per : "row": as many in each row, a row being what one output reads; "layer": over all rows.

    Returns
    -------
    Tensor
        (d_out, d_in), bool.

    >>> unstructured(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), 0.5, per="layer").tolist()
    [[True, True], [False, False]]
    """
    check_sparsity(sparsity)
    if per not in SCOPES:
        raise unknown("per", per, SCOPES)
    compared = scores if per == "row" else scores.reshape(1, -1)
    kept = compared.shape[1] - round(sparsity * compared.shape[1])
    return keep_highest(compared, kept).view(scores.shape)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n highest of every m neighbours in a row.

    Parameters
    ----------
    scores : (d_out, d_in); m must divide d_in.

    Returns
    -------
    Tensor
        (d_out, d_in), bool.

    Source: arXiv 2104.08378.
    """
    if not 1 <= n <= m or scores.shape[-1] % m:
        raise ValueError(
            f"{n}:{m} on rows of {scores.shape[-1]}; allowed: n from 1 to m, m a divisor of the row"
        )
    return keep_highest(scores.unflatten(-1, (-1, m)), n).flatten(-2)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest along the last dimension."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def read_pattern(pattern: str) -> tuple[int, int]:
    """The n and m of "n:m".

    >>> read_pattern("2:4")
    (2, 4)
    """
    found = _PATTERN.fullmatch(pattern)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(f"pattern is {shorten(pattern)}; allowed: n:m with n at most m, as 2:4")
    return int(found[1]), int(found[2])


def make_mask(scores: Tensor, sparsity: float, pattern: str = "", per: str = "row") -> Tensor:
    """`n_of_m` where a pattern is given, which then sets the sparsity; else `unstructured`."""
    if pattern:
        return n_of_m(scores, *read_pattern(pattern))
    return unstructured(scores, sparsity, per)


def density(mask: Tensor) -> float:
    """The share of weights that are kept."""
    return mask.double().mean().item()


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity out of range."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {shorten(sparsity)}; allowed: from 0 to below 1")
