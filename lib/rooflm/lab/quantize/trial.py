"""Number formats tried: on numbers of a kind, on a model's weights, on what its layers read.

`try_format` is for the explorer: its numbers are cut into groups that share a scale, whatever
block the format's standard asks for, so that formats can be compared at one group size.

Chapter: number formats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.calibrate import LINEARS, inner_linear
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.evaluate import Comparison
from rooflm.lab.model import Transformer
from rooflm.lab.quantize import codebook, codecs, float_codecs, grids, laws, measure, sweep
from rooflm.lab.quantize.float_codecs import E2M1, E4M3, E5M2, NF4_LEVELS, Stored
from rooflm.roofline.numeric import unknown

COUNT = 2**15  # numbers that are quantized
ZERO_POINT, SYMMETRIC = ", zero point", ", symmetric"
FORMATS = (
    *(f"int{bits}{kind}" for bits in (8, 4, 3, 2) for kind in (SYMMETRIC, ZERO_POINT)),
    "fp8-e4m3", "fp8-e5m2", "nf4", "mxfp4", "nvfp4", "q4_1", "binary",
)  # fmt: skip
# Of `roofline/formats.py`, by how their levels lie.
KINDS = {
    "uniform": (
        "int8", "int8-g64-sym", "int4", "int4-g128-sym", "int4-g128", "int4-g64-sym", "int4-g64",
        "int4-g32", "int3", "int3-g64", "int2", "int2-g64", "q4_1",
    ),
    "float": ("fp8-e4m3", "fp8-e5m2", "mxfp4", "nvfp4"),
    "non-uniform": ("nf4", "nf4-dq"),
    "few levels": ("ternary", "binary"),
}  # fmt: skip
_TEACHER = "teacher, "
NUMBERS = (
    "normal", "heavy-tailed",
    f"{_TEACHER}layers.0.q_proj", f"{_TEACHER}layers.2.gate_proj", f"{_TEACHER}layers.5.down_proj",
)  # fmt: skip
GROUPS = (8, 16, 32, 64, 128, 256)


class Trial(NamedTuple):
    """What came of it.

    Parameters
    ----------
    numbers : (groups, group), of root mean square 1 before an outlier enters each group.
    levels : (levels,), all that the group with the median scale can hold, rising.
    bits : stored per number, scales included.
    measured, predicted : SQNR in dB; predicted for normal numbers, None without a closed form.
    crest : the mean over the groups.
    """

    numbers: Tensor
    levels: Tensor
    bits: float
    measured: float
    predicted: float | None
    crest: float


def linear_weights(model: Transformer) -> list[Tensor]:
    """The weights of all linear layers inside the blocks, (d_out, d_in) each, block by block."""
    return [inner_linear(block, name).weight for block in model.layers for name in LINEARS]


@torch.no_grad()
def with_weights(model: Transformer, change: Callable[[Tensor], Tensor]) -> Transformer:
    """A copy of the model whose linear weights a function has changed."""
    result = copy.deepcopy(model)
    for weight in linear_weights(result):
        weight.copy_(change(weight))
    return result


def book_cost(weights: Sequence[Tensor], bits: int) -> tuple[float, float]:
    """As `measure.format_cost`, for a codebook of 2^bits FP16 numbers in each row, by k-means."""
    held = [codebook.squeezellm(weight, torch.ones_like(weight), bits) for weight in weights]
    count = sum(book.weight.numel() for book in held)
    stored = sum(book.bits_per_weight * book.weight.numel() for book in held)
    kept = iter(held)
    return stored / count, measure.sqnr_after(weights, lambda _: next(kept).weight)


def unbeaten(costs: Mapping[str, tuple[float, float]]) -> list[str]:
    """The frontier: formats that no other beats in SQNR at the same bits or fewer.

    Parameters
    ----------
    costs : by name, bits per weight and SQNR, as of `measure.format_cost`.

    >>> unbeaten({"a": (4.0, 20.0), "b": (4.5, 19.0), "c": (8.0, 40.0)})
    ['a', 'c']
    """
    return [
        name
        for name, (bits, found) in costs.items()
        if not any(other <= bits and more > found for other, more in costs.values())
    ]


def stored_losses(model: str = "teacher") -> list[tuple[str, float, Comparison]]:
    """What plain rounding to grids and formats costs a model, from the stored map.

    Parameters
    ----------
    model : of `sweep.load_map`, the name of a checkpoint.

    Returns
    -------
    list
        label, SQNR of all linear weights in dB, and the loss in bits per byte.
    """
    weights = linear_weights(load_checkpoint(model))
    found = []
    for row in sweep.load_map(model):
        if row["method"] == "format":
            name = row["options"].removeprefix("number_format=")
            quantize = partial(codecs.to_format, name=name)
        elif row["method"] == "round" and row["options"] in ("", "symmetric"):
            quantize = partial(
                grids.round_to_nearest,
                bits=row["bits"],
                group=row["group"],
                symmetric=bool(row["options"]),
            )
        else:
            continue
        kept = measure.sqnr_after(weights, quantize)
        found.append((sweep.label(row), kept, sweep.comparison(row)))
    return found


def token_sqnr(x: Tensor, kind: str, per: str) -> tuple[float, float]:
    """How well activations survive 8 bits, for the median token.

    Parameters
    ----------
    x : (tokens, d), what a layer reads.
    kind : "INT8", symmetric, or "FP8", E4M3.
    per : "tensor" or "token": what shares a scale, which is fitted to its largest magnitude.

    Returns
    -------
    tuple of float
        the largest magnitude under the token's scale over the token's root mean square, and the
        token's SQNR in dB; each the median over tokens.
    """
    if kind not in ("INT8", "FP8") or per not in ("tensor", "token"):
        raise ValueError(f"{kind} per {per}; allowed: INT8 or FP8, per tensor or token")
    x = x.float()
    shared = x if per == "token" else x.reshape(1, -1)
    if kind == "INT8":
        kept = grids.quantize_activations(shared)
    else:
        kept = float_codecs.scaled_fp8(shared).values
    peaks = shared.abs().amax(-1).expand(len(x))
    reach = peaks / x.square().mean(-1).sqrt()
    return reach.median().item(), measure.row_sqnr(x, kept.reshape(x.shape)).median().item()


@lru_cache(maxsize=16)
def try_format(name: str, group: int, numbers: str = "normal", outlier: int = 0) -> Trial:
    """Quantize and predict.

    Parameters
    ----------
    name, numbers : of `FORMATS` and `NUMBERS`; heavy-tailed is Student's t of 5 degrees.
    group : numbers that share a scale, of `GROUPS`.
    outlier : the first number of each group becomes so many standard deviations; 0 for none.

    Raises
    ------
    ValueError
        for an unknown format, kind of numbers or group.

    >>> try_format("int4, symmetric", 64).bits
    4.25
    """
    for what, given, allowed in (
        ("number format", name, FORMATS), ("kind of numbers", numbers, NUMBERS),
    ):  # fmt: skip
        if given not in allowed:
            raise unknown(what, given, allowed)
    if group not in GROUPS:
        raise ValueError(f"group is {group}; allowed: {', '.join(map(str, GROUPS))}")
    x = drawn(numbers).reshape(-1, group).clone()
    if outlier:
        x[:, 0] = outlier
    kept = _codec(name)(x)
    peaks = x.abs().amax(1)
    row = int(peaks.argsort()[len(peaks) // 2])
    return Trial(
        x,
        _levels(name, kept, row),
        8 * kept.bytes / x.numel(),
        measure.sqnr(x, kept.values),
        predict(name, group, outlier),
        measure.crest(x).mean().item(),
    )


def predict(name: str, group: int, outlier: int = 0) -> float | None:
    """SQNR in dB of normal numbers under a scale from their largest; None without a closed form.

    An outlier is the largest of its group by assumption.
    """
    if name.endswith(ZERO_POINT) or name in ("q4_1", "binary"):
        return None
    levels = _table(name)
    top = levels.abs().max()

    def scale(peaks: Tensor) -> Tensor:
        if name == "mxfp4":
            return float_codecs.power_of_two((torch.frexp(peaks.double())[1] - 3).long())
        return peaks / top

    if not outlier:
        return laws.decibels(measure.absmax_error(levels, group, scale))
    peak = torch.tensor([float(outlier)], dtype=torch.float64)
    own = (levels * scale(peak) - peak).square().min().item()
    rest = (group - 1) * measure.normal_error(levels * scale(peak))
    return 10 * math.log10((group - 1 + outlier**2) / (rest + own))


@lru_cache(maxsize=8)
def drawn(kind: str) -> Tensor:
    """(COUNT,) numbers of root mean square 1, the same at every call."""
    if kind.startswith(_TEACHER):
        _, index, name = kind.removeprefix(_TEACHER).split(".")
        weight = inner_linear(load_checkpoint("teacher").layers[int(index)], name).weight
        x = weight.detach().flatten()[:COUNT]
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(COUNT, generator=generator)
        if kind != "normal":  # a normal number over the root of the mean square of five others
            x = x / torch.randn(COUNT, 5, generator=generator).square().mean(1).sqrt()
    return x / x.double().square().mean().sqrt().float()


def _levels(name: str, kept: Stored, row: int) -> Tensor:
    def of_row(part: str) -> Tensor:
        return kept.parts[part].numbers.reshape(-1)[row].double()

    if "zero" in kept.parts:
        codes = torch.arange(2.0 ** int(name[3]), dtype=torch.float64)
        return (codes - of_row("zero")) * of_row("scale")
    if "minimum" in kept.parts:
        return torch.arange(16, dtype=torch.float64) * of_row("scale") + of_row("minimum")
    outer = kept.parts["tensor_scale"].numbers.item() if name == "nvfp4" else 1.0
    return _table(name) * of_row("scale") * outer


@lru_cache(maxsize=32)
def _table(name: str) -> Tensor:
    """The levels of a format before any scale, float64."""
    if name == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=torch.float64)
    if name == "binary":
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    floats = {"fp8-e4m3": E4M3, "fp8-e5m2": E5M2, "mxfp4": E2M1, "nvfp4": E2M1}
    if name in floats:
        return float_codecs.float_points(floats[name])
    top = 2 ** (int(name[3]) - 1) - 1
    return torch.arange(-top, top + 1, dtype=torch.float64)


def _codec(name: str) -> Callable[[Tensor], Stored]:
    """The library's codec, for rows that are groups."""
    if name.startswith("int"):
        return lambda x: codecs.integers(x, int(name[3]), 0, name.endswith(SYMMETRIC))
    if name.startswith("fp8"):
        return lambda x: float_codecs.scaled_fp8(x, E5M2 if name.endswith("e5m2") else E4M3)
    blocks: dict[str, Callable[..., Stored]] = {
        "nf4": float_codecs.nf4, "mxfp4": float_codecs.mxfp4, "nvfp4": float_codecs.nvfp4,
        "q4_1": codecs.q4_1,
    }  # fmt: skip
    return (lambda x: blocks[name](x, x.shape[1])) if name in blocks else codecs.binary
