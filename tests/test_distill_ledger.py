"""The ledger of distillation: the command, its file, and what is committed."""

import pytest
import torch

from rooflm.lab import maps, text, train
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.distill import __main__ as command
from rooflm.lab.distill import ledger
from rooflm.lab.distill.ledger import (
    KEPT,
    LEDGER,
    REFERENCES,
    RUNS,
    find_row,
    find_rows,
    load_ledger,
    names,
    scratch,
    wanted,
    writing_contrast,
)
from rooflm.lab.evaluate import compare, evaluate
from rooflm.lab.pairs import contrast_rows
from rooflm.lab.train import CONFIGS

FOUND = {"bits_per_byte": 1.5, "agreement": 0.5, "acceptance": 0.5, "teacher_nats": 3.0}


def row_of(variant, **other):
    """A row with numbers in every column, as the command writes them."""
    row = {name: kind() for name, kind in LEDGER.columns.items()}
    row |= {"model": "student", "checkpoint": checkpoint_digest("student"), "tokens": 16_384}
    row |= {"teacher": checkpoint_digest("teacher"), **names(variant), **FOUND}
    return row | other


@pytest.fixture
def measured(monkeypatch):
    """The command without training: what it was asked to measure."""
    asked = []

    def row(self, variant):
        asked.append(variant)
        keys = [*LEDGER.keys, *maps.HEAD, *maps.TAIL]
        return {name: x for name, x in row_of(variant).items() if name not in keys}

    monkeypatch.setattr(command.Measurer, "row", row)
    return asked


# ---- the command


def test_a_row_that_is_there_is_not_measured_again(measured, tmp_path, capsys):
    arguments = ["--part", "continued", "--out", str(tmp_path / "d.csv")]
    assert command.main(arguments) == 0
    first = list(measured)
    assert first == [v for v in RUNS if v.part == "continued"]
    assert command.main(arguments) == 0
    assert measured == first
    rows = load_ledger(tmp_path / "d.csv")
    assert [LEDGER.key(row) for row in rows] == [LEDGER.key(names(v)) for v in first]
    assert "the ledger is in" in capsys.readouterr().out


def test_one_objective_is_run_in_every_part(measured, tmp_path):
    assert command.main(["--objective", "forward-kl", "--out", str(tmp_path / "d.csv")]) == 0
    assert {v.part for v in measured} == {"scratch", "continued"}
    assert {v.objective for v in measured} == {"forward-kl"}


def test_rows_of_another_teacher_are_refused(measured, tmp_path, capsys, monkeypatch):
    path = tmp_path / "d.csv"
    assert command.main(["--part", "reference", "--out", str(path)]) == 0
    known = ledger.checkpoint_digest
    monkeypatch.setattr(
        ledger, "checkpoint_digest", lambda n: "0" * 12 if n == "teacher" else known(n)
    )
    assert command.main(["--out", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rows of teacher" in error
    with pytest.raises(ValueError, match="rows of teacher"):
        load_ledger(path)


def test_the_list_names_every_run_and_does_nothing(measured, capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == len(REFERENCES) + len(RUNS) and not measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "forward"], "invalid choice: 'forward'"),
        (["--part", "all"], "invalid choice: 'all'"),
        (["--part", "scratch", "--objective", "ranked"], "has no run of part scratch"),
        (["--tokens", "100"], "--tokens is 100; allowed: 512 to 65536"),
        (["--threads", "0"], "--threads is 0; allowed: 1 or more"),
        (["--no-such\noption"], "unrecognized arguments: --no-such option"),
    ],
)
def test_bad_arguments_end_with_status_2_and_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rooflm.lab.distill: error: ")
    assert message in error


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    for option in (
        "part",
        "objective",
        "runs",
        "tokens",
        "threads",
        "fresh",
        "save",
        "list",
        "out",
    ):
        assert f"--{option}" in shown


def test_kept_checkpoints_are_written_to_their_places(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = train.Transformer(CONFIGS["student"]).requires_grad_(False)
    command.save_checkpoint(model, tmp_path / "run", "# a log\n")
    monkeypatch.setattr(command, "data_path", lambda *parts: tmp_path.joinpath(*parts))

    class Shop:
        def train(self, variant):
            return tmp_path / "run"

    kept = next(iter(KEPT))
    command.keep([*REFERENCES, kept, scratch("jsd")], Shop(), lambda _: None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [KEPT[kept]]
    written = tmp_path / "checkpoints" / KEPT[kept]
    for name in ("model.safetensors", "config.json", "log.csv"):
        assert (written / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


# ---- reading it


def test_two_rows_have_the_paired_difference_of_their_models():
    bytes_of = text.token_bytes()
    held_out = text.encode(text.load_text(text.HELD_OUT))[: 4 * 256 + 1]
    rows, found = [], []
    for name in ("student", "teacher"):
        found.append(evaluate(load_checkpoint(name), held_out, bytes_of, 256))
        nats = " ".join(f"{x:.7g}" for x in found[-1].blocks.losses.tolist())
        rows.append(row_of("student", nats=nats, tokens=1024))
    compared, expected = contrast_rows(*rows), compare(*found)
    for end in ("value", "low", "high"):
        ours, theirs = (getattr(x.difference, end) for x in (compared, expected))
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert compared.verdict == expected.verdict
    with pytest.raises(ValueError, match="the same blocks"):
        contrast_rows(rows[0], rows[1] | {"tokens": 512})


def test_what_two_models_write_is_paired_by_prompts():
    ours, theirs = (row_of("student", teacher_row_nats=x) for x in ("128 256 384", "0 128 384"))
    found = writing_contrast(ours, theirs)
    assert found.value == pytest.approx(256 / (3 * 128)) and found.low < found.value < found.high
    with pytest.raises(ValueError, match="3 and 2 texts; allowed: as many"):
        writing_contrast(ours, row_of("student", teacher_row_nats="1 2"))


def test_rows_are_found_by_what_they_are():
    rows = [row_of(v) for v in wanted()]
    assert find_row(rows, scratch("jsd"))["objective"] == "jsd"
    assert find_row(rows, "text")["part"] == "reference"
    assert {row["seed"] for row in find_rows(rows, objective="next-token", part="scratch")} == {
        0,
        1,
    }
    with pytest.raises(ValueError, match=r"no row of scratch jsd 250 steps 0\.006 seed 7"):
        find_row(rows, scratch("jsd", seed=7))
    with pytest.raises(ValueError, match="unknown column 'objectiv'"):
        find_rows(rows, objectiv="jsd")
    with pytest.raises(ValueError, match="unknown reference 'human'"):
        find_row(rows, "human")


# ---- what is committed


def test_the_committed_ledger_is_whole():
    found = {LEDGER.key(row) for row in load_ledger()}
    assert found == {LEDGER.key(names(v)) for v in wanted()}


def test_the_committed_checkpoints_are_those_of_the_ledger():
    rows = load_ledger()
    for variant, name in KEPT.items():
        row = find_row(rows, variant)
        assert row["weights"] == checkpoint_digest(name)
        assert row["steps"] * row["tokens_per_step"] == variant.steps * variant.tokens_per_step


def test_the_committed_rows_stay_within_what_is_possible():
    for row in load_ledger():
        assert 0 <= row["repeated"] <= 1 and 0 < row["distinct"] <= 1
        if row["objective"] == "text":
            continue
        assert row["acceptance"] <= 1 and row["divergence"] >= 0
        lost = 1 - row["acceptance"]
        for kl in (row["divergence"], row["reverse_divergence"]):
            assert lost**2 <= kl / 2 + 1e-6  # Pinsker, and Jensen over the positions
        if row["objective"] != "teacher":
            assert row["difference"] > 0 and row["sequence_divergence"] > 0
