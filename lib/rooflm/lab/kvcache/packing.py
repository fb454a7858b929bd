"""Codes of 1 to 8 bits in whole bytes.

Codes of 1, 2, 4 and 8 bits fill a byte evenly, the first code in its lowest bits. Codes of other
widths are cut into planes of these widths, 3 = 2 + 1 bits: the low bits of all codes first, then
the next plane. What is stored is then exactly `bits` a code wherever 8 divides their number.

Chapter: KV cache quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.roofline.numeric import shorten


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in bytes, along the last dimension.

    Parameters
    ----------
    codes : (…, n), whole numbers in [0, 2^bits), of any dtype; n a multiple of 8 unless each of
        the planes of `bits` fills whole bytes with fewer.
    bits : 1 to 8.

    Returns
    -------
    Tensor
        (…, n * bits / 8), uint8.

    Raises
    ------
    ValueError
        for bits out of range, or a number of codes that leaves a byte unfilled.

    >>> pack(torch.tensor([1, 2, 3, 0]), 2).tolist()  # 1 + 2 * 4 + 3 * 16
    [57]
    """
    codes = codes.to(torch.uint8)
    parts, below = [], 0
    for width in planes(bits, codes.shape[-1]):
        plane = (codes >> below) & (2**width - 1)
        in_bytes = plane.unflatten(-1, (-1, 8 // width))
        packed = in_bytes[..., 0].clone()
        for place in range(1, 8 // width):
            packed |= in_bytes[..., place] << (place * width)
        parts.append(packed)
        below += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes of (…, n * bits / 8) bytes: (…, n), uint8; undoes `pack`."""
    count = packed.shape[-1] * 8 // bits
    found, start, below = None, 0, 0
    for width in planes(bits, count):
        length = count * width // 8
        part = packed[..., start : start + length]
        plane = packed.new_empty(*part.shape, 8 // width)
        for place in range(8 // width):
            plane[..., place] = (part >> (place * width)) & (2**width - 1)
        plane = plane.flatten(-2)
        found = plane if found is None else found | (plane << below)
        start, below = start + length, below + width
    assert found is not None
    return found


def planes(bits: int, count: int) -> list[int]:
    """The widths that `bits` is cut into, widest first; checks that they fill whole bytes.

    >>> planes(3, 64), planes(4, 2)
    ([2, 1], [4])
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise ValueError(f"bits is {shorten(bits)}; allowed: a whole number from 1 to 8")
    found = [width for width in (8, 4, 2, 1) if bits & width]
    if any(count * width % 8 for width in found):
        raise ValueError(f"{count} codes of {bits} bits leave a byte unfilled; allowed: 8, 16, …")
    return found
