"""A paged KV cache: keys and values in blocks of one pool, read through each sequence's table.

`PagePool` owns the tensors, for every layer (blocks, block_tokens, kv_heads, head_dim), and asks a
`BlockManager` who may write where. `PagedCache` is one or more sequences of equal length in the
pool, with the face of every other cache of the book. Two caches of one pool may differ in length;
they share blocks where their texts begin alike, and after `fork`.

The caller says which tokens it is about to read, because a cache sees no tokens:

    logits = model(cache.admit(prompt), cache)      # only what is not in the pool already
    logits = model(cache.note(next_tokens), cache)

Tokens that were not announced are held as well; their blocks are never found by another prompt.

Keys are stored rotated: a prefix stands at the same positions in every text that begins with it.

Sources: PagedAttention, arXiv 2309.06180, section 4.1 (eq. 4), 4.3 and 4.4; the running softmax,
arXiv 1805.02867, algorithm 3.

Chapter: paged attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rooflm.lab.kvcache.blocks import BlockManager, OutOfBlocks
from rooflm.lab.model import Config, Rope, attend


def gather(pool: Tensor, tables: Tensor, context: int) -> Tensor:
    """What a plain attention needs: the blocks of some sequences, copied into one piece.

    Parameters
    ----------
    pool : (blocks, block_tokens, kv_heads, head_dim), the keys or the values of a layer.
    tables : (batch, blocks of a sequence), int64.
    context : tokens of each sequence; the room behind them in the last block is cut off.

    Returns
    -------
    Tensor
        (batch, kv_heads, context, head_dim).
    """
    whole = pool.index_select(0, tables.flatten())
    return whole.view(len(tables), -1, *pool.shape[2:])[:, :context].transpose(1, 2)


def paged_attention(
    queries: Tensor, keys: Tensor, values: Tensor, table: Sequence[int], context: int
) -> Tensor:
    """Attention of one new token, block by block where the blocks lie; nothing is gathered.

    Each block gives its scores' largest, the sum of their exponentials and the weighted values;
    what was found so far is rescaled when a larger score turns up.

    Parameters
    ----------
    queries : (heads, head_dim), rotated.
    keys, values : (blocks, block_tokens, kv_heads, head_dim), the pool's.
    table : the sequence's blocks in order.
    context : tokens of the sequence, the new one included.

    Returns
    -------
    Tensor
        (heads, head_dim).
    """
    _, size, g, d = keys.shape
    q = queries.view(g, -1, d) * d**-0.5  # (kv_heads, heads of each, head_dim)
    largest = torch.full_like(q[..., :1], -torch.inf)
    total, summed = torch.zeros_like(largest), torch.zeros_like(q)
    for i, block in enumerate(table):
        filled = min(size, context - i * size)
        k, v = (x[block, :filled].transpose(0, 1) for x in (keys, values))  # (kv_heads, filled, d)
        scores = q @ k.mT
        highest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - highest).exp(), (largest - highest).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        summed = summed * shrink + weights @ v
        largest = highest
    return (summed / total).view_as(queries)


class PagePool:
    """The memory of all sequences of a model.

    Parameters
    ----------
    config : of the model.
    blocks, block_tokens : how many blocks, and tokens in one; a block is one in every layer.
    dtype : of the stored keys and values.
    """

    def __init__(
        self, config: Config, blocks: int, block_tokens: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.manager = BlockManager(blocks, block_tokens)
        self.layers = config.layers
        shape = (config.layers, blocks, block_tokens, config.kv_heads, config.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, in use or not."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.nbytes // len(self.manager.blocks)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are in a table."""
        return self.manager.used_blocks * self.block_bytes

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, target), in all layers."""
        for source, target in pairs:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]


class PagedCache:
    """Sequences of equal length in a pool; a `rooflm.lab.model.Cache`.

    Parameters
    ----------
    pool : where they live.
    blockwise : attend to one new token block by block, where the blocks lie, instead of gathering.
        In Python that shows the algorithm, not its speed.

    Raises
    ------
    OutOfBlocks
        from `admit`, `note` or a pass that does not fit, with the cache and the pool as they were.
    """

    def __init__(self, pool: PagePool, blockwise: bool = False) -> None:
        self.pool, self.blockwise = pool, blockwise
        self.sequences: list[int] = []
        self.length = 0
        self._announced = 0  # tokens that the manager has room for, read or not
        self._tables = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks in the tables; one that several of the sequences have counts once."""
        return len({b for table in self._block_lists() for b in table}) * self.pool.block_bytes

    def admit(self, tokens: Tensor) -> Tensor:
        """Begin with prompts, and return what of them is left to compute.

        Parameters
        ----------
        tokens : (batch, tokens), or (tokens,) for one sequence; into a cache that holds nothing.

        Returns
        -------
        Tensor
            (batch, rest). All prompts skip as many tokens as the one of which the pool has least.
        """
        rows = [row.tolist() for row in torch.atleast_2d(tokens)]
        if self.sequences:
            raise ValueError(
                f"the cache holds {self.length} tokens; allowed: admit into an empty one"
            )
        self._admit(rows, max(len(row) for row in rows))
        return torch.atleast_2d(tokens)[:, self.length :]

    def note(self, tokens: Tensor) -> Tensor:
        """Announce the tokens of the next pass, (batch, new), and return them."""
        rows = [row.tolist() for row in torch.atleast_2d(tokens)]
        if not self.sequences:
            return self.admit(tokens)
        if len(rows) != len(self.sequences):
            raise ValueError(f"{len(rows)} rows are given; allowed: {len(self.sequences)}")
        self._append(rows)
        return torch.atleast_2d(tokens)

    def fork(self, copies: int = 1) -> PagedCache:
        """A cache with that many further copies of each sequence; nothing is copied but tables."""
        other = PagedCache(self.pool, self.blockwise)
        manager = self.pool.manager
        other.sequences = [manager.fork(s) for s in self.sequences for _ in range(copies)]
        other.length, other._announced = self.length, self._announced
        return other

    def keep(self, parents: Sequence[int]) -> None:
        """Go on with these sequences, each as often as it is named: a step of beam search."""
        manager = self.pool.manager
        chosen = [manager.fork(self.sequences[parent]) for parent in parents]
        self._give_back(self.sequences)
        self.sequences = chosen

    def free(self) -> None:
        """Give all blocks back; those that can be found stay in the pool until they are needed."""
        self._give_back(self.sequences)
        self.sequences, self.length, self._announced = [], 0, 0

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `rooflm.lab.model.Cache.attend`."""
        b, _, new, _ = keys.shape
        start, stop = self.length, self.length + new
        if layer == 0:
            self._make_room(b, stop)
        size, pool = self.pool.manager.block_tokens, self.pool
        places = torch.arange(start, stop)
        blocks, offsets = self._tables[:, places // size], (places % size).expand(b, -1)
        pool.keys[layer][blocks, offsets] = rope(keys, start).transpose(1, 2).to(pool.keys.dtype)
        pool.values[layer][blocks, offsets] = values.transpose(1, 2).to(pool.values.dtype)
        queries = rope(queries, start)
        if layer == pool.layers - 1:
            self.length = stop
            for sequence in self.sequences if stop == self._announced else ():
                pool.manager.commit(sequence)
        layer_keys, layer_values = pool.keys[layer], pool.values[layer]
        if self.blockwise and new == 1:
            y = [
                paged_attention(q[:, 0], layer_keys, layer_values, table, stop)
                for q, table in zip(queries, self._tables.tolist(), strict=True)
            ]
            return torch.stack(y)[:, :, None]
        k, v = (gather(x, self._tables, stop) for x in (layer_keys, layer_values))
        return attend(queries, k.to(queries.dtype), v.to(queries.dtype))

    def _make_room(self, batch: int, stop: int) -> None:
        """Room for tokens that nobody announced, and this pass's tables."""
        if not self.sequences:
            self._admit([[None] * stop for _ in range(batch)], 0)
        if batch != len(self.sequences):
            raise ValueError(f"batch is {batch}; allowed: {len(self.sequences)}, as admitted")
        if stop > self._announced:
            self._append([[None] * (stop - self._announced)] * batch)
        self._tables = torch.tensor(self._block_lists())

    def _admit(self, rows: Sequence[Sequence[int | None]], most: int) -> None:
        """Sequences that all start with as many tokens of the pool's; `most` of them at most."""
        manager = self.pool.manager
        while True:
            admitted, least = [], most
            try:
                for row in rows:
                    sequence, found = manager.admit(row, most)
                    admitted.append(sequence)
                    least = min(least, found)
            except OutOfBlocks:
                self._give_back(admitted)
                raise
            if all(manager.tables[s].findable * manager.block_tokens == least for s in admitted):
                break
            self._give_back(admitted)  # one has fewer, or lost some to the room of another
            most = least
        self.sequences, self.length, self._announced = admitted, least, len(rows[0])

    def _give_back(self, sequences: list[int]) -> None:
        for sequence in sequences:
            self.pool.manager.free(sequence)

    def _append(self, rows: Sequence[Sequence[int | None]]) -> None:
        manager = self.pool.manager
        try:
            for sequence, row in zip(self.sequences, rows, strict=True):
                self.pool.copy(manager.append(sequence, row))
        except OutOfBlocks:
            for sequence in self.sequences:
                manager.truncate(sequence, self._announced)
            raise
        self._announced += len(rows[0])

    def _block_lists(self) -> list[list[int]]:
        return [self.pool.manager.tables[sequence].blocks for sequence in self.sequences]
