"""Small floating-point formats, and the block formats that are built of them.

A float format is a sign, a mantissa of M bits and an exponent; between two powers of two its
points are evenly spaced, 2^M of them. Rounding is to nearest, halves to even; numbers below the
smallest normal one are subnormal; numbers beyond the largest finite one saturate to it, as
inference libraries store them, also where the format has an infinity (FP16, BF16, E5M2).

A block format keeps small floats and a scale for every block of neighbours in a row: MXFP4 a
power of two for 32, NVFP4 an E4M3 number for 16 and one FP32 number for the tensor. FP8 weights
carry one FP32 scale a row. NF4, the "normal float", is a table of 16 levels under an FP32 scale
for 64, which double quantization stores in 8 bits.

Sources: FP8, arXiv 2209.05433, section 3 and table 1; E2M1, E8M0 and MXFP4, OCP Microscaling
Formats v1.0, sections 5 and 6.3 (scale: 2^(floor(log2 max|w|) - 2)); NVFP4, arXiv
2509.25149, appendix on the quantization procedure; NF4 and double quantization, QLoRA, arXiv
2305.14314, section 3 and appendix E.

Chapter: number formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.quantize.grids import to_groups


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Parameters
    ----------
    name : as the field writes it.
    mantissa_bits : stored bits after the point.
    lowest_exponent : of the smallest normal number, 2^lowest_exponent.
    largest : the largest finite number.
    """

    name: str
    mantissa_bits: int
    lowest_exponent: int
    largest: float


E2M1 = FloatFormat("FP4 E2M1", 1, 0, 6.0)
E4M3 = FloatFormat("FP8 E4M3", 3, -6, 448.0)  # 480 would be its NaN
E5M2 = FloatFormat("FP8 E5M2", 2, -14, 57344.0)
FP16 = FloatFormat("FP16", 10, -14, 65504.0)
BF16 = FloatFormat("BF16", 7, -126, (2 - 2.0**-7) * 2.0**127)
TF32 = FloatFormat("TF32", 10, -126, (2 - 2.0**-10) * 2.0**127)
FP32 = FloatFormat("FP32", 23, -126, (2 - 2.0**-23) * 2.0**127)


# Quantiles of the normal distribution, 8 above 0 and 7 below it, scaled to [-1, 1].
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Part(NamedTuple):
    """Numbers that are stored, each in `bits` bits: codes, scales or zero points."""

    numbers: Tensor
    bits: float


class Stored(NamedTuple):
    """A weight as a codec stores it.

    Parameters
    ----------
    values : (d_out, d_in), float32: what reading it gives.
    parts : what is kept of it, by name.
    """

    values: Tensor
    parts: dict[str, Part]

    @property
    def bytes(self) -> int:
        """Bytes of all parts, each packed without gaps."""
        return sum(math.ceil(part.numbers.numel() * part.bits / 8) for part in self.parts.values())


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for whole exponents from -1022 to 1023."""
    # The exponent field of a float64 holds exponent + 1023: no pow, hence no rounding.
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def round_to_float(x: Tensor, form: FloatFormat) -> Tensor:
    """Each number's nearest number in a float format, halves to even, saturating.

    Parameters
    ----------
    x : any shape.
    form : such as `E4M3`.

    Returns
    -------
    Tensor
        of the shape of x, float32.

    Source: IEEE 754 rounding to nearest; saturation, OCP Microscaling v1.0, section 6.3.

    >>> round_to_float(torch.tensor([0.3, 2.5, 3.5, 100.0]), E2M1).tolist()
    [0.5, 2.0, 4.0, 6.0]
    """
    wide = x.double()
    _, exponent = torch.frexp(wide)  # |x| = m 2^exponent with 1/2 <= m < 1
    exponent = (exponent - 1).clamp(min=form.lowest_exponent)  # subnormals share one spacing
    step = power_of_two(exponent - form.mantissa_bits)
    return (torch.round(wide / step) * step).clamp(-form.largest, form.largest).float()


def float_points(form: FloatFormat) -> Tensor:
    """All finite numbers of a format, ascending, zero once; float64.

    >>> float_points(E2M1).tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    steps = 2**form.mantissa_bits
    top = math.frexp(form.largest)[1] - 1
    mantissas = torch.arange(steps, 2 * steps, dtype=torch.float64)
    exponents = torch.arange(form.lowest_exponent, top + 1) - form.mantissa_bits
    normal = (power_of_two(exponents)[:, None] * mantissas).flatten()
    subnormal = torch.arange(1, steps, dtype=torch.float64) * power_of_two(exponents[0])
    positive = torch.cat([subnormal, normal[normal <= form.largest]])
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def cast(weight: Tensor, form: FloatFormat, bits: int) -> Stored:
    """A weight in a float format without a scale, `bits` an element."""
    values = round_to_float(weight, form)
    return Stored(values, {"elements": Part(values, bits)})


def scaled_fp8(weight: Tensor, form: FloatFormat = E4M3) -> Stored:
    """FP8 with an FP32 scale a row, which takes the row's largest magnitude to the format's.

    Parameters
    ----------
    weight : (d_out, d_in).
    form : `E4M3` or `E5M2`.

    Returns
    -------
    Stored
        with parts elements (d_out, d_in) and scale (d_out, 1).

    Source: arXiv 2209.05433, section 3.2 (scaling factors in software).
    """
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / form.largest
    scale = torch.where(scale == 0, 1.0, scale)  # a row of zeros: any scale holds it
    elements = round_to_float(weight / scale, form)
    return Stored(elements * scale, {"elements": Part(elements, 8), "scale": Part(scale, 32)})


def mxfp4(weight: Tensor, group: int = 32) -> Stored:
    """E2M1 elements under a power of two (E8M0) for each block.

    The scale puts the block's largest magnitude between 4 and 8; what then lies above 6
    saturates, which costs up to a quarter of that element.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements of a block, 32 in the standard.

    Returns
    -------
    Stored
        with parts elements (d_out, blocks, group) and scale (d_out, blocks, 1).

    Source: OCP Microscaling Formats v1.0, section 6.3.
    """
    grouped = to_groups(weight, group).double()
    _, exponent = torch.frexp(grouped.abs().amax(-1, keepdim=True))
    # floor(log2 max) less the exponent of E2M1's largest number, 6 = 1.5 x 2^2.
    scale = power_of_two((exponent - 1 - 2).clamp(-127, 127))
    elements = round_to_float(grouped / scale, E2M1)
    values = (elements * scale).float().reshape(weight.shape)
    return Stored(values, {"elements": Part(elements, 4), "scale": Part(scale.float(), 8)})


def nvfp4(weight: Tensor, group: int = 16) -> Stored:
    """E2M1 elements under an E4M3 scale for each block and an FP32 scale for the tensor.

    The tensor's scale takes its largest magnitude to 6 x 448, so that the largest block scale
    is E4M3's largest number. A block some 460 000 times smaller than that becomes zeros.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements of a block, 16 in the format.

    Returns
    -------
    Stored
        with parts elements (d_out, blocks, group), scale (d_out, blocks, 1) and
        tensor_scale (1,).

    Source: arXiv 2509.25149, appendix on the quantization procedure.
    """
    grouped = to_groups(weight, group).float()
    peak = grouped.abs().amax(-1, keepdim=True)
    tensor_scale = (peak.amax() / (E2M1.largest * E4M3.largest)).reshape(1)
    tensor_scale = torch.where(tensor_scale == 0, 1.0, tensor_scale)
    scale = round_to_float(peak / E2M1.largest / tensor_scale, E4M3)
    step = scale * tensor_scale
    ratio = torch.where(step == 0, 0.0, grouped / step)  # a block too small for its scale
    elements = round_to_float(ratio, E2M1)
    parts = {
        "elements": Part(elements, 4),
        "scale": Part(scale, 8),
        "tensor_scale": Part(tensor_scale, 32),
    }
    return Stored((elements * step).reshape(weight.shape), parts)


def nf4(weight: Tensor, group: int = 64, double_quantization: bool = False) -> Stored:
    """The nearest of 16 normal quantiles, times the largest magnitude of the block.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : elements of a block, 64 in the paper.
    double_quantization : whether the block scales are themselves quantized; codes are chosen
        for the scales as they will be read.

    Returns
    -------
    Stored
        with parts codes (d_out, blocks, group), 0 to 15, and scale (d_out, blocks, 1), or the
        parts of `quantize_scales`.

    Source: QLoRA, arXiv 2305.14314, section 3 and appendix E.
    """
    grouped = to_groups(weight, group).float()
    scale = grouped.abs().amax(-1, keepdim=True)
    kept = {"scale": Part(scale, 32)}
    if double_quantization:
        read = quantize_scales(scale.flatten())
        scale, kept = read.values.reshape(scale.shape), read.parts
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    ratio = torch.where(scale == 0, 0.0, grouped / scale)
    codes = torch.bucketize(ratio.contiguous(), boundaries)
    values = (levels[codes] * scale).reshape(weight.shape)
    return Stored(values, {"codes": Part(codes, 4), **kept})


def quantize_scales(scales: Tensor, group: int = 256) -> Stored:
    """Double quantization: block scales in FP8 E4M3 about their mean.

    The mean goes first, since scales are positive and a float format has a sign to use.

    Parameters
    ----------
    scales : (blocks,), not negative.
    group : scales that share an FP32 scale of their own, 256 in the paper; the last group may
        be shorter.

    Returns
    -------
    Stored
        values (blocks,), not negative; parts scale (blocks,) in E4M3, scale_of_scales
        (groups, 1) and scale_mean, of no dimension.

    Source: QLoRA, arXiv 2305.14314, section 3, "Double Quantization". The paper says 8-bit
    floats; E4M3 is our choice among them.
    """
    mean = scales.double().mean().float()
    padding = -len(scales) % group
    centred = torch.nn.functional.pad(scales - mean, (0, padding)).reshape(-1, group)
    outer = centred.abs().amax(1, keepdim=True) / E4M3.largest
    outer = torch.where(outer == 0, 1.0, outer)
    elements = round_to_float(centred / outer, E4M3)
    values = (elements * outer + mean).clamp(min=0).flatten()[: len(scales)]
    parts = {
        "scale": Part(elements.flatten()[: len(scales)], 8),
        "scale_of_scales": Part(outer, 32),
        "scale_mean": Part(mean, 32),
    }
    return Stored(values, parts)
