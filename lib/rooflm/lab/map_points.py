"""Every way to make the teacher smaller as a point: bytes that a decoded token reads, and loss.

The maps of quantization, pruning, factorization and distillation share a text, its blocks and the
teacher that a difference is taken to, so that their rows are points of one plane. Here they are
read. Left out are controls (random masks, ranks and orders, shapes without their training),
rounded activations, which no weight byte shows, and LASER, which searched its cut on this text.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rooflm.lab import maps
from rooflm.lab.bench import decode_bytes, linear_weights
from rooflm.lab.distill import ledger
from rooflm.lab.estimates import Estimate
from rooflm.lab.factorize import sweep as factorized
from rooflm.lab.factorize.variants import EMBEDDINGS
from rooflm.lab.prune import sweep as pruned
from rooflm.lab.prune.recipes import METHODS as ZEROING
from rooflm.lab.prune.variants import FULL as UNPRUNED
from rooflm.lab.prune.variants import label as pruned_label
from rooflm.lab.quantize import sweep as quantized
from rooflm.lab.quantize.map_rows import weights_only
from rooflm.lab.rows import Row
from rooflm.lab.train import CONFIGS

TEACHER = "teacher"
FULL, QUANTIZED, PRUNED, REMOVED = "full", "quantized", "pruned", "removed"
FACTORIZED, EMBEDDING, DISTILLED = "factorized", "embedding", "distilled"
BOTH = " + quantized"
PARTS = (
    FULL, QUANTIZED, PRUNED, PRUNED + BOTH, REMOVED, FACTORIZED, FACTORIZED + BOTH, EMBEDDING,
    DISTILLED, DISTILLED + BOTH,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A model.

    Parameters
    ----------
    part : one of `PARTS`.
    label : what tells it from the others of its source.
    decode_bytes : of weights, read for one decoded token.
    loss : in bits per byte; difference : the same less the teacher's, paired.
    trained : whether it was trained further, or trained as a student.
    source : the file of its row.
    nats : losses of the blocks, where the row has them.
    tokens : predictions that it was measured on.
    """

    part: str
    label: str
    decode_bytes: float
    loss: Estimate
    difference: Estimate
    trained: bool
    source: str
    nats: str
    tokens: int


def map_points() -> list[Point]:
    """The points of all four maps.

    Raises
    ------
    ValueError
        in one line, for a map that is missing or of another checkpoint.
    """
    return without_twins(
        [
            *from_quantization(quantized.load_map(TEACHER)),
            *from_pruning(pruned.load_map(TEACHER)),
            *from_factorization(factorized.load_map(TEACHER)),
            *from_distillation(ledger.load_ledger()),
        ]
    )


def from_quantization(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Quantized weights, and the full model in FP16, as which it is stored."""
    rows, config = list(rows), CONFIGS[TEACHER]
    full = quantized.find_row(rows, None)
    found = [_point(quantized.MAP, full, FULL, "fp16", decode_bytes(config))]
    for row in weights_only(rows):
        read = decode_bytes(config, row["bits_per_weight"] * linear_weights(config))
        found.append(_point(quantized.MAP, row, QUANTIZED, quantized.label(row), read))
    return found


def from_pruning(rows: Iterable[Row]) -> list[Point]:
    """Zeroed weights in the layout that takes least, and models without some of their parts."""
    found = []
    for row in rows:
        if row["method"] in ("random", "scratch", UNPRUNED):
            continue
        words = row["options"].split()
        rounded = any(x.startswith("bits=") for x in words)
        if row["method"] == "dense":
            part = QUANTIZED if rounded else FULL
        elif row["method"] in ZEROING:
            part = PRUNED + (BOTH if rounded else "")
        else:
            part = REMOVED
        found.append(
            _point(pruned.MAP, row, part, pruned_label(row), row["decode_bytes"], _steps(words))
        )
    return found


def from_factorization(rows: Iterable[Row]) -> list[Point]:
    """Factors, factors of few bits, embeddings of fewer numbers."""
    found = []
    for row in rows:
        words = row["options"].split()
        if row["method"] in ("random", "laser") or "shuffled" in words:
            continue
        rounded = any(x.startswith("bits=") for x in words)
        if row["method"] in EMBEDDINGS:
            part = EMBEDDING
        elif row["method"] == "plain":
            part = QUANTIZED if rounded else FULL
        else:
            part = FACTORIZED + (BOTH if rounded else "")
        if part == FULL and not words:
            continue  # the teacher itself stands in the map of quantization
        found.append(
            _point(
                factorized.MAP, row, part, factorized.label(row), row["decode_bytes"], _steps(words)
            )
        )
    return found


def from_distillation(rows: Iterable[Row]) -> list[Point]:
    """Students, with the one that was trained alone; those of a random judge are a control."""
    read = decode_bytes(CONFIGS[ledger.STUDENT])
    return [
        _point(ledger.LEDGER, row, DISTILLED, ledger.label(row), read, True)
        for row in rows
        if row["part"] != ledger.REFERENCE or row["objective"] == ledger.STUDENT
        if row["objective"] != "ranked-randomly"
    ]


def without_twins(points: Iterable[Point]) -> list[Point]:
    """The points, one of each model that two maps have: the one that keeps its blocks."""
    kept: dict[tuple[str, str], Point] = {}
    for point in points:
        key = place(point)
        if key not in kept or (point.nats and not kept[key].nats):
            kept[key] = point
    return list(kept.values())


def place(point: Point) -> tuple[str, str]:
    """Where a point stands, to the digits that all maps keep: those of one model are the same."""
    return point.part, f"{point.decode_bytes:.5g} B, {point.difference.value:.5f} more"


def _point(
    source: maps.MapFile,
    row: Mapping[str, Any],
    part: str,
    label: str,
    read: float,
    trained: bool = False,
) -> Point:
    return Point(
        part,
        label,
        float(read),
        maps.estimate(row, "bits_per_byte"),
        maps.estimate(row, "difference"),
        trained,
        source.place[-1],
        row.get("nats", ""),
        row["tokens"],
    )


def _steps(words: Iterable[str]) -> bool:
    """Whether a row's options hold training."""
    return any(word.startswith("steps=") for word in words)
