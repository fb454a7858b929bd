"""Paired differences between rows of maps, from the losses of the blocks that the rows keep.

A row may hold the nats of every block that its variant was measured on, as one cell. Two rows of
the same blocks then have a paired difference, in which the ups and downs of the text cancel, also
where neither of them is the full model and also where they stand in two files.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rooflm.lab import maps, text
from rooflm.lab.bench import SMOLLM2, WINDOW
from rooflm.lab.evaluate import BlockSums, Comparison, Evaluation, compare, summarize
from rooflm.lab.gguf import to_tokenizer
from rooflm.lab.rows import Row
from rooflm.lab.smollm2 import read_smollm2

LABORATORY = "laboratory"  # the tokenizer of every other model


def nats_cell(found: Evaluation) -> str:
    """The nats of an evaluation's blocks, as a cell of a row."""
    return " ".join(f"{x:.7g}" for x in found.blocks.losses.tolist())


def measured_cells(found: Evaluation, full: Evaluation) -> Row:
    """The cells of `maps.LOSS`, `maps.MATCH` and "nats", of a model beside the full one."""
    assert found.agreement is not None and found.divergence is not None
    return {
        **maps.spread("bits_per_byte", found.bits_per_byte),
        **maps.spread("difference", compare(found, full).difference),
        "agreement": found.agreement.value,
        "divergence": found.divergence.value,
        "nats": nats_cell(found),
    }


def from_nats(
    cell: str, name: str, tokens: int, block: int, tokenizer: str = LABORATORY
) -> Evaluation:
    """The evaluation that a cell was made of, without a reference.

    Parameters
    ----------
    name : of the text: *Persuasion* was measured on its first `tokens` predictions, the other
        author's text on its last.
    tokens, block : predictions in all, and in a block.
    tokenizer : `LABORATORY`, or "smollm2".

    Raises
    ------
    ValueError
        for a cell that holds another number of blocks.
    """
    losses = torch.tensor([float(x) for x in cell.split()], dtype=torch.float64)
    sizes = block_bytes(name, tokens, block, tokenizer)
    if len(losses) != len(sizes):
        raise ValueError(f"the row holds {len(losses)} blocks; allowed: {len(sizes)}")
    return summarize(BlockSums(torch.full_like(losses, float(block)), sizes, losses))


def contrast(cell: str, other: str, name: str, tokens: int, block: int) -> Comparison:
    """The first cell minus the second, in bits per byte, paired; arguments as of `from_nats`."""
    return compare(from_nats(cell, name, tokens, block), from_nats(other, name, tokens, block))


def contrast_rows(
    row: Mapping[str, Any], other: Mapping[str, Any], blocks: slice = slice(None)
) -> Comparison:
    """The first row of a bench's map minus the second, in bits per byte, paired.

    Parameters
    ----------
    row, other : with the columns "model", "tokens" and "nats", of one map or of two.
    blocks : of the text; all of them if not given.

    Raises
    ------
    ValueError
        for rows of different blocks: another tokenizer, or another length.
    """
    tokenizer, theirs = (SMOLLM2 if r["model"] == SMOLLM2 else LABORATORY for r in (row, other))
    tokens = row["tokens"]
    if (tokenizer, tokens) != (theirs, other["tokens"]):
        raise ValueError(
            f"the rows are of {tokens} tokens ({tokenizer}) and of {other['tokens']} ({theirs}); "
            "allowed: the same blocks"
        )

    def part(cell: str) -> Evaluation:
        of = from_nats(cell, text.HELD_OUT, tokens, WINDOW, tokenizer).blocks
        return summarize(BlockSums(of.tokens[blocks], of.bytes[blocks], of.losses[blocks]))

    return compare(part(row["nats"]), part(other["nats"]))


@lru_cache(maxsize=8)
def block_bytes(name: str, tokens: int, block: int, tokenizer: str = LABORATORY) -> Tensor:
    """Bytes of text in each block that is measured, (blocks,); arguments as of `from_nats`."""
    cuts = to_tokenizer(read_smollm2()) if tokenizer == SMOLLM2 else None
    whole = text.encode(text.load_text(name), cuts)
    part = whole[-tokens:] if name == text.OTHER_AUTHOR else whole[1 : tokens + 1]
    return text.token_bytes(cuts)[part].view(-1, block).sum(1).double()
