"""The command `rooflm`, also `python -m rooflm`.

Bad input ends with exit status 2 and one line on standard error that names the value and what
is allowed; there is no traceback.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from rooflm.roofline import __version__
from rooflm.roofline.analysis import ACCOUNTINGS, ATTENTIONS, Report, analyze
from rooflm.roofline.config import load_model, model_names, model_source
from rooflm.roofline.formats import Precision
from rooflm.roofline.generation import generation
from rooflm.roofline.hardware import hardware_names, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import ForwardPass
from rooflm.roofline.numeric import shorten, size

SWEEP_LIMIT = 1_000_000  # rows; a longer sweep is an array's work


codecs.register_error("rooflm.ascii", lambda error: ("u", getattr(error, "end", 0)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for bad input.

    Parameters
    ----------
    arguments : the words after the command's name; those of the process by default.
    """
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed")
        if isinstance(sys.stdout, io.TextIOWrapper):  # "us" where the terminal has no µ
            sys.stdout.reconfigure(errors="rooflm.ascii")
        options = _parser().parse_args(arguments)
        for name, value in vars(options).items():
            if isinstance(value, list):  # argparse's answer to --batch=--
                raise ValueError(f"{name} is '--'; allowed: a value")
        options.run(options, sys.stdout)
        sys.stdout.flush()
    except ValueError as error:
        print(f"rooflm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk
        print(f"rooflm: cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        print("rooflm: interrupted", file=sys.stderr)
        return 130
    return 0


def _analyze(options: argparse.Namespace, out: TextIO) -> None:
    step = _step(options, _size("batch", options.batch), _size("context", options.context))
    report = analyze(
        options.model,
        options.hardware,
        step,
        _precision(options),
        options.attention,
        options.accounting,
    )
    if options.json:
        fields = ("seconds", "lower_bound", "flops", "bytes")
        answer: dict[str, Any] = {"operators": [row._asdict() for row in report.operators]}
        answer |= {name: getattr(report, name) for name in fields}
        answer["memory"] = _memory_fields(report.memory, options.hardware)
        _print_json(answer, out)
        return
    print(
        f"{_setting(options)}\nWork and bytes are those of one layer, time that of all.\n", file=out
    )
    header = ("operator", "layers", "FLOPs", "bytes", "FLOP/B", "attainable", "time", "bound", "at")
    rows = [
        (
            row.name, str(row.count), _si(row.flops), _si(row.bytes, "B"), f"{row.intensity:.4g}",
            _si(row.attainable, "FLOP/s"), _si(row.count * row.seconds, "s"), row.bound, row.rate,
        )
        for row in report.operators
    ]  # fmt: skip
    _print_table(header, rows, out)
    print(
        f"\n{_si(report.seconds, 's')} for the pass, {report.bound}-bound; no schedule takes less "
        f"than {_si(report.lower_bound, 's')}.\n{_fits(report)}",
        file=out,
    )


def _memory(options: argparse.Namespace, out: TextIO) -> None:
    context = _size("context", options.context)
    new = context if options.phase == "prefill" else 1
    batch, p = _size("batch", options.batch), _precision(options)
    parts = memory(options.model, p, batch, context, new, options.accounting, options.attention)
    answer = _memory_fields(parts, options.hardware)
    if options.json:
        _print_json(answer, out)
        return
    print(f"{_setting(options)}\n", file=out)
    for name in ("weights", "kv_cache", "activations", "total"):
        print(f"{name:12} {_si(answer[name], 'B')}", file=out)
    print(f"{'capacity':12} {_capacity(answer['capacity'])}", file=out)
    print(f"{'fits':12} {_YES_NO[answer['fits']]}", file=out)


def _generate(options: argparse.Namespace, out: TextIO) -> None:
    g = generation(
        options.model,
        options.hardware,
        _precision(options),
        _size("batch", options.batch),
        _size("prompt_tokens", options.prompt_tokens),
        _size("output_tokens", options.output_tokens),
        options.attention,
        options.accounting,
    )
    answer: dict[str, Any] = {
        name: getattr(g, name) for name in ("ttft", "tpot", "seconds", "tokens_per_second")
    }
    if options.json:
        _print_json(answer | {"memory": _memory_fields(g.memory, options.hardware)}, out)
        return
    sizes = f"batch {options.batch}, {options.prompt_tokens} tokens in, {options.output_tokens} out"
    print(f"{options.model} on {options.hardware}, {sizes}; {_how(options)}\n", file=out)
    tpot = "none, one token" if math.isnan(g.tpot) else _si(g.tpot, "s")
    print(f"time to first token    {_si(g.ttft, 's')}", file=out)
    print(f"time per output token  {tpot}", file=out)
    print(f"whole answer           {_si(g.seconds, 's')}", file=out)
    print(f"throughput             {g.tokens_per_second:.4g} tokens/s", file=out)
    print(f"memory                 {_si(g.memory.total, 'B')}; fits: {_YES_NO[g.fits]}", file=out)


def _sweep(options: argparse.Namespace, out: TextIO) -> None:
    model, device, p = (
        load_model(options.model),
        load_hardware(options.hardware),
        _precision(options),
    )
    batches, contexts = _sizes("batch", options.batch), _sizes("context", options.context)
    if len(batches) * len(contexts) > SWEEP_LIMIT:
        raise ValueError(
            f"the sweep has {len(batches) * len(contexts)} rows; allowed: at most {SWEEP_LIMIT}"
        )
    header = (
        "batch", "context", "seconds", "lower_bound", "tokens_per_second",
        "flops", "bytes", "bound", "memory", "fits",
    )  # fmt: skip

    def rows() -> Iterator[tuple[Any, ...]]:
        for batch in batches:
            for context in contexts:
                step = _step(options, batch, context)
                r = analyze(model, device, step, p, options.attention, options.accounting)
                yield (
                    batch, context, r.seconds, r.lower_bound, r.tokens_per_second,
                    r.flops, r.bytes, r.bound, r.memory.total, _YES_NO[r.fits],
                )  # fmt: skip

    if options.csv:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows())
        return
    text = [tuple(f"{x:.5g}" if isinstance(x, float) else str(x) for x in row) for row in rows()]
    print(f"{_setting(options)}; s, tokens/s, FLOP and B\n", file=out)
    _print_table(header, text, out)


def _models(options: argparse.Namespace, out: TextIO) -> None:
    rows = []
    for name in model_names():
        model = load_model(name)
        rows.append((name, f"{model.parameters:,}", str(model.layers), model_source(name)))
    if options.json:
        keys = ("name", "parameters", "layers", "source")
        _print_json([dict(zip(keys, row, strict=True)) for row in rows], out)
        return
    _print_table(("model", "parameters", "layers", "source"), rows, out)


def _hardware(options: argparse.Namespace, out: TextIO) -> None:
    devices = [load_hardware(name) for name in hardware_names()]
    if options.json:
        fields = (
            "name",
            "bandwidth",
            "memory_capacity",
            "onchip_memory",
            "link_bandwidth",
            "power",
        )
        _print_json(
            [{f: getattr(d, f) for f in fields} | {"peaks": dict(d.peaks)} for d in devices], out
        )
        return
    rows = [
        (
            d.name,
            _capacity(d.memory_capacity),
            _si(d.bandwidth, "B/s"),
            ", ".join(f"{name} {_si(peak)}" for name, peak in d.peaks.items()),
        )
        for d in devices
    ]
    _print_table(("device", "memory", "bandwidth", "peaks in FLOP/s, dense but for 2:4"), rows, out)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())[:300]
        if re.search(r"unrecognized arguments:.* \d", message):
            message += "; a list of sizes is one word: 1,8,64"
        raise ValueError(f"{message}; help: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rooflm", description="Roofline predictions for LLM inference.")
    parser.add_argument("--version", action="version", version=f"rooflm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def placed(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
        added = command(name, run, text)
        added.add_argument(
            "model", metavar="MODEL", help="a name (rooflm models), or a config.json"
        )
        added.add_argument("hardware", metavar="HARDWARE", help="a name (rooflm hardware)")
        of_weights = "such as int4-g128, fp16-2:4 or fp16-50%%-bitmap; default: fp16"
        added.add_argument("--weights", default="fp16", metavar="FORMAT", help=of_weights)
        for kind in ("activations", "kv-cache"):
            added.add_argument(f"--{kind}", default="fp16", metavar="FORMAT", help="default: fp16")
        added.add_argument(
            "--state", default="fp32", metavar="FORMAT", help="recurrent states; default: fp32"
        )
        added.add_argument(
            "--attention", default="flash", choices=ATTENTIONS, help="default: flash"
        )
        added.add_argument(
            "--accounting", default="exact", choices=ACCOUNTINGS, help="default: exact"
        )
        return added

    def sized(added: argparse.ArgumentParser, several: str = "") -> None:
        phases = ("prefill", "decode")
        added.add_argument("--phase", default="decode", choices=phases, help="default: decode")
        help_batch = f"sequences{several}; default: 1"
        added.add_argument("--batch", default="1", metavar="N", help=help_batch)
        help_context = f"tokens per sequence once the pass is done{several}; default: 2048"
        added.add_argument("--context", default="2048", metavar="N", help=help_context)

    for name, run, text in (
        ("analyze", _analyze, "every operator of one forward pass against the roofs"),
        ("memory", _memory, "weights, KV cache and activations against the device's capacity"),
    ):
        added = placed(name, run, text)
        sized(added)
        added.add_argument("--json", action="store_true", help="print JSON")
    added = placed("generate", _generate, "latency and throughput of a whole answer")
    for option, default, text in (
        ("--batch", "1", "sequences"),
        ("--prompt-tokens", "512", "tokens of each prompt"),
        ("--output-tokens", "128", "tokens of each answer"),
    ):
        help_size = f"{text}; default: {default}"
        added.add_argument(option, default=default, metavar="N", help=help_size)
    added.add_argument("--json", action="store_true", help="print JSON")
    added = placed("sweep", _sweep, "one pass for each batch and context")
    sized(added, "; a list such as 1,2,4 or a range first:last[:step]")
    added.add_argument("--csv", action="store_true", help="print CSV")
    for name, run, text in (
        ("models", _models, "the models in data/models"),
        ("hardware", _hardware, "the devices in data/hardware.csv"),
    ):
        command(name, run, text).add_argument("--json", action="store_true", help="print JSON")
    return parser


def _precision(options: argparse.Namespace) -> Precision:
    return Precision(options.weights, options.activations, options.kv_cache, options.state)


def _step(options: argparse.Namespace, batch: int, context: int) -> ForwardPass:
    phase = ForwardPass.prefill if options.phase == "prefill" else ForwardPass.decode
    return phase(batch, context)


def _size(name: str, text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,20}", text):
        raise ValueError(f"{name} is {shorten(text)}; allowed: a whole number from 1 to 2^40")
    checked: int = size(name, int(text))
    return checked


def _sizes(name: str, text: str) -> list[int]:
    """The sizes that "1,2,4" or "1:64" or "1:64:8" stand for."""
    found: list[int] = []
    for part in text.split(","):
        ends = [_size(name, end) for end in part.split(":")]
        if len(ends) > 3 or (len(ends) > 1 and ends[1] < ends[0]):
            raise ValueError(f"{name} is {shorten(text)}; allowed: 1,2,4 or first:last[:step]")
        span = range(
            ends[0], ends[-1 if len(ends) < 3 else 1] + 1, ends[2] if len(ends) == 3 else 1
        )
        if len(found) + len(span) > SWEEP_LIMIT:
            raise ValueError(f"{name} is {shorten(text)}; allowed: at most {SWEEP_LIMIT} values")
        found.extend(span)
    return found


def _memory_fields(parts: Memory, hardware: str) -> dict[str, Any]:
    fields = {
        name: getattr(parts, name) for name in ("weights", "kv_cache", "activations", "total")
    }
    return fields | {
        "capacity": parts.capacity(hardware),
        "fits": parts.fits(hardware),
    }


def _fits(report: Report) -> str:
    need, capacity = _si(report.memory.total, "B"), report.memory.capacity(report.device)
    if capacity is None:
        return f"It needs {need}; the capacity of {report.device.name} is not published."
    verb = "fits in" if report.fits else "DOES NOT FIT in"
    shown = _capacity(capacity)
    return f"It needs {need}, which {verb} the {shown} of {report.device.name}."


def _setting(options: argparse.Namespace) -> str:
    """What the numbers below are of, defaults included."""
    sizes = f"{options.phase}, batch {options.batch}, context {options.context}"
    return f"{options.model} on {options.hardware}, {sizes}; {_how(options)}"


def _how(options: argparse.Namespace) -> str:
    attention = f"{options.attention} attention, {options.accounting} accounting"
    return f"{_precision(options)}; {attention}"


def _capacity(capacity: float | None) -> str:
    """A device's memory as it is sold, in binary units, and in the units of everything else."""
    if capacity is None:
        return "not published"
    gib = capacity / 2**30
    sold = f"{gib:.0f} GiB ({_si(capacity, 'B')})"
    return sold if gib.is_integer() else _si(capacity, "B")


_YES_NO = {True: "yes", False: "no", None: "unknown"}


def _print_json(answer: object, out: TextIO) -> None:
    json.dump(_without_nan(answer), out, indent=1, allow_nan=False)
    out.write("\n")


def _without_nan(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> None:
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), file=out)


def _si(value: float, unit: str = "") -> str:
    """Four digits and an SI prefix: 155.4 T, 18.64 ms."""
    if value == 0:
        return f"0 {unit}".strip()
    power = min(max(math.floor(math.log10(abs(value)) / 3), -4), 6)
    prefix = ["p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E"][power + 4]
    return f"{value / 1000**power:.4g} {prefix}{unit}".strip()
