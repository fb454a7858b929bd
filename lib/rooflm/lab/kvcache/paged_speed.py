"""What reading through a table costs on this processor, beside a cache in one piece.

Chapter: paged attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rooflm.lab.kvcache.paged import gather, paged_attention
from rooflm.lab.machine import time_call
from rooflm.lab.model import attend


class Reads(NamedTuple):
    """Seconds of one layer's attention to one new token of each sequence, the fastest of a few.

    one_piece : keys and values in one piece; gathered : copied from blocks into one piece first;
    block_by_block : the loop of `paged_attention`, one sequence after another.
    """

    one_piece: float
    gathered: float
    block_by_block: float


def time_reads(
    block_tokens: int,
    batch: int = 8,
    context: int = 1024,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    runs: int = 9,
) -> Reads:
    """Time the three ways on noise, in blocks that lie in random order.

    Parameters
    ----------
    block_tokens : a divisor of the context.
    """
    if context % block_tokens:
        raise ValueError(f"block_tokens is {block_tokens}; allowed: a divisor of {context}")
    keys, values = torch.randn(2, batch * context // block_tokens, block_tokens, kv_heads, head_dim)
    tables = torch.randperm(len(keys)).view(batch, -1)
    q = torch.randn(batch, heads, 1, head_dim)
    k, v = (gather(x, tables, context).contiguous() for x in (keys, values))
    first = tables[0].tolist()

    def read_gathered() -> torch.Tensor:
        return attend(q, *(gather(x, tables, context) for x in (keys, values)))

    loop = time_call(lambda: paged_attention(q[0, :, 0], keys, values, first, context), 3)
    return Reads(
        time_call(lambda: attend(q, k, v), runs).best_s,
        time_call(read_gathered, runs).best_s,
        batch * loop.best_s,
    )
