"""A KV cache that keeps codes in place of numbers, whatever the codes are.

The positions of a sequence lie in three parts, oldest first: a few *sinks* and the *recent* ones
as FP16 numbers, and all between as codes. New positions become recent; once `block` of them are
older than the last `residual`, these are encoded together and never touched again. What is
coded therefore depends on the text alone, not on how it was cut into passes. Reading decodes
everything. The keys and values of the running pass itself are used as they came, before any
rounding: "past-only quantization" (WKVQuant, arXiv 2402.12065).

Keys may be coded before or after their rotation by position. Coded before, the rotation has to
be done again for every key that is read.

`nbytes` counts the tensors that grow with the text. Tables and scales that were calibrated once
belong to the model, as its weights do, and serve all sequences.

Sources: KIVI, arXiv 2402.02750, section 3.3 and algorithm 1 (a residual part in full precision);
KVQuant, arXiv 2401.18079, section 3.2 (keys before rotation) and 3.5 (sinks).

Chapter: KV cache quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rooflm.lab.model import Rope, attend
from rooflm.roofline.numeric import size


class Codec(Protocol):
    """Turns positions into stored tensors and back.

    Every stored tensor has (batch, kv_heads or 1, positions or groups of them, …), so that they
    grow along dimension 2.
    """

    @property
    def block(self) -> int:
        """Positions that are encoded together; their number is always a multiple of it."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Numbers (batch, kv_heads, positions, head_dim) as stored tensors."""

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """The numbers that stored tensors stand for, in float32."""


class CodedCache:
    """A cache whose older positions are codes.

    Parameters
    ----------
    keys, values : a codec for all layers, or one for each.
    residual : recent positions that stay uncoded; up to `block` - 1 more wait for their block.
    sinks : first positions that stay uncoded for ever.
    before_rope : whether keys are coded before the rotation.
    full : dtype of what is not coded.
    """

    def __init__(
        self,
        keys: Codec | Sequence[Codec],
        values: Codec | Sequence[Codec],
        residual: int = 0,
        sinks: int = 0,
        before_rope: bool = False,
        full: torch.dtype = torch.float16,
    ) -> None:
        self._codecs = keys, values
        self.residual = size("residual", residual, smallest=0)
        self.sinks = size("sinks", sinks, smallest=0)
        self.before_rope, self.full = before_rope, full
        self._layers: list[tuple[_Part, _Part]] = []

    @property
    def length(self) -> int:
        """Positions seen, the same for all layers between two passes."""
        return self._layers[-1][0].length if self._layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: codes, scales, sinks and recent positions."""
        return sum(part.nbytes for pair in self._layers for part in pair)

    @property
    def coded(self) -> int:
        """Positions that are held as codes."""
        return self._layers[-1][0].coded if self._layers else 0

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """Attention's output for new positions, which are then taken in; see `model.Cache`."""
        start = self._part(layer).length
        queries = rope(queries, start)
        if not self.before_rope:
            keys = rope(keys, start)
        k, v = self.read(layer, keys.dtype)
        k, v = torch.cat([k, keys], 2), torch.cat([v, values], 2)
        self.store(layer, keys, values)
        return attend(queries, rope(k, 0) if self.before_rope else k, v)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take new positions in, (batch, kv_heads, new, head_dim), and code what is old enough."""
        self._part(layer)
        for part, x in zip(self._layers[layer], (keys, values), strict=True):
            part.add(x)

    def read(self, layer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values as they are now known, (batch, kv_heads, length, head_dim)."""
        keys, values = self._layers[layer]
        return keys.read(dtype), values.read(dtype)

    def _part(self, layer: int) -> _Part:
        if layer == len(self._layers):
            pair = (c[layer] if isinstance(c, Sequence) else c for c in self._codecs)
            keys, values = (_Part(c, self.sinks, self.residual, self.full) for c in pair)
            self._layers.append((keys, values))
        return self._layers[layer][0]


class Growing:
    """A tensor that grows along dimension 2, in a buffer that doubles when it is full."""

    def __init__(self, first: Tensor) -> None:
        self._buffer, self._filled = first.clone(), first.shape[2]

    def add(self, x: Tensor) -> None:
        """Append along dimension 2."""
        start, stop = self._filled, self._filled + x.shape[2]
        if stop > self._buffer.shape[2]:
            shape = list(x.shape)
            shape[2] = max(stop, 2 * start)
            buffer = x.new_empty(shape)
            buffer[:, :, :start] = self._buffer[:, :, :start]
            self._buffer = buffer
        self._buffer[:, :, start:stop] = x
        self._filled = stop

    @property
    def all(self) -> Tensor:
        """What has been added, a view."""
        return self._buffer[:, :, : self._filled]


class _Part:
    """The keys or the values of one layer."""

    def __init__(self, codec: Codec, sinks: int, residual: int, full: torch.dtype) -> None:
        self.codec, self.sinks, self.residual, self.full = codec, sinks, residual, full
        self.length = self.coded = 0
        self._codes: list[Growing] = []
        self._sinks: Tensor | None = None
        self._recent: Tensor | None = None

    @property
    def nbytes(self) -> int:
        kept = [t for t in (self._sinks, self._recent) if t is not None]
        return sum(t.nbytes for t in [*kept, *(c.all for c in self._codes)])

    def add(self, x: Tensor) -> None:
        self.length += x.shape[2]
        x = x.to(self.full)
        recent = x if self._recent is None else torch.cat([self._recent, x], 2)
        missing = self.sinks - (0 if self._sinks is None else self._sinks.shape[2])
        if missing > 0:
            first, recent = recent[:, :, :missing], recent[:, :, missing:]
            self._sinks = first if self._sinks is None else torch.cat([self._sinks, first], 2)
        old = max(0, recent.shape[2] - self.residual)
        old -= old % self.codec.block
        if old:
            stored = self.codec.encode(recent[:, :, :old].float())
            if self._codes:
                for held, new in zip(self._codes, stored, strict=True):
                    held.add(new)
            else:
                self._codes = [Growing(new) for new in stored]
            self.coded += old
            recent = recent[:, :, old:]
        self._recent = recent.clone()  # no view: it would keep the whole pass alive

    def read(self, dtype: torch.dtype) -> Tensor:
        parts = [] if self._sinks is None else [self._sinks.to(dtype)]
        if self._codes:
            parts.append(self.codec.decode(tuple(c.all for c in self._codes)).to(dtype))
        if self._recent is not None:
            parts.append(self._recent.to(dtype))
        return torch.cat(parts, 2) if parts else _EMPTY


_EMPTY = torch.empty(0)
