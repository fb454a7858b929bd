"""Weights that stay packed in memory while they are used, through kernels that torch ships.

Decoding one sequence reads every weight once for each token, and that is its time. Weights of b
bits instead of 32 are read in b/32 of it, if the kernel keeps up: each must be unpacked, by the
same units that multiply. Whether it keeps up is measured in `speed` (`time_linears`, `account`).

- `fp16`: FP16 weights, FP32 inputs (FBGEMM, x86 only).
- `int8`: codes of 8 bits, a BF16 scale for each row; BF16 inputs and outputs.
- `int4-g32`, `int4-g64`, `int4-g128`: codes of 4 bits, a BF16 scale and a BF16 offset for each
  group; BF16 inputs and outputs.
- `int8-dynamic`: the weights of `int8`, but each input is rounded to integers too, one scale
  for all of it, and integers are multiplied: less work, but not weight-only. One large input
  coarsens the grid of all the others, those of other rows included.

The weight-only kernels turn codes into floating-point numbers in registers and sum in FP32.
The dynamic one keeps its inputs to 7 bits: without VNNI instructions an x86 processor adds pairs
of 8-bit products in 16 bits, which overflow silently. With all 8 bits its results are off by
tenths of their size on such a machine.

Sources: the survey, arXiv 2402.16363, section 3.1.1; FBGEMM, arXiv 2101.05615 (sums in 16
bits and their overflow); ZeroQuant, arXiv 2206.01861, section 4.1 (scales by rows and groups).

Chapter: quantization roofline.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rooflm.lab.model import Transformer
from rooflm.lab.quantize.grids import encode, fit_grid, to_groups
from rooflm.roofline.formats import Format, Precision, load_format
from rooflm.roofline.numeric import unknown

_GROUPS = {"int4-g32": 32, "int4-g64": 64, "int4-g128": 128}
WEIGHT_ONLY = ("fp16", "int8", *_GROUPS)
KINDS = (*WEIGHT_ONLY, "int8-dynamic")


def precision(kind: str) -> Precision:
    """The formats that `speed.predict` takes for a model packed so.

    >>> precision("int4-g64").w * 8, precision("int8").w * 8
    (4.5, 8.0)
    """
    _known(kind)
    if kind in _GROUPS:  # two numbers of 16 bits for each group
        return Precision(Format(kind, 4, "fp16", _GROUPS[kind], 32), "fp32", "fp32")
    return Precision(load_format(kind.removesuffix("-dynamic")), "fp32", "fp32")


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of 8 bits, one scale for each row.

    Parameters
    ----------
    weight : (d_out, d_in).

    Returns
    -------
    codes, scales : (d_out, d_in) int8 and (d_out,) BF16; the weight is about codes * scales.
    """
    rows = to_groups(weight, 0).float()
    grid = fit_grid(rows, 8, symmetric=True)
    # The kernel reads scales in BF16; codes must be computed with what it reads.
    grid = grid._replace(scale=grid.scale.bfloat16().float())
    codes = encode(rows, grid).to(torch.int8).view(weight.shape)
    return codes, grid.scale.flatten().bfloat16()


def int4_codes(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 4 bits with a scale and an offset for each group, as torch's kernel takes them.

    The offset is any number, not a whole multiple of the scale: so this is Q4_1 with another
    origin, and weights that come from Q4_1 find nearly their own grid again.

    Parameters
    ----------
    weight : (d_out, d_in).
    group : neighbours in a row that share a scale.

    Returns
    -------
    codes, scales, offsets : (d_out, d_in) int32 from 0 to 15, and twice (d_out, d_in / group)
        BF16; the weight is about (codes - 8) * scale + offset.
    """
    grouped = to_groups(weight, group).float()
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    exact = (high - low) / 15
    # Rounded to BF16 before any code is computed: that is what the kernel reads.
    scale = exact.bfloat16().float()
    offset = (low + 8 * exact).bfloat16().float()
    step = torch.where(scale == 0, 1.0, scale)  # a group of equal numbers is all offset
    codes = (torch.round((grouped - offset) / step) + 8).clamp(0, 15)
    return (
        codes.to(torch.int32).view(weight.shape),
        scale[..., 0].bfloat16(),
        offset[..., 0].bfloat16(),
    )


def dequantized(weight: Tensor, kind: str) -> Tensor:
    """The numbers that the packed form of a weight stands for, (d_out, d_in), FP32.

    A model with these weights, run in FP32, is what a packed model approximates.
    """
    _known(kind)
    if kind == "fp16":
        return weight.half().float()
    if kind in _GROUPS:
        codes, scales, offsets = int4_codes(weight, _GROUPS[kind])
        grouped = to_groups(codes - 8, _GROUPS[kind])
        return (grouped * scales.float()[..., None] + offsets.float()[..., None]).view(codes.shape)
    codes, scales = int8_codes(weight)
    return codes * scales.float()[:, None]


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` without bias.

    Parameters
    ----------
    weight : (d_out, d_in); read, not kept.
    kind : one of `KINDS`.

    Raises
    ------
    ValueError
        for an unknown kind, sizes that its kernel does not take, or a torch or a processor
        that has no such kernel.
    """

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        check_kind(kind)
        self.kind: str = kind
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        # The kernels' blocks: other sizes are refused by them, or give nonsense.
        step = _GROUPS.get(kind, 16)
        if self.out_features % 16 or self.in_features % step:
            raise ValueError(
                f"a weight of {self.out_features} x {self.in_features} can't be packed as {kind}; "
                f"allowed: multiples of 16 x {step}"
            )
        self.kept = _pack(weight.detach().float(), kind)

    @property
    def packed_bytes(self) -> int:
        """Bytes that a multiplication reads of the weight, its scales included."""
        if self.kind == "fp16":
            return 2 * self.out_features * self.in_features
        if self.kind == "int8-dynamic":  # FP32 scale, zero point and sum of each row
            return self.out_features * self.in_features + 12 * self.out_features
        return sum(tensor.nbytes for tensor in self.kept)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) FP32 to (…, d_out) FP32."""
        return _multiply(x.reshape(-1, self.in_features), self.kept, self.kind).view(
            *x.shape[:-1], self.out_features
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"


def pack_model(model: Transformer, kind: str = "int8", head: str | None = None) -> Transformer:
    """A model whose linear layers are packed; the given one stays as it is.

    Parameters
    ----------
    kind : one of `KINDS`.
    head : the kind of the head; None for the same, "fp32" for not packed. It is tied to the
        embedding, which stays in FP32 and of which a step reads one row; packed, the head is a
        second copy with fewer bits.

    Returns
    -------
    Transformer
        which shares the norms and the embedding with the given model.

    Raises
    ------
    ValueError
        as in `PackedLinear`.
    """
    packed = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in packed.layers:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, PackedLinear(child.weight, kind))
    if head != "fp32":
        weight = (model.embedding if model.head is None else model.head).weight
        packed.head = PackedLinear(weight, head or kind)
    return packed.eval()


def check_kind(kind: str) -> None:
    """Refuse what is not a kind, or has no kernel here.

    Raises
    ------
    ValueError
        in one line, naming the kinds that do run here.
    """
    _known(kind)
    if reason := _lacking(kind):
        here = ", ".join(kinds_here()) or "none"
        raise ValueError(
            f"torch {torch.__version__} has no {kind} kernel for this processor ({reason}); "
            f"runs here: {here}"
        )


def kinds_here() -> list[str]:
    """The kinds whose kernels run with this torch on this processor."""
    return [kind for kind in KINDS if not _lacking(kind)]


def _pack(weight: Tensor, kind: str) -> tuple[Any, ...]:
    """What the kernel of that kind reads."""
    if kind == "fp16":
        return (torch.ops.quantized.linear_prepack_fp16(weight, None),)
    if kind in _GROUPS:
        codes, scales, offsets = int4_codes(weight, _GROUPS[kind])
        pairs = torch.stack((scales.T, offsets.T), dim=-1).contiguous()  # (groups, d_out, 2)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), pairs
    codes, scales = int8_codes(weight)
    if kind == "int8":
        return codes, scales
    with warnings.catch_warnings():  # torch announces that this kind of tensor will go
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        return (torch.ops.quantized.linear_prepack(quantized, None),)


def _multiply(x: Tensor, kept: tuple[Any, ...], kind: str) -> Tensor:
    """(rows, d_in) FP32 times the packed weight: (rows, d_out) FP32."""
    if kind == "fp16":
        return torch.ops.quantized.linear_dynamic_fp16(x, *kept)
    if kind == "int8-dynamic":
        return torch.ops.quantized.linear_dynamic(x, *kept, reduce_range=True)
    if kind == "int8":
        return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), *kept).float()
    packed, pairs = kept
    group = _GROUPS[kind]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, pairs).float()


@cache
def _lacking(kind: str) -> str:
    """Why a kind can't be used here, or nothing."""
    try:
        _multiply(torch.zeros(1, 128), _pack(torch.ones(32, 128), kind), kind)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:80]
    return ""


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise unknown("kind of packed weight", kind, KINDS)
