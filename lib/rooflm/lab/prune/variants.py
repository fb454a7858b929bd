"""Which variants the map of pruning holds, and by which names each stands there.

A row is told from others by `method` (what scores, or chooses parts), `sparsity` (the share of the
linear layers' weights that go), `pattern` ("" for single weights anywhere, "2:4", or the parts that
go, such as "channels 192") and `options`, which are a recipe's other fields where they differ from
the default.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from rooflm.lab.bench import SMOLLM2, linear_weights
from rooflm.lab.model import Config
from rooflm.lab.prune.recipes import PARTS, RATE, Recipe, Removal
from rooflm.lab.rows import Row

Variant = Recipe | Removal | None  # None: the full model
FULL = "full"
STEPS = 60  # of recovery
RATES = (RATE, RATE / 5)
_NAMED = {"method", "criterion", "sparsity", "pattern", *PARTS}  # not among the options


def variants(name: str = "teacher") -> list[Variant]:
    """What the map holds of a model, beside the full one: of SmolLM2 a choice."""
    if name == SMOLLM2:
        return _smollm2_variants()
    return [*_weights(), *_rounded(), *_parts(), *_depths(), *_recoveries()]


def label(row: Mapping[str, Any]) -> str:
    """A row in words, such as "wanda 50 % 2:4" or "influence 16.7 % layers 1 steps=60"."""
    share = f"{100 * row['sparsity']:.3g} %" if row["sparsity"] else ""
    return " ".join(filter(None, (row["method"], share, row["pattern"], row["options"])))


def names_of(variant: Variant, config: Config | None = None) -> Row:
    """The key columns of a variant.

    Parameters
    ----------
    config : of the full model, which the sparsity of a `Removal` follows from; None leaves it None.
    """
    if variant is None:
        return {"method": FULL, "sparsity": 0.0, "pattern": "", "options": ""}
    options = [
        field.name if value is True else f"{field.name}={value}"
        for field in fields(variant)
        if (value := getattr(variant, field.name)) != field.default and field.name not in _NAMED
    ]
    if isinstance(variant, Recipe):
        method, pattern = variant.method, variant.pattern
        sparsity: float | None = variant.sparsity
    else:
        method = variant.criterion
        sparsity = None if config is None else _removed_share(variant, config)
        pattern = " ".join(f"{name} {getattr(variant, name)}" for name in variant.parts)
    return {
        "method": method,
        "sparsity": None if sparsity is None else round(sparsity, 4),
        "pattern": pattern,
        "options": " ".join(options),
    }


def _removed_share(removal: Removal, config: Config) -> float:
    """The share of the linear layers' weights that a removal takes out."""
    groups = config.kv_heads - removal.groups
    left = replace(
        config,
        layers=config.layers - removal.layers,
        kv_heads=groups,
        heads=groups * (config.heads // config.kv_heads - removal.heads),
        intermediate=config.intermediate - removal.channels,
        head_width=config.head_dim,
    )
    return 1 - linear_weights(left) / linear_weights(config)


def _weights() -> list[Variant]:
    shares = [i / 10 for i in range(1, 10)]
    found = [Recipe(m, x) for m in ("magnitude", "wanda", "sparsegpt") for x in shares]
    found += [Recipe("random", x) for x in (0.1, 0.2, 0.3, 0.5, 0.7)]
    found += [
        Recipe(m, x, per=per)
        for m, per in (("magnitude", "row"), ("wanda", "layer"), ("sparsegpt", "row"))
        for x in (0.5, 0.6, 0.7)
    ]
    found += [Recipe(m, x, update=True) for m in ("magnitude", "wanda") for x in (0.5, 0.7)]
    found += [Recipe(m, 0.5, "2:4", update=True) for m in ("magnitude", "wanda")]
    found += [
        Recipe(m, x, refit=True) for m in ("magnitude", "wanda", "sparsegpt") for x in (0.5, 0.7)
    ]
    found += [Recipe(m, x, calibration="full") for m in ("wanda", "sparsegpt") for x in (0.5, 0.7)]
    found += [
        Recipe(m, 0.5, pattern)
        for pattern in ("2:4", "4:8")
        for m in ("magnitude", "wanda", "sparsegpt", "random")
    ]
    found += [Recipe("wanda", x, owl=True) for x in (0.5, 0.6, 0.7, 0.8)]
    return [*found, *(Recipe(m, 0.7, owl=True) for m in ("magnitude", "sparsegpt"))]


def _rounded() -> list[Variant]:
    """Pruned and rounded to 4 bits, beside as many bytes of dense 3-bit weights."""
    joint = [
        Recipe("sparsegpt", 0.5, pattern, bits=4, group=group)
        for pattern in ("", "2:4")
        for group in (0, 64)
    ]
    after = [replace(r, method="wanda", update=True) for r in joint]
    dense = [Recipe("dense", 0.0, bits=b, group=group) for b in (4, 3) for group in (0, 64)]
    return [*joint, *after, *dense]


_SHAPES = (
    {"channels": 192}, {"channels": 384}, {"heads": 1}, {"groups": 1},
    {"heads": 1, "channels": 384},
)  # fmt: skip


def _parts() -> list[Variant]:
    how = ("first-order", "vector", "random")
    return [Removal(criterion, **shape) for shape in _SHAPES for criterion in how]


def _depths() -> list[Variant]:
    how = ("influence", "loss", "first-order", "vector", "last", "first")
    found: list[Variant] = [Removal(criterion, layers=n) for n in (1, 2, 3) for criterion in how]
    return found + [Removal("random", layers=n, seed=s) for n in (1, 2, 3) for s in range(3)]


def _recoveries() -> list[Variant]:
    """Equal tokens for all, the full model too; and a choice again at a lower rate."""
    dense: list[Variant] = [Recipe("dense", 0.0)]
    some = [Recipe(m, x) for m in ("magnitude", "wanda", "sparsegpt") for x in (0.5, 0.7)]
    some += [Recipe(m, 0.5, "2:4") for m in ("magnitude", "wanda", "sparsegpt")]
    some += [Recipe("random", 0.5)]
    parts = [Removal("first-order", **shape) for shape in _SHAPES]
    parts += [Removal("random", **shape) for shape in _SHAPES]
    parts += [Removal("loss", layers=n) for n in (1, 2, 3)]
    parts += [Removal("influence", layers=3), Removal("random", layers=3)]
    parts += [Removal("scratch", heads=1, channels=384)]
    gently: list[Variant] = [*dense, Recipe("magnitude", 0.5), Recipe("sparsegpt", 0.5)]
    gently += [Recipe(m, 0.7) for m in ("magnitude", "wanda", "sparsegpt")]
    gently += [Recipe("sparsegpt", 0.5, "2:4"), Recipe("random", 0.5), *parts[:5]]
    gently += [Removal("random", heads=1, channels=384), Removal("influence", layers=3)]
    found = [(RATES[0], x) for x in (*dense, *some, *parts)] + [(RATES[1], x) for x in gently]
    return [replace(x, steps=STEPS, rate=rate) for rate, x in found if x is not None]


def _smollm2_variants() -> list[Variant]:
    three = ("magnitude", "wanda", "sparsegpt")
    found: list[Variant] = [Recipe(m, x) for x in (0.3, 0.5) for m in three]
    found += [Recipe(m, 0.5, "2:4") for m in three] + [Recipe("random", 0.3)]
    found += [Recipe("magnitude", 0.5, update=True), Recipe("wanda", 0.5, update=True)]
    found += [Recipe("magnitude", 0.5, per="row"), Recipe("wanda", 0.5, per="layer")]
    found += [Removal("influence", layers=n) for n in (1, 3, 6, 9)]
    found += [Removal("first-order", layers=n) for n in (1, 3, 6)]
    found += [Removal(m, layers=n) for m in ("last", "random") for n in (1, 3, 6)]
    return [*found, *(Removal(m, channels=384) for m in ("first-order", "random"))]
