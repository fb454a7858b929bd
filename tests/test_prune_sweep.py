"""The map of pruning: its rows by hand, its command, and the committed file."""

import csv

import pytest

from rooflm.lab import text
from rooflm.lab.bench import WINDOW, checkpoint_digest, decode_bytes, linear_weights
from rooflm.lab.calibrate import LINEARS
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.evaluate import compare, evaluate
from rooflm.lab.model import Config, Transformer
from rooflm.lab.pairs import contrast_rows
from rooflm.lab.prune import __main__ as command
from rooflm.lab.prune import map_rows, sweep
from rooflm.lab.prune.recipes import Recipe, Removal
from rooflm.lab.prune.variants import FULL, label, names_of, variants
from rooflm.lab.train import CONFIGS

CONFIG = Config(2048, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=64)
FEW = [
    Recipe("magnitude", 0.5),
    Recipe("sparsegpt", 0.5, "2:4", bits=4, group=32),
    Removal("last", layers=1),
    Removal("random", heads=1, channels=16, steps=2),
    Recipe("wanda", 0.5, owl=True, steps=2),
]


@pytest.fixture(scope="module", autouse=True)
def short_texts(short_novels):
    with short_novels(6_000):
        yield


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint(CONFIG)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(command, "variants", lambda name: FEW)


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    """The map of the few, as `load_map` reads it."""
    out = tmp_path_factory.mktemp("maps") / "map.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "variants", lambda name: FEW)
        assert command.main(arguments(folder, out)) == 0
    return sweep.load_map(folder, out)


def arguments(folder, out, *more):
    return ["--model", str(folder), "--tokens", str(2 * WINDOW), "--out", str(out), *more]


def test_a_row_holds_what_is_stored_and_a_paired_difference(folder, rows):
    found = sweep.find_row(rows, FEW[0])
    model = load_checkpoint(folder)
    tokens = text.encode(text.load_text("persuasion"))[: 2 * WINDOW + 1]
    before = evaluate(model, tokens, text.token_bytes(), WINDOW)
    for block in model.layers:
        for name in LINEARS:
            weight = getattr(block, name).weight
            sizes = weight.abs().flatten().tolist()
            order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
            weight.view(-1)[order[len(order) // 2 :]] = 0
    expected = compare(evaluate(model, tokens, text.token_bytes(), WINDOW), before).difference
    assert found["difference"] == pytest.approx(expected.value, abs=1e-5)
    assert found["difference_high"] == pytest.approx(expected.high, abs=1e-5)
    assert found["density"] == 0.5 and found["storage"] == "bitmap"
    weights = linear_weights(CONFIG)
    assert found["linear_bits"] == 9 * weights
    assert found["decode_bytes"] == pytest.approx(decode_bytes(CONFIG, 9.0 * weights))
    assert found["checkpoint"] == checkpoint_digest(folder) and found["tokens"] == 2 * WINDOW


def test_the_full_model_stands_first(rows):
    assert rows[0]["method"] == FULL and rows[0]["difference"] == 0
    assert rows[0]["decode_bytes"] == 2 * sum(p.numel() for p in Transformer(CONFIG).parameters())
    assert len(rows) == 1 + len(FEW)


def test_a_pattern_in_four_bits_takes_half_the_codes_their_places_and_all_scales(rows):
    found = sweep.find_row(rows, FEW[1])
    weights = linear_weights(CONFIG)
    scales = (16 + 4) * weights / 32
    assert found["storage"] == "2:4"
    assert found["linear_bits"] == (2 + 1) * weights + scales


def test_a_smaller_model_stands_with_its_own_sizes(rows):
    row = sweep.find_row(rows, FEW[2])
    assert row["layers"] == 2 and row["sparsity"] == pytest.approx(1 / 3, abs=1e-4)
    row = sweep.find_row(rows, FEW[3])
    # of 32·32·2 + 32·16·2 + 3·32·64 weights a layer keeps 32·16·4 + 3·32·48
    left = (32 * 16 * 4 + 3 * 32 * 48) / (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert row["heads"] == row["kv_heads"] == 2 and row["intermediate"] == 48
    assert row["density"] == pytest.approx(left) == pytest.approx(1 - row["sparsity"], abs=1e-4)


def test_any_two_rows_have_a_paired_difference(rows):
    full, found = rows[0], sweep.find_row(rows, FEW[0])
    assert contrast_rows(found, full).difference.value == pytest.approx(
        found["difference"], abs=1e-5
    )
    other = rows[2]
    forth, back = contrast_rows(found, other), contrast_rows(other, found)
    assert forth.difference.value == pytest.approx(-back.difference.value)


def test_a_row_that_is_not_there_is_named(rows):
    with pytest.raises(ValueError, match="no row of wanda 30 %"):
        sweep.find_row(rows, Recipe("wanda", 0.3))
    with pytest.raises(ValueError, match="no row of last layers 2"):
        sweep.find_row(rows, Removal("last", layers=2))


def test_tables_and_figures_read_the_map_in_its_own_units(rows):
    found = map_rows.tabulate(
        rows, {"half": FEW[0], "all": None}, ["bits", "loss", "MB", "storage"]
    )
    row = sweep.find_row(rows, FEW[0])
    loss = f"{row['difference']:+.4f} ± {row['difference_high'] - row['difference']:.4f}"
    assert found[0] == ("half", 9, loss, row["decode_bytes"] / 1e6, "bitmap")
    assert found[1][1:3] == (16, "–")
    assert map_rows.losses(rows, {"x": [None, FEW[0]]}) == [("x", "–", loss)]
    assert map_rows.points(rows, FEW[:1])[0][:2] == (50, row["difference"])
    assert map_rows.points(rows, FEW[:1], "MB")[0][0] == row["decode_bytes"] / 1e6
    assert map_rows.beside(rows, FEW[0], FEW[0]) == "+0.0000 ± 0.0000, within noise"
    less = map_rows.losses(rows, {"x": [FEW[0], FEW[1], None]}, less=[(1, 0), (2, 0)])
    assert less[0][4:] == (map_rows.beside(rows, FEW[1], FEW[0]), "–")


def test_the_command_goes_on_where_it_was_interrupted(folder, few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "map.csv"
    measure, calls = sweep._measured, []

    def stop(bench, variant):
        calls.append(variant)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(bench, variant)

    monkeypatch.setattr(sweep, "_measured", stop)
    assert command.main(arguments(folder, out)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert command.main(arguments(folder, out)) == 0
    assert calls == [None, *FEW[:2], *FEW[1:]]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 1 + len(FEW)


def test_what_the_command_does_not_take_is_one_line(folder, tmp_path, capsys):
    assert command.main(["--model", "nobody", "--out", str(tmp_path / "x.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        command.main(arguments(folder, tmp_path / "x.csv", "--tokens", "100"))


def test_every_variant_has_a_name_of_its_own():
    names = [tuple(names_of(x, CONFIGS["teacher"]).values()) for x in variants()]
    assert len(set(names)) == len(names)
    assert label(names_of(Recipe("wanda", 0.5, "2:4", steps=60))) == "wanda 50 % 2:4 steps=60"
    assert label(names_of(Removal("last", layers=1), CONFIGS["teacher"])) == "last 16.7 % layers 1"


@pytest.mark.parametrize("name", ["teacher", "smollm2"])
def test_the_committed_map_is_whole_and_its_columns_agree(name):
    rows = sweep.load_map(name)
    for variant in [None, *variants(name)]:
        sweep.find_row(rows, variant)
    assert len(rows) == 1 + len(variants(name))
    full = rows[0]
    for row in rows:
        where = label(row)
        assert len(row["nats"].split()) == row["tokens"] // WINDOW, where
        assert row["difference_low"] <= row["difference"] <= row["difference_high"], where
        assert row["difference"] == pytest.approx(
            row["bits_per_byte"] - full["bits_per_byte"], abs=1e-4
        ), where
        # A row of a block of 128 columns keeps a whole number of weights.
        assert row["density"] == pytest.approx(1 - row["sparsity"], abs=0.5 / 128), where
        rest = [r["decode_bytes"] - r["linear_bits"] / 8 for r in (full, row)]  # head and norms
        assert 0.99 * rest[0] < rest[1] < 1.0001 * rest[0], where
