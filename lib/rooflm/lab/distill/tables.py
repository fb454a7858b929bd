"""Rows for the chapter's tables: what the ledger says, what a way costs, what two models say.

Chapter: distillation.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rooflm.lab.distill import measure
from rooflm.lab.distill.divergences import forward_kl, reverse_kl
from rooflm.lab.distill.ledger import Wanted, continued, find_row, label, scratch
from rooflm.lab.evaluate import Reference
from rooflm.lab.maps import estimate
from rooflm.lab.model import Transformer
from rooflm.lab.pairs import contrast_rows
from rooflm.lab.rows import Row
from rooflm.roofline.analysis import analyze
from rooflm.roofline.datafiles import data_path
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import size, unknown

SHARES = ("agreement", "acceptance", "repeated", "distinct", measure.GREEDY)
MEASURED = (*measure.ON_TEXT, *measure.ALONE, measure.GREEDY)
BESIDE, VERDICT = "beside", "verdict"
NOISE, LESS, MORE = "within noise", "less", "more"
SEEDS_APART = 2.0  # how often the seeds' spread a difference must be to be one
WAYS = ("text alone", "text with logits", "teacher's text", "own text, scored")

# The runs of each part by what the chapter calls them.
NEW_WEIGHTS: Mapping[str, Wanted] = {
    "logits and layers": scratch("matching"),
    "forward KL": scratch("forward-kl"),
    "forward KL, T = 2": scratch("forward-kl-t2"),
    "forward KL and text": scratch("forward-kl+text"),
    "text alone": scratch("next-token"),
    "teacher's text": scratch("teacher-text"),
    "JSD": scratch("jsd"),
    "reverse KL": scratch("reverse-kl"),
}
TRAINED_FURTHER: Mapping[str, Wanted] = {
    "the start": "student",
    "text alone": continued("next-token"),
    "teacher's text": continued("teacher-text"),
    "forward KL": continued("forward-kl"),
    "reverse KL": continued("reverse-kl"),
    "own text, JSD": continued("own-jsd"),
    "own text, reverse KL": continued("own-reverse-kl"),
    "policy gradient": continued("policy-gradient"),
    "best of 4": continued("best-of-n"),
    "ranked": continued("ranked"),
    "ranked by chance": continued("ranked-randomly"),
}


def words(row: Mapping[str, Any], column: str) -> str:
    """What was measured, with half the width of its interval; a dash where nothing was.

    >>> words({"divergence": 0.5, "divergence_low": 0.48, "divergence_high": 0.52}, "divergence")
    '0.500 ± 0.020'
    """
    if column not in MEASURED:
        raise unknown("column", column, MEASURED)
    if row[column] is None:
        return "–"
    found = estimate(row, column)
    if column in SHARES:
        return f"{found.value:.1%} ± {found.half:.1%}"
    return f"{found.value:.3f} ± {found.half:.3f}"


def tabulate(
    rows: Iterable[Row],
    wanted: Mapping[str, Wanted],
    columns: Iterable[str],
    baseline: Wanted | None = None,
) -> list[tuple[str, ...]]:
    """Rows for a table: what each run is called, and what the ledger says of it.

    Parameters
    ----------
    wanted : runs, or names of `ledger.REFERENCES`, by what they are called in the table.
    columns : of `MEASURED`; or "beside" for the paired difference to the baseline in bits per
        byte, and "verdict" for what `verdict` says of it, with the seeds of the run's own part.
    """
    rows, columns = list(rows), list(columns)
    against = None if baseline is None else find_row(rows, baseline)
    for column in (BESIDE, VERDICT):
        if column in columns and against is None:
            raise ValueError(f"the column {column!r} needs a baseline; none is given")

    def cell(row: Mapping[str, Any], column: str) -> str:
        if column not in (BESIDE, VERDICT):
            return words(row, column)
        if row is against or not row["nats"] or against is None:
            return "–"
        if column == VERDICT:
            part = [other for other in rows if other["part"] == row["part"]]
            return verdict(row, against, seed_spread(part))
        return contrast_rows(row, against).difference.signed()

    found = {name: find_row(rows, variant) for name, variant in wanted.items()}
    return [(name, *(cell(row, column) for column in columns)) for name, row in found.items()]


def plane(
    rows: Iterable[Row], wanted: Mapping[str, Wanted], x: str, y: str
) -> tuple[list[float], list[float]]:
    """Two columns of runs, as the coordinates of a figure's points."""
    found = [find_row(rows, variant) for variant in wanted.values()]
    return [row[x] for row in found], [row[y] for row in found]


def seed_spread(rows: Iterable[Row], column: str = "bits_per_byte") -> float:
    """By how much two runs part that differ in nothing but the seed, root mean square.

    Raises
    ------
    ValueError
        where the ledger holds no such pair.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["steps"]:
            groups.setdefault(label(dict(row) | {"seed": 0}), []).append(row[column])
    squares = [
        (one - other) ** 2
        for found in groups.values()
        for i, one in enumerate(found)
        for other in found[i + 1 :]
    ]
    if not squares:
        raise ValueError("no two rows differ by the seed alone; allowed: one such pair at least")
    return float(sum(squares) / len(squares)) ** 0.5


def verdict(row: Mapping[str, Any], other: Mapping[str, Any], spread: float) -> str:
    """Whether the first row's bits per byte are "less" than the other's, "more", or "within noise".

    A difference counts that is beyond the noise of the text, which the paired interval holds, and
    beyond that of training: `SEEDS_APART` times what two seeds part by.
    """
    found = contrast_rows(row, other).difference
    if found.low <= 0 <= found.high or abs(found.value) <= SEEDS_APART * spread:
        return NOISE
    return LESS if found.value < 0 else MORE


def training_curve(checkpoint: str) -> tuple[list[int], list[float]]:
    """Tokens read and bits per byte, from a checkpoint's log, before its learning rate falls.

    Only there are two runs of different lengths comparable: a falling rate lowers the loss.
    """
    path = data_path("checkpoints", checkpoint, "log.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    log = list(csv.DictReader(line for line in lines if line[:1] != "#"))
    full = max(float(row["learning_rate"]) for row in log)
    kept = [row for row in log if float(row["learning_rate"]) == full]
    return [int(row["tokens"]) for row in kept], [float(row["bits_per_byte"]) for row in kept]


class TrainingCost(NamedTuple):
    """What one token of training costs, at the roofs.

    Parameters
    ----------
    flops : of student and teacher together.
    reading_s : passes over whole rows: the student's three, the teacher's one.
    writing_s : decode steps that wrote the row, if a model did.
    """

    flops: float
    reading_s: float
    writing_s: float


def training_costs(
    student: Model | str, teacher: Model | str, device: str, rows: int, tokens: int
) -> dict[str, TrainingCost]:
    """The cost of a token for each of `WAYS`.

    A backward pass is two forward passes. Logits are computed at all positions. What a model
    writes, it writes step by step, all rows together, at half the context on average; the
    optimizer is left out.

    Parameters
    ----------
    rows, tokens : of a batch, and of each row.
    """
    whole = ForwardPass(rows, tokens, 0, tokens)
    step = ForwardPass.decode(rows, max(1, tokens // 2))

    def costs(model: Model | str) -> tuple[float, float, float, float]:
        reading, writing = (analyze(model, device, x) for x in (whole, step))
        every = rows * tokens
        per_token = reading.flops / every, reading.seconds / every
        return (*per_token, writing.flops / rows, writing.seconds / rows)

    flops, seconds, written, writing = costs(student)
    their_flops, their_seconds, their_written, their_writing = costs(teacher)
    read, taught = 3 * seconds, 3 * seconds + their_seconds
    return {
        WAYS[0]: TrainingCost(3 * flops, read, 0.0),
        WAYS[1]: TrainingCost(3 * flops + their_flops, taught, 0.0),
        WAYS[2]: TrainingCost(3 * flops + their_written, read, their_writing),
        WAYS[3]: TrainingCost(3 * flops + written + their_flops, taught, writing),
    }


def crossing_bytes(vocab: int, likeliest: int = 64) -> tuple[float, float, float]:
    """Bytes for a token: its number, its likeliest logits with their numbers, all its logits.

    Logits are FP16; a number has as many whole bits as name one of the vocabulary.

    >>> crossing_bytes(2048)
    (1.375, 216.0, 4096.0)
    """
    number = (size("vocab", vocab) - 1).bit_length() / 8
    return number, likeliest * (2 + number), 2.0 * vocab


def softened(student: Tensor, teacher: Tensor, temperatures: Iterable[float]) -> list[Row]:
    """At each temperature: the teacher's entropy, and the length of the forward KL's gradient.

    Parameters
    ----------
    student, teacher : logits, (positions, vocab); what is found are means over the positions.

    Returns
    -------
    list
        rows of temperature, entropy (nats), gradient and gradient times the temperature squared.

    Source: arXiv 1503.02531, section 2.
    """
    found = []
    for t in temperatures:
        logs = (teacher / t).log_softmax(-1)
        gradient = ((student / t).softmax(-1) - logs.exp()) / t  # (positions, vocab)
        length = gradient.norm(dim=-1).mean().item()
        entropy = -(logs.exp() * logs).sum(-1).mean().item()
        row = {"temperature": t, "entropy": entropy, "gradient": length}
        found.append({**row, "times T squared": t**2 * length})
    return found


@torch.no_grad()
def on_text(model: Transformer, reference: Reference) -> tuple[float, float, float]:
    """A model's entropy, and its forward and reverse KL from the reference, nats a token."""
    ours, theirs = model(reference.rows[:, :-1]), reference.head(reference.states)
    logs = ours.log_softmax(-1)
    values = -(logs.exp() * logs).sum(-1), forward_kl(ours, theirs), reverse_kl(ours, theirs)
    entropy, forward, reverse = (x.double().mean().item() for x in values)
    return entropy, forward, reverse


def two_modes(teacher: Tensor) -> int:
    """The position at which the teacher's two likeliest tokens come nearest to a half each.

    Parameters
    ----------
    teacher : logits, (positions, vocab).
    """
    return int((teacher.softmax(-1).topk(2).values - 0.5).abs().sum(-1).argmin())
