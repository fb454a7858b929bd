"""Train the laboratory's own models: `python -m rooflm.lab.train teacher`.

The teacher (5.2 million parameters) and the student (1.0 million) read the same texts with the
same tokenizer. Half of what is drawn is Austen, half her contemporaries; *Persuasion* is never
drawn. Every batch follows from (seed, step), so that an interrupted run that is resumed sees the
same text as one that was not.

The learning rate warms up, stays, and falls to zero over the last third of the steps; the window
doubles where the fall begins (short contexts are cheaper, and teach most of what there is to
learn). The schedule counts steps, never seconds.

What is minimized is a `Lesson`: the next token of a text here, something else of a teacher in
`rooflm.lab.distill`. The trainer is the same for all.

What is written: `config.json`, `model.safetensors`, `log.csv` and `SHA256SUMS` in the output
folder at the end, and `training-state.safetensors` there every few minutes and at an interrupt;
the same command then goes on from it.

Sources: warmup-stable-decay, arXiv 2404.06395, section 4; AdamW, arXiv 1711.05101; Muon, see
`rooflm.lab.muon`.

Chapter: number formats.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab import text
from rooflm.lab.checkpoints import save_checkpoint
from rooflm.lab.command import OneLineParser, attempt
from rooflm.lab.evaluate import token_losses
from rooflm.lab.model import Config, Transformer
from rooflm.lab.muon import Muon
from rooflm.lab.stored import sha256, write_whole
from rooflm.roofline.datafiles import data_path

VOCAB = 2048
CONFIGS = {
    "teacher": Config(VOCAB, hidden=256, layers=6, heads=4, kv_heads=2, intermediate=768),
    "student": Config(VOCAB, hidden=128, layers=4, heads=2, kv_heads=1, intermediate=384),
}
COMMAND = "python -m rooflm.lab.train"
STATE = "training-state.safetensors"
COLUMNS = ("step", "tokens", "seconds", "learning_rate", "training_loss", "bits_per_byte")
_COUNTED = ("step", "seconds", "recent", "log")  # of a `Run`, beside its tensors
MINUTES_BETWEEN_STATES = 3
EVALUATED_TOKENS = 16_384  # of Persuasion, while training; all of it at the end


@dataclass(frozen=True)
class Plan:
    """What a run is; a resumed run must have the same.

    Parameters
    ----------
    model : a name in `CONFIGS`.
    steps : optimizer steps in all.
    tokens_per_step : tokens in a batch.
    learning_rate : of Muon and AdamW alike, after the warmup.
    warmup : steps of linear warmup.
    seed : of the weights and of every batch.
    austen : share of Austen in what is drawn.
    """

    model: str
    steps: int
    tokens_per_step: int = 6144
    learning_rate: float = 6e-3
    warmup: int = 40
    seed: int = 0
    austen: float = 0.5

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to fall and the window doubles."""
        return self.steps - self.steps // 3

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        left = min(1.0, (self.steps - step) / (self.steps - self.decay_start + 1))
        return self.learning_rate * warm * left

    def window(self, step: int) -> int:
        """Positions of each row of a step's batch."""
        longest = CONFIGS[self.model].window
        return longest // 2 if step < self.decay_start else longest


def step_generator(plan: Plan, step: int) -> torch.Generator:
    """What draws the batch of a step, counted from 0."""
    return torch.Generator().manual_seed(plan.seed * 1_000_003 + step)


def draw(sources: tuple[Tensor, Tensor], plan: Plan, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: tokens and the tokens that follow them, both (rows, window)."""
    window = plan.window(step)
    rows = plan.tokens_per_step // window
    batch = draw_rows(sources, rows, window + 1, plan.austen, step_generator(plan, step))
    return batch[:, :-1], batch[:, 1:]


def draw_rows(
    sources: tuple[Tensor, Tensor],
    rows: int,
    length: int,
    austen: float,
    generator: torch.Generator,
) -> Tensor:
    """Passages of the two sources, (rows, length), the first source with a chance of `austen`."""
    found = []
    for _ in range(rows):
        of_austen = torch.rand((), generator=generator).item() < austen
        source = sources[0] if of_austen else sources[1]
        start = int(torch.randint(len(source) - length + 1, (), generator=generator))
        found.append(source[start : start + length])
    return torch.stack(found)


def training_sources() -> tuple[Tensor, Tensor]:
    """The tokens of Austen's five novels and of the others', the texts parted by token 0."""
    end = torch.zeros(1, dtype=torch.int64)
    parts = (text.AUSTEN, text.OTHERS)
    found = [
        torch.cat([t for name in names for t in (text.encode(text.load_text(name)), end)])
        for names in parts
    ]
    return found[0], found[1]


def next_token_loss(model: Transformer, tokens: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of the tokens that follow, nats a token; both (rows, window)."""
    return functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


@dataclass(frozen=True)
class Lesson:
    """What a run learns.

    Parameters
    ----------
    batch : (model, step) to the tensors of a step; it may depend on nothing else.
    loss : (model, *tensors) to the scalar that is minimized.
    extra : parameters that are trained beside the model's and dropped at the end.
    """

    batch: Callable[[Transformer, int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor] = next_token_loss
    extra: nn.Module | None = None


def text_lesson(sources: tuple[Tensor, Tensor], plan: Plan) -> Lesson:
    """The next token of texts, drawn as `draw` does."""
    return Lesson(lambda _, step: draw(sources, plan, step))


class Run:
    """A training run: the model, its optimizers and its log, at some step.

    Parameters
    ----------
    plan : what it is.
    device : where it computes.
    lesson : what is minimized; the loss of the next token where none is given.
    start : the model whose copy is trained further; none for new weights from the plan's seed.
    """

    def __init__(
        self,
        plan: Plan,
        device: str,
        lesson: Lesson | None = None,
        start: Transformer | None = None,
    ) -> None:
        self.plan, self.device = plan, device
        torch.manual_seed(plan.seed)
        made = copy.deepcopy(start) if start else Transformer(CONFIGS[plan.model])
        self.model = made.requires_grad_(True).to(device)
        self.loss = lesson.loss if lesson else next_token_loss
        self.extra = lesson.extra if lesson else None
        matrices = [p for name, p in self.model.named_parameters() if _is_inner(name, p)]
        others = [p for name, p in self.model.named_parameters() if not _is_inner(name, p)]
        others += self.extra.to(device).parameters() if self.extra else []
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=plan.learning_rate),
            torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.step, self.seconds = 0, 0.0
        self.recent: list[float] = []  # losses since the last row of the log
        self.log: list[dict[str, object]] = []

    def advance(self, *batch: Tensor) -> float:
        """One optimizer step; returns the loss of its batch, nats a token."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate(self.step)
        loss = self.loss(self.model, *(part.to(self.device) for part in batch))
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.recent.append(loss.item())
        return self.recent[-1]

    def save_state(self, path: Path) -> None:
        """Write all that is needed to go on."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.extra:
            tensors |= {f"extra.{k}": v for k, v in self.extra.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{i}.{key}.{name}"] = torch.as_tensor(value)
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        facts = {"plan": asdict(self.plan), "sha256": sha256(save(tensors))}
        facts |= {name: getattr(self, name) for name in _COUNTED}
        write_whole(path, save(tensors, {"run": json.dumps(facts)}))

    def load_state(self, path: Path) -> None:
        """Take up where a state was written.

        Raises
        ------
        ValueError
            where the state belongs to another plan, is altered, or is not a state.
        """
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads(file.metadata()["run"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            stored = type(self.plan)(**facts["plan"])
            counted, digest = {name: facts[name] for name in _COUNTED}, facts["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a training state ({error}); delete it") from None
        if digest != sha256(save(tensors)):
            raise ValueError(f"{path} is altered: its SHA-256 is another; delete it")
        self._match(stored, counted["step"], path)
        self.model.load_state_dict(_under("model.", tensors))
        if self.extra:
            self.extra.load_state_dict(_under("extra.", tensors))
        for i, optimizer in enumerate(self.optimizers):
            restored: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(f"optimizer.{i}.", tensors).items():
                key, field = name.split(".", 1)
                restored.setdefault(int(key), {})[field] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": restored, "param_groups": groups})
        for name, value in counted.items():
            setattr(self, name, value)

    def _match(self, stored: Plan, step: int, path: Path) -> None:
        mine, theirs = asdict(self.plan), asdict(stored)
        # Before the rate falls, the number of steps has had no effect yet.
        if step <= min(stored.decay_start, self.plan.decay_start):
            theirs["steps"] = mine["steps"]
        for name, value in theirs.items():
            if mine[name] != value:
                raise ValueError(
                    f"{path} is of a run with {name} {value}, not {mine[name]}; "
                    "give the same arguments, or delete it"
                )

    def log_text(self) -> str:
        """The log as CSV, with what ran it in the first lines."""
        out = io.StringIO()
        plan = " ".join(f"{k}={v}" for k, v in asdict(self.plan).items())
        out.write(f"# {plan}\n# torch {torch.__version__}, {_machine(self.device)}\n")
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        return out.getvalue()


def bits_per_byte(model: Transformer, tokens: Tensor) -> float:
    """Of a text, in blocks of the model's window."""
    window = model.config.window
    device = next(model.parameters()).device
    losses = token_losses(model, tokens.to(device), window)
    counted = text.token_bytes()[tokens[1 : losses.numel() + 1]].sum().item()
    return losses.double().sum().item() / counted / 0.6931471805599453


def _is_inner(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and not name.startswith("embedding")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {torch.get_num_threads()} threads"


def train(
    plan: Plan,
    folder: Path,
    device: str = "cpu",
    every: int = 50,
    lesson: Lesson | None = None,
    start: Transformer | None = None,
) -> Transformer:
    """Train to the end, or until an interrupt; then raises KeyboardInterrupt, the state saved.

    Parameters
    ----------
    plan, device, lesson, start : see `Run`; without a lesson it is the training texts.
    folder : receives the checkpoint, or the state.
    every : steps between the rows of the log.
    """
    run, state = Run(plan, device, lesson, start), folder / STATE
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        run.load_state(state)
        print(f"going on from step {run.step} of {plan.steps}", flush=True)
    lesson = lesson or text_lesson(training_sources(), plan)
    held_out = text.encode(text.load_text(text.HELD_OUT))
    last, saved, begin = time.monotonic(), time.monotonic(), run.seconds - time.monotonic()
    with _interruptible() as interrupted:
        while run.step < plan.steps:
            loss = run.advance(*lesson.batch(run.model, run.step))
            run.seconds = begin + time.monotonic()
            finished = run.step == plan.steps
            if run.step % every == 0 or finished:
                part = held_out if finished else held_out[:EVALUATED_TOKENS]
                run.model.eval()
                _record(run, bits_per_byte(run.model, part))
            elif time.monotonic() - last > 10:
                print(f"step {run.step}/{plan.steps}  loss {loss:.3f}", flush=True)
                last = time.monotonic()
            if interrupted() or time.monotonic() - saved > 60 * MINUTES_BETWEEN_STATES:
                run.save_state(state)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
        save_checkpoint(run.model.cpu(), folder, run.log_text())
        state.unlink(missing_ok=True)
    return run.model


def _record(run: Run, held_out: float) -> None:
    row: dict[str, object] = {
        "step": run.step,
        "tokens": run.step * run.plan.tokens_per_step,
        "seconds": round(run.seconds),
        "learning_rate": float(f"{run.plan.rate(run.step - 1):.3g}"),
        "training_loss": round(sum(run.recent) / len(run.recent), 4),
        "bits_per_byte": round(held_out, 4),
    }
    run.log.append(row)
    run.recent.clear()
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is never cut in two."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in signals]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog=COMMAND,
        description="Train one of the laboratory's models on Austen and her contemporaries.",
        epilog="An interrupted run goes on where it was when the same command is given again.",
    )
    parser.add_argument("model", choices=sorted(CONFIGS), help="which model")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps (%(default)s)")
    parser.add_argument("--tokens-per-step", type=int, default=6144, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--every", type=int, default=50, help="steps between log rows (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (all that the machine has)")
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda where there is one (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (data/checkpoints/MODEL, which it replaces)"
    )
    arguments = parser.parse_args(given)
    window = CONFIGS[arguments.model].window
    for name in ("steps", "tokens_per_step", "every", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed is {arguments.seed}; allowed: 0 to 2^32 - 1")
    if arguments.tokens_per_step % window:
        parser.error(
            f"--tokens-per-step is {arguments.tokens_per_step}; allowed: a multiple of {window}"
        )
    if not 0 < arguments.learning_rate < 1:
        parser.error(f"--learning-rate is {arguments.learning_rate}; allowed: between 0 and 1")
    if arguments.device != "cpu" and not (
        arguments.device.startswith("cuda") and torch.cuda.is_available()
    ):
        parser.error(f"--device is {arguments.device}; allowed here: cpu")
    return arguments


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = Plan(
        arguments.model,
        arguments.steps,
        arguments.tokens_per_step,
        arguments.learning_rate,
        seed=arguments.seed,
    )
    folder = arguments.out or data_path("checkpoints", arguments.model)

    def work() -> None:
        train(plan, folder, arguments.device, arguments.every)
        print(f"written to {folder}")

    def next_time() -> str:
        kept = (folder / STATE).exists()
        return f"goes on from {folder / STATE}" if kept else "begins anew"

    return attempt(COMMAND, work, next_time)


if __name__ == "__main__":
    sys.exit(main())
