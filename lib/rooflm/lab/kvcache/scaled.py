"""One scale for a token: eight bits as in practice, a magnitude and a table, and rotations.

- `Integers`: symmetric codes with one scale for a token of a head. At 8 bits what INT8 caches do.
- `Float8`: a cast to FP8 E4M3, scale 1, as serving systems do by default; beyond 448 it saturates.
- `MagnitudeScaled`: the root mean square of a token is stored, and what is left of its numbers
  lies on one table for all tokens and heads, the best for normal numbers (Lloyd and Max). If
  `channels` are given, each channel is divided by its own constant before.
- `Rotated`: any codec on numbers that a random Hadamard matrix has mixed. With `Integers` inside
  it is like QuaRot's cache, whose codes are asymmetric, clipped to 0.95 of the range and in groups
  of 128. With `MagnitudeScaled` inside it is TurboQuant's, of least squared error, which rotates
  by any random orthogonal matrix: after the rotation the numbers *are* about normal. Reading
  rotates back; a kernel would rotate the queries and the output instead, once a step and not once
  a position.

Sources: QuaRot, arXiv 2404.00456, section 4, stages 1d (keys are rotated after RoPE) and 2c (the
cache), and section 5 (its codes); TurboQuant, arXiv 2504.19874, section 3.1 (algorithm 1); Max,
1960.

Chapter: KV cache quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflm.lab.kvcache.coded import Codec
from rooflm.lab.kvcache.kvquant import nearest_codes
from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.quantize import grids
from rooflm.lab.quantize.float_codecs import E4M3
from rooflm.lab.quantize.measure import lloyd_max
from rooflm.lab.quantize.rotation import random_signs, rotate_features, unrotate_features


class Integers:
    """Symmetric codes, one FP16 scale for a token of a head.

    Parameters
    ----------
    bits : of a code, 2 to 8.
    """

    block = 1

    def __init__(self, bits: int = 8) -> None:
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to codes and scales."""
        grid = grids.fit_grid(x, self.bits, symmetric=True)
        codes = grids.encode(x, grid) - grid.lowest
        return pack(codes, self.bits), grid.scale.half()

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        codes, scale = stored
        return (unpack(codes, self.bits).float() - 2 ** (self.bits - 1)) * scale.float()


class Float8:
    """FP8 E4M3 without a scale."""

    block = 1

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to bytes."""
        return (x.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn).view(torch.uint8),)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        return stored[0].view(torch.float8_e4m3fn).float()


class MagnitudeScaled:
    """A token's root mean square, and codes on one table.

    Parameters
    ----------
    bits : of a code, 1 to 6.
    channels : (1, kv_heads, 1, head_dim), what each channel is divided by; None for nothing.
    """

    block = 1

    def __init__(self, bits: int, channels: Tensor | None = None) -> None:
        self.bits, self.channels = bits, channels
        self.levels = lloyd_max(2**bits).float()

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to codes and magnitudes."""
        if self.channels is not None:
            x = x / self.channels
        size = grids.round_up_to_fp16(x.square().mean(-1, keepdim=True).sqrt())
        scaled = x / torch.where(size == 0, 1.0, size)
        return pack(nearest_codes(scaled, self.levels), self.bits), size.half()

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        codes, size = stored
        x = self.levels[unpack(codes, self.bits).int()] * size.float()
        return x if self.channels is None else x * self.channels


class Rotated:
    """A codec of numbers that are rotated by diag(signs) H within each head first.

    Parameters
    ----------
    inner : what codes them then.
    head_dim, seed : of the random signs.
    """

    def __init__(self, inner: Codec, head_dim: int, seed: int = 0) -> None:
        self.inner = inner
        self.signs = random_signs(head_dim, torch.Generator().manual_seed(seed))

    @property
    def block(self) -> int:
        """Positions that are encoded together."""
        return self.inner.block

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, kv_heads, positions, head_dim) to what the inner codec stores."""
        return self.inner.encode(rotate_features(x, self.signs))

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """What is stored as numbers, float32."""
        return unrotate_features(self.inner.decode(stored), self.signs)
