"""The map of factorizations: every way to make a model of thinner matrices, measured.

    python -m rooflm.lab.factorize

measures every variant of the teacher, and a choice on SmolLM2, on *Persuasion* and writes a row for
each into `data/measurements/factorization_map.csv`. A row that is there is not measured again, so
that an interrupted run goes on when the same command is given. A file whose rows are of another
checkpoint or length is refused.

Conventions: texts and calibration are those of `rooflm.lab.bench`, so that any two rows, and rows
of other maps, have a paired difference; each row has the nats of its blocks. Bits count all that is
stored: factors in FP16 unless they are quantized, scales, zero points, the order of pivoted rows.
`decode_bytes` is what one decoded token reads of the weights. `output_error` is the mean over the
factorized layers of the squared error of the output over the squared output, on the calibration
inputs. Ranks stand in the order of the layers, 0 for a layer that is one matrix. LASER's rows count
the tokens foreseen in each block too. `seconds` is what making the variant took, on whatever
machine; decompositions that an earlier row has made are not in it.

Chapter: factorization.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rooflm.lab import maps, pairs
from rooflm.lab.bench import WINDOW, checkpoint_digest, decode_bytes
from rooflm.lab.estimates import Estimate, ratio_estimate
from rooflm.lab.factorize.bench import Built, FactorizeBench
from rooflm.lab.factorize.laser import correct_tokens
from rooflm.lab.factorize.variants import Variant
from rooflm.lab.map_command import Job
from rooflm.lab.quantize.gptq import output_error
from rooflm.lab.rows import Row

KEYS = ("method", "share", "rule", "options")
MAP = maps.MapFile(
    ("measurements", "factorization_map.csv"),
    "python -m rooflm.lab.factorize",
    KEYS,
    {
        **maps.HEAD, "method": str, "share": float, "rule": str, "options": str,
        "linear_bits": int, "embedding_bits": int, "decode_bytes": int,
        **maps.LOSS, **maps.MATCH, "output_error": float, "seconds": float,
        **maps.TAIL, "ranks": str, "correct": str, "nats": str,
    },
)  # fmt: skip


def load_map(name: str | Path = "teacher", path: Path | None = None) -> list[Row]:
    """The rows of a model, numbers as numbers.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or holds no rows of this checkpoint.
    """
    return MAP.load(Path(name).name, checkpoint_digest(name), path)


def find_row(rows: Iterable[Row], variant: Variant) -> Mapping[str, Any]:
    """The row of a variant."""
    return MAP.find(rows, variant.names, label(variant.names))


def label(row: Mapping[str, Any]) -> str:
    """A row in words, such as "whitened 50 % uniform pivoted"."""
    share = f"{row['share']:.4g}" if row["share"] < 1 else ""
    return " ".join(filter(None, (row["method"], share, row["rule"], row["options"])))


def more_correct(
    row: Mapping[str, Any], other: Mapping[str, Any], blocks: slice = slice(None)
) -> Estimate:
    """By what share of the tokens the first row foresees more than the second, paired.

    Parameters
    ----------
    blocks : of the text; all of them if not given.
    """
    a, b = (torch.tensor([float(x) for x in r["correct"].split()])[blocks] for r in (row, other))
    return ratio_estimate(a - b, torch.full_like(a, float(WINDOW)))


def sweep(
    bench: FactorizeBench,
    wanted: Iterable[Variant],
    job: Job,
) -> None:
    """Measure what the file does not hold yet, as `Job.fill` does."""

    def words(row: Row) -> str:
        size, loss = row["decode_bytes"] / 1e6, row["difference"]
        return f"{job.name}, {label(row)}: {size:.2f} MB a token, {loss:+.4f} bits per byte"

    def names(variant: Variant) -> Row:
        return dict(variant.names)

    measure = partial(_measured, bench)
    job.fill(MAP, bench.tokens, wanted, names, measure, words)


def _measured(bench: FactorizeBench, variant: Variant) -> Row:
    begin = time.monotonic()
    built = bench.build(variant)
    seconds = time.monotonic() - begin
    found = bench.measure(built.model)
    config = bench.model.config
    read = decode_bytes(config, built.linear_bits)
    if not variant.untied:
        read += built.embedding_bits / 8 - 2.0 * config.vocab * config.hidden
    row: Row = {"linear_bits": round(built.linear_bits), "decode_bytes": round(read)}
    row |= {"embedding_bits": round(built.embedding_bits)}
    row |= pairs.measured_cells(found, bench.full)
    row |= {"output_error": _output_error(bench, built), "seconds": seconds}
    counted = variant.method == "laser" or variant == Variant()
    if counted and config.vocab < 10_000:  # the logits of a batch fit
        right = correct_tokens(built.model, bench.held_out, WINDOW).tolist()
        row["correct"] = " ".join(f"{x:.0f}" for x in right)
    else:
        row["correct"] = ""
    row["ranks"] = " ".join(str(built.ranks.get(name, 0)) for name in bench.shapes)
    return row


def _output_error(bench: FactorizeBench, built: Built) -> float | None:
    """The mean relative error of the factorized layers' outputs on the calibration inputs."""
    errors = []
    for name in built.ranks:
        weight, inputs = bench.layer(name)
        _, index, kind = name.split(".")
        stored = getattr(built.model.layers[int(index)], kind).weight.detach()
        whole = output_error(weight, weight * 0, inputs.hessian)
        errors.append(output_error(weight, stored, inputs.hessian) / whole)
    return sum(errors) / len(errors) if errors else None
