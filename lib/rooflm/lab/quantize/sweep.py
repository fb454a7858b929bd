"""The map: every method at every width, measured on a model and a text.

    python -m rooflm.lab.quantize.sweep

measures 130 variants of the teacher, and twenty of SmolLM2, on *Persuasion* and writes a row
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

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rooflm.lab import maps
from rooflm.lab.bench import MAP_TOKENS, SMOLLM2, WINDOW, checkpoint_digest
from rooflm.lab.estimates import Estimate
from rooflm.lab.evaluate import Comparison, compare
from rooflm.lab.map_command import Job, MapCommand
from rooflm.lab.quantize.bench import QuantizeBench, make_bench
from rooflm.lab.quantize.methods import METHODS, Recipe
from rooflm.lab.rows import Row

FULL = "full"  # the method of the row without quantization
# Their bits are not chosen.
_OWN_BITS = ("format", "binary", "ternary", "pb-llm", "billm", "llm-int8")
_KEYS = ("method", "bits", "group", "options")
_NUMBERS = (
    "bits_per_weight", "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high",
    "difference", "difference_low", "difference_high", "perplexity", "agreement", "divergence",
    "seconds",
)  # fmt: skip
MAP = maps.MapFile(
    ("measurements", "quantization_map.csv"),
    "python -m rooflm.lab.quantize.sweep",
    _KEYS,
    {
        **maps.HEAD,
        **dict(zip(_KEYS, (str, int, int, str), strict=True)),
        **dict.fromkeys(_NUMBERS, float),
        **maps.TAIL,
    },
)


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
    return MAP.load(Path(name).name, checkpoint_digest(name), path)


def find_row(rows: Iterable[Mapping[str, Any]], recipe: Recipe | None) -> Mapping[str, Any]:
    """The row of a recipe; None for the full model."""
    return MAP.find(rows, _names(recipe), label(recipe))


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
    bench: QuantizeBench,
    recipes: Iterable[Recipe],
    job: Job,
) -> None:
    """Measure what the file does not hold yet, as `Job.fill` does; the full model first."""

    def words(row: Row) -> str:
        bits, loss = row["bits_per_weight"], row["difference"]
        return f"{label(row)}: {bits:.3g} bits, {loss:+.4f} bits per byte"

    wanted: list[Recipe | None] = [None, *recipes]
    measure = partial(_measured, bench)
    job.fill(MAP, bench.tokens, wanted, _names, measure, words)


def _measured(bench: QuantizeBench, recipe: Recipe | None) -> Row:
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


def _measure(job: Job) -> None:
    recipes = [recipe for recipe in variants(job.name) if job.wants(recipe.method)]
    bench = make_bench(job.model, job.tokens)
    sweep(bench, recipes, job)


COMMAND = MapCommand(
    MAP,
    "Measure every quantization method on a model and write the map.",
    MAP_TOKENS,
    WINDOW,
    METHODS,
    _measure,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
