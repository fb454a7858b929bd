"""Who holds which block: the bookkeeping of a paged KV cache, without a tensor.

Memory is a number of equal blocks, each with room for the keys and values of `block_tokens`
tokens. A sequence has a table: the blocks that hold its tokens, in order, anywhere in memory. Only
its last block may have room left, so a sequence wastes less than one block. Blocks are counted by
their references: sequences that start alike, or that were forked, share them.

A block that is full and written gets a hash of its tokens and of all tokens before it, and can be
found by it: a prompt that starts with the same tokens takes the block instead of computing it. When
its last sequence leaves it, the block stays findable, idle, until its memory is needed; the one
idle for longest goes first. A hit needs the same hash, the same tokens and the same block before
it, so a collision of hashes costs a hit and never hands out a wrong block.

Order makes two things simple. A sequence leaves its last block first, so a block is idle before
the one that it follows, and eviction never cuts a chain in the middle. And a block that fills with
what another already holds gives way to that one, so every findable text is stored once.

Sources: PagedAttention, arXiv 2309.06180, sections 4.2 to 4.5; prefix reuse, SGLang, arXiv
2312.07104, section 3. The way not taken here, contiguous addresses backed on demand: vAttention,
arXiv 2405.04437.

Chapter: paged attention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from rooflm.roofline.numeric import shorten, size


class OutOfBlocks(ValueError):
    """More blocks were asked for than are free or idle; nothing was changed."""


@dataclass
class Block:
    """A block's references, and what it holds once it can be found: else its hash is None."""

    references: int = 0
    hash: int | None = None
    tokens: tuple[int | None, ...] = ()
    before: int | None = None  # the block that it follows


@dataclass
class Table:
    """A sequence: its tokens, its blocks in order, and how many of these can be found."""

    tokens: list[int | None] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    findable: int = 0


def chain_hash(before: int, tokens: Iterable[int | None]) -> int:
    """A hash of 64 bits of a block's tokens and of the hash of all that stands before it.

    Parameters
    ----------
    before : the hash of the block before; 0 for none.
    """
    text = f"{before}:" + ",".join(map(str, tokens))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class BlockManager:
    """Hands out blocks, shares them and takes them back.

    Parameters
    ----------
    blocks, block_tokens : how many blocks there are, and how many tokens fit in one.
    hasher : as `chain_hash`; another one shows that collisions do no harm.

    Examples
    --------
    >>> manager = BlockManager(blocks=4, block_tokens=2)
    >>> first, found = manager.admit([7, 8, 9])
    >>> manager.commit(first)  # its keys and values are written
    >>> manager.admit([7, 8, 5])  # the block of 7, 8 is shared; 5 needs a new one
    (1, 2)
    >>> manager.used_blocks, manager.free_blocks
    (3, 1)
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        hasher: Callable[[int, Iterable[int | None]], int] = chain_hash,
    ) -> None:
        self.block_tokens = size("block_tokens", block_tokens)
        self.blocks = [Block() for _ in range(size("blocks", blocks))]
        self.tables: dict[int, Table] = {}
        self.hits = self.evictions = self.copies = 0
        self._hasher = hasher
        self._free = deque(range(blocks))
        self._idle: dict[int, None] = {}  # findable, unreferenced; the longest idle first
        self._by_hash: dict[int, int] = {}
        self._next = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def idle_blocks(self) -> int:
        """Blocks that no sequence has and a prompt could still find."""
        return len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks in at least one table."""
        return len(self.blocks) - len(self._free) - len(self._idle)

    def find(self, tokens: Sequence[int | None]) -> list[int]:
        """The blocks that hold the start of these tokens; the last token is left to compute."""
        found: list[int] = []
        before, at = 0, None
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            part = tuple(tokens[start : start + self.block_tokens])
            before = self._hasher(before, part)
            block = self._by_hash.get(before)
            if block is None or not self._holds(block, part, at):
                break
            found.append(block)
            at = block
        return found

    def admit(self, tokens: Sequence[int | None], most: int | None = None) -> tuple[int, int]:
        """Make a sequence with room for all these tokens.

        Parameters
        ----------
        tokens : ids; None for one that is not known, whose block is never shared by its text.
        most : take at most that many tokens from blocks that are there; None for no limit.

        Returns
        -------
        sequence, found : its number, and how many leading tokens need not be computed.

        Raises
        ------
        OutOfBlocks
            without a change, where the blocks do not suffice.
        """
        found = self.find(tokens)
        if most is not None:
            found = found[: most // self.block_tokens]
        needed = -(-len(tokens) // self.block_tokens) - len(found)
        self._require(needed, kept=sum(block in self._idle for block in found), what="admit")
        for block in found:
            self._idle.pop(block, None)
            self.blocks[block].references += 1
        table = Table(list(tokens), list(found), len(found))
        table.blocks.extend(self._take() for _ in range(needed))
        self.tables[self._next] = table
        self._next += 1
        self.hits += len(found)
        return self._next - 1, len(found) * self.block_tokens

    def append(self, sequence: int, tokens: Sequence[int | None]) -> list[tuple[int, int]]:
        """Make room for more tokens.

        Returns
        -------
        list
            (source, target) blocks to copy before anything is written: the last block, where it
            has room left and another sequence has it too, or can find it (copy on write).

        Raises
        ------
        OutOfBlocks
            without a change, where the blocks do not suffice.
        """
        table = self._table(sequence)
        room = len(table.blocks) * self.block_tokens - len(table.tokens)
        last = self.blocks[table.blocks[-1]] if table.blocks else Block()
        copied = bool(tokens) and room > 0 and (last.references > 1 or last.hash is not None)
        needed = -(-max(0, len(tokens) - room) // self.block_tokens)
        self._require(needed + copied, what="append")
        copies = []
        if copied:
            source, target = table.blocks[-1], self._take()
            table.blocks[-1] = target
            self._release(source)
            copies.append((source, target))
            self.copies += 1
        table.blocks.extend(self._take() for _ in range(needed))
        table.tokens.extend(tokens)
        return copies

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence after the first `length`, as when drafts are refused."""
        table = self._table(sequence)
        kept = -(-size("length", length, 0) // self.block_tokens)
        for block in reversed(table.blocks[kept:]):
            self._release(block)
        del table.tokens[length:], table.blocks[kept:]
        table.findable = min(table.findable, len(table.tokens) // self.block_tokens)

    def commit(self, sequence: int) -> None:
        """Say that all tokens of the sequence are written: its full blocks can be found now."""
        table = self._table(sequence)
        full = len(table.tokens) // self.block_tokens
        while table.findable < full and self._register(table):
            table.findable += 1

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, in the same blocks; its number."""
        table = self._table(sequence)
        for block in table.blocks:
            self.blocks[block].references += 1
        self.tables[self._next] = Table(list(table.tokens), list(table.blocks), table.findable)
        self._next += 1
        return self._next - 1

    def free(self, sequence: int) -> None:
        """Forget a sequence. Blocks that it alone had go idle if they can be found, else free."""
        for block in reversed(self._table(sequence).blocks):
            self._release(block)
        del self.tables[sequence]

    def evict(self, blocks: int) -> int:
        """Free up to that many idle blocks, the longest idle first; how many there were."""
        gone = min(blocks, len(self._idle))
        for _ in range(gone):
            self._free.append(self._evict_one())
        return gone

    def check(self) -> None:
        """Raise AssertionError unless every block is where it should be, and counted right."""
        counts = [0] * len(self.blocks)
        for table in self.tables.values():
            assert len(table.blocks) == -(-len(table.tokens) // self.block_tokens)
            assert len(set(table.blocks)) == len(table.blocks)
            for i, number in enumerate(table.blocks):
                block, start = self.blocks[number], i * self.block_tokens
                counts[number] += 1
                assert block.hash is not None or i >= table.findable
                if block.hash is not None:
                    part = tuple(table.tokens[start : start + self.block_tokens])
                    assert block.tokens[: len(part)] == part
                    assert block.before == (table.blocks[i - 1] if i else None)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle
        for number, block in enumerate(self.blocks):
            assert block.references == counts[number]
            assert (block.references == 0) == (number in free or number in idle)
            assert number not in free or block.hash is None
            assert number not in idle or block.hash is not None
            if block.hash is not None:
                assert self._by_hash[block.hash] == number
                if block.before is not None:  # what it follows can be found as well
                    assert self.blocks[block.before].hash is not None
        assert len(self._by_hash) == sum(block.hash is not None for block in self.blocks)

    def _holds(self, block: int, tokens: tuple[int | None, ...], before: int | None) -> bool:
        return self.blocks[block].tokens == tokens and self.blocks[block].before == before

    def _table(self, sequence: int) -> Table:
        if sequence not in self.tables:
            raise ValueError(
                f"there is no sequence {shorten(sequence)}; allowed: one of the "
                f"{len(self.tables)} that were admitted and not freed"
            )
        return self.tables[sequence]

    def _require(self, needed: int, what: str, kept: int = 0) -> None:
        idle = len(self._idle) - kept
        if needed > len(self._free) + idle:
            raise OutOfBlocks(
                f"{what} needs {needed} blocks; there are {len(self._free)} free and {idle} idle "
                f"of {len(self.blocks)}"
            )

    def _take(self) -> int:
        number = self._free.popleft() if self._free else self._evict_one()
        self.blocks[number].references = 1
        return number

    def _evict_one(self) -> int:
        number = next(iter(self._idle))
        del self._idle[number]
        forgotten = self.blocks[number].hash
        assert forgotten is not None
        del self._by_hash[forgotten]
        self.blocks[number] = Block()
        self.evictions += 1
        return number

    def _release(self, number: int) -> None:
        block = self.blocks[number]
        block.references -= 1
        if block.references == 0:
            if block.hash is None:
                self._free.append(number)
            else:
                self._idle[number] = None

    def _register(self, table: Table) -> bool:
        """Make the next full block findable, or put the one that holds the same in its place."""
        i = table.findable
        number = table.blocks[i]
        tokens = tuple(table.tokens[i * self.block_tokens : (i + 1) * self.block_tokens])
        before = table.blocks[i - 1] if i else None
        if self.blocks[number].hash is not None:
            return True  # a fork was first
        if None in tokens:
            return False
        earlier = self.blocks[before].hash if before is not None else 0
        key = self._hasher(earlier or 0, tokens)
        other = self._by_hash.get(key)
        if other is None:
            block = self.blocks[number]
            block.hash, block.tokens, block.before = key, tokens, before
            self._by_hash[key] = number
            return True
        if not self._holds(other, tokens, before):
            return False  # a collision
        self._idle.pop(other, None)
        self.blocks[other].references += 1
        table.blocks[i] = other
        self._release(number)
        return True
