"""The map: every method at every width, measured on a model and a text.

    python -m rooflm.lab.quantize.sweep
    python -m rooflm.lab.quantize.sweep --model smollm2

measure 130 variants of the teacher, and twenty of SmolLM2, on *Persuasion* and write a row
for each into `data/measurements/quantization_map.csv`. A row that is there is not measured again,
so that an interrupted run goes on when the same command is given. A file whose rows are of
another checkpoint or length is refused.

Conventions: calibration is that of `bench`, done once. All variants are measured on the same
blocks as the full model, so that their differences have paired intervals. `seconds` is what the
method took, calibration apart, on whatever machine. SmolLM2's weights lie on a 4-bit grid already
(`smollm2`): what rounding to 4 bits costs it is not what it would cost the original.

Chapter: quantization methods.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rooflm.lab.estimates import Estimate
from rooflm.lab.evaluate import Comparison, compare
from rooflm.lab.quantize.bench import (
    SMOLLM2,
    TOKENS,
    WINDOW,
    Bench,
    checkpoint_digest,
    make_bench,
)
from rooflm.lab.quantize.methods import METHODS, Recipe
from rooflm.lab.quantize.rows import Columns, Row, check_rows, read_rows, write_rows
from rooflm.roofline.datafiles import data_path

MAP = ("measurements", "quantization_map.csv")
FULL = "full"  # the method of the row without quantization
_COMMAND = "python -m rooflm.lab.quantize.sweep"
_SMOLLM2_TOKENS = 4096  # twenty-five times the teacher's work for each
# Their bits are not chosen.
_OWN_BITS = ("format", "binary", "ternary", "pb-llm", "billm", "llm-int8")
_NUMBERS = (
    "bits_per_weight", "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high",
    "difference", "difference_low", "difference_high", "perplexity", "agreement", "divergence",
    "seconds",
)  # fmt: skip
COLUMNS: Columns = {
    **dict.fromkeys(("model", "checkpoint", "method"), str),
    **dict.fromkeys(("bits", "group"), int),
    "options": str,
    **dict.fromkeys(_NUMBERS, float),
    "tokens": int,
    **dict.fromkeys(("date", "torch"), str),
}


def variants(name: str = "teacher") -> list[Recipe]:
    """What the map holds of a model, beside the full one: of SmolLM2 a choice."""
    low = (4, 3, 2)
    eight = Recipe("round", 8, symmetric=True, activations=8)
    both = [replace(eight, per=x) for x in ("token", "tensor", "static")]
    both += [Recipe("llm-int8"), replace(eight, rotate=True)]
    both += [replace(eight, smooth=0.5, per=x) for x in ("token", "static")]
    if name == SMOLLM2:
        few = [Recipe("round", bits, group) for bits in low for group in (0, 64)]
        few += [Recipe(x, 3, 64, control=c) for x in ("salient", "awq") for c in (False, True)]
        return [Recipe("round", 8), *few, Recipe("gptq", 3), Recipe("gptq", 3, 64), *both]
    rounded = [Recipe("round", bits, group) for group in (0, 64) for bits in (8, 6, 5, *low)]
    rounded += [Recipe("round", bits, group, clip="mse") for group in (0, 64) for bits in low]
    rounded += [Recipe("round", bits, symmetric=True) for bits in (8, *low)]
    formats = [Recipe("format", number_format=x) for x in ("fp8", "nf4", "mxfp4", "nvfp4")]
    rows_and_groups = [(bits, group) for group in (0, 64) for bits in low]
    gptq = [Recipe("gptq", *x, act_order=order) for order in (False, True) for x in rows_and_groups]
    gptq += [Recipe("gptq", *x, clip="mse") for x in rows_and_groups]
    awq = [Recipe("awq", *x) for x in rows_and_groups]
    awq += [Recipe("awq", bits, 64, clip="output") for bits in low]
    kept = [Recipe(name, bits, group) for name, group in (("owq", 0), ("spqr", 16)) for bits in low]
    books = [Recipe("squeezellm", bits) for bits in low]
    salient = [Recipe("salient", *x) for x in rows_and_groups]
    eights = [Recipe(x, 8) for x in ("gptq", "awq", "salient", "owq")] + [Recipe("spqr", 8, 16)]
    turned = [Recipe(name, *x, rotate=True) for name in ("round", "gptq") for x in rows_and_groups]
    tiny = [Recipe(name, group=group) for name in ("binary", "ternary") for group in (0, 64)]
    tiny += [Recipe("pb-llm", group=128, keep=0.1), Recipe("billm", group=128)]
    tried = [*awq[:6], *kept, *books, *salient, tiny[-2]]
    controls = [replace(recipe, control=True) for recipe in tried]
    four = [Recipe(x, 4, 64, activations=a) for x in ("round", "gptq") for a in (8, 4)]
    both += four + [replace(x, rotate=True) for x in four]
    rest = [*salient, *eights, *controls]
    return [*rounded, *formats, *gptq, *awq, *kept, *books, *turned, *tiny, *both, *rest]


def load_map(name: str | Path = "teacher", path: Path | None = None) -> list[Row]:
    """The rows of a model, numbers as numbers.

    Parameters
    ----------
    name : of the model, or the folder of its checkpoint.
    path : of the map; None for the one in `data/measurements`.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or holds no rows of this checkpoint.
    """
    path = path or data_path(*MAP)
    rows = [row for row in read_rows(path, COLUMNS, _COMMAND) if row["model"] == Path(name).name]
    if not rows:
        raise ValueError(f"{path.name} has no rows of {name}; {_COMMAND} --model {name} makes them")
    check_rows(path, rows, Path(name).name, checkpoint_digest(name))
    return rows


def find_row(rows: Iterable[Mapping[str, Any]], recipe: Recipe | None) -> Mapping[str, Any]:
    """The row of a recipe; None for the full model."""
    wanted = _key(_names(recipe))
    for row in rows:
        if _key(row) == wanted:
            return row
    raise ValueError(f"the map has no row of {label(recipe)}")


def label(row: Mapping[str, Any] | Recipe | None) -> str:
    """A row or a recipe in words, such as "gptq 3 bits g64 act_order"."""
    if row is None or isinstance(row, Recipe):
        row = _names(row)
    bits = f"{row['bits']} bits" if row["bits"] is not None else ""
    group = f"g{row['group']}" if row["group"] else ""
    return " ".join(filter(None, (row["method"], bits, group, row["options"])))


def comparison(row: Mapping[str, Any]) -> Comparison:
    """What `evaluate.compare` found of a row, in bits per byte."""
    found = Estimate(row["difference"], row["difference_low"], row["difference_high"])
    worse = "worse" if found.value > 0 else "better"
    noise = found.low <= 0 <= found.high
    return Comparison("bits_per_byte", found, "within noise" if noise else worse)


def sweep(
    bench: Bench,
    recipes: Iterable[Recipe],
    path: Path,
    name: str,
    digest: str,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Measure what the file does not hold yet; after each variant the file is whole.

    Parameters
    ----------
    path : of the map; its rows are kept.
    name, digest : of the checkpoint.
    fresh : drop the rows that the file holds of this model, once the first new one is there.
    say : receives a line of progress.
    """
    rows = read_rows(path, COLUMNS, _COMMAND) if path.exists() else []
    if fresh:
        rows = [row for row in rows if row["model"] != name]
    tokens = int(bench.full.blocks.tokens.sum())
    check_rows(path, rows, name, digest, tokens)
    done = {_key(row) for row in rows if row["model"] == name}
    missing = [r for r in (None, *recipes) if _key(_names(r)) not in done]
    begin = time.monotonic()
    for i, recipe in enumerate(missing):
        row = {"model": name, "checkpoint": digest, **_names(recipe), **_measured(bench, recipe)}
        row |= {"tokens": tokens, "date": date.today().isoformat(), "torch": torch.__version__}
        rows.append(row)
        write_rows(path, COLUMNS, rows)
        left = (time.monotonic() - begin) / (i + 1) * (len(missing) - i - 1)
        say(
            f"{i + 1}/{len(missing)}  {label(row)}: {row['bits_per_weight']:.3g} bits, "
            f"{row['difference']:+.4f} bits per byte; {left / 60:.0f} min left"
        )


def _measured(bench: Bench, recipe: Recipe | None) -> dict[str, float]:
    begin = time.monotonic()
    if recipe is None:
        bits, found, seconds = 32.0, bench.full, 0.0
    else:
        bench.base(recipe)  # calibration is not a part of the method's time
        begin = time.monotonic()
        quantized = bench.quantize(recipe)
        seconds = time.monotonic() - begin
        bits, found = quantized.bits_per_weight, bench.measure(quantized.model)
    own, change = found.bits_per_byte, compare(found, bench.full).difference
    assert found.agreement is not None and found.divergence is not None
    values = (
        bits, own.value, own.low, own.high, change.value, change.low, change.high,
        found.perplexity.value, found.agreement.value, found.divergence.value, seconds,
    )  # fmt: skip
    return dict(zip(_NUMBERS, values, strict=True))


def _names(recipe: Recipe | None) -> dict[str, Any]:
    """Method, bits, group and options of a recipe."""
    if recipe is None:
        return {"method": FULL, "bits": None, "group": 0, "options": ""}
    options = []
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        shown = field.name == "number_format" and recipe.method == "format"
        if field.name in ("method", "bits", "group") or (value == field.default and not shown):
            continue
        options.append(field.name if value is True else f"{field.name}={value}")
    bits = None if recipe.method in _OWN_BITS else recipe.bits
    return {
        "method": recipe.method,
        "bits": bits,
        "group": recipe.group,
        "options": " ".join(options),
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "bits", "group", "options"))


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rooflm.lab.quantize.sweep",
        description="Measure every quantization method on a model and write the map.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--model", default="teacher", help="teacher, student, smollm2 or a checkpoint's folder")
    tokens = f"of Persuasion to measure on ({TOKENS}; {SMOLLM2}: {_SMOLLM2_TOKENS})"
    add("--tokens", type=int, help=tokens)
    add("--method", choices=METHODS, metavar="METHOD", help="only variants of this method")
    add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
    add("--out", type=Path, help="the map (data/measurements/quantization_map.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    tokens = a.tokens or (_SMOLLM2_TOKENS if a.model == SMOLLM2 else TOKENS)
    if tokens < 2 * WINDOW:
        parser.error(f"--tokens is {tokens}; allowed: {2 * WINDOW} or more")
    path, name = a.out or data_path(*MAP), Path(a.model).name
    try:
        digest = checkpoint_digest(a.model)
        if path.exists() and not a.fresh:  # before the minute of calibration
            check_rows(
                path, read_rows(path, COLUMNS, _COMMAND), name, digest, tokens // WINDOW * WINDOW
            )
        recipes = [r for r in variants(name) if a.method in (None, r.method)]
        bench = make_bench(a.model, tokens)
        sweep(bench, recipes, path, name, digest, a.fresh, _say)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last row", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"rooflm.lab.quantize.sweep: error: {error}", file=sys.stderr)
        return 2
    print(f"the map is in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
