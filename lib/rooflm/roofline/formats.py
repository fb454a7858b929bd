"""Number formats: how many bits an element takes, scales included, and at which rate it computes.

One home for every format of the book. `bits` is what is stored per element on average: a
grouped format carries its scales (and its zero points), a bare `int8` or `int4` is exactly 8
or 4 bits: one FP16 scale a channel is neglected, which is 0.4 % of 4-bit rows of 1000 elements
and less of longer or wider ones. So are one FP32 scale a row of FP8 or a tensor of NVFP4, one
FP16 scale a tensor of ternary weights, and the FP32 mean of NF4's double quantization. A sparse
format of weights is a format of its values and a layout (`sparsity`); its bits are those per
element of the dense matrix.

Sources: OCP Microscaling Formats v1.0 (MXFP4: 32 elements, one 8-bit scale); NVFP4,
arXiv 2509.25149 (16 elements, one E4M3 scale); NF4 and double quantization, QLoRA,
arXiv 2305.14314, section 3; Q4_1, llama.cpp (32 elements, FP16 scale and minimum); ternary,
BitNet b1.58, arXiv 2402.17764.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from rooflm.roofline.numeric import Number, shorten, unknown
from rooflm.roofline.sparsity import DENSE, INDEXES, Layout, read_layout, stored_bits

# The next wider formats that stand in, in this order, where a device lacks a rate.
_HALF = ("fp16", "bf16", "tf32", "fp32")
STAND_INS = {
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "fp16": _HALF,
    "bf16": ("bf16", "fp16", "tf32", "fp32"),
    "fp8": ("fp8", *_HALF),
    "fp4": ("fp4", "fp8", *_HALF),
    "int8": ("int8", *_HALF),
    "int4": ("int4", "int8", *_HALF),
}


@dataclass(frozen=True)
class Format:
    """A number format as stored in memory.

    Parameters
    ----------
    name : e.g. "fp16", "int4-g128", "fp16-2:4".
    element_bits : bits of one element without its scale; in a sparse format, of one that is kept.
    computes_as : the key of `STAND_INS` whose rate the matmul units would use.
    group : elements that share a scale; 0 where scales are per channel or absent.
    scale_bits : bits that one group adds (scale, zero point, minimum).
    layout : which elements are kept and how their places are stored; all of them by default.
    """

    name: str
    element_bits: float
    computes_as: str
    group: int = 0
    scale_bits: float = 0.0
    layout: Layout = DENSE

    @property
    def is_sparse(self) -> bool:
        """Whether only non-zeros are stored."""
        return bool(self.layout.name)

    @property
    def bits(self) -> float:
        """Bits per element, scales included; of a sparse format, per element of the dense matrix.

        A group of a sparse format counts elements of the dense matrix.
        """
        bits = self.element_bits
        if self.is_sparse:
            bits = stored_bits(bits, self.layout.density, self.layout.places)
        return bits + (self.scale_bits / self.group if self.group else 0.0)

    @cached_property
    def bytes(self) -> float:
        """Bytes per element, scales included: `w`, `a` or `k` of the formulas.

        >>> load_format("int4-g128").bytes * 8
        4.15625
        """
        return self.bits / 8


_BARE = {
    f.name: f
    for f in (
        Format("fp32", 32, "fp32"),
        Format("tf32", 32, "tf32"),  # 19 bits are used, 32 are stored
        Format("fp16", 16, "fp16"),
        Format("bf16", 16, "bf16"),
        Format("fp8", 8, "fp8"),
        Format("int8", 8, "int8"),
        Format("int4", 4, "int4"),
        Format("int3", 3, "int4"),
        Format("int2", 2, "int4"),
        Format("ternary", 2, "int4"),  # packed; log2(3) = 1.585 bits is the ideal
        Format("ternary-ideal", 1.584962500721156, "int4"),
        Format("binary", 1, "int4"),
        Format("nf4", 4, "fp16", 64, 32),
        # The 32-bit scales themselves in 8 bits, with one 32-bit scale for 256 of them.
        Format("nf4-dq", 4, "fp16", 64, 8 + 32 / 256),
        Format("mxfp4", 4, "fp4", 32, 8),
        Format("nvfp4", 4, "fp4", 16, 8),
        Format("q4_1", 4, "fp16", 32, 32),
    )
}
_ALIASES = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp8-e4m3": "fp8",
    "fp8-e5m2": "fp8",
    "int1": "binary",
}
_GROUPED = re.compile(r"(int[2348])-g([1-9][0-9]{0,5})(-sym)?")
_SPARSE = re.compile(r"(.+?)-([0-9]+:[0-9]+|[0-9.]+%-[a-z0-9-]+)")
_FP16_SCALE_BITS = 16


def load_format(name: str) -> Format:
    """The format of that name.

    Parameters
    ----------
    name : one of `format_names()`, or `int{2,3,4,8}-g{group}` with an FP16 scale and a zero
        point of the element's width for each group, or the same with `-sym` and no zero point.
        After each of these may stand how sparse weights are stored: `-{N}:{M}` keeps N of every
        M, `-{P}%-{layout}` leaves P % zeros out, with a layout of bitmap, csr16, csr32 or, for
        16-bit values, tiled-csl.

    Raises
    ------
    ValueError
        for an unknown name, with the nearest known ones.

    >>> load_format("int4-g128-sym").bits, load_format("nvfp4").bits
    (4.125, 4.5)
    >>> load_format("fp16-2:4").bits, load_format("int4-50%-bitmap").bits
    (9.0, 3.0)
    """
    if not isinstance(name, str):
        raise ValueError(f"a number format is named by a string, not {shorten(name)}")
    return _read_name(name)


@lru_cache(maxsize=1024)
def _read_name(name: str) -> Format:
    key = name.strip().lower()
    found = _read_dense(key)
    if found is None and (match := _SPARSE.fullmatch(key)):
        values = _read_dense(match[1])
        layout = values and read_layout(match[2], values.element_bits)
        if values and layout:
            found = replace(values, name=f"{values.name}-{layout.name}", layout=layout)
    if found is None:
        hint = (
            "; grouped: int2|int3|int4|int8-g<size>, with -sym for no zero point; sparse: any of "
            f"these and -2:4 or -50%-{'|'.join(INDEXES)}"
        )
        raise unknown("number format", name, [*_BARE, "int4-g128", "int4-g128-sym"], hint)
    return found


def _read_dense(key: str) -> Format | None:
    key = _ALIASES.get(key, key)
    if key in _BARE:
        return _BARE[key]
    match = _GROUPED.fullmatch(key)
    if match is None:
        return None
    base, group = _BARE[match[1]], int(match[2])
    zero_point = 0 if match[3] else base.element_bits
    return Format(key, base.element_bits, base.computes_as, group, _FP16_SCALE_BITS + zero_point)


def format_names() -> list[str]:
    """The names of the formats that have one; grouped and sparse ones are named by rule."""
    return list(_BARE)


@dataclass(frozen=True, init=False)
class Precision:
    """The number formats of a deployment, by what they hold.

    Parameters
    ----------
    weights, activations, kv_cache : names of formats. `int4-g128` weights with `fp16`
        activations compute at FP16; W8A8 computes at INT8. Only weights may be sparse, and then
        all of them are: embedding and head as well, as with every format.
    state : the format of recurrent states, FP32 as their reference code keeps them.

    Raises
    ------
    ValueError
        for an unknown format, or a sparse one that is not of the weights.

    >>> Precision(weights="int4-g128").w
    0.51953125
    """

    weights: Format
    activations: Format
    kv_cache: Format
    state: Format

    def __init__(
        self,
        weights: str | Format = "fp16",
        activations: str | Format = "fp16",
        kv_cache: str | Format = "fp16",
        state: str | Format = "fp32",
    ) -> None:
        for field, value in (
            ("weights", weights),
            ("activations", activations),
            ("kv_cache", kv_cache),
            ("state", state),
        ):
            found = value if isinstance(value, Format) else load_format(value)
            if found.is_sparse and field != "weights":
                raise ValueError(
                    f"{field} is {shorten(found.name)}; allowed: a dense format, only weights are "
                    "pruned"
                )
            object.__setattr__(self, field, found)

    @property
    def w(self) -> Number:
        """Bytes per weight."""
        return self.weights.bytes

    @property
    def a(self) -> Number:
        """Bytes per activation."""
        return self.activations.bytes

    @property
    def k(self) -> Number:
        """Bytes per element of the KV cache."""
        return self.kv_cache.bytes

    def __str__(self) -> str:
        return (
            f"weights {self.weights.name}, activations {self.activations.name}, "
            f"KV cache {self.kv_cache.name}"
        )


def precision_of(given: Precision | None) -> Precision:
    """The precision that was asked for: FP16 throughout for None.

    Raises
    ------
    ValueError
        for anything but a Precision.
    """
    if given is None:
        return _FP16
    if not isinstance(given, Precision):
        raise ValueError(
            f"precision is {shorten(given)}; allowed: a Precision, "
            'such as Precision(weights="int4-g128")'
        )
    return given


def operand_rate(x: Format, y: Format) -> str:
    """The rate that a product of x and y would need: that of the wider operand.

    Equal widths of different kinds (INT8 by FP8, FP16 by BF16) meet at FP16.

    >>> operand_rate(load_format("int4-g128"), load_format("fp16"))
    'fp16'
    """
    if x.computes_as == y.computes_as:
        return x.computes_as
    width_x, width_y = _operand_width(x), _operand_width(y)
    if width_x == width_y:
        return "fp16"
    return x.computes_as if width_x > width_y else y.computes_as


def _operand_width(x: Format) -> float:
    return 19 if x.computes_as == "tf32" else x.element_bits


_FP16 = Precision()
