"""Sparse matrices in bytes: bitmap, compressed rows and n:m, encoded and read back.

The roofline's `sparsity` has what each takes per element. Here are the bytes themselves, so that
the formula has something to be held against and a matrix is what comes back.

- Bitmap: a bit for every element, rows in whole bytes, and the kept values.
- Compressed rows (CSR): for every kept value its column in 16 bits, and where each row begins.
- n:m: n values of every m, each with its place among the m; where fewer are not zero, zeros are
  stored too.

Values are FP16. `linear_bits` adds up what all linear layers of a model take, codes and scales of
rounded weights included.

Sources: bitmap, SparseGPT, arXiv 2301.00774, section 3.5; 2:4, Mishra et al., arXiv 2104.08378.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.prune.masks import keep_highest, read_pattern
from rooflm.lab.quantize.sensitive import stored_bits as quantized_bits
from rooflm.roofline.sparsity import pattern as pattern_layout

_LONGEST_ROW = 2**16  # that an index of 16 bits reaches


class Bitmap(NamedTuple):
    """A bit for every element, (d_out, d_in / 8) bytes, and the kept values in FP16."""

    bits: Tensor
    values: Tensor


class CompressedRows(NamedTuple):
    """Where each row begins, (d_out + 1,) int32; columns in uint16 and values in FP16, (kept,)."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    d_in: int


class Patterned(NamedTuple):
    """n FP16 values of every m, (d_out, groups * n), and their packed places, in bytes."""

    values: Tensor
    places: Tensor
    n: int
    m: int


Encoded = Bitmap | CompressedRows | Patterned


def to_bitmap(weight: Tensor) -> Bitmap:
    """The non-zeros of (d_out, d_in), d_in a multiple of 8."""
    mask = weight != 0
    return Bitmap(pack(mask, 1), weight[mask].half())


def from_bitmap(stored: Bitmap) -> Tensor:
    """The dense matrix, FP16."""
    mask = unpack(stored.bits, 1).bool()
    dense = torch.zeros(mask.shape, dtype=torch.float16)
    dense[mask] = stored.values
    return dense


def to_rows(weight: Tensor) -> CompressedRows:
    """The non-zeros of (d_out, d_in), d_in at most 65536."""
    d_out, d_in = weight.shape
    if d_in > _LONGEST_ROW:
        raise ValueError(f"rows are {d_in} long; allowed: {_LONGEST_ROW}, for indices of 16 bits")
    mask = weight != 0
    starts = torch.zeros(d_out + 1, dtype=torch.int32)
    starts[1:] = mask.sum(1).cumsum(0)
    return CompressedRows(starts, mask.nonzero()[:, 1].to(torch.uint16), weight[mask].half(), d_in)


def from_rows(stored: CompressedRows) -> Tensor:
    """The dense matrix, FP16."""
    counts = stored.starts.diff().long()
    dense = torch.zeros(len(counts), stored.d_in, dtype=torch.float16)
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    dense[rows, stored.columns.long()] = stored.values
    return dense


def to_pattern(weight: Tensor, n: int = 2, m: int = 4) -> Patterned:
    """The kept values of (d_out, d_in), at most n of every m.

    Raises
    ------
    ValueError
        where m neighbours hold more than n non-zeros, or m does not divide d_in.
    """
    if weight.shape[1] % m:
        raise ValueError(f"rows are {weight.shape[1]} long; allowed: a multiple of {m}")
    grouped = weight.unflatten(1, (-1, m))
    if (most := int((grouped != 0).sum(-1).max())) > n:
        raise ValueError(f"{most} of {m} neighbours are not zero; allowed: {n}")
    stored = keep_highest((grouped != 0).float(), n)
    places = stored.nonzero()[:, 2].view(len(weight), -1)
    values = grouped[stored].view(len(weight), -1).half()
    return Patterned(values, pack(places, (m - 1).bit_length()), n, m)


def from_pattern(stored: Patterned) -> Tensor:
    """The dense matrix, FP16."""
    d_out, n, m = len(stored.values), stored.n, stored.m
    places = unpack(stored.places, (m - 1).bit_length()).long().view(d_out, -1, n)
    dense = torch.zeros(d_out, places.shape[1], m, dtype=torch.float16)
    return dense.scatter_(2, places, stored.values.view(d_out, -1, n)).flatten(1)


def nbytes(stored: Encoded) -> int:
    """Bytes of all that is stored."""
    return sum(part.nbytes for part in stored if isinstance(part, Tensor))


def file_bits(weight: Tensor) -> dict[str, float]:
    """Bits that an encoded matrix takes for each of its elements, by layout.

    Parameters
    ----------
    weight : (d_out, d_in); 2:4 is among the layouts where it holds such zeros.

    Raises
    ------
    ValueError
        where a layout doesn't give back what it was given, in FP16.
    """
    codecs: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
        "csr16": (to_rows, from_rows),
        "bitmap": (to_bitmap, from_bitmap),
    }
    if int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2:
        codecs["2:4"] = (to_pattern, from_pattern)
    found = {}
    for name, (write, read) in codecs.items():
        stored = write(weight)
        if not torch.equal(read(stored), weight.half()):
            raise ValueError(f"{name} does not give the matrix back; allowed: exactly that")
        found[name] = 8 * nbytes(stored) / weight.numel()
    return found


def linear_bits(
    masks: Iterable[Tensor], pattern: str = "", bits: int | None = None, group: int = 0
) -> tuple[float, str]:
    """What the linear layers of a model take together, in the layout that takes least.

    Parameters
    ----------
    masks : (d_out, d_in) of each layer, true where a weight is kept; a kept weight is stored also
        where it is or rounds to 0.
    pattern : "n:m" where all masks keep n of every m, which is a layout of its own.
    bits, group : of codes that stand for the kept weights, with their scales and zero points, as
        many as a dense matrix has; None for FP16.

    Returns
    -------
    bits, layout
        in all, and "dense", "bitmap", "csr16" or the pattern.
    """
    found = dict.fromkeys(("dense", "bitmap", "csr16"), 0.0)
    per_element = 0.0
    if pattern:
        n, m = read_pattern(pattern)
        per_element = pattern_layout(n, m).places.of_nonzero * n / m
        found[pattern] = 0.0
    for mask in masks:
        (d_out, d_in), kept = mask.shape, int(mask.sum())
        value = 16.0 if bits is None else bits
        scales = (
            0 if bits is None else quantized_bits(d_out, d_in, bits, group) - d_out * d_in * bits
        )
        found["dense"] += value * mask.numel() + scales
        found["bitmap"] += value * kept + mask.numel() + scales
        found["csr16"] += (value + 16) * kept + 32 * (d_out + 1) + scales
        if pattern:
            found[pattern] += value * kept + per_element * mask.numel() + scales
    order = (pattern, *found) if pattern else tuple(found)  # of equals, what a device may have
    layout = min(order, key=lambda name: found[name])
    return found[layout], layout
