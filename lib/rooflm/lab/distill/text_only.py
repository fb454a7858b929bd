"""Black-box distillation: only text crosses over, from a teacher that is sampled once.

The client sends prompts and gets texts back: no logits, no tokens. The student reads the texts
with its own tokenizer and learns the next token of them, so that any two models can be paired. At
temperature 1 its loss is, in expectation, the forward KL of sequences plus the teacher's entropy:
the same goal as white-box distillation, seen through samples.

A corpus is a folder of pieces, each of `DOCUMENTS` answers and decided by its number and the seed;
pieces that are there are not written again.

Source: sequence-level distillation, arXiv 1606.07947, section 3.2, with samples in place of the
output of beam search.

Chapter: distillation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.decode.writing import sample
from rooflm.lab.model import Transformer
from rooflm.lab.stored import write_whole
from rooflm.lab.train import draw_rows

DOCUMENTS, PROMPT, LENGTH = 256, 16, 256  # of a piece; tokens of a prompt and of a document
BROKEN = "\ufffd"  # where a document ends within a character


def complete(teacher: Transformer, prompts: list[str], length: int, seed: int) -> list[str]:
    """The service: texts to the same texts continued, to `length` tokens of the teacher's.

    Prompts are cut to as many tokens as the shortest has.
    """
    tokens = [text.encode(prompt) for prompt in prompts]
    shortest = min(len(row) for row in tokens)
    rows = torch.stack([row[:shortest] for row in tokens])
    generator = torch.Generator().manual_seed(seed)
    written = sample(teacher, rows, length - shortest, generator)
    return [text.decode(row).rstrip(BROKEN) for row in written]


def teacher_corpus(
    teacher: Transformer,
    sources: tuple[Tensor, Tensor],
    folder: Path,
    tokens: int,
    seed: int = 0,
    documents: int = DOCUMENTS,
    length: int = LENGTH,
    say: Callable[[str], None] = print,
) -> Tensor:
    """The tokens of a corpus that the teacher wrote, at least so many; written where it is missing.

    Parameters
    ----------
    teacher : writes.
    sources : prompts are drawn from them, half of each.
    folder : of the corpus.
    tokens : wanted; the teacher writes whole pieces.
    seed : of prompts and samples.
    documents, length : of a piece, and in tokens.
    say : receives a line of progress for each piece that is written.

    Returns
    -------
    Tensor
        (tokens,), the documents parted by token 0.
    """
    pieces = -(-tokens // (documents * length))
    found, end = [], torch.zeros(1, dtype=torch.int64)
    for i in range(pieces):
        path = folder / f"seed{seed}-{documents}x{length}-{i}.jsonl"
        if not path.exists():
            number = seed * 1_000_003 + i
            generator = torch.Generator().manual_seed(number)
            prompts = draw_rows(sources, documents, PROMPT, 0.5, generator)
            texts = complete(teacher, [text.decode(row) for row in prompts], length, number)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(t) + "\n" for t in texts).encode("utf-8"))
            say(f"piece {i + 1}/{pieces} of the teacher's text is written")
        for line in path.read_text(encoding="utf-8").splitlines():
            found += [text.encode(json.loads(line)), end]
    return torch.cat(found)
