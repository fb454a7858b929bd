"""The ledger of fine-tuning: its rows by hand, its command, and the committed file."""

import copy
import csv
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional

from rooflm.lab import maps, text
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.estimates import ratio_estimate
from rooflm.lab.finetune import fit, next_token_loss, text_batches
from rooflm.lab.quantize import adapt, ledger, peft
from rooflm.lab.quantize.codecs import to_format
from rooflm.lab.quantize.ledger import BLOCK, MEASURED, Run, find_rows, find_run, load_ledger

TRAINED = {"rank": 2, "learning_rate": 0.01, "steps": 2, "text": "moby_dick"}
FEW = [
    Run("none"),
    Run("full", **TRAINED | {"rank": 0}),
    Run("qlora", "int3-g16", **TRAINED),
    Run("qlora", "int3-g16", **TRAINED, served="rounded"),
]


@pytest.fixture(scope="module", autouse=True)
def short_texts(short_novels):
    with short_novels(12_000) as patch:
        patch.setattr(adapt, "CALIBRATION", (2, 64))
        patch.setattr(adapt, "GENERATED", (2, 70))
        yield


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def shop(folder):
    return adapt.Workshop(load_checkpoint(folder), 2 * BLOCK)


@pytest.fixture
def few(monkeypatch):
    parts = {"main": lambda: FEW[:2], "served": lambda: FEW[2:]}
    monkeypatch.setattr(ledger, "PARTS", parts)


def arguments(folder, out, *more):
    return ["--model", str(folder), "--tokens", str(2 * BLOCK), "--out", str(out), *more]


def without_time(path):
    """What the file says, but for the seconds."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    clocks = ("seconds", "preparation")
    return [{name: cell for name, cell in row.items() if name not in clocks} for row in rows]


def losses_by_hand(model, tokens):
    """Nats of each block, every block read from an empty cache."""
    blocks = []
    for start in range(0, 2 * BLOCK, BLOCK):
        row = tokens[start : start + BLOCK + 1]
        loss = functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        blocks.append(loss.detach().double())
    return torch.stack(blocks)


def test_a_row_is_a_run_trained_and_measured_by_hand(folder, few, tmp_path):
    out = tmp_path / "ledger.csv"
    assert adapt.main(arguments(folder, out)) == 0
    row = find_run(load_ledger(folder, out), FEW[2])

    own = text.encode(text.load_text("moby_dick"))
    first = own[: round(0.75 * len(own))]
    before = load_checkpoint(folder)
    after = peft.qlora(before, 2, torch.Generator().manual_seed(0), "int3-g16")
    started = copy.deepcopy(after)
    fit(after, text_batches(first, 8, 64, 0), next_token_loss, 2, 0.01)
    other = text.encode(text.load_text("persuasion"))
    for name, tokens in (("moby_dick", own[-2 * BLOCK - 1 :]), ("persuasion", other)):
        ours, theirs = losses_by_hand(after, tokens), losses_by_hand(before, tokens)
        sizes = text.token_bytes()[tokens[1 : 2 * BLOCK + 1]].view(2, BLOCK).sum(1).double()
        ln2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
        expected = ratio_estimate((ours - theirs) / ln2, sizes)
        assert row[f"{name}_difference"] == pytest.approx(expected.value, rel=1e-3, abs=1e-5)
        assert row[f"{name}_difference_low"] == pytest.approx(expected.low, rel=1e-3, abs=1e-4)
        begun = (losses_by_hand(started, tokens) - theirs).sum() / ln2 / sizes.sum()
        assert row[f"{name}_start"] == pytest.approx(begun.item(), rel=1e-3, abs=1e-5)
        own_loss = (ours.sum() / ln2 / sizes.sum()).item()
        assert row[f"{name}_bits_per_byte"] == pytest.approx(own_loss, rel=1e-5)
        kept = torch.tensor([float(x) for x in row[f"{name}_nats"].split()])
        torch.testing.assert_close(kept.double(), ours, rtol=1e-5, atol=0)
    assert row["trainable"] == 2 * 2 * (4 * 2 * 32 - 2 * 16 + 3 * 96)
    assert row["steps"] == 2 and row["tokens"] == 2 * BLOCK and row["part"] == "served"
    assert row["checkpoint"] == checkpoint_digest(folder)


def test_no_token_that_is_measured_is_read_in_training(shop):
    own = text.encode(text.load_text("moby_dick"))
    read, held_out = len(shop.training), len(shop.held_out["moby_dick"])
    assert torch.equal(shop.training, own[:read]) and read + held_out <= len(own)
    assert torch.equal(shop.held_out["moby_dick"], own[-held_out:])


def test_the_controls_read_what_they_claim(shop):
    shuffled = shop.read("shuffled")
    assert torch.equal(shuffled.sort().values, shop.training.sort().values)
    assert not torch.equal(shuffled, shop.training)
    assert torch.equal(shop.read("shuffled"), shuffled)  # the same on every call
    assert not torch.equal(shop.read("shuffled", 1), shuffled)
    assert shop.read("generated").shape == (2, 70)
    assert len(shop.read("random").unique()) == 2048
    with pytest.raises(ValueError, match="unknown text 'emmy'; nearest: emma"):
        shop.read("emmy")


@pytest.mark.parametrize("run", [
    Run("round", "int2-g16-sym", text="emma"),
    Run("gptq", "int2-g16-sym", text="random"),
    Run("qat", "int2-g16-sym", 0, 1e-3, 1, "emma"),
    Run("lsq", "int2-g16-sym", 0, 1e-3, 1, "generated"),
    Run("loftq", "int2-g16", **TRAINED),
    Run("lora", "fp16", **TRAINED),
    Run("qa-lora", "int4-g16", **TRAINED, served="merged"),
], ids=lambda run: run.method)  # fmt: skip
def test_every_method_gives_a_row(shop, run):
    row = shop.row(run)
    assert row["bits_per_weight"] > 0 and len(row["moby_dick_nats"].split()) == 2
    assert row["moby_dick_difference_low"] <= row["moby_dick_difference"]
    if not run.steps:
        assert row["trainable"] == 0 and row["moby_dick_start"] == row["moby_dick_difference"]


def test_what_is_served_by_the_codes_lies_on_their_grid(shop):
    for run in (Run("lsq", "int2-g16-sym", 0, 1e-3, 1, "emma"), replace(FEW[3])):
        model = shop.start(run)
        shop.train(model, run)
        served = adapt._as_served(model, run)
        weight = served.layers[0].down_proj.weight
        if run.served == "rounded":
            whole = peft.merged(model).layers[0].down_proj.weight
            assert torch.equal(weight, to_format(whole, run.base))
        assert all(len(group.unique()) <= 8 for group in weight.reshape(-1, 16))


def test_merged_qa_lora_measures_as_trained(shop):
    run = Run("qa-lora", "int4-g16", **TRAINED)
    a, b = shop.row(run), shop.row(replace(run, served="merged"))
    assert a["moby_dick_difference"] == pytest.approx(b["moby_dick_difference"], abs=2e-3)
    assert a["bits_per_weight"] > b["bits_per_weight"] == 4 + 32 / 16


def test_an_interrupted_command_goes_on_and_ends_at_the_same_rows(
    folder, few, tmp_path, capsys, monkeypatch
):
    assert adapt.main(arguments(folder, tmp_path / "whole.csv")) == 0
    write, written = maps.write_rows, []

    def interrupted(*given):
        write(*given)
        written.append(given)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(maps, "write_rows", interrupted)
    assert adapt.main(arguments(folder, tmp_path / "parts.csv")) == 130
    assert "goes on" in capsys.readouterr().err
    assert len(without_time(tmp_path / "parts.csv")) == 2
    monkeypatch.setattr(maps, "write_rows", write)
    assert adapt.main(arguments(folder, tmp_path / "parts.csv")) == 0
    assert "2/2  qlora int3-g16 r2 0.01 2 steps moby_dick seed 0 rounded" in capsys.readouterr().out
    assert without_time(tmp_path / "parts.csv") == without_time(tmp_path / "whole.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.csv", "whole.csv"]


def test_rows_of_another_checkpoint_or_length_are_refused_unless_fresh(
    folder, few, tmp_path, capsys
):
    out = tmp_path / "ledger.csv"
    assert adapt.main(arguments(folder, out, "--part", "main")) == 0
    assert len(without_time(out)) == 2
    assert adapt.main(["--model", str(folder), "--tokens", "768", "--out", str(out)]) == 2
    assert "measured on 512 tokens, not 768" in capsys.readouterr().err
    other = out.read_text().replace(checkpoint_digest(folder), "0123456789ab")
    out.write_text(other)
    assert adapt.main(arguments(folder, out)) == 2
    said = capsys.readouterr().err
    assert "holds rows of checkpoint 0123456789ab" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="0123456789ab"):
        load_ledger(folder, out)
    assert out.read_text() == other
    assert adapt.main(arguments(folder, out, "--part", "main", "--fresh")) == 0
    assert {row["method"] for row in without_time(out)} == {"none", "full"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace("moby_dick_start", "start"),
        lambda content: content[: len(content) * 2 // 3],
        lambda content: content.replace(",512,", ",many,"),
        lambda content: content + "one,two\n",
        lambda content: content[:-1] + ",more\n",
    ],
    ids=["column", "cut", "word", "short row", "long row"],
)
def test_an_altered_ledger_is_named(folder, few, tmp_path, capsys, damage):
    out = tmp_path / "ledger.csv"
    assert adapt.main(arguments(folder, out, "--part", "main")) == 0
    out.write_text(damage(out.read_text()))
    capsys.readouterr()
    assert adapt.main(arguments(folder, out, "--part", "main")) == 2
    said = capsys.readouterr().err
    assert "ledger.csv is altered" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "teachers"), "teachers"),
        (("--tokens", "100"), "512 to 100000"),
        (("--part", "grids"), "grids"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, more, words):
    given = ["--out", str(tmp_path / "ledger.csv"), *more]
    try:
        status = adapt.main(given)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_ledger_or_row_or_column_is_one_line(tmp_path, folder):
    with pytest.raises(ValueError, match=r"python -m rooflm\.lab\.quantize\.adapt"):
        load_ledger(folder, tmp_path / "ledger.csv")
    with pytest.raises(ValueError, match="no row of full fp16"):
        find_run([], FEW[1])
    with pytest.raises(ValueError, match="unknown column 'sed'"):
        find_rows([], sed=0)


def test_two_rows_compare_as_their_models_do(folder, few, tmp_path):
    out = tmp_path / "ledger.csv"
    assert adapt.main(arguments(folder, out)) == 0
    rows = load_ledger(folder, out)
    none, full = find_run(rows, FEW[0]), find_run(rows, FEW[1])
    for name in MEASURED:
        found = ledger.contrast(full, none, name)
        assert found.difference.value == pytest.approx(full[f"{name}_difference"], abs=1e-5)
        assert found.difference.low == pytest.approx(full[f"{name}_difference_low"], abs=1e-4)
        assert ledger.contrast(full, full, name).verdict == "within noise"
        assert ledger.change(full, name).value == full[f"{name}_difference"]
    with pytest.raises(ValueError, match="unknown text"):
        ledger.contrast(full, none, "emma")
    with pytest.raises(ValueError, match="unknown text"):
        ledger.change(full, "emma")
    assert ledger.seeds_of([full | {"seed": 1}, none, full], FEW[1]) == [full, full | {"seed": 1}]


def test_runs_are_named_apart():
    every = ledger.runs()
    names = [ledger.label(asdict(run)) for run in every]
    assert len(set(names)) == len(names) == sum(len(some()) for some in ledger.PARTS.values())
    assert set(ledger.runs("qat").values()) == {"qat"}


def test_the_committed_ledger_is_whole_and_of_the_committed_model():
    """After a new teacher: python -m rooflm.lab.quantize.adapt --fresh."""
    if not ledger.LEDGER.path.exists():
        pytest.skip("there is no ledger yet")
    rows = load_ledger()
    for run in ledger.runs():
        row = find_run(rows, run)
        for name in MEASURED:
            low, middle = row[f"{name}_difference_low"], row[f"{name}_difference"]
            assert low <= middle <= row[f"{name}_difference_high"]
            assert len(row[f"{name}_nats"].split()) == row["tokens"] // BLOCK
    assert {row["tokens"] for row in rows} == {ledger.TOKENS}
