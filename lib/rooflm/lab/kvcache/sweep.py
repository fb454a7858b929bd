"""The map of KV caches: methods x bits x budget, by perplexity and by retrieval.

    python -m rooflm.lab.kvcache

measures every variant on the teacher and on SmolLM2 and writes a row for each into
`data/measurements/kv_cache_map.csv`. A row that is there is not measured again, so that an
interrupted run goes on when the same command is given. A file whose rows are of another checkpoint
or another length is refused.

Conventions: *Persuasion* is read in blocks of 512 predictions, each through an empty cache, `CHUNK`
tokens a pass; all variants read the same blocks as the full cache, so that differences have paired
intervals. A budget is a number of positions held between passes. SnapKV chooses anew after each
pass there, since a text has no prompt; in retrieval it chooses once, when the prompt has been
read. Retrieval is measured on SmolLM2 alone, at three depths (`retrieval`): the teacher does
not retrieve. Quantized caches are calibrated on *Emma*. Weights in 4 bits are rounded, a scale and
a zero point for 64. `bytes_per_token` is what the cache holds at the end of a block, divided by the
block's tokens; keys and values that are not coded are FP32 here, or FP16 in the quantized caches.

Chapter: throwing the cache away; quantizing the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rooflm.lab import maps, text
from rooflm.lab.bench import CALIBRATION_TEXT, SMOLLM2, checkpoint_digest
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.estimates import Estimate, ratio_estimate, share_estimate
from rooflm.lab.evaluate import compare, evaluate, prepare_reference
from rooflm.lab.kvcache.evicting import (
    H2OCache,
    PriorityCache,
    SnapKVCache,
    TOVACache,
    lots_after,
)
from rooflm.lab.kvcache.quantized import QUANTIZED
from rooflm.lab.kvcache.retrieval import make_cases, retrieve
from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.map_command import Job
from rooflm.lab.maps import spread
from rooflm.lab.model import Cache, FullCache, Transformer
from rooflm.lab.quantize.apply import quantize_model
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.rows import Row
from rooflm.lab.smollm2 import load_smollm2
from rooflm.roofline.numeric import unknown

BLOCK = 512
CHUNK = 32
TOKENS = {"teacher": 8192, SMOLLM2: 3072}
CASES = 8  # at each depth
CONTEXT = 512
DEPTHS = (0.1, 0.5, 0.9)
BUDGETS = (256, 128, 64, 32, 16)
CALIBRATION = {"teacher": 4096, SMOLLM2: 1024}
SINKS = 4
Make = Callable[[], Cache]

# A budget, and whether one prompt is read before the answers, to a function that makes a cache.
BUDGETED: Mapping[str, Callable[[int, bool], Make]] = {
    "windowed": lambda n, once: partial(WindowedCache, n - SINKS, SINKS),
    "window-only": lambda n, once: partial(WindowedCache, n, 0),
    "h2o": lambda n, once: partial(H2OCache, n),
    "tova": lambda n, once: partial(TOVACache, n),
    "snapkv": lambda n, once: partial(SnapKVCache, n, again=not once),
    "snapkv-16-5": lambda n, once: partial(SnapKVCache, n, 16, 5, again=not once),
    "random": lambda n, once: partial(PriorityCache, n),
    "random-sinks": lambda n, once: partial(PriorityCache, n, priority=lots_after(SINKS)),
}
METHODS = ("full", *BUDGETED, *QUANTIZED)
_ESTIMATES = ("bits_per_byte", "difference", "perplexity", "exact", "log_probability")
MAP = maps.MapFile(
    ("measurements", "kv_cache_map.csv"),
    "python -m rooflm.lab.kvcache",
    ("method", "budget", "weights"),
    {
        **maps.HEAD, "weights": str, "method": str, "budget": int, "bytes_per_token": float,
        **{f"{x}{end}": float for x in _ESTIMATES for end in ("", "_low", "_high")},
        "agreement": float, "divergence": float, "seconds": float, "tokens": int,
        "cases": int, "answered": str, "log_probabilities": str, "date": str, "torch": str,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A row of the map.

    Parameters
    ----------
    method : a name in `METHODS`.
    budget : positions held, of the methods in `BUDGETED`; 0 for all.
    weights : "fp32" or "int4-g64".
    """

    method: str = "full"
    budget: int = 0
    weights: str = "fp32"


def variants(name: str = "teacher") -> list[Variant]:
    """What the map holds of a model, the most telling first."""
    four = [Variant(x, weights="int4-g64") for x in ("full", "wkvquant-4", "kivi-4")]
    if name != SMOLLM2:
        evicting = [Variant(method, budget) for method in BUDGETED for budget in BUDGETS]
        return [Variant(), *evicting, *(Variant(x) for x in QUANTIZED), *four]
    at_128 = ("snapkv", "snapkv-16-5", "h2o", "random", "windowed", "window-only", "random-sinks")
    first = [Variant(x, 128) for x in at_128]
    coded = [Variant(x) for x in ("kivi-2", "kvquant-3", "wkvquant-4", "int4-token", "kivi-4")]
    half = [Variant(x, 256) for x in ("snapkv", "h2o", "random-sinks", "windowed")]
    more = [Variant(x) for x in ("kvquant-2", "binary-10", "binary-10-random", "turbo-3")]
    pairs = ("token", "channel"), ("token", "token"), ("channel", "channel")  # keys, values
    more += [Variant(f"k-{k}-v-{v}-2") for k, v in pairs] + [Variant("rotated-4")]
    rest = [Variant("snapkv", 64), *half, Variant("tova", 128)]
    return [Variant(), *first, *coded, *four[:2], *rest, *more]


class Bench:
    """A model with the text and the cases that its caches are measured on.

    Parameters
    ----------
    model, tokenizer : in full precision.
    tokens : predictions of *Persuasion*, two blocks or more.
    cases : of retrieval at each depth; 0 for none.
    calibration : tokens of *Emma*.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, tokens: int, cases: int, calibration: int
    ) -> None:
        self.model = model
        self.token_bytes = text.token_bytes(tokenizer)
        self.held_out = text.encode(text.load_text(text.HELD_OUT), tokenizer)[: tokens + 1]
        self.emma = text.encode(text.load_text(CALIBRATION_TEXT), tokenizer)[:calibration]
        self.reference = prepare_reference(model, self.held_out, BLOCK)
        self.full = evaluate(model, self.held_out, self.token_bytes, BLOCK, self.reference)
        filler = text.encode(text.load_text(text.HELD_OUT), tokenizer)[tokens + 1 :]
        self.cases = [
            make_cases(tokenizer, filler, cases, CONTEXT, depth, seed=i)
            for i, depth in enumerate(DEPTHS if cases else ())
        ]
        self._rounded: Transformer | None = None

    def weights(self, name: str) -> Transformer:
        """The model with its weights in a format, rounded at first use."""
        if name == "fp32":
            return self.model
        if self._rounded is None:
            self._rounded = quantize_model(self.model, Recipe("round", 4, 64)).model
        return self._rounded

    def make(self, variant: Variant, once: bool = False) -> Make:
        """What makes a variant's empty cache; `once` for a prompt that is read before answers."""
        if variant.method in BUDGETED:
            return BUDGETED[variant.method](variant.budget, once)
        if variant.method in QUANTIZED:
            return QUANTIZED[variant.method](self.weights(variant.weights), self.emma)
        return FullCache

    def measure(self, variant: Variant) -> dict[str, Any]:
        """The columns that are measured."""
        begin, model = time.monotonic(), self.weights(variant.weights)
        make = self.make(variant)
        made: list[Cache] = []

        def recorded() -> Cache:
            made[:] = [make()]
            return made[0]

        found = evaluate(
            model, self.held_out, self.token_bytes, BLOCK, self.reference, 4, recorded, CHUNK
        )
        blocks = len(found.blocks.tokens)
        last = blocks % 4 or 4  # rows of the last batch
        row: dict[str, Any] = {"bytes_per_token": made[0].nbytes / (last * BLOCK)}
        row |= spread("bits_per_byte", found.bits_per_byte)
        row |= spread("difference", compare(found, self.full).difference)
        row |= spread("perplexity", found.perplexity)
        assert found.agreement is not None and found.divergence is not None
        row |= {"agreement": found.agreement.value, "divergence": found.divergence.value}
        row |= self._retrieved(model, make if variant.method in QUANTIZED else None, variant)
        return row | {"seconds": time.monotonic() - begin}

    def _retrieved(self, model: Transformer, make: Make | None, variant: Variant) -> dict[str, Any]:
        found = [
            retrieve(model, cases, make or self.make(variant, once=True), CHUNK)
            for cases in self.cases
        ]
        if not found:
            nothing = {f"{x}{y}": None for x in _ESTIMATES[3:] for y in ("", "_low", "_high")}
            return {"cases": 0, "answered": "", "log_probabilities": ""} | nothing
        # Depths take turns: neighbours in the row are then no more alike than others.
        right = torch.stack([x.answered for x in found], 1).flatten()
        return answers(right, torch.stack([x.log_probabilities for x in found], 1).flatten())


def answers(right: Tensor, logs: Tensor) -> dict[str, Any]:
    """The columns of retrieval, from the cases, whose depths take turns."""
    ones = torch.ones_like(logs)
    row: dict[str, Any] = {
        "cases": len(right),
        "answered": "".join(str(int(x)) for x in right),
        "log_probabilities": " ".join(f"{x:.3f}" for x in logs.tolist()),
    }
    row |= spread("exact", share_estimate(right, ones))
    return row | spread("log_probability", ratio_estimate(logs, ones))


def make_bench(name: str | Path, tokens: int | None = None, cases: int | None = None) -> Bench:
    """The bench of "smollm2", of a checkpoint, or of a checkpoint's folder."""
    kind = str(name) if str(name) in TOKENS else "teacher"
    tokens = tokens or TOKENS[kind]
    if str(name) == SMOLLM2:
        cases = CASES if cases is None else cases
        return Bench(*load_smollm2(), tokens, cases, CALIBRATION[kind])
    model = load_checkpoint(name)
    return Bench(model, text.load_tokenizer(), tokens, cases or 0, CALIBRATION[kind])


def load_map(name: str | Path = "teacher", path: Path | None = None) -> list[Row]:
    """The rows of a model, numbers as numbers.

    Raises
    ------
    ValueError
        in one line: the file is missing or altered, or holds no rows of this checkpoint.
    """
    return MAP.load(Path(name).name, checkpoint_digest(name), path)


def find_row(
    rows: Iterable[Mapping[str, Any]], method: str = "full", budget: int = 0, weights: str = "fp32"
) -> Mapping[str, Any]:
    """The row of a variant."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    wanted = asdict(Variant(method, budget, weights))
    return MAP.find(rows, wanted, label(wanted))


def label(row: Mapping[str, Any]) -> str:
    """A row in words, such as "h2o 128" or "int4-g64 weights, kivi-4"."""
    words = row["method"] + (f" {row['budget']}" if row["budget"] else "")
    return words if row["weights"] == "fp32" else f"{row['weights']} weights, {words}"


def by_depth(row: Mapping[str, Any]) -> dict[float, Estimate]:
    """The share that was answered at each depth."""
    right = torch.tensor([float(x) for x in row["answered"]]).view(-1, len(DEPTHS)).T
    ones = torch.ones(right.shape[1])
    return {d: share_estimate(x, ones) for d, x in zip(DEPTHS, right, strict=True)}


def sweep(
    bench: Bench,
    wanted: Iterable[Variant],
    job: Job,
) -> None:
    """Measure what the file does not hold yet, as `Job.fill` does."""

    def words(row: Row) -> str:
        told = f", {row['exact']:.0%} retrieved" if row["exact"] is not None else ""
        size, loss = row["bytes_per_token"], row["difference"]
        return f"{job.name}, {label(row)}: {size:.0f} B/token, {loss:+.4f} bits per byte{told}"

    tokens = int(bench.full.blocks.tokens.sum())
    job.fill(MAP, tokens, wanted, asdict, bench.measure, words)
