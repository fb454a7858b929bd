"""The ledger of fine-tuning: each way of adapting or repairing a quantized model, measured.

    python -m rooflm.lab.quantize.adapt
    python -m rooflm.lab.quantize.adapt --part qat

train some seventy variants of the teacher and write a row for each into
`data/measurements/finetuning.csv`. A row that is there is not measured again, so that an
interrupted run goes on when the same command is given. A file whose rows are of another
checkpoint or length is refused.

`ledger` has the conventions. QAT learns the teacher's own distributions (`llm_qat.distill`);
adapters and full fine-tuning learn the next token.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rooflm.lab import pairs, text
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.calibrate import calibration_rows
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.command import OneLineParser, attempt, say
from rooflm.lab.evaluate import Evaluation, compare, evaluate
from rooflm.lab.finetune import (
    fit,
    next_token_loss,
    plain_layer,
    replace_weights,
    text_batches,
    unfrozen,
)
from rooflm.lab.model import Transformer
from rooflm.lab.quantize import llm_qat, peft
from rooflm.lab.quantize.apply import quantize_model
from rooflm.lab.quantize.codecs import to_format
from rooflm.lab.quantize.ledger import (
    ADAPTERS,
    BATCH_ROWS,
    BLOCK,
    CALIBRATION,
    FOUND,
    GENERATED,
    LEDGER,
    MEASURED,
    PARTS,
    SERVED,
    TOKENS,
    TRAINED_SHARE,
    WINDOW,
    Run,
    label,
    runs,
)
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.quantize.qat import frozen, quantization_aware
from rooflm.lab.rows import Row
from rooflm.roofline.formats import load_format
from rooflm.roofline.numeric import unknown


class Workshop:
    """A model, the texts, and the model's losses on them: what a run needs.

    Parameters
    ----------
    model : in full precision.
    tokens : measured on, of each text.
    """

    def __init__(self, model: Transformer, tokens: int = TOKENS) -> None:
        self.model = model
        self.token_bytes = text.token_bytes()
        own = text.encode(text.load_text(text.OTHER_AUTHOR))
        self.training = own[: round(TRAINED_SHARE * len(own))]
        others = text.encode(text.load_text(text.HELD_OUT))
        self.held_out = {
            text.OTHER_AUTHOR: own[-tokens - 1 :],
            text.HELD_OUT: others[: tokens + 1],
        }
        if len(self.training) + tokens > len(own):
            raise ValueError(f"tokens is {tokens}; allowed: what training leaves of the text")
        self._started: dict[tuple[str, str, int], dict[str, Evaluation]] = {}
        self._novels: dict[str, Tensor] = {}
        self._last: tuple[Run, Transformer] | None = None

    @cached_property
    def before(self) -> dict[str, Evaluation]:
        """The model itself on both texts."""
        return self.measure(self.model)

    def measure(self, model: Transformer, names: Iterable[str] = MEASURED) -> dict[str, Evaluation]:
        """A model on texts of `MEASURED`."""
        texts = ((name, self.held_out[name]) for name in names)
        return {name: evaluate(model, x, self.token_bytes, BLOCK) for name, x in texts}

    def read(self, name: str, seed: int = 0) -> Tensor:
        """The tokens of a run's text, (tokens,), or (sequences, tokens) that the model writes."""
        generator = torch.Generator().manual_seed(1000 + seed)
        if name == text.OTHER_AUTHOR:
            return self.training
        if name == "shuffled":
            return self.training[torch.randperm(len(self.training), generator=generator)]
        if name == "random":
            return torch.randint(self.model.config.vocab, (50_000,), generator=generator)
        if name == "generated":
            return llm_qat.generate_data(self.model, *GENERATED, generator)
        if name not in text.TEXTS:
            raise unknown("text", name, [*text.TEXTS, "shuffled", "random", "generated"])
        if name not in self._novels:
            self._novels[name] = text.encode(text.load_text(name))
        return self._novels[name]

    def start(self, run: Run) -> Transformer:
        """The model as a run starts from it; what is not trained is done."""
        model, form, base = self.model, load_format(run.base), run.base
        bits, generator = int(form.element_bits), torch.Generator().manual_seed(run.seed)
        if run.method in ("none", "full"):
            return unfrozen(model)
        if run.method == "round":
            return _rounded(model, base)
        if run.method == "gptq":
            recipe = Recipe("gptq", bits, form.group, symmetric=True, clip="mse")
            rows = calibration_rows(self.read(run.text), *CALIBRATION, seed=run.seed)
            return quantize_model(model, recipe, rows).model
        if run.method in ("qat", "lsq"):
            return quantization_aware(model, bits, form.group, learned=run.method == "lsq")
        if run.method == "loftq":
            return peft.loftq(model, run.rank, base)
        if run.method == "qa-lora":
            return peft.qa_lora(model, run.rank, generator, bits, form.group)
        return peft.qlora(model, run.rank, generator, base)

    def train(self, model: Transformer, run: Run) -> list[float]:
        """Train a run's start, in place; the losses of the steps."""
        tokens, steps, rate = self.read(run.text, run.seed), run.steps, run.learning_rate
        if run.method in ("qat", "lsq"):
            windows = tokens.unfold(-1, WINDOW, 1).reshape(-1, WINDOW)  # (windows, WINDOW)
            teacher, seed = self.model, run.seed
            return llm_qat.distill(model, teacher, windows, steps, rate, BATCH_ROWS, seed)
        batches = text_batches(tokens, BATCH_ROWS, WINDOW, run.seed)
        return fit(model, batches, next_token_loss, steps, rate)

    def _measure_start(self, model: Transformer, run: Run) -> dict[str, Evaluation]:
        """Before training, where only loftq's adapter does anything yet."""
        if run.method in ("none", "full"):
            return self.before
        if not run.steps:
            return self.measure(model)
        kind = run.method, run.base, run.rank if run.method == "loftq" else 0
        if kind not in self._started:
            self._started[kind] = self.measure(model)
        return self._started[kind]

    def row(self, run: Run) -> Row:
        """Train, measure, count."""
        begin = time.monotonic()
        model = self.start(run)
        preparation, seconds = time.monotonic() - begin, 0.0
        started, cost = self._measure_start(model, run), _cost(model, run)
        if run.steps:
            begin, trained = time.monotonic(), replace(run, served=SERVED[0])
            if self._last is None or self._last[0] != trained:
                self.train(model, run)
                self._last = trained, model
            model, seconds = self._last[1], time.monotonic() - begin
        found = self.measure(_as_served(model, run)) if run.steps else started
        row = asdict(run) | cost | {"preparation": preparation, "seconds": seconds}
        for name in MEASURED:
            change = compare(found[name], self.before[name]).difference
            start = compare(started[name], self.before[name]).difference
            own = found[name].bits_per_byte
            values = own.value, start.value, change.value, change.low, change.high
            row |= {f"{name}_{x}": value for x, value in zip(FOUND, values, strict=True)}
            row[f"{name}_nats"] = pairs.nats_cell(found[name])
        return row


def adapt(
    make: Callable[[], Workshop],
    wanted: Mapping[Run, str],
    path: Path,
    name: str,
    digest: str,
    tokens: int = TOKENS,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Measure what the file does not hold yet; after each run the file is whole.

    Parameters
    ----------
    make : makes the workshop, if anything is to be done.
    wanted : as of `runs`.
    path : of the ledger; its rows are kept.
    name, digest : of the checkpoint.
    tokens : measured on.
    fresh : drop the rows that the file holds of this model, once the first new one is there.
    say : receives a line of progress.
    """
    shop: list[Workshop] = []

    def measure(run: Run) -> Row:
        if not shop:
            shop.append(make())
        return {"part": wanted[run], **shop[0].row(run)}

    def words(row: Row) -> str:
        changes = ", ".join(f"{x} {row[f'{x}_difference']:+.4f}" for x in MEASURED)
        return f"{label(row)}: {changes}"

    measured = tokens // BLOCK * BLOCK
    LEDGER.fill(path, name, digest, measured, wanted, asdict, measure, words, fresh, say)


def _rounded(model: Transformer, base: str) -> Transformer:
    return replace_weights(model, lambda _, weight: plain_layer(to_format(weight, base)))


def _as_served(model: Transformer, run: Run) -> Transformer:
    if run.method in ("qat", "lsq"):
        return frozen(model)
    if run.served == SERVED[0]:
        return model
    whole = peft.merged(model)
    return whole if run.served == "merged" else _rounded(whole, run.base)


def _cost(model: Transformer, run: Run) -> dict[str, Any]:
    """Stored bits a weight, parameters in training and the bytes that they take."""
    bits = load_format(run.base).bits
    if run.method not in ADAPTERS:
        trainable = sum(p.numel() for p in model.parameters()) if run.steps else 0
        return {"bits_per_weight": bits, "trainable": trainable, "training_bytes": 16 * trainable}
    found = peft.footprint(model)
    if run.served == "merged":
        bits = peft.footprint(peft.merged(model)).bits_per_weight
    return {
        "bits_per_weight": bits if run.served != SERVED[0] else found.bits_per_weight,
        "trainable": found.trainable,
        "training_bytes": found.training_bytes,
    }


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=LEDGER.command,
        description="Adapt a model to another author in every way of the chapter, and measure it.",
        epilog="An interrupted run goes on when the same command is given.",
    )
    add = parser.add_argument
    add("--model", default="teacher", help="teacher, student or a checkpoint's folder")
    add("--tokens", type=int, default=TOKENS, help=f"measured on, of each text ({TOKENS})")
    add("--part", choices=tuple(PARTS), metavar="PART", help=f"only one of {', '.join(PARTS)}")
    add("--fresh", action="store_true", help="drop the rows that the file holds of the model")
    add("--out", type=Path, help="the ledger (data/measurements/finetuning.csv)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    if not 2 * BLOCK <= a.tokens <= 100_000:
        parser.error(f"--tokens is {a.tokens}; allowed: {2 * BLOCK} to 100000")
    path, name = a.out or LEDGER.path, Path(a.model).name

    def work() -> None:
        digest = checkpoint_digest(a.model)

        def make() -> Workshop:
            return Workshop(load_checkpoint(a.model), a.tokens)

        adapt(make, runs(a.part), path, name, digest, a.tokens, a.fresh, say)
        print(f"the ledger is in {path}")

    return attempt(LEDGER.command, work)


if __name__ == "__main__":
    sys.exit(main())
