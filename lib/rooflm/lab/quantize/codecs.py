"""Every number format of `roofline/formats.py` as a codec on a real weight.

`to_format(weight, "nf4")` gives the numbers that remain after storing and reading; `store`
gives also the codes and scales themselves, from which `stored_bytes` counts what
`Format.bits` predicts. What the formula neglects, the count holds: one scale a row (bare
integers and binary, FP16; FP8, FP32) or a tensor (ternary, FP16; NVFP4, FP32) and the mean
scale of double quantization (FP32).

FP16 scales are rounded up, as in `grids`, except in Q4_1, which follows llama.cpp.

Sources: Q4_1, the reference quantizer of llama.cpp; ternary, BitNet b1.58, arXiv 2402.17764,
section 2, equations 1-3; binary, XNOR-Net, arXiv 1603.05279, section 3.1, equation 6; floats,
block floats and NF4, `float_codecs`.

Chapter: number formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rooflm.lab.quantize.binary import binarize
from rooflm.lab.quantize.float_codecs import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FP16,
    FP32,
    NF4_LEVELS,
    TF32,
    FloatFormat,
    Part,
    Stored,
    cast,
    float_points,
    mxfp4,
    nf4,
    nvfp4,
    scaled_fp8,
)
from rooflm.lab.quantize.grids import (
    LARGEST_FP16,
    decode,
    encode,
    fit_grid,
    round_up_to_fp16,
    to_groups,
)
from rooflm.roofline.formats import Format, load_format
from rooflm.roofline.numeric import shorten, size

_CASTS = {"fp32": FP32, "tf32": TF32, "fp16": FP16, "bf16": BF16}


def to_format(weight: Tensor, name: str) -> Tensor:
    """The numbers that remain of a weight after storing it in a format and reading it.

    Parameters
    ----------
    weight : (d_out, d_in), finite.
    name : a name that `load_format` knows. Bare integers are symmetric with a scale a row,
        grouped ones have a zero point unless they end in -sym; "fp8" is "fp8-e4m3", scaled by
        row, beside "fp8-e5m2"; fp16, bf16 and tf32 are casts.

    Returns
    -------
    Tensor
        (d_out, d_in), float32.

    Raises
    ------
    ValueError
        for an unknown name, a weight that is no finite matrix, or a group that does not
        divide d_in.

    >>> to_format(torch.tensor([[0.1, -0.4, 0.7]]), "ternary").tolist()
    [[0.0, -0.400146484375, 0.400146484375]]
    """
    return store(weight, name).values


def store(weight: Tensor, name: str) -> Stored:
    """A weight's values, codes and scales in a format; arguments and errors of `to_format`."""
    form = load_format(name)
    to_groups(weight, form.group)  # refuses what is no matrix or not divided
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds an infinity or a NaN; allowed: finite numbers")
    weight = weight.detach().float()
    if form.name in _CASTS:
        return cast(weight, _CASTS[form.name], int(form.element_bits))
    if form.name == "fp8":
        return scaled_fp8(weight, _fp8_kind(name))
    if form.name.startswith("int"):
        return integers(weight, int(form.element_bits), form.group, _is_symmetric(form))
    if form.name in ("ternary", "ternary-ideal"):
        return ternary(weight, packed=form.name == "ternary")
    if form.name == "binary":
        return binary(weight)
    if form.name in ("nf4", "nf4-dq"):
        return nf4(weight, form.group, double_quantization=form.name == "nf4-dq")
    codecs = {"mxfp4": mxfp4, "nvfp4": nvfp4, "q4_1": q4_1}
    if form.name not in codecs:  # a format that formats.py gained and this module did not
        raise ValueError(f"number format {shorten(name)} has no codec")
    return codecs[form.name](weight, form.group)


def grid_points(name: str) -> Tensor:
    """The points of a format's element grid, ascending, before any scale: for drawing.

    Codes of integers, ternary and binary; the levels of NF4; the finite numbers of a float
    format (of FP4 E2M1 for MXFP4 and NVFP4).

    Parameters
    ----------
    name : a name that `load_format` knows, of at most 16 bits or "tf32".

    Returns
    -------
    Tensor
        (points,), float64.

    Raises
    ------
    ValueError
        for an unknown name, and for fp32, whose 2^32 points are too many.

    >>> grid_points("int3").tolist()
    [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    form = load_format(name)
    if form.name == "fp32":
        raise ValueError("fp32 has 2^32 points; allowed: a format of fewer")
    floats = {**_CASTS, "fp8": _fp8_kind(name), "mxfp4": E2M1, "nvfp4": E2M1}
    if form.name in floats:
        return float_points(floats[form.name])
    if form.name in ("nf4", "nf4-dq"):
        return torch.tensor(NF4_LEVELS, dtype=torch.float64)
    if form.name in ("ternary", "ternary-ideal"):
        return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    if form.name == "binary":
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    codes = torch.arange(2 ** int(form.element_bits), dtype=torch.float64)
    return codes - len(codes) / 2 if _is_symmetric(form) else codes


def stored_bytes(shape: Sequence[int], name: str) -> int:
    """Bytes that a weight of that shape takes, counted from what the codec stores.

    The codec runs on a ramp of that shape, so a large shape takes as long as its quantization.

    Parameters
    ----------
    shape : (d_out, d_in).
    name : as in `to_format`.

    Returns
    -------
    int
        codes, scales and zero points, each packed without gaps.

    >>> stored_bytes((4, 128), "int4-g128"), 4 * 128 * 4.15625 / 8
    (266, 266.0)
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"shape is {shorten(shape)}; allowed: (d_out, d_in)")
    d_out, d_in = size("d_out", shape[0]), size("d_in", shape[1])
    return store(torch.linspace(-1, 1, d_out * d_in).reshape(d_out, d_in), name).bytes


def integers(weight: Tensor, bits: int, group: int = 0, symmetric: bool = True) -> Stored:
    """Uniform integers, rounded to nearest on the grid of `fit_grid`, a scale a group."""
    grouped = to_groups(weight, group).float()
    grid = fit_grid(grouped, bits, symmetric)
    codes = encode(grouped, grid)
    parts = {"codes": Part(codes, bits), "scale": Part(grid.scale, 16)}
    if not symmetric:
        parts["zero"] = Part(grid.zero, bits)
    return Stored(decode(codes, grid).reshape(weight.shape), parts)


def q4_1(weight: Tensor, group: int = 32) -> Stored:
    """4-bit codes with a scale and a minimum a block, both FP16: q d + m.

    As llama.cpp does it: codes are computed before d and m are rounded, halves round up, and
    the range need not contain 0. Weights beyond FP16's range saturate first, where llama.cpp may
    store an infinity.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements of a block, 32 in llama.cpp.

    Returns
    -------
    Stored
        with parts codes (d_out, blocks, group), scale and minimum (d_out, blocks, 1).
    """
    grouped = to_groups(weight, group).float().clamp(-LARGEST_FP16, LARGEST_FP16)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / 15
    # A constant block, or one so narrow that 1 / scale overflows: all codes 0.
    inverse = torch.where(torch.isfinite(1 / scale), 1 / scale, 0.0)
    codes = torch.floor((grouped - low) * inverse + 0.5).clamp(0, 15)
    scale, low = scale.half().float(), low.half().float()
    parts = {"codes": Part(codes, 4), "scale": Part(scale, 16), "minimum": Part(low, 16)}
    return Stored((codes * scale + low).reshape(weight.shape), parts)


def ternary(weight: Tensor, packed: bool = True) -> Stored:
    """Codes -1, 0 and 1 times the mean magnitude of the whole weight.

    The mean counts the weights that become 0, so a ternary weight comes back with the same
    codes under a smaller scale: BitNet trains with this function, and it is no projection.

    Parameters
    ----------
    weight : (d_out, d_in).
    packed : 2 bits a code, or the log2(3) bits of an ideal packing.

    Returns
    -------
    Stored
        with parts codes (d_out, d_in) and scale, of no dimension.

    Source: BitNet b1.58, arXiv 2402.17764, equations 1-3.
    """
    scale = round_up_to_fp16(weight.double().abs().mean().float())
    scale = torch.where(scale == 0, 1.0, scale)
    codes = torch.round(weight / scale).clamp(-1, 1)
    bits = 2 if packed else math.log2(3)
    return Stored(codes * scale, {"codes": Part(codes, bits), "scale": Part(scale, 16)})


def binary(weight: Tensor) -> Stored:
    """Signs times the row's mean magnitude, the scale of least squared error; 0 becomes +.

    Parameters
    ----------
    weight : (d_out, d_in).

    Returns
    -------
    Stored
        with parts codes (d_out, d_in), -1 or 1, and scale (d_out, 1).

    Source: XNOR-Net, arXiv 1603.05279, equation 6.
    """
    values = binarize(weight)
    codes = torch.where(weight < 0, -1.0, 1.0)
    scale = values[:, :1].abs()  # 0 for a row of zeros, which FP16 holds
    return Stored(values, {"codes": Part(codes, 1), "scale": Part(scale, 16)})


def _fp8_kind(name: str) -> FloatFormat:
    return E5M2 if name.strip().lower().endswith("e5m2") else E4M3


def _is_symmetric(form: Format) -> bool:
    return form.name.startswith("int") and (not form.group or form.name.endswith("-sym"))
