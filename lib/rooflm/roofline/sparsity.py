"""Sparse weights: what zeros save in bytes, once the places of the other values are stored too.

A layout stores the non-zeros and where they stand. Either every element of the dense matrix takes
a bit of a mask (bitmap), or every non-zero takes an index (CSR, Tiled-CSL, N:M). Its cost is linear
in the density, so that the density below which it saves bytes has a closed form.

What is stored is per element of the *dense* matrix, and FLOPs stay dense: such weights are loaded
sparse and computed dense (Flash-LLM), but for 2:4 where a device has a rate for it (`hardware`).
Neglected are row pointers of CSR (32 bits a row: 0.008 bits an element in rows of 4096) and the
padding of Tiled-CSL (at most 3 words a tile: 0.012 bits an element).

Sources: bitmap, SparseGPT, arXiv 2301.00774, section 3.5 (50 % of 4-bit weights and a mask take 3
bits); Tiled-CSL, Flash-LLM, arXiv 2309.10285, section 4.3.1, and its code (a 16-bit value and its
16-bit place in one word, 32 bits for every tile of 128 x 64); 2:4, arXiv 2104.08378 (two of four
are kept, each with 2 bits for its place).

Chapter: pruning.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rooflm.roofline.numeric import Number

_TILE = 128 * 64  # elements of a tile of Tiled-CSL


class Index(NamedTuple):
    """What a layout stores beside the values: bits for a non-zero, and bits for every element."""

    of_nonzero: Number
    of_element: Number


INDEXES = {
    "bitmap": Index(0, 1),
    "csr16": Index(16, 0),  # rows of up to 65536 elements
    "csr32": Index(32, 0),
    "tiled-csl": Index(16, 32 / _TILE),
}


class Layout(NamedTuple):
    """How a sparse matrix is stored.

    Parameters
    ----------
    name : as it stands in the name of a format: "2:4", "50%-bitmap".
    density : the share of elements that are kept; N / M, or 1 less the sparsity.
    places : bits of their places.
    """

    name: str
    density: Number
    places: Index


DENSE = Layout("", 1, Index(0, 0))
TWO_FOUR = "2:4"


def stored_bits(value_bits: Number, density: Number, index: Index) -> Number:
    """Bits per element of the dense matrix: density (value + index) + mask.

    >>> stored_bits(16, 0.5, INDEXES["bitmap"]), stored_bits(16, 0.5, INDEXES["csr16"])
    (9.0, 16.0)
    """
    return density * (value_bits + index.of_nonzero) + index.of_element


def break_even_density(
    value_bits: Number, index: Index, dense_bits: Number | None = None
) -> Number:
    """The density below which a layout takes fewer bytes than a dense matrix.

    Parameters
    ----------
    value_bits : bits of a value that is kept.
    index : of `INDEXES`.
    dense_bits : of an element of the dense matrix; None for those of the value.

    Returns
    -------
    number
        (dense - mask) / (value + index); 0 or less where no density saves.

    >>> break_even_density(16, INDEXES["csr16"]), break_even_density(16, INDEXES["bitmap"])
    (0.5, 0.9375)
    >>> break_even_density(16, INDEXES["bitmap"], dense_bits=4)  # FP16 values against dense INT4
    0.1875
    """
    dense = value_bits if dense_bits is None else dense_bits
    return (dense - index.of_element) / (value_bits + index.of_nonzero)


def crossing_density(value_bits: Number, one: Index, other: Index) -> Number:
    """The density at which two layouts of the same values take as many bytes.

    The layout with the larger index of a non-zero takes fewer bytes below it.

    >>> crossing_density(16, INDEXES["bitmap"], INDEXES["csr16"])
    0.0625
    """
    return (one.of_element - other.of_element) / (other.of_nonzero - one.of_nonzero)


def pattern(kept: int, of: int) -> Layout:
    """N:M, N values of every M kept: 2:4 is `pattern(2, 4)`. Each has ceil(log2 M) bits of place.

    (SparseGPT and Wanda count the zeros: their n:m is (m - n):m here, the same for 2:4 and 4:8.)

    >>> pattern(2, 4).places.of_nonzero, pattern(4, 8).places.of_nonzero
    (2, 3)
    """
    return Layout(f"{kept}:{of}", kept / of, Index((of - 1).bit_length(), 0))


def break_even_bits(kept: Number, of: Number, place_bits: Number) -> Number:
    """The width of a value above which N:M takes fewer bytes than the dense matrix.

    N (value + place) = M value: N place / (M - N), which is 2 bits for 2:4.

    >>> break_even_bits(2, 4, 2)
    2.0
    """
    return kept * place_bits / (of - kept)


_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")
_SHARE = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,4})?)%-(" + "|".join(INDEXES) + ")")


def read_layout(text: str, value_bits: Number) -> Layout | None:
    """The layout that a name's end stands for; None for none.

    Parameters
    ----------
    text : "N:M" with N < M, or "P%-" and one of `INDEXES`, P being the share of zeros.
    value_bits : of the values it is to hold; Tiled-CSL holds 16-bit values alone.

    >>> read_layout("70%-bitmap", 16).density
    0.3
    """
    if found := _PATTERN.fullmatch(text):
        kept, of = int(found[1]), int(found[2])
        return pattern(kept, of) if kept < of else None
    found = _SHARE.fullmatch(text)
    if found is None or (found[2] == "tiled-csl" and value_bits != 16):
        return None
    return Layout(text, (100 - float(found[1])) / 100, INDEXES[found[2]])
