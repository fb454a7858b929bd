"""The map: every way of pruning at every sparsity, measured on a model and a text.

    python -m rooflm.lab.prune

measures 160 variants of the teacher, and thirty of SmolLM2, on *Persuasion* and writes a row for
each into `data/measurements/pruning_map.csv`. A row that is there is not measured again.

Conventions. `variants` says what tells a row from others. Blocks are calibrated in order on *Emma*,
each on what the pruned ones before it hand on, unless "calibration=full" says otherwise.
`linear_bits` is what all linear layers take in the layout that takes least, which `storage` names;
`decode_bytes` adds the head and the norms. Kept weights are FP16, or codes of `bits`. Recovery is
`steps` of next-token training on Austen's other five novels, 1,024 tokens each, at one learning
rate for all and for a choice at a fifth of it; "dense" is the full model after the same training.
`nats` has the losses of the blocks, so that any two rows of a model have a paired difference.
`seconds` is what pruning took, recovery included, on a busy machine. SmolLM2's weights lie on a
4-bit grid (`smollm2`).

Chapter: pruning.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from torch import Tensor

from rooflm.lab import maps, pairs
from rooflm.lab.bench import (
    Bench,
    checkpoint_digest,
    decode_bytes,
    linear_weights,
)
from rooflm.lab.map_command import Job
from rooflm.lab.model import Transformer
from rooflm.lab.prune import apply
from rooflm.lab.prune.recipes import Recipe, Removal
from rooflm.lab.prune.storage import linear_bits
from rooflm.lab.prune.variants import Variant, label, names_of
from rooflm.lab.recovery import recovery_text
from rooflm.lab.rows import Row

_KEYS = ("method", "sparsity", "pattern", "options")
_SHAPE = ("layers", "heads", "kv_heads", "intermediate")
MAP = maps.MapFile(
    ("measurements", "pruning_map.csv"),
    "python -m rooflm.lab.prune",
    _KEYS,
    {
        **maps.HEAD,
        **dict(zip(_KEYS, (str, float, str, str), strict=True)),
        **{"density": float, "linear_bits": float, "storage": str, "decode_bytes": float},
        **dict.fromkeys(_SHAPE, int),
        **maps.LOSS,
        **maps.MATCH,
        **{"nats": str, "seconds": float},
        **maps.TAIL,
    },
)


class PruneBench(Bench):
    """A bench that prunes by recipe; its parameters are those of `Bench`."""

    @cached_property
    def recovery_tokens(self) -> Tensor:
        """The text of recovery, (tokens,)."""
        return recovery_text()

    def prune(self, recipe: Recipe) -> apply.PrunedModel:
        """The model pruned by a recipe, recovered where it says so."""
        inputs = self.inputs if recipe.owl or recipe.calibration == "full" else None
        found = apply.prune_model(self.model, recipe, self.rows, inputs)
        if not recipe.steps:
            return found
        return found._replace(model=apply.recovered(found.model, recipe, self.recovery_tokens))

    def remove(self, removal: Removal) -> Transformer:
        """The model without some of its parts, recovered where it says so."""
        found = apply.remove_parts(self.model, removal, self.rows)
        if not removal.steps:
            return found
        return apply.recovered(found, removal, self.recovery_tokens)


def load_map(name: str | Path = "teacher", path: Path | None = None) -> list[Row]:
    """The rows of a model, numbers as numbers.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or holds no rows of this checkpoint.
    """
    return MAP.load(Path(name).name, checkpoint_digest(name), path)


def find_row(rows: Iterable[Row], variant: Variant) -> Row:
    """The row of a variant; None for the full model.

    Raises
    ------
    ValueError
        where the map has none.
    """
    names = names_of(variant)
    known = {name: x for name, x in names.items() if x is not None}
    for row in rows:
        if all(row[name] == x for name, x in known.items()):
            return row
    raise ValueError(f"the map has no row of {label(names)}")


def sweep(
    bench: PruneBench,
    wanted: Iterable[Variant],
    job: Job,
) -> None:
    """Measure what the file does not hold yet, as `Job.fill` does; the full model first."""

    def words(row: Row) -> str:
        return f"{label(row)}: {row['difference']:+.4f} bits per byte"

    def names(variant: Variant) -> Row:
        return names_of(variant, bench.model.config)

    def measure(variant: Variant) -> Row:
        return _measured(bench, variant)

    job.fill(MAP, bench.tokens, [None, *wanted], names, measure, words)


def _measured(bench: PruneBench, variant: Variant) -> Row:
    config, begin = bench.model.config, time.monotonic()
    whole = linear_weights(config)
    bits, storage, density = 16.0 * whole, "dense", 1.0
    model = bench.model
    if isinstance(variant, Recipe):
        pruned = bench.prune(variant)
        model, masks = pruned.model, list(pruned.masks.values())
        bits, storage = linear_bits(masks, variant.pattern, variant.bits, variant.group)
        density = sum(int(mask.sum()) for mask in masks) / whole
    elif isinstance(variant, Removal):
        model = bench.remove(variant)
        config, left = model.config, linear_weights(model.config)
        bits, density = 16.0 * left, left / whole
    seconds = time.monotonic() - begin
    found = bench.full if variant is None else bench.measure(model)
    return {
        "density": density,
        "linear_bits": bits,
        "storage": storage,
        "decode_bytes": decode_bytes(config, bits),
        **{name: getattr(config, name) for name in _SHAPE},
        **pairs.measured_cells(found, bench.full),
        "seconds": seconds,
    }
