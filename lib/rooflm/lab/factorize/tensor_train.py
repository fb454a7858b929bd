"""Tensor trains: an embedding as chains of small cores, after TensorGPT.

A tensor of order N is a chain of N cores, X[i_1, …, i_N] = G_1[i_1] … G_N[i_N], where G_k[i_k] is
an r_{k-1} x r_k matrix and the ends are 1 wide. The SVD gives it from left to right: unfold, cut,
pass the rest on. The squared error of all cuts is at most the sum of what each cut left out.

An embedding becomes trains in two ways. In TensorGPT each token's vector is a tensor of its own,
with its own cores: the channel number is written with several digits. Or the whole matrix is one
tensor, whose k-th index is the k-th digit of the token with the k-th digit of the channel
(`matrix_train`). A train can use a digit only as far as neighbours in number have something in
common. The control is the same matrix with its channels, or its tokens, in a random order.

Cores are kept as (indices, r_{k-1}, width, r_k), one slice for each token or for each digit of it,
so that a row is looked up without the matrix: gather N slices, multiply them up.

Sources: TT-SVD, Oseledets, SIAM J. Sci. Comput. 33 (2011), 2295, algorithm 1 and theorem 2.2;
TensorGPT, arXiv 2307.00526; a matrix as one train, arXiv 1901.10787.

Chapter: factorization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.factorize.svd import check_matrix
from rooflm.roofline.numeric import shorten, size


class Train(NamedTuple):
    """Trains of one shape, one for each item of a batch.

    Parameters
    ----------
    cores : of (batch, r_{k-1}, n_k, r_k) each; r_0 = r_N = 1.
    left_out : (batch,), the sum of the squares that the cuts left out; no less than the error.
    """

    cores: list[Tensor]
    left_out: Tensor


def tt_svd(tensors: Tensor, rank: int) -> Train:
    """Tensor trains by successive singular value decompositions.

    Parameters
    ----------
    tensors : (batch, n_1, …, n_N).
    rank : the largest width of a chain; a place that needs less gets less.

    Returns
    -------
    Train
        float64. With no cut at all it is exact.

    Source: Oseledets (2011), algorithm 1.
    """
    size("rank", rank)
    batch, *modes = tensors.shape
    if not modes:
        raise ValueError(f"tensors is of shape {tuple(tensors.shape)}; allowed: (batch, n_1, …)")
    rest = tensors.double().reshape(batch, 1, -1)
    cores, left_out = [], torch.zeros(batch, dtype=torch.float64)
    for n in modes[:-1]:
        before = rest.shape[1]
        unfolded = rest.reshape(batch, before * n, -1)
        left, singular, right = torch.linalg.svd(unfolded, full_matrices=False)
        kept = min(rank, singular.shape[1])
        left_out = left_out + singular[:, kept:].square().sum(1)
        cores.append(left[:, :, :kept].reshape(batch, before, n, kept))
        rest = singular[:, :kept, None] * right[:, :kept]
    cores.append(rest.reshape(batch, rest.shape[1], modes[-1], 1))
    return Train(cores, left_out)


def multiply_up(slices: Sequence[Tensor]) -> Tensor:
    """Cores of (batch, r_{k-1}, n_k, r_k) to the tensors, flattened: (batch, n_1 … n_N)."""
    batch = slices[0].shape[0]
    chain = slices[0].reshape(batch, -1, slices[0].shape[-1])  # (batch, n_1, r_1)
    for core in slices[1:]:
        chain = chain @ core.flatten(2)  # (batch, n_1 … n_{k-1}, n_k r_k)
        chain = chain.reshape(batch, -1, core.shape[-1])
    return chain.reshape(batch, -1)


class TTEmbedding(nn.Module):
    """An embedding whose rows are multiplied up from cores when they are looked up.

    Parameters
    ----------
    cores : (indices_k, r_{k-1}, width_k, r_k) each; `token_train` and `matrix_train` make them.
    digits : how many values each digit of a token has, the first the most significant; None
        where every core has a slice of its own for each token.
    """

    def __init__(self, cores: Sequence[Tensor], digits: Sequence[int] | None = None) -> None:
        super().__init__()
        self.cores = nn.ParameterList(
            nn.Parameter(core.detach().float().clone(), requires_grad=False) for core in cores
        )
        self.digits = None if digits is None else tuple(digits)
        self.vocab = len(cores[0]) if digits is None else math.prod(digits)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, (vocab, hidden); a tied head reads it."""
        return self(torch.arange(self.vocab))

    @property
    def numbers(self) -> int:
        """Numbers in all cores."""
        return sum(core.numel() for core in self.cores)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of any shape to (…, hidden)."""
        flat = tokens.flatten()
        rows = multiply_up(
            [core[place] for core, place in zip(self.cores, self._places(flat), strict=True)]
        )
        return rows.reshape(*tokens.shape, -1)

    def _places(self, tokens: Tensor) -> list[Tensor]:
        if self.digits is None:
            return [tokens] * len(self.cores)
        places = []
        for values in reversed(self.digits):
            places.append(tokens % values)
            tokens = tokens // values
        return places[::-1]


def token_train(weight: Tensor, modes: Sequence[int], rank: int) -> TTEmbedding:
    """Each token's vector as a train of its own.

    Parameters
    ----------
    weight : (vocab, hidden).
    modes : sizes whose product is `hidden`.
    rank : the largest width of the chains.

    Source: TensorGPT, arXiv 2307.00526.
    """
    vocab, hidden = check_matrix(weight).shape
    _check_product("modes", modes, hidden)
    return TTEmbedding(tt_svd(weight.detach().reshape(vocab, *modes), rank).cores)


def matrix_train(
    weight: Tensor, rows: Sequence[int], columns: Sequence[int], rank: int
) -> TTEmbedding:
    """The whole matrix as one train, whose k-th mode is a digit of the row and one of the column.

    Parameters
    ----------
    weight : (vocab, hidden).
    rows, columns : sizes whose products are `vocab` and `hidden`, as many of each.
    rank : the largest width of the chain.

    Source: arXiv 1901.10787.
    """
    vocab, hidden = check_matrix(weight).shape
    _check_product("rows", rows, vocab)
    _check_product("columns", columns, hidden)
    if len(rows) != len(columns):
        raise ValueError(f"rows has {len(rows)} sizes and columns {len(columns)}; allowed: as many")
    n = len(rows)
    mixed = weight.detach().reshape(*rows, *columns)
    mixed = mixed.permute(*(x for k in range(n) for x in (k, n + k)))
    modes = [r * c for r, c in zip(rows, columns, strict=True)]
    cores = tt_svd(mixed.reshape(1, *modes), rank).cores
    sliced = [
        core[0].reshape(core.shape[1], r, c, core.shape[3]).transpose(0, 1)
        for core, r, c in zip(cores, rows, columns, strict=True)
    ]
    return TTEmbedding(sliced, rows)


def train_numbers(modes: Sequence[int], rank: int) -> int:
    """Numbers in one train of modes n_k, its chains as wide as they need be and at most `rank`.

    >>> train_numbers((4, 4, 4, 4), 2), train_numbers((4, 4, 4, 4), 16)
    (48, 544)
    """
    widths = [1]
    for k, n in enumerate(modes[:-1]):
        widths.append(min(rank, widths[-1] * n, math.prod(modes[k + 1 :])))
    widths.append(1)
    return sum(a * n * b for a, n, b in zip(widths, modes, widths[1:], strict=False))


def _check_product(name: str, sizes: Sequence[int], wanted: int) -> None:
    if not sizes or math.prod(sizes) != wanted:
        raise ValueError(f"{name} is {shorten(tuple(sizes))}; allowed: sizes of product {wanted}")
