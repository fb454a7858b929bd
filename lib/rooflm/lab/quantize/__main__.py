"""Quantize a model and say what it costs: `python -m rooflm.lab.quantize --model teacher …`.

The quantized weights are written as a checkpoint that `load_checkpoint` reads (dequantized, FP32:
exactly the numbers that codes and scales stand for), with a log of each layer. An interrupted run
goes on after the last finished block when the same command is given again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rooflm.lab import text
from rooflm.lab.calibrate import calibration_rows
from rooflm.lab.checkpoints import load_checkpoint, save_checkpoint
from rooflm.lab.command import OneLineParser, attempt
from rooflm.lab.evaluate import evaluate
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.apply import METHODS, QuantizedModel, Recipe, Stored, quantize_model
from rooflm.lab.stored import write_whole

COMMAND = "python -m rooflm.lab.quantize"
STATE = "quantizing-state.safetensors"
CALIBRATION_TEXT = "emma"  # read in training; the held-out text stays unseen


def run(model_name: str, recipe: Recipe, rows: int, window: int, tokens: int, folder: Path) -> None:
    """Quantize, evaluate, write; prints what happens.

    Parameters
    ----------
    model_name : a checkpoint's name or folder, or "smollm2".
    rows, window : calibration rows and their length in tokens.
    tokens : of *Persuasion*, on which both models are evaluated; 0 for none.
    folder : receives the checkpoint; the state of an unfinished run meanwhile.
    """
    model, tokenizer = _subject(model_name)
    identity = json.dumps({"model": model_name, "rows": rows, "window": window, **asdict(recipe)})
    state = folder / STATE
    done = _load_state(state, identity) if state.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = calibration_rows(
        text.encode(text.load_text(CALIBRATION_TEXT), tokenizer), rows, window, recipe.seed
    )
    begin, blocks = time.monotonic(), model.config.layers

    def progress(finished: int, stored: Mapping[str, Stored]) -> None:
        write_whole(state, _state(stored, identity))
        print(f"block {finished}/{blocks}  {time.monotonic() - begin:.0f} s", flush=True)

    if done:
        print(f"going on: {len(done)} layers are done", flush=True)
    quantized = quantize_model(model, recipe, drawn, done, progress)
    print(f"{quantized.bits_per_weight:.3f} bits per weight, scales and indices included")
    results = _evaluate(model, quantized.model, tokens, tokenizer)
    for line in results:
        print(line)
    log = _log(identity, quantized, results)
    if not recipe.keeps_architecture:
        write_whole(folder / "log.csv", log.encode("utf-8"))
        print(f"log written to {folder}; a model that rotates or rounds its inputs is not stored")
    else:
        save_checkpoint(quantized.model, folder, log, torch.float32)
        print(f"checkpoint written to {folder}")
    state.unlink(missing_ok=True)


def _subject(name: str) -> tuple[Transformer, text.Tokenizer]:
    if name == "smollm2":
        from rooflm.lab.smollm2 import load_smollm2

        return load_smollm2()
    return load_checkpoint(name), text.load_tokenizer()


def _evaluate(
    model: Transformer, quantized: Transformer, tokens: int, tokenizer: text.Tokenizer
) -> list[str]:
    if not tokens:
        return []
    held_out = text.encode(text.load_text(text.HELD_OUT), tokenizer)[: tokens + 1]
    sizes = text.token_bytes(tokenizer)
    window = min(model.config.window, 512, (len(held_out) - 1) // 2)  # two blocks at least
    before = evaluate(model, held_out, sizes, window)
    after = evaluate(quantized, held_out, sizes, window, reference=model)
    return [f"before: {before}", f"after:  {after}"]


def _state(stored: Mapping[str, Stored], identity: str) -> bytes:
    tensors = {name: s.weight.contiguous() for name, s in stored.items()}
    bits = {name: s.bits_per_weight for name, s in stored.items()}
    return save(tensors, {"identity": identity, "bits": json.dumps(bits)})


def _load_state(path: Path, identity: str) -> dict[str, Stored]:
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
            tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            found, bits = metadata["identity"], json.loads(metadata["bits"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a quantizing state ({error}); delete it") from None
    if found != identity:
        raise ValueError(f"{path} is of another command; give the same arguments, or delete it")
    return {name: Stored(weight, bits[name]) for name, weight in tensors.items()}


def _log(identity: str, quantized: QuantizedModel, results: list[str]) -> str:
    out = io.StringIO()
    out.write("".join(f"# {line}\n" for line in (identity, *results)))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "relative_output_error"])
    writer.writerows([name, f"{error:.4g}"] for name, error in quantized.errors.items())
    return out.getvalue()


def _parser() -> OneLineParser:
    methods = "\n".join(f"  {name:11} {method.about}" for name, method in METHODS.items())
    parser = OneLineParser(
        prog=COMMAND,
        description="Quantize the linear layers of a model and measure what is lost.",
        epilog=f"methods:\n{methods}\n\nAn interrupted run goes on when the same command is given.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="teacher", help="teacher, student, smollm2 or a checkpoint's folder")
    add("--method", default="gptq", metavar="METHOD", help="see below (%(default)s)")
    add("--bits", type=int, default=4, help="bits of a code, 2 to 8 (%(default)s)")
    add("--group", type=int, default=0, help="weights that share a scale; 0: a row (%(default)s)")
    add("--symmetric", action="store_true", help="no zero points")
    add("--clip", help="mse: least squared error of the weights; awq also: output")
    add("--act-order", action="store_true", help="gptq: columns of large inputs first")
    add("--keep", type=float, default=0.01, help="share kept: owq, spqr, pb-llm (%(default)s)")
    add("--format", default="nf4", help="of method format (%(default)s)")
    add("--rotate", action="store_true", help="rotate by random Hadamard matrices first")
    add("--activations", type=int, default=16, help="bits of the inputs; 16: as is (%(default)s)")
    add("--rows", type=int, default=32, help="rows of calibration text (%(default)s)")
    add("--window", type=int, default=256, help="tokens of such a row (%(default)s)")
    add("--evaluate", type=int, default=16_384, help="tokens to evaluate on (%(default)s)")
    add("--per", default="token", help="inputs' scales: token, tensor or static (%(default)s)")
    add("--smooth", type=float, help="strength of SmoothQuant, 0 to 1; none if not given")
    add("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    add("--out", type=Path, help="folder to write (quantized/MODEL-METHOD-BITS…)")
    return parser


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    a = parser.parse_args(given)
    for name, smallest in (("rows", 1), ("window", 2), ("evaluate", 0), ("group", 0), ("seed", 0)):
        if getattr(a, name) < smallest:
            parser.error(f"--{name} is {getattr(a, name)}; allowed: {smallest} or more")
    if a.evaluate == 1:
        parser.error("--evaluate is 1; allowed: 0 for none, or 2 or more")

    def work() -> None:
        recipe = Recipe(
            a.method, a.bits, a.group, a.symmetric, a.clip, a.act_order, a.keep, a.format,
            a.rotate, a.activations, a.seed, a.per, a.smooth,
        )  # fmt: skip
        name = f"{Path(a.model).name}-{a.method}-{a.bits}b" + (f"-g{a.group}" if a.group else "")
        folder = a.out or Path("quantized") / name
        run(a.model, recipe, a.rows, a.window, a.evaluate, folder)

    return attempt(COMMAND, work, lambda: "goes on after the last block")


if __name__ == "__main__":
    sys.exit(main())
