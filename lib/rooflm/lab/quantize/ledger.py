"""The ledger of fine-tuning: what was run, its rows in a file, and paired differences of rows.

Every run trains on as many tokens, `STEPS` batches of `BATCH_ROWS` windows of `WINDOW` tokens.
*Moby-Dick* is read in training up to three quarters of its tokens; measured are its last `TOKENS`,
which no run has read, and the first `TOKENS` of *Persuasion*. All variants are measured on the same
blocks, whose losses stand in the row: any two rows have a paired difference. `seconds` are what
training took on whatever machine, `preparation` what came before it. `adapt` makes the file.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rooflm.lab import maps, pairs, text
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.estimates import Estimate
from rooflm.lab.evaluate import Comparison
from rooflm.lab.rows import Row
from rooflm.roofline.numeric import unknown

MEASURED = (text.OTHER_AUTHOR, text.HELD_OUT)
TRAINED_SHARE = 0.75  # of the other author's tokens
TOKENS = 16_384  # measured on, of each text
BLOCK = 256  # predictions in a block
STEPS, BATCH_ROWS, WINDOW = 60, 8, 64
SHORT = 20  # steps of a run that a chapter can do again
SEEDS = 3  # of the main comparison
RANK, RATE, FULL_RATE, QAT_RATE = 8, 1e-2, 1e-3, 5e-4
GENERATED = (64, 128)  # sequences and tokens that the model writes for itself
CALIBRATION = (16, 256)
FOUND = ("bits_per_byte", "start", "difference", "difference_low", "difference_high")
_RUN = {
    "method": str, "base": str, "rank": int, "learning_rate": float, "steps": int, "text": str,
    "seed": int, "served": str,
}  # fmt: skip
LEDGER = maps.MapFile(
    ("measurements", "finetuning.csv"),
    "python -m rooflm.lab.quantize.adapt",
    tuple(_RUN),
    {
        **maps.HEAD, "part": str, **_RUN,
        "bits_per_weight": float, "trainable": int, "training_bytes": int, "preparation": float,
        "seconds": float, **{f"{name}_{x}": float for name in MEASURED for x in FOUND},
        **maps.TAIL, **{f"{name}_nats": str for name in MEASURED},
    },
)  # fmt: skip
ADAPTERS = ("lora", "qlora", "loftq", "qa-lora")
TRAINED = ("full", *ADAPTERS, "qat", "lsq")
METHODS = ("none", "round", "gptq", *TRAINED)
SERVED = ("as trained", "merged", "rounded")


@dataclass(frozen=True)
class Run:
    """One variant.

    Parameters
    ----------
    method : "none", "round" and "gptq" (not trained; full range and least squared error), "full",
        an adapter, "qat" (straight through, full range) or "lsq" (learned step).
    base : format of the linear weights; of qa-lora, qat, lsq and gptq its bits and group count.
    rank, learning_rate, steps, seed : of training.
    text : what is read: "moby_dick" (its first part), "emma", "shuffled" (the same tokens of
        Moby-Dick in another order), "generated" (what the teacher writes) or "random" (tokens).
    served : "as trained", "merged" (adapters into weights or zero points), or "rounded" (merged
        and rounded to the base's format again).
    """

    method: str
    base: str = "fp16"
    rank: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    text: str = ""
    seed: int = 0
    served: str = "as trained"


def runs(part: str | None = None) -> dict[Run, str]:
    """What the ledger holds, with the part that each stands in; of all parts, or of one.

    Runs that serve one training stand side by side, so that it is done once.
    """
    found = {run: of for of, some in PARTS.items() if part in (None, of) for run in some()}
    first: dict[Run, int] = {}
    for i, run in enumerate(found):
        first.setdefault(replace(run, served=SERVED[0]), i)
    order = sorted(found, key=lambda run: first[replace(run, served=SERVED[0])])
    return {run: found[run] for run in order}


def usual_run(method: str, base: str = "fp16", **other: Any) -> Run:
    """Full fine-tuning or an adapter with the settings of the main comparison, but for others."""
    rate = FULL_RATE if method == "full" else RATE
    rank = 0 if method == "full" else RANK
    run = Run(method, base, rank, rate, STEPS, text.OTHER_AUTHOR)
    return replace(run, **other)


def _main() -> list[Run]:
    kinds = [("full", "fp16"), ("lora", "fp16"), ("qlora", "nf4-dq"), ("qlora", "int2-g32")]
    kinds += [("loftq", "int2-g32"), ("qa-lora", "int4-g32")]
    found = [usual_run(*kind, seed=seed) for seed in range(SEEDS) for kind in kinds]
    once = [("qlora", "int3-g32"), ("loftq", "nf4-dq")]
    return [Run("none"), *found, *(usual_run(*kind) for kind in once)]


def _served() -> list[Run]:
    kinds = [("qlora", "nf4-dq"), ("qlora", "int2-g32"), ("qa-lora", "int4-g32")]
    found = [usual_run(*kind, served=x) for kind in kinds for x in SERVED[1:]]
    return [run for run in found if (run.method, run.served) != ("qa-lora", "rounded")]


def _controls() -> list[Run]:
    found = [usual_run("qlora", "nf4-dq", text=name) for name in ("emma", "shuffled")]
    return [*found, usual_run("qlora", "nf4-dq", steps=SHORT)]  # the one to run again


def _grid() -> list[Run]:
    found = [
        usual_run("qlora", base, rank=rank, learning_rate=RATE * factor)
        for base in ("nf4-dq", "int2-g32")
        for rank in (2, 32)
        for factor in (0.25, 1.0, 4.0)
    ]
    return found + [usual_run("full", learning_rate=FULL_RATE * factor) for factor in (0.25, 4.0)]


def _qat() -> list[Run]:
    forms = ("int2-g64-sym", "int3-g64-sym")
    after = [Run(method, x, text="emma") for x in forms for method in ("round", "gptq")]
    train = Run("lsq", learning_rate=QAT_RATE, steps=STEPS, text="emma")
    found = [replace(train, method=m, base=x) for x in forms for m in ("qat", "lsq")]
    found += [replace(train, base=forms[0], text=x) for x in ("generated", "random")]
    return [*after, *found]


def _calibration() -> list[Run]:
    forms = ("int2-g64-sym", "int3-g64-sym")
    return [Run("gptq", x, text=y) for x in forms for y in (text.OTHER_AUTHOR, "random")]


PARTS: dict[str, Callable[[], list[Run]]] = {
    "main": _main, "served": _served, "controls": _controls, "qat": _qat,
    "calibration": _calibration, "grid": _grid,
}  # fmt: skip


def load_ledger(name: str | Path = "teacher", path: Path | None = None) -> list[Row]:
    """The rows of a model, numbers as numbers.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or holds no rows of this checkpoint.
    """
    return LEDGER.load(Path(name).name, checkpoint_digest(name), path)


def find_rows(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows in which these columns hold these values, such as method="qlora", seed=0."""
    for name in wanted:
        if name not in LEDGER.columns:
            raise unknown("column", name, LEDGER.columns)
    return [row for row in rows if all(row[name] == x for name, x in wanted.items())]


def find_run(rows: Iterable[Row], run: Run) -> Mapping[str, Any]:
    """The row of a run."""
    return LEDGER.find(rows, asdict(run), label(asdict(run)))


def seeds_of(rows: Iterable[Row], run: Run) -> list[Row]:
    """The rows of a run with whatever seed, in the order of the seeds."""
    wanted = {name: x for name, x in asdict(run).items() if name != "seed"}
    return sorted(find_rows(rows, **wanted), key=lambda row: row["seed"])


def change(row: Row, name: str = text.OTHER_AUTHOR) -> Estimate:
    """What a row adds to the teacher's bits per byte on a text of `MEASURED`, paired."""
    _check_text(name)
    return Estimate(*(row[f"{name}_{x}"] for x in FOUND[2:]))


def contrast(row: Row, other: Row, name: str = text.OTHER_AUTHOR) -> Comparison:
    """The first row minus the second on a text of `MEASURED`, in bits per byte, paired."""
    _check_text(name)
    if row["tokens"] != other["tokens"]:
        raise ValueError("the two rows are of different blocks; allowed: the same text")
    ours, theirs = row[f"{name}_nats"], other[f"{name}_nats"]
    return pairs.contrast(ours, theirs, name, row["tokens"], BLOCK)


def label(row: Mapping[str, Any]) -> str:
    """A row in words, such as "qlora nf4-dq r8 0.004 60 steps moby_dick seed 0"."""
    words = [row["method"], row["base"]]
    if row["steps"]:
        words += [f"r{row['rank']}"] if row["rank"] else []
        words += [f"{row['learning_rate']:g}", f"{row['steps']} steps"]
    words += [row["text"], f"seed {row['seed']}" if row["steps"] else ""]
    words += [row["served"]] if row["served"] != SERVED[0] else []
    return " ".join(filter(None, words))


def _check_text(name: str) -> None:
    if name not in MEASURED:
        raise unknown("text", name, MEASURED)
