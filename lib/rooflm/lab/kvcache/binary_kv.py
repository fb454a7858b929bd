"""A cache of one bit a number, but for a few: partial binarization, as PB-LLM does to weights.

Within each group the numbers farthest from the group's mean are *salient* and stored as 8-bit
codes with their places. Every other number becomes one of two, mean ± alpha, by a bit; alpha is
the mean distance of these numbers from the mean, the least-squares optimum for signs. Without
`centred` the mean is taken as 0, the plain method; channels of keys, which lie far from 0,
need it.

A salient number costs 16 bits more, 8 for its code and 8 for its place. That is what makes the
method dear here: 10 % of salient numbers add 1.6 bits to each.

`chosen="random"` is the control: the salient places of a group are drawn once, by the seed, and
are the same in all groups.

Sources: PB-LLM, arXiv 2310.00034, section 3.2, for weights; signs and their scale, XNOR-Net,
arXiv 1603.05279, section 3.1.

Chapter: KV cache quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.kvcache.kivi import ALONG, from_groups, to_groups
from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.quantize import grids
from rooflm.lab.quantize.binary import binarize_where
from rooflm.roofline.numeric import shorten, size, unknown

SALIENT_BITS = 8


def salient_places(grouped: Tensor, count: int) -> Tensor:
    """The places of the `count` largest magnitudes of each group, rising, (…, count)."""
    return grouped.abs().topk(count, dim=-1).indices.sort(dim=-1).values


class PartlyBinary:
    """The codec of partial binarization.

    Parameters
    ----------
    share : of the numbers of a group that are salient; rounded to whole numbers.
    along, group : as of `kivi.Uniform`; a group is a multiple of 8, up to 256.
    centred : whether the group's mean is subtracted and stored.
    chosen : "magnitude" or "random".
    seed : of the random places.
    """

    def __init__(
        self,
        share: float = 0.1,
        along: str = "token",
        group: int = 64,
        centred: bool = False,
        chosen: str = "magnitude",
        seed: int = 0,
    ) -> None:
        if along not in ALONG:
            raise unknown("direction", along, ALONG)
        if chosen not in ("magnitude", "random"):
            raise unknown("choice", chosen, ["magnitude", "random"])
        if not 0 <= share <= 1:
            raise ValueError(f"share is {shorten(share)}; allowed: 0 to 1")
        if size("group", group) % 8 or group > 256:
            raise ValueError(f"group is {group}; allowed: a multiple of 8, up to 256")
        self.count, self.along, self.group = round(share * group), along, group
        self.centred, self.chosen = centred, chosen
        drawn = torch.randperm(group, generator=torch.Generator().manual_seed(seed))
        self._drawn = drawn[: self.count].sort().values

    @property
    def block(self) -> int:
        """Positions that are encoded together."""
        return self.group if self.along == "channel" else 1

    @property
    def bits_per_number(self) -> float:
        """Stored bits: signs, salient codes and places, alpha, the salient scale and the mean."""
        scales = 16 * (1 + self.centred + bool(self.count))
        return 1 + (2 * SALIENT_BITS * self.count + scales) / self.group

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Signs and alpha; then the mean; then places, codes and scale of salient numbers."""
        grouped = to_groups(x, self.along, self.group)
        mean = []
        if self.centred:
            mean = [grouped.mean(-1, keepdim=True).half()]
            grouped = grouped - mean[0].float()
        places = self._places(grouped)
        binary = torch.ones_like(grouped, dtype=torch.bool).scatter(-1, places, False)
        alpha = binarize_where(grouped, binary).abs().amax(-1, keepdim=True).half()
        stored = [pack(grouped >= 0, 1), alpha, *mean]
        if self.count:
            salient = grouped.gather(-1, places)
            grid = grids.fit_grid(salient, SALIENT_BITS, symmetric=True)
            codes = grids.encode(salient, grid).to(torch.int8)
            stored += [places.to(torch.uint8), codes, grid.scale.half()]
        return tuple(stored)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        signs, alpha, *rest = stored
        mean = rest.pop(0).float() if self.centred else 0.0
        alpha = alpha.float()
        grouped = torch.where(unpack(signs, 1).bool(), alpha, -alpha)
        if rest:
            places, codes, scale = rest
            grouped = grouped.scatter(-1, places.long(), codes * scale.float())
        return from_groups(grouped + mean, self.along)

    def _places(self, grouped: Tensor) -> Tensor:
        if self.chosen == "random":
            return self._drawn.expand(*grouped.shape[:-1], -1)
        return salient_places(grouped, self.count)
