"""One frontier over all that makes the teacher smaller: bytes per decoded token against loss.

    python -m rooflm.lab.frontier

measures what no single map has: the committed students at 8, 4 and 3 bits (in FP16 they stand in
the ledger of distillation), and once more the best of the map of quantization, which keeps no
blocks. It puts every map's rows beside them, prints the frontier with its error bars and writes all
points into `data/measurements/compression_frontier.csv`. What is measured already is not measured
again.

A point is on the frontier where nothing that reads as few bytes loses less. That is by values; what
can be told from what is another question, which `pareto.rivals` answers. Hundreds of points were
tried on one text, and the best of many looks better than it is: the error bars are those of single
points and hold nothing for that.

Conventions: `difference` is the loss less the teacher's, in bits per byte of *Persuasion*; students
are quantized by GPTQ with a scale and a zero point for 64 weights and searched ranges, calibrated
on *Emma* as the teacher is. Embedding, norms and head are FP16 unless the row is about them. Bytes
are compared to five digits, which is what all maps keep.

Chapter: factorization.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rooflm.lab import maps, pairs
from rooflm.lab.bench import TOKENS, WINDOW, checkpoint_digest, decode_bytes, linear_weights
from rooflm.lab.checkpoints import checkpoint_names, load_checkpoint
from rooflm.lab.command import OneLineParser, attempt, say
from rooflm.lab.map_points import BOTH, DISTILLED, QUANTIZED, TEACHER, Point, map_points, place
from rooflm.lab.pareto import FRONTIER_COLUMNS, frontier_rows
from rooflm.lab.quantize import sweep as quantized
from rooflm.lab.quantize.bench import QuantizeBench, make_bench
from rooflm.lab.quantize.map_rows import frontier as best_of_map
from rooflm.lab.quantize.map_rows import weights_only
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.rows import Row, check_rows, read_rows, write_rows

WIDTHS = (8, 4, 3)  # bits of a student's weights
MAP = maps.MapFile(
    ("measurements", "compression_frontier.csv"),
    "python -m rooflm.lab.frontier",
    ("part", "label"),
    {
        **maps.HEAD, "part": str, "label": str, "decode_bytes": float,
        **maps.LOSS, "trained": int, "source": str, "nats": str, **maps.TAIL,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A committed checkpoint, quantized."""

    checkpoint: str
    recipe: Recipe

    @property
    def names(self) -> Row:
        """The columns that tell it apart; of the teacher they are those of the map's point."""
        label = quantized.label(self.recipe)
        if self.checkpoint == TEACHER:
            return {"part": QUANTIZED, "label": label}
        return {"part": DISTILLED + BOTH, "label": f"{self.checkpoint} {label}"}


def load_points(path: Path | None = None) -> list[Point]:
    """Every point: those of the maps as they are now, and those that this command measured.

    Raises
    ------
    ValueError
        in one line, for a file that is missing, altered or of another checkpoint.
    """
    path = path or MAP.path
    rows = read_rows(path, MAP.columns, MAP.command)
    rows = [row for row in rows if row["source"] == MAP.path.name]
    for name in {row["model"] for row in rows}:
        check_rows(path, rows, name, checkpoint_digest(name))
    own = [_from_row(row) for row in rows]
    return [*left_of(map_points(), own), *own]


def left_of(taken: Iterable[Point], own: Iterable[Point]) -> list[Point]:
    """The points of the maps without those that were measured once more, under whatever label."""
    own = list(own)
    again = {(p.part, p.label) for p in own} | {place(p) for p in own}
    return [p for p in taken if (p.part, p.label) not in again and place(p) not in again]


def variants() -> list[Variant]:
    """The best of the map of quantization, and the committed students at every width."""
    rows = quantized.load_map(TEACHER)
    best = {quantized.MAP.key(row) for row in best_of_map(weights_only(rows))}

    def is_best(recipe: Recipe) -> bool:
        return quantized.MAP.key(quantized.find_row(rows, recipe)) in best

    found = [Variant(TEACHER, recipe) for recipe in quantized.variants() if is_best(recipe)]
    students = [name for name in checkpoint_names() if name != TEACHER]
    widths = [Recipe("gptq", bits, 64, clip="mse") for bits in WIDTHS]
    return found + [Variant(name, recipe) for name in students for recipe in widths]


def measure(bench: QuantizeBench, variant: Variant) -> Row:
    """A variant's row, beside the bench's own model."""
    own = bench
    if variant.checkpoint != TEACHER:
        model = load_checkpoint(variant.checkpoint)
        own = QuantizeBench(model, bench.held_out, bench.rows, bench.token_bytes)
    found, config = own.quantize(variant.recipe), own.model.config
    measured = bench.measure(found.model)
    return {
        "decode_bytes": decode_bytes(config, found.bits_per_weight * linear_weights(config)),
        **pairs.measured_cells(measured, bench.full),
        "trained": int(variant.checkpoint != TEACHER),
        "source": MAP.path.name,
    }


def fill(
    bench: QuantizeBench,
    wanted: Iterable[Variant],
    path: Path,
    taken: Iterable[Point] = (),
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Measure what the file does not hold yet; then put the maps' points beside it.

    Parameters
    ----------
    bench : of the teacher.
    taken : points of the maps, in place of those that the file has; those that were measured once
        more are left out.
    """

    def words(row: Row) -> str:
        return f"{row['label']}: {row['difference']:+.4f} bits per byte"

    wanted = list(wanted)
    for name in dict.fromkeys(v.checkpoint for v in wanted):
        of_it = [v for v in wanted if v.checkpoint == name]
        digest = checkpoint_digest(name)
        MAP.fill(
            path, name, digest, bench.tokens, of_it, lambda v: v.names,
            lambda v: measure(bench, v), words, fresh, say,
        )  # fmt: skip
    rows = read_rows(path, MAP.columns, MAP.command)
    own = [row for row in rows if row["source"] == MAP.path.name]
    others = left_of(taken, map(_from_row, own))
    write_rows(path, MAP.columns, [*own, *map(to_row, others)])


def to_row(point: Point) -> Row:
    """A map's point as a row of the file; its blocks stay in the map."""
    model = "student" if point.part == DISTILLED else TEACHER
    return {
        "model": model,
        "checkpoint": checkpoint_digest(model),
        "part": point.part,
        "label": point.label,
        "decode_bytes": point.decode_bytes,
        **maps.spread("bits_per_byte", point.loss),
        **maps.spread("difference", point.difference),
        "trained": int(point.trained),
        "source": point.source,
        "nats": "",
        "tokens": point.tokens,
        "date": "",
        "torch": "",
    }


def _from_row(row: Row) -> Point:
    return Point(
        row["part"], row["label"], row["decode_bytes"], maps.estimate(row, "bits_per_byte"),
        maps.estimate(row, "difference"), bool(row["trained"]), row["source"], row["nats"],
        row["tokens"],
    )  # fmt: skip


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=MAP.command,
        description="Put all maps on one frontier: bytes per decoded token against loss.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--tokens", type=int, default=TOKENS, help="of Persuasion to measure on (%(default)s)")
    add("--fresh", action="store_true", help="measure all anew that no map has")
    add("--out", type=Path, help="the file (data/measurements/compression_frontier.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    if a.tokens < 2 * WINDOW:
        parser.error(f"--tokens is {a.tokens}; allowed: {2 * WINDOW} or more")
    path = a.out or MAP.path

    def work() -> None:
        taken = map_points()  # refuses what is missing before the teacher is read
        fill(make_bench(TEACHER, a.tokens), variants(), path, taken, a.fresh, say)
        points = load_points(path)
        print(f"{len(points)} points are in {path}; on the frontier:")
        table = [FRONTIER_COLUMNS, *frontier_rows(points)]
        widths = [max(len(row[i]) for row in table) for i in range(len(FRONTIER_COLUMNS))]
        for row in table:
            print("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())
        print("step: whether the point before it surely loses more")
        print("rivals: points that cannot be told from it, by paired + by single intervals")

    return attempt(MAP.command, work)


if __name__ == "__main__":
    sys.exit(main())
