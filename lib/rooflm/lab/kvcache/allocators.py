"""Ways to give requests their share of the KV memory: one piece each, or blocks on demand.

An allocator counts slots, one for the keys and values of one token in all layers; it holds no
tensor. `trace.simulate` runs requests through one.

Sources: PagedAttention, arXiv 2309.06180, sections 3.1 and 6.1, where Orca's three ways to reserve
are placed by a buddy allocator; buddies, Knuth, The Art of Computer Programming, volume 1, 2.5.

Chapter: paged attention.
"""

from __future__ import annotations

import math
from bisect import insort
from typing import NamedTuple, Protocol

from rooflm.roofline.numeric import size, unknown

RESERVATIONS = ("max", "pow2", "oracle")


class Chunk(NamedTuple):
    """Slots that are a request's: where they start, how many, and how many it asked for."""

    start: int
    slots: int
    asked: int


class Allocator(Protocol):
    """A way to place requests; slots are given on `admit`, or as the request grows."""

    capacity: int

    @property
    def saved(self) -> int:
        """Slots that requests have in common, less those that hold it."""

    def admit(self, key: int, tokens: int, final: int) -> bool:
        """Place a request that has `tokens` now and `final` at its end; False: no room."""

    def grow(self, key: int, tokens: int) -> bool:
        """Make room for one token beyond these; False: no room."""

    def release(self, key: int) -> None:
        """Take a request's slots back."""

    def waste(self, key: int, tokens: int, final: int) -> tuple[int, int]:
        """Slots of a request that are reserved, and internal."""


class Contiguous:
    """One piece of memory for each request, of its largest size, for all its life.

    Parameters
    ----------
    capacity : slots.
    reserve : "max" reserves `longest` for every request; "pow2" the prompt and the answer's length
        rounded up to a power of two; "oracle" what the request will need, known in advance.
    buddy : pieces are powers of two, split and joined in pairs; else the first gap that fits.
    longest : the longest request that the model takes.
    """

    def __init__(
        self, capacity: int, reserve: str, buddy: bool = True, longest: int = 2048
    ) -> None:
        if reserve not in RESERVATIONS:
            raise unknown("reservation", reserve, RESERVATIONS)
        self.capacity = self.free = size("capacity", capacity)
        self.reserve, self.buddy, self.longest = reserve, buddy, longest
        self.chunks: dict[int, Chunk] = {}
        self.gaps: list[tuple[int, int]] = []  # (start, slots), by start
        at = 0
        for power in reversed(range(capacity.bit_length())) if buddy else ():
            if capacity >> power & 1:
                self.gaps.append((at, 1 << power))
                at += 1 << power
        if not buddy:
            self.gaps.append((0, capacity))

    @property
    def saved(self) -> int:
        """As `Allocator.saved`: nothing is shared."""
        return 0

    def admit(self, key: int, tokens: int, final: int) -> bool:
        """As `Allocator.admit`."""
        asked = {"max": self.longest, "oracle": final}.get(self.reserve)
        if asked is None:
            asked = min(self.longest, tokens + (1 << (final - tokens - 1).bit_length()))
        slots = 1 << (asked - 1).bit_length() if self.buddy else asked
        fitting = [gap for gap in self.gaps if gap[1] >= slots]
        if not fitting:
            return False
        start, room = min(fitting, key=lambda gap: gap[1]) if self.buddy else fitting[0]
        self.gaps.remove((start, room))
        while self.buddy and room > slots:  # keep the lower half, free the upper one
            room //= 2
            insort(self.gaps, (start + room, room))
        if room > slots:
            insort(self.gaps, (start + slots, room - slots))
        self.chunks[key] = Chunk(start, slots, asked)
        self.free -= slots
        return True

    def grow(self, key: int, tokens: int) -> bool:
        """As `Allocator.grow`: the room is there."""
        return True

    def release(self, key: int) -> None:
        """As `Allocator.release`; neighbouring gaps are joined."""
        start, slots, _ = self.chunks.pop(key)
        self.free += slots
        known = dict(self.gaps)
        if self.buddy:
            # A pair is two halves of one piece: its starts differ in one bit of their place in it.
            base = self._base(start)
            while known.get(other := base + ((start - base) ^ slots)) == slots:
                del known[other]
                start, slots = min(start, other), 2 * slots
                if (start, slots) == (base, self._whole(base)):
                    break
            known[start] = slots
        else:
            known[start] = slots
            ordered = sorted(known.items())
            known = {}
            last = -1
            for at, room in ordered:
                if last >= 0 and last + known[last] == at:
                    known[last] += room
                else:
                    known[at] = room
                    last = at
        self.gaps = sorted(known.items())

    def waste(self, key: int, tokens: int, final: int) -> tuple[int, int]:
        """As `Allocator.waste`; the allocator's rounding is external, and not counted here."""
        return final - tokens, self.chunks[key].asked - final

    def _base(self, start: int) -> int:
        """Where the whole piece of memory that holds this slot starts."""
        at = 0
        while start >= at + self._whole(at):
            at += self._whole(at)
        return at

    def _whole(self, base: int) -> int:
        return 1 << (self.capacity - base).bit_length() - 1


class Paged:
    """Blocks on demand, counted only; `BlockManager` is what would hand them out.

    Parameters
    ----------
    capacity : slots; those that make no whole block are lost.
    block_tokens : slots of a block.
    shared : tokens that every prompt begins with; their full blocks are held once.
    watermark : share of the blocks that an admission leaves free for those that run.
    """

    def __init__(
        self, capacity: int, block_tokens: int, shared: int = 0, watermark: float = 0.01
    ) -> None:
        self.capacity, self.block_tokens = (
            size("capacity", capacity),
            size("block_tokens", block_tokens),
        )
        self.blocks = capacity // block_tokens
        self.common = shared // block_tokens
        self.kept = math.ceil(watermark * self.blocks)
        self.held: dict[int, int] = {}  # blocks of a request, without the common ones
        self._free = self.blocks

    @property
    def free(self) -> int:
        """Slots in free blocks, and those that make no block."""
        return self.capacity - (self.blocks - self._free) * self.block_tokens

    @property
    def saved(self) -> int:
        """As `Allocator.saved`."""
        return self.common * self.block_tokens * max(0, len(self.held) - 1)

    def admit(self, key: int, tokens: int, final: int) -> bool:
        """As `Allocator.admit`."""
        own = -(-tokens // self.block_tokens) - self.common
        needed = own + (0 if self.held else self.common)
        if needed + (self.kept if self.held else 0) > self._free:
            return False
        self.held[key] = own
        self._free -= needed
        return True

    def grow(self, key: int, tokens: int) -> bool:
        """As `Allocator.grow`."""
        if tokens % self.block_tokens:
            return True
        if not self._free:
            return False
        self.held[key] += 1
        self._free -= 1
        return True

    def release(self, key: int) -> None:
        """As `Allocator.release`; the last one takes the common blocks with it."""
        self._free += self.held.pop(key) + (0 if self.held else self.common)

    def waste(self, key: int, tokens: int, final: int) -> tuple[int, int]:
        """As `Allocator.waste`: the room in the last block, of which some may still be used."""
        return 0, -tokens % self.block_tokens
