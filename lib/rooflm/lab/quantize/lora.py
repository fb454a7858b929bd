"""Low-rank adapters over a base that never changes.

LoRA adds scaling · B A to a weight: A is (rank, d_in), B (d_out, rank), and only they are
trained. B starts at 0, so that training starts from the base. QA-LoRA's variant sums each group
of inputs first: A is then (rank, groups), and all weights of a row's group move together.

A base knows what it would take in storage. What it computes with are float32 numbers.

Sources: LoRA, arXiv 2106.09685, section 4.1, eq. 3 (there `scaling` is alpha / rank); the
pooled input, QA-LoRA, arXiv 2309.14717, section 3.3 and algorithm 1.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.quantize.grids import Grid, decode, to_groups
from rooflm.roofline.numeric import shorten


class FrozenLinear(nn.Module):
    """A linear layer without parameters, in place of an `nn.Linear`.

    Parameters
    ----------
    weight : (d_out, d_in).
    stored_bytes : what the weight takes in the format it was rounded to.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, stored_bytes: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.stored_bytes = stored_bytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return functional.linear(x, self.weight)


class GridLinear(nn.Module):
    """A frozen linear layer kept as integer codes on a uniform grid: w = (q - z) s.

    Parameters
    ----------
    codes : (d_out, groups, group), whole numbers.
    scale, zero : (d_out, groups, 1); zero is real-valued once an adapter was merged into it.
    bits : of a code.
    zero_bits : of a zero point: `bits` for whole numbers, 16 for real ones in FP16.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, zero_bits: int
    ) -> None:
        super().__init__()
        for name, tensor in (("codes", codes), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor.detach().clone())
        self.bits, self.zero_bits = bits, zero_bits

    @property
    def weight(self) -> Tensor:
        """The weight as its codes stand for it, (d_out, d_in)."""
        grid = Grid(self.scale, self.zero, self.bits, symmetric=False)
        return decode(self.codes, grid).flatten(1)

    @property
    def stored_bytes(self) -> int:
        """Codes, FP16 scales and zero points, packed without gaps."""
        bits = self.codes.numel() * self.bits + self.scale.numel() * (16 + self.zero_bits)
        return -(-bits // 8)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return functional.linear(x, self.weight)


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank adapter beside it.

    Parameters
    ----------
    base : `FrozenLinear` or `GridLinear`, of (d_out, d_in).
    a, b : (rank, d_in / pool) and (d_out, rank), from where training starts.
    scaling : factor of the adapter, alpha / rank in the papers.
    pool : inputs that are summed up before the adapter, neighbours; 1 for LoRA itself.
    """

    def __init__(
        self,
        base: FrozenLinear | GridLinear,
        a: Tensor,
        b: Tensor,
        scaling: float = 1.0,
        pool: int = 1,
    ) -> None:
        super().__init__()
        d_out, d_in = base.weight.shape
        if a.shape != (b.shape[1], d_in / pool) or len(b) != d_out:
            given = f"a is {tuple(a.shape)} and b {tuple(b.shape)}"
            raise ValueError(f"{given}; allowed: (rank, {d_in / pool:g}) and ({d_out}, rank)")
        self.base, self.scaling, self.pool = base, scaling, pool
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        pooled = x.unflatten(-1, (-1, self.pool)).sum(-1) if self.pool > 1 else x
        update = functional.linear(functional.linear(pooled, self.a), self.b)
        return self.base(x) + self.scaling * update

    @property
    def weight(self) -> Tensor:
        """The one weight that computes the same, (d_out, d_in)."""
        update = self.scaling * (self.b @ self.a)
        return self.base.weight + update.repeat_interleave(self.pool, dim=1)


def initial_adapter(
    shape: tuple[int, int], rank: int, generator: torch.Generator, pool: int = 1
) -> tuple[Tensor, Tensor]:
    """A of normal noise, B of zeros: an adapter that changes nothing yet.

    Parameters
    ----------
    shape : (d_out, d_in) of the weight.
    rank : at least 1.
    pool : as in `LoraLinear`.

    Returns
    -------
    tuple
        a (rank, d_in / pool), of deviation d_in^-1/2, and b (d_out, rank).

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    d_out, d_in = shape
    to_groups(torch.empty(1, d_in), pool)  # refuses a pool that does not divide
    check_rank(rank, d_out, d_in // pool, smallest=1)
    a = torch.randn(rank, d_in // pool, generator=generator) * d_in**-0.5
    return a, torch.zeros(d_out, rank)


def check_rank(rank: int, d_out: int, d_in: int, smallest: int = 0) -> None:
    """Refuse, with a ValueError, a rank that a (d_out, d_in) matrix cannot have."""
    largest = min(d_out, d_in)
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not whole or not smallest <= rank <= largest:
        allowed = f"a whole number from {smallest} to {largest} for ({d_out}, {d_in})"
        raise ValueError(f"rank is {shorten(rank)}; allowed: {allowed}")
