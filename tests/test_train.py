"""Training: an interrupted run equals one that was not; schedules, batches, the optimizer."""

import csv
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from rooflm.lab import train
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.model import Config
from rooflm.lab.muon import Muon, orthogonalize
from rooflm.lab.stored import SUMS
from rooflm.lab.train import CONFIGS, STATE, Plan, Run, draw

TINY = Config(train.VOCAB, hidden=8, layers=1, heads=2, kv_heads=1, intermediate=16, window=16)
PLAN = Plan("teacher", steps=9, tokens_per_step=32, learning_rate=0.01, warmup=3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny(monkeypatch):
    """A small model, short texts, one thread: the same sums on every run."""
    numbers = torch.Generator().manual_seed(7)
    austen, others = (torch.randint(1, 50, (200 + i,), generator=numbers) for i in range(2))
    monkeypatch.setattr(train, "CONFIGS", {"teacher": TINY, "student": TINY})
    monkeypatch.setattr(train, "training_sources", lambda: (austen, others))
    monkeypatch.setattr(train.text, "load_text", lambda name: "It is a truth universally. " * 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield austen, others
    torch.set_num_threads(threads)


def interrupted_at(step, monkeypatch, number=signal.SIGINT):
    """Send a signal to this process in the middle of a step."""
    inner = Run.advance

    def advance(self, *batch):
        if self.step == step:
            os.kill(os.getpid(), number)
        return inner(self, *batch)

    monkeypatch.setattr(Run, "advance", advance)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def log_of(folder):
    """The rows of the log, without the seconds, which are no run's twice."""
    lines = [x for x in (folder / "log.csv").read_text().splitlines() if not x.startswith("#")]
    return [{**row, "seconds": ""} for row in csv.DictReader(io.StringIO("\n".join(lines)))]


# ---- interrupting and going on


@pytest.mark.parametrize("step", [0, 1, 4, 7, 8])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_that_goes_on_equals_one_that_was_not(
    step, number, tiny, tmp_path, monkeypatch
):
    whole = train.train(PLAN, tmp_path / "whole", every=3)
    before = signal.getsignal(number)  # a job in the background ignores SIGINT from its start
    with monkeypatch.context() as inner:
        interrupted_at(step, inner, number)
        with pytest.raises(KeyboardInterrupt):
            train.train(PLAN, tmp_path / "parts", every=3)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [STATE]
    assert signal.getsignal(number) == before
    parts = train.train(PLAN, tmp_path / "parts", every=3)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert not (tmp_path / "parts" / STATE).exists()


def test_a_state_holds_all_that_the_next_step_needs(tiny, tmp_path):
    straight, saved, resumed = Run(PLAN, "cpu"), Run(PLAN, "cpu"), Run(PLAN, "cpu")
    for run in (straight, saved):
        for step in range(4):
            run.advance(*draw(tiny, PLAN, step))
    saved.save_state(tmp_path / STATE)
    resumed.load_state(tmp_path / STATE)
    assert resumed.step == 4 and len(resumed.recent) == 4
    for step in range(4, 7):
        assert straight.advance(*draw(tiny, PLAN, step)) == resumed.advance(*draw(tiny, PLAN, step))
    for one, other in zip(straight.optimizers, resumed.optimizers, strict=True):
        ours, theirs = (o.state_dict()["state"] for o in (one, other))
        assert ours.keys() == theirs.keys() and ours
        for key, state in ours.items():
            assert all(torch.equal(value, theirs[key][name]) for name, value in state.items())


def test_a_longer_plan_may_take_over_until_the_rate_falls(tiny, tmp_path, monkeypatch):
    longer = replace(PLAN, steps=12)
    train.train(longer, tmp_path / "whole", every=4)
    with monkeypatch.context() as inner:
        interrupted_at(5, inner)  # the sixth of nine steps is the last at the full rate
        with pytest.raises(KeyboardInterrupt):
            train.train(PLAN, tmp_path / "parts", every=4)
    train.train(longer, tmp_path / "parts", every=4)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"learning_rate": 0.02}, "learning_rate 0.01, not 0.02"),
        ({"tokens_per_step": 64}, "tokens_per_step 32, not 64"),
        ({"model": "student"}, "model teacher, not student"),
        ({"steps": 12}, "steps 9, not 12"),  # the rate has begun to fall
    ],
)
def test_the_state_of_another_plan_is_refused(change, message, tiny, tmp_path):
    run = Run(PLAN, "cpu")
    for step in range(7):
        run.advance(*draw(tiny, PLAN, step))
    run.save_state(tmp_path / STATE)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match=f"is of a run with {message}") as caught:
        train.train(replace(PLAN, **change), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_damaged_state_is_named_and_refused(tiny, tmp_path):
    run = Run(PLAN, "cpu")
    run.advance(*draw(tiny, PLAN, 0))
    run.save_state(tmp_path / STATE)
    content = (tmp_path / STATE).read_bytes()
    altered = bytearray(content)
    altered[-5] ^= 1
    for damaged, reason in (
        (content[:-8], "is not a training state"),
        (altered, "is altered"),
        (content.replace(b"sha256", b"sha257"), "is not a training state"),
        (content.replace(b"warmup", b"warmpu"), "is not a training state"),
        (pickle.dumps({"step": 3}), "is not a training state"),
        (b"", "is not a training state"),
    ):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{STATE} {reason}") as caught:
            Run(PLAN, "cpu").load_state(tmp_path / STATE)
        assert "\n" not in str(caught.value)


def test_a_finished_run_leaves_a_checkpoint_and_its_log(tiny, tmp_path):
    model = train.train(PLAN, tmp_path, every=4)
    names = {"config.json", "model.safetensors", "log.csv", SUMS}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = load_checkpoint(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.half().float())
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == ["4", "8", "9"]
    assert [row["tokens"] for row in rows] == ["128", "256", "288"]
    head = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert head.startswith("# model=teacher steps=9 tokens_per_step=32") and "seed=0" in head


def test_training_learns_a_text_that_repeats_itself(tiny, tmp_path, monkeypatch):
    again = (torch.arange(400) % 7) + 1
    monkeypatch.setattr(train, "training_sources", lambda: (again, again))
    train.train(replace(PLAN, steps=80, tokens_per_step=64), tmp_path, every=20)
    losses = [float(row["training_loss"]) for row in log_of(tmp_path)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 4 and losses[-1] < 2.5  # a blind guess costs ln 2048 = 7.6


# ---- lessons: what else may be minimized


def test_a_run_may_start_from_a_model_which_stays_as_it_is(tiny, tmp_path):
    first = train.train(PLAN, tmp_path / "first")
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    run = Run(PLAN, "cpu", start=first)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]), name
    run.advance(*draw(tiny, PLAN, 0))
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())
    assert not torch.equal(run.model.embedding.weight, before["embedding.weight"])


def test_the_texts_are_the_lesson_where_none_is_given(tiny, tmp_path):
    train.train(PLAN, tmp_path / "none")
    train.train(PLAN, tmp_path / "texts", lesson=train.text_lesson(tiny, PLAN))
    assert weights(tmp_path / "none") == weights(tmp_path / "texts")


def test_a_lesson_may_train_more_than_the_model_and_a_state_holds_it(tiny, tmp_path):
    def loss(model, tokens, following):
        return train.next_token_loss(model, tokens, following) + (extra.weight - 1).square().sum()

    runs = []
    for _ in range(2):
        extra = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.zeros_(extra.weight)
        lesson = train.Lesson(lambda _, step: draw(tiny, PLAN, step), loss, extra)
        runs.append(Run(PLAN, "cpu", lesson))
    run = runs[1]  # whose `extra` the loss reads
    for step in range(3):
        run.advance(*draw(tiny, PLAN, step))
    assert (run.extra.weight > 0).all()
    run.save_state(tmp_path / STATE)
    runs[0].load_state(tmp_path / STATE)
    assert torch.equal(runs[0].extra.weight, run.extra.weight)


# ---- what a step sees


@given(st.integers(3, 500), st.integers(1, 60))
@settings(max_examples=50)
def test_the_rate_warms_up_stays_and_falls(steps, warmup):
    plan = Plan("teacher", steps, learning_rate=1.0, warmup=warmup)
    rates = [plan.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    for step in range(1, steps):
        if step < min(warmup, plan.decay_start):
            assert rates[step] > rates[step - 1]
        if warmup <= step < plan.decay_start:
            assert rates[step] == 1
    falling = rates[max(plan.decay_start, warmup) :]
    assert falling == sorted(falling, reverse=True)
    if warmup < plan.decay_start:
        left = steps - plan.decay_start
        assert rates[-1] == pytest.approx(1 / (left + 1))
        drops = [a - b for a, b in zip([1.0, *falling], falling, strict=False)]
        assert drops == pytest.approx([1 / (left + 1)] * left)  # a straight line to zero


def test_the_window_doubles_where_the_rate_begins_to_fall():
    plan = Plan("teacher", steps=90)
    longest = CONFIGS["teacher"].window
    assert [plan.window(s) for s in (0, 59, 60, 89)] == [longest // 2] * 2 + [longest] * 2
    assert plan.rate(59) == plan.learning_rate > plan.rate(60)


def test_a_batch_depends_on_seed_and_step_alone(tiny):
    first = draw(tiny, PLAN, 5)
    torch.manual_seed(99)
    torch.rand(10)
    draw(tiny, PLAN, 6)
    state = torch.get_rng_state()
    again = draw(tiny, PLAN, 5)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb anything else
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw(tiny, PLAN, 6), draw(tiny, replace(PLAN, seed=1), 5)):
        assert not torch.equal(first[0], other[0])


def test_a_batch_is_text_and_what_follows_it(tiny):
    for step in range(PLAN.steps):
        tokens, following = draw(tiny, PLAN, step)
        assert tokens.shape == following.shape == (32 // PLAN.window(step), PLAN.window(step))
        for row, after in zip(tokens, following, strict=True):
            assert torch.equal(row[1:], after[:-1])
            passage = [*row.tolist(), after[-1].item()]
            spans = [s.unfold(0, len(passage), 1).tolist() for s in tiny]
            assert any(passage in span for span in spans)


def test_the_whole_of_a_text_is_drawn_to_its_last_token():
    source = torch.arange(1, 12)
    plan = replace(PLAN, tokens_per_step=8 * 50)
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CONFIGS", {"teacher": TINY})
        for step in range(5):
            tokens, following = draw((source, source), plan, step)
            assert tokens.shape[1] == 8
            seen |= {*tokens.flatten().tolist(), *following.flatten().tolist()}
    assert seen == {*range(1, 12)}


def test_half_of_what_is_drawn_is_austen(tiny):
    ours, others = torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64)
    plan = replace(PLAN, tokens_per_step=8 * 2000)
    share = 1 - draw((ours, others), plan, 0)[0].double().mean().item()
    assert share == pytest.approx(0.5, abs=0.04)


def test_the_models_have_the_parameters_that_are_stated():
    counted = {name: Run(Plan(name, 3), "cpu").model for name in CONFIGS}
    millions = {
        name: round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        for name, model in counted.items()
    }
    assert millions == {"teacher": 5.2, "student": 1.0}


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: model"),
        (["pupil"], "invalid choice: 'pupil'"),
        (["teacher", "--steps", "0"], "--steps is 0; allowed: 1 or more"),
        (["teacher", "--steps", "many"], "invalid int value: 'many'"),
        (["teacher", "--every", "-1"], "--every is -1"),
        (["teacher", "--threads", "0"], "--threads is 0"),
        (["teacher", "--tokens-per-step", "6000"], "is 6000; allowed: a multiple of 512"),
        (["teacher", "--learning-rate", "nan"], "--learning-rate is nan; allowed: between 0 and 1"),
        (["teacher", "--learning-rate", "2"], "--learning-rate is 2.0"),
        (["teacher", "--seed", "-1"], "--seed is -1; allowed: 0 to 2^32 - 1"),
        (["teacher", "--seed", str(2**63)], "--seed is 9223372036854775808"),
        (["teacher", "--device", "tpu"], "--device is tpu"),
        (["teacher", "--no-such\noption"], "unrecognized arguments: --no-such option"),
    ],
)
def test_bad_arguments_end_with_status_2_and_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rooflm.lab.train: error: ")
    assert message in error


def test_a_folder_that_cannot_be_written_is_one_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["teacher", "--steps", "2", "--tokens-per-step", "32"]
    assert train.main([*arguments, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "file" in error


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for option in ("steps", "tokens-per-step", "learning-rate", "seed", "every", "threads", "out"):
        assert f"--{option}" in shown
    assert "goes on where it was" in re.sub(r"\s+", " ", shown)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_saves_the_state_and_ends_with_130_and_one_line(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        from rooflm.lab import train
        from rooflm.lab.model import Config
        tiny = Config(train.VOCAB, 8, 1, 2, 1, 16, window=16)
        train.CONFIGS = {"teacher": tiny}
        train.training_sources = lambda: (torch.arange(200), torch.arange(200))
        train.text.load_text = lambda name: "It is a truth universally. " * 20
        sys.exit(train.main(sys.argv[1:]))
        """
    )
    command = [sys.executable, "-c", script, "teacher", "--tokens-per-step", "32", "--every", "1"]
    command += ["--steps", "1000000", "--threads", "1", "--out", str(tmp_path)]
    library = str(Path(train.__file__).parents[2])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": library},
    ) as process:
        assert process.stdout.readline().startswith("step 1 ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == f"interrupted; the same command goes on from {tmp_path / STATE}\n"
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CONFIGS", {"teacher": TINY})
        run = Run(Plan("teacher", 1_000_000, 32), "cpu")
        run.load_state(tmp_path / STATE)
    assert run.step >= 1 and len(run.log) == run.step


def test_an_interrupt_before_anything_is_saved_says_so(tiny, tmp_path, capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "training_sources", interrupted)
    arguments = ["teacher", "--tokens-per-step", "32", "--out", str(tmp_path)]
    assert train.main(arguments) == 130
    assert capsys.readouterr().err == "interrupted; the same command begins anew\n"


def test_a_state_is_saved_every_few_minutes(tiny, tmp_path, monkeypatch):
    clock = iter(range(0, 10**9, 50))  # fifty seconds at each look
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(Run, "save_state", lambda self, path: saved.append(self.step))
    train.train(PLAN, tmp_path, every=9)
    assert len(saved) >= 2


# ---- the optimizer


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrix = random(*shape)
    found = orthogonalize(matrix).double()
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.T @ found @ vt.T  # diagonal, if the singular vectors are the same
    values = inner.diagonal()
    assert torch.allclose(inner, torch.diag(values), atol=1e-4)
    large = s > 0.002 * s.square().sum().sqrt()
    assert large.sum() >= len(s) - 1
    assert values[large].min() > 0.68 and values.max() < 1.21
    assert (values > 0).all()


def test_orthogonalizing_is_blind_to_scale_and_leaves_its_argument():
    matrix = random(12, 20)
    before = matrix.clone()
    expected = orthogonalize(matrix)
    assert torch.equal(matrix, before)
    for scale in (1e-3, 1e4):
        assert torch.allclose(orthogonalize(scale * matrix), expected, atol=1e-3)
    assert torch.isfinite(orthogonalize(torch.zeros(3, 4))).all()


def test_muon_follows_nesterov_momentum_and_decoupled_decay():
    lr, momentum, decay = 0.1, 0.9, 0.5
    parameter = torch.nn.Parameter(random(6, 4))
    expected = parameter.detach().clone().double()
    optimizer = Muon([parameter], lr=lr, momentum=momentum, weight_decay=decay)
    average = torch.zeros(6, 4, dtype=torch.float64)
    for step in range(3):
        parameter.grad = random(6, 4, seed=step + 1)
        gradient = parameter.grad.double()
        average = momentum * average + (1 - momentum) * gradient
        ahead = momentum * average + (1 - momentum) * gradient
        update = orthogonalize(ahead.float()).double()
        expected = expected * (1 - lr * decay) - 0.2 * lr * 6**0.5 * update
        optimizer.step()
        assert torch.allclose(parameter.detach().double(), expected, atol=1e-5)


def test_an_update_of_muon_has_the_size_of_adamws():
    parameter = torch.nn.Parameter(torch.zeros(64, 256))
    parameter.grad = random(64, 256)
    Muon([parameter], lr=0.01).step()
    rms = parameter.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * 0.01, rel=0.2)


def test_every_parameter_is_moved_by_one_optimizer(tiny):
    run = Run(PLAN, "cpu")
    held = [p for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(run.model.parameters()))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.advance(*draw(tiny, PLAN, 0))
    for name, p in run.model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_a_state_is_plain_tensors(tiny, tmp_path):
    run = Run(PLAN, "cpu")
    run.advance(*draw(tiny, PLAN, 0))
    run.save_state(tmp_path / STATE)
    names = load((tmp_path / STATE).read_bytes()).keys()
    assert "model.embedding.weight" in names
    assert any(name.endswith("momentum_buffer") for name in names)
    assert any(name.endswith("exp_avg_sq") for name in names)
