"""The map of KV caches: its rows by hand, its command, and the committed file."""

import csv

import pytest
import torch
from torch.nn import functional

from rooflm.lab import maps, text
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.estimates import ratio_estimate
from rooflm.lab.kvcache import __main__ as command
from rooflm.lab.kvcache import sweep
from rooflm.lab.kvcache.sweep import BLOCK, BUDGETED, METHODS, Variant
from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.model import Config
from rooflm.lab.quantize.grids import round_to_nearest

FEW = [Variant(), Variant("windowed", 16), Variant("kivi-2"), Variant("full", weights="int4-g64")]


@pytest.fixture(scope="module", autouse=True)
def short_texts(short_novels):
    with short_novels(9_000) as patch:
        patch.setattr(sweep, "CALIBRATION", {"teacher": 512})
        patch.setattr(sweep, "CONTEXT", 120)
        yield


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint(Config(2048, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=64))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sweep, "variants", lambda name: FEW)


def arguments(folder, out, *more):
    given = ["--model", str(folder), "--tokens", str(2 * BLOCK), "--cases", "2"]
    return [*given, "--out", str(out), *more]


def without_time(path):
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]


def losses(logits_of, tokens):
    """Bits of each block, (blocks,)."""
    blocks = []
    for start in range(0, 2 * BLOCK, BLOCK):
        row = tokens[start : start + BLOCK + 1]
        loss = functional.cross_entropy(logits_of(row[None, :-1])[0], row[1:], reduction="sum")
        blocks.append(loss.double() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    return torch.stack(blocks)


def test_a_row_holds_what_was_measured_by_hand(folder, few, tmp_path):
    out = tmp_path / "map.csv"
    assert command.main(arguments(folder, out)) == 0
    rows = sweep.load_map(folder, out)
    assert len(rows) == len(FEW)
    model = load_checkpoint(folder)
    tokens = text.encode(text.load_text("persuasion"))
    sizes = text.token_bytes()[tokens[1 : 2 * BLOCK + 1]].view(2, BLOCK).sum(1).double()

    def windowed(row):
        cache = WindowedCache(12, 4)
        return torch.cat([model(part, cache) for part in row.split(1, dim=1)], 1)

    before, after = losses(model, tokens), losses(windowed, tokens)
    full, found = sweep.find_row(rows), sweep.find_row(rows, "windowed", 16)
    assert full["bits_per_byte"] == pytest.approx((before.sum() / sizes.sum()).item(), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx((after.sum() / sizes.sum()).item(), rel=1e-4)
    expected = ratio_estimate(after - before, sizes)
    assert found["difference"] == pytest.approx(expected.value, rel=1e-2, abs=1e-5)
    assert found["difference_low"] == pytest.approx(expected.low, rel=1e-2, abs=1e-4)
    assert full["difference"] == pytest.approx(0, abs=1e-6) and full["agreement"] == 1
    # 2 layers of one KV head of 32, keys and values in FP32; 16 of 512 positions
    assert full["bytes_per_token"] == 2 * 2 * 32 * 4
    assert found["bytes_per_token"] == 2 * 2 * 32 * 4 * 16 / BLOCK
    assert sweep.find_row(rows, "kivi-2")["bytes_per_token"] < full["bytes_per_token"] / 3
    for block in model.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            weight = getattr(block, f"{name}_proj").weight
            weight.copy_(round_to_nearest(weight, 4, 64))
    rounded = losses(model, tokens)
    four = sweep.find_row(rows, weights="int4-g64")
    assert four["bits_per_byte"] == pytest.approx((rounded.sum() / sizes.sum()).item(), rel=1e-4)
    assert {row["checkpoint"] for row in rows} == {checkpoint_digest(folder)}
    assert {row["tokens"] for row in rows} == {2 * BLOCK}
    assert {row["cases"] for row in rows} == {6}  # two at each of three depths
    for row in rows:
        assert len(row["answered"]) == 6 and len(row["log_probabilities"].split()) == 6
        assert row["exact"] == pytest.approx(row["answered"].count("1") / 6, abs=1e-6)
        logs = [float(x) for x in row["log_probabilities"].split()]
        assert row["log_probability"] == pytest.approx(sum(logs) / 6, abs=1e-2)
        depths = sweep.by_depth(row)
        for i, depth in enumerate(sweep.DEPTHS):  # they take turns
            assert depths[depth].value == row["answered"][i::3].count("1") / 2
        assert maps.estimate(row, "exact").high <= 1


def test_depths_that_take_turns_do_not_widen_the_interval():
    """Eight cases of 24, all of one depth: as eight of 24 drawn independently (Wilson)."""
    right = torch.tensor([0.0, 0, 1] * 8)
    row = sweep.answers(right, -torch.ones(24))
    assert (row["exact"], row["cases"]) == (pytest.approx(1 / 3), 24)
    z, p, n = 2.069, 1 / 3, 24  # Student's t with 23 degrees of freedom
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    assert row["exact_low"] == pytest.approx(middle - half, abs=0.01)
    assert row["exact_high"] == pytest.approx(middle + half, abs=0.01)


def test_variants_are_named_apart_and_cover_every_method():
    for name in ("teacher", "smollm2"):
        wanted = sweep.variants(name)
        assert len(set(wanted)) == len(wanted) and wanted[0] == Variant()
        assert set(BUDGETED) <= {x.method for x in wanted} <= set(METHODS)
        assert all(x.budget > 0 for x in wanted if x.method in BUDGETED)
    assert {x.method for x in sweep.variants()} == set(METHODS)


@pytest.mark.parametrize("method", BUDGETED)
def test_a_budget_is_what_is_held(folder, method):
    model = load_checkpoint(folder)
    tokens = text.encode(text.load_text("persuasion"))[None, :90]
    cache = BUDGETED[method](16, False)()
    for part in tokens.split(30, dim=1):
        model.states(part, cache)
    assert cache.held(1).shape[-1] == 16


def test_an_interrupted_sweep_goes_on_and_ends_at_the_same_rows(
    folder, few, tmp_path, capsys, monkeypatch
):
    assert command.main(arguments(folder, tmp_path / "whole.csv")) == 0
    write, written = maps.write_rows, []

    def interrupted(path, columns, rows):
        write(path, columns, rows)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(maps, "write_rows", interrupted)
    assert command.main(arguments(folder, tmp_path / "parts.csv")) == 130
    assert "goes on" in capsys.readouterr().err
    assert len(without_time(tmp_path / "parts.csv")) == 2
    monkeypatch.setattr(maps, "write_rows", write)
    assert command.main(arguments(folder, tmp_path / "parts.csv")) == 0
    assert "2/2  tiny, int4-g64 weights, full" in capsys.readouterr().out  # two were left
    assert without_time(tmp_path / "parts.csv") == without_time(tmp_path / "whole.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.csv", "whole.csv"]


def test_rows_of_another_checkpoint_or_length_are_refused_unless_fresh(
    folder, few, tmp_path, capsys
):
    out = tmp_path / "map.csv"
    assert command.main(arguments(folder, out, "--method", "windowed")) == 0
    assert command.main(["--model", str(folder), "--tokens", "1536", "--out", str(out)]) == 2
    assert "measured on 1024 tokens, not 1536" in capsys.readouterr().err
    other = out.read_text().replace(checkpoint_digest(folder), "0123456789ab")
    out.write_text(other)
    assert command.main(arguments(folder, out)) == 2
    said = capsys.readouterr().err
    assert "holds rows of checkpoint 0123456789ab" in said and said.count("\n") == 1
    assert out.read_text() == other
    assert command.main(arguments(folder, out, "--method", "full", "--fresh")) == 0
    assert {row["method"] for row in without_time(out)} == {"full"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "teachers"), "teachers"),
        (("--tokens", "100"), "1024 or more"),
        (("--cases", "1"), "2 or more"),
        (("--method", "h20"), "h20"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, more, words):
    try:
        status = command.main(["--out", str(tmp_path / "map.csv"), *more])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_missing_is_named(folder, few, tmp_path):
    with pytest.raises(ValueError, match=r"python -m rooflm\.lab\.kvcache"):
        sweep.load_map(folder, tmp_path / "map.csv")
    with pytest.raises(ValueError, match="no row of h2o 16"):
        sweep.find_row([], "h2o", 16)
    with pytest.raises(ValueError, match="h2o"):
        sweep.find_row([], "h20", 16)


@pytest.mark.parametrize("name", ["teacher", "smollm2"])
def test_the_committed_map_is_whole_and_of_the_committed_model(name):
    """After a new teacher: python -m rooflm.lab.kvcache --model teacher --fresh."""
    rows = sweep.load_map(name)
    for variant in sweep.variants(name):
        row = sweep.find_row(rows, variant.method, variant.budget, variant.weights)
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert 0 <= row["agreement"] <= 1 and row["bytes_per_token"] > 0
        assert row["cases"] == (24 if name == "smollm2" else 0)
    full = sweep.find_row(rows)
    assert abs(full["difference"]) < 1e-6 and full["agreement"] == 1
