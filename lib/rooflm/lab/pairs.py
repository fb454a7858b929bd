"""Paired differences between rows of maps, from the losses of the blocks that the rows keep.

A row may hold the nats of every block that its variant was measured on, as one cell. Two rows of
the same blocks then have a paired difference, in which the ups and downs of the text cancel, also
where neither of them is the full model and also where they stand in two files.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.evaluate import BlockSums, Comparison, Evaluation, compare, summarize


def nats_cell(found: Evaluation) -> str:
    """The nats of an evaluation's blocks, as a cell of a row."""
    return " ".join(f"{x:.7g}" for x in found.blocks.losses.tolist())


def from_nats(cell: str, name: str, tokens: int, block: int) -> Evaluation:
    """The evaluation that a cell was made of, without a reference.

    Parameters
    ----------
    name : of the text, one of the laboratory's tokenizer: *Persuasion* was measured on its first
        `tokens` predictions, the other author's text on its last.
    tokens, block : predictions in all, and in a block.

    Raises
    ------
    ValueError
        for a cell that holds another number of blocks.
    """
    losses = torch.tensor([float(x) for x in cell.split()], dtype=torch.float64)
    sizes = block_bytes(name, tokens, block)
    if len(losses) != len(sizes):
        raise ValueError(f"the row holds {len(losses)} blocks; allowed: {len(sizes)}")
    return summarize(BlockSums(torch.full_like(losses, float(block)), sizes, losses))


def contrast(cell: str, other: str, name: str, tokens: int, block: int) -> Comparison:
    """The first cell minus the second, in bits per byte, paired; arguments as of `from_nats`."""
    return compare(from_nats(cell, name, tokens, block), from_nats(other, name, tokens, block))


@lru_cache(maxsize=8)
def block_bytes(name: str, tokens: int, block: int) -> Tensor:
    """Bytes of text in each block that is measured, (blocks,)."""
    whole = text.encode(text.load_text(name))
    part = whole[-tokens:] if name == text.OTHER_AUTHOR else whole[1 : tokens + 1]
    return text.token_bytes()[part].view(-1, block).sum(1).double()
