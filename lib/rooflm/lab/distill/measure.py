"""What a student is measured by: its distributions on real text, and the text that it writes.

On the held-out text, position by position: bits per byte, agreement, both divergences, and how
often a draft token of the student's would be accepted by the teacher. That is with prefixes that
a person wrote. Running freely, the student writes its own: `ROWS` prompts of *Persuasion*, beyond
what is measured otherwise, are continued; the teacher says what that text costs it, beside what
it cost the student. The difference, a token, is the divergence of sequences, KL(student ||
teacher); in place of the drawn tokens' difference stands its mean over the vocabulary at each drawn
prefix, which has the same expectation and less noise. Repetition needs no model: n-grams that came
before in the same continuation, and how many different ones a few continuations hold.

A text that costs the teacher less than real text does is no better for it: it is duller.

Sources: repetition, arXiv 1908.04319 (seq-rep-n); distinct n-grams, arXiv 1510.03055.

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflm.lab import pairs
from rooflm.lab.bench import Bench
from rooflm.lab.decode.writing import answer_logits, sample, token_logs
from rooflm.lab.distill.divergences import reverse_kl, total_variation
from rooflm.lab.estimates import Estimate, ratio_estimate, share_estimate
from rooflm.lab.evaluate import Reference, compare
from rooflm.lab.maps import spread
from rooflm.lab.model import Transformer
from rooflm.roofline.numeric import size

ROWS, PROMPT, NEW = 128, 32, 128  # continuations, and the tokens of a prompt and of its answer
REPEATED, DISTINCT, TOGETHER = 4, 2, 8  # n of the n-grams; continuations that are counted together
ON_TEXT = (
    "bits_per_byte", "difference", "agreement", "divergence", "reverse_divergence", "acceptance",
)  # fmt: skip
ALONE = ("teacher_nats", "own_nats", "sequence_divergence", "repeated", "distinct")
GREEDY = "greedy_repeated"
_AT_ONCE = 8  # blocks or continuations of which the logits stand in memory


@dataclass(frozen=True, eq=False)
class Distances:
    """Sums over the positions of each block, (blocks,): nats, and rejected drafts."""

    reverse: Tensor
    rejected: Tensor


@torch.no_grad()
def distances(model: Transformer, reference: Reference) -> Distances:
    """KL(model || reference) and the total variation of both, on the reference's text."""
    found = []
    for rows, states in zip(
        reference.rows.split(_AT_ONCE), reference.states.split(_AT_ONCE), strict=True
    ):
        ours, theirs = model(rows[:, :-1]), reference.head(states)
        values = reverse_kl(ours, theirs), total_variation(ours, theirs)
        found.append(torch.stack([v.double().sum(1) for v in values]))
    return Distances(*torch.cat(found, dim=1))


@dataclass(frozen=True, eq=False)
class Writing:
    """Continuations, and sums over each, (rows,).

    Parameters
    ----------
    tokens : (rows, n), what was written.
    teacher : nats that it costs the teacher.
    own, divergence : nats that it cost its writer, and KL(writer || teacher) at its places; None
        for a text whose writer is no model.
    """

    tokens: Tensor
    teacher: Tensor
    own: Tensor | None = None
    divergence: Tensor | None = None


@torch.no_grad()
def judge_writing(
    rows: Tensor, prompt: int, teacher: Transformer, writer: Transformer | None = None
) -> Writing:
    """What prompts' continuations cost the teacher and their writer.

    Parameters
    ----------
    rows : (rows, prompt + n).
    """
    found = []
    for part in rows.split(_AT_ONCE):
        answer, theirs = part[:, prompt:], answer_logits(teacher, part, prompt)
        values = [-token_logs(theirs, answer)]
        if writer is not None:
            ours = answer_logits(writer, part, prompt)
            values += [-token_logs(ours, answer), reverse_kl(ours, theirs)]
        found.append(torch.stack([v.double().sum(1) for v in values]))
    return Writing(rows[:, prompt:], *torch.cat(found, dim=1))


def repeated(tokens: Tensor, n: int = REPEATED) -> Tensor:
    """How many of the n-grams of each row stood in the row before, (rows,), of (rows, length)."""
    size("n", n)
    counts = []
    for row in tokens:
        grams = row.unfold(0, n, 1)
        counts.append(len(grams) - len(grams.unique(dim=0)))
    return torch.tensor(counts, dtype=torch.float64)


def repeated_share(tokens: Tensor, n: int = REPEATED) -> Estimate:
    """The share of n-grams that repeat one of the same row; the rows are the sample."""
    counts = repeated(tokens, n)
    return share_estimate(counts, torch.full_like(counts, tokens.shape[1] - n + 1))


def distinct_share(tokens: Tensor, n: int = DISTINCT, together: int = TOGETHER) -> Estimate:
    """Different n-grams among all of `together` rows, a share; groups of rows are the sample."""
    grams = tokens.unfold(1, n, 1)
    groups = [g.flatten(0, 1) for g in grams[: len(grams) // together * together].split(together)]
    counts = torch.tensor([len(g.unique(dim=0)) for g in groups], dtype=torch.float64)
    return share_estimate(counts, torch.full_like(counts, len(groups[0])))


class Scales:
    """A teacher's bench with the prompts that students continue.

    Parameters
    ----------
    bench : of the teacher.
    text : (tokens,), what prompts are taken from, at equal distances; with what follows them there.
    rows, prompt, new : continuations, and tokens of a prompt and of its answer.
    seed : of every model's draws.
    """

    def __init__(
        self,
        bench: Bench,
        text: Tensor,
        rows: int = ROWS,
        prompt: int = PROMPT,
        new: int = NEW,
        seed: int = 0,
    ) -> None:
        length = prompt + new
        if len(text) < length + rows or rows < 2 * TOGETHER:
            raise ValueError(
                f"rows is {rows}; allowed: {2 * TOGETHER} or more, in a text of {length + rows} "
                f"tokens or more, not {len(text)}"
            )
        starts = torch.linspace(0, len(text) - length, rows).long()
        self.bench, self.prompt, self.seed = bench, prompt, seed
        self.text_rows = text[starts[:, None] + torch.arange(length)]

    def measure(self, model: Transformer) -> dict[str, Any]:
        """The columns of a model."""
        return self._on_text(model) | self._alone(model)

    def measure_text(self) -> dict[str, Any]:
        """The columns of what the author wrote after the prompts: those that need no writer."""
        writing = judge_writing(self.text_rows, self.prompt, self.bench.model)
        return EMPTY | _columns(writing)

    def _on_text(self, model: Transformer) -> dict[str, Any]:
        found, apart = self.bench.measure(model), distances(model, self.bench.reference)
        assert found.agreement is not None and found.divergence is not None
        tokens = found.blocks.tokens
        estimates = (
            found.bits_per_byte,
            compare(found, self.bench.full).difference,
            found.agreement,
            found.divergence,
            ratio_estimate(apart.reverse, tokens),
            share_estimate(tokens - apart.rejected, tokens),
        )
        row: dict[str, Any] = {"nats": pairs.nats_cell(found)}
        for name, value in zip(ON_TEXT, estimates, strict=True):
            row |= spread(name, value)
        return row

    def _alone(self, model: Transformer) -> dict[str, Any]:
        prompts, new = self.text_rows[:, : self.prompt], self.text_rows.shape[1] - self.prompt
        drawn = sample(model, prompts, new, torch.Generator().manual_seed(self.seed))
        row = _columns(judge_writing(drawn, self.prompt, self.bench.model, model))
        likeliest = sample(model, prompts, new)[:, self.prompt :]
        return row | spread(GREEDY, repeated_share(likeliest))


COLUMNS: Mapping[str, type] = {
    **{f"{x}{end}": float for x in (*ON_TEXT, *ALONE, GREEDY) for end in ("", "_low", "_high")},
    "nats": str,
    "teacher_row_nats": str,
}
EMPTY: dict[str, Any] = {name: "" if kind is str else None for name, kind in COLUMNS.items()}


def _columns(writing: Writing) -> dict[str, Any]:
    tokens = torch.full_like(writing.teacher, writing.tokens.shape[1])
    row: dict[str, Any] = {
        "teacher_row_nats": " ".join(f"{x:.6g}" for x in writing.teacher.tolist())
    }
    for name, sums in zip(ALONE, (writing.teacher, writing.own, writing.divergence), strict=False):
        if sums is not None:
            row |= spread(name, ratio_estimate(sums, tokens))
    row |= spread("repeated", repeated_share(writing.tokens))
    return row | spread("distinct", distinct_share(writing.tokens))
