"""The same zeros, timed on this processor: dense, compressed rows, 2:4 and a smaller matrix.

Four ways to compute y = W x where half of W is gone, with one row of inputs (decode, bound by
bytes) and with many (prefill, bound by FLOPs):

- `dense`: the zeros are multiplied like any other number.
- `csr32`: torch's compressed sparse rows, with 32-bit indices, which its kernel asks for.
- `2:4`: kept values and their places; a processor has no unit for it, so it is expanded to a dense
  matrix first (load as sparse, compute as dense), by torch and not by a kernel of its own.
- `removed`: half of the rows are gone, and the matrix is dense.

The prediction is a ratio of bytes (one row) or of FLOPs (many). Measured are ratios too, of the
fastest of several runs; the four take turns, so that a busy machine disturbs all alike, and each
finds its weights gone from the cache.

Source: load as sparse, compute as dense: Flash-LLM, arXiv 2309.10285.

Chapter: pruning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflm.lab.machine import Timing, thread_count, time_call
from rooflm.lab.prune import masks, scores
from rooflm.roofline.numeric import size
from rooflm.roofline.sparsity import INDEXES, pattern, stored_bits

VALUE_BITS = 32  # the laboratory computes in FP32


@dataclass(frozen=True)
class Product:
    """One way to multiply.

    Parameters
    ----------
    name : see above.
    bytes_share, flops_share : of the dense product's, as predicted.
    timing : measured.
    """

    name: str
    bytes_share: float
    flops_share: float
    timing: Timing


def make_products(
    d_out: int, d_in: int, rows: int, sparsity: float = 0.5, seed: int = 0
) -> dict[str, Callable[[], Tensor]]:
    """The four ways, on random numbers; each call returns (d_out or fewer, rows).

    Parameters
    ----------
    d_out, d_in : of the dense weight, d_in a multiple of 4.
    rows : of inputs.
    sparsity : share of the weights, or of the matrix's rows, that are gone; 2:4 has its own.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(d_in, size("rows", rows), generator=generator)
    drawn = scores.draw(weight, seed)
    zeroed = weight * masks.unstructured(drawn, sparsity)
    compressed = _compressed(zeroed)
    mask = masks.n_of_m(drawn, 2, 4)
    values, buffer = weight[mask], torch.zeros_like(weight)
    fewer = weight[: d_out - round(sparsity * d_out)].clone()
    return {
        "dense": lambda: zeroed @ x,
        "csr32": lambda: compressed @ x,
        "2:4": lambda: buffer.masked_scatter_(mask, values) @ x,
        "removed": lambda: fewer @ x,
    }


def time_products(
    d_out: int,
    d_in: int,
    rows: int,
    sparsity: float = 0.5,
    runs: int = 5,
    threads: int | None = None,
) -> list[Product]:
    """Time the four ways, the dense one first.

    Parameters
    ----------
    d_out, d_in, rows, sparsity : as in `make_products`.
    runs : rounds, after one to warm up.
    threads : torch threads; None for as many as torch uses already.
    """
    shares = byte_shares(sparsity)
    with thread_count(threads), torch.inference_mode():
        ways = make_products(d_out, d_in, rows, sparsity)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + size("runs", runs)):
            for name, way in ways.items():
                times[name].append(time_call(way, runs=1, warmup=0).best_s)
    flops = {"dense": 1.0, "csr32": 1 - sparsity, "2:4": 1.0, "removed": 1 - sparsity}
    return [
        Product(name, shares[name], flops[name], Timing.of(seconds[1:]))
        for name, seconds in times.items()
    ]


def byte_shares(sparsity: float = 0.5, value_bits: float = VALUE_BITS) -> dict[str, float]:
    """Bytes of each way's weight as a share of the dense one's.

    >>> byte_shares(0.5)
    {'dense': 1.0, 'csr32': 1.0, '2:4': 0.53125, 'removed': 0.5}
    """
    two_four = pattern(2, 4)
    return {
        "dense": 1.0,
        "csr32": stored_bits(value_bits, 1 - sparsity, INDEXES["csr32"]) / value_bits,
        "2:4": stored_bits(value_bits, two_four.density, two_four.places) / value_bits,
        "removed": 1 - sparsity,
    }


def _compressed(weight: Tensor) -> Tensor:
    """The weight as torch's compressed rows, with 32-bit indices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are in beta
        found = weight.to_sparse_csr()
        parts = found.crow_indices().int(), found.col_indices().int(), found.values()
        return torch.sparse_csr_tensor(*parts, size=weight.shape, check_invariants=True)
