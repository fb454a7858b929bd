"""The map of quantization methods: its rows by hand, its command, and the committed file."""

import csv

import pytest
import torch
from torch.nn import functional

from rooflm.lab import maps, text
from rooflm.lab.bench import WINDOW, checkpoint_digest
from rooflm.lab.calibrate import calibration_rows, layer_inputs
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.estimates import ratio_estimate
from rooflm.lab.quantize import sweep
from rooflm.lab.quantize.apply import quantize_model
from rooflm.lab.quantize.bench import make_bench
from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.methods import METHODS, Recipe
from rooflm.lab.quantize.rotation import rotate_model

FEW = [Recipe("round", 2), Recipe("gptq", 3, 16), Recipe("round", 4, activations=8, per="static")]


@pytest.fixture(scope="module", autouse=True)
def short_texts(short_novels):
    with short_novels(6_000):
        yield


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def bench(folder):
    return make_bench(folder, 2 * WINDOW)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sweep, "variants", lambda name: FEW)


def arguments(folder, out, *more):
    return ["--model", str(folder), "--tokens", str(2 * WINDOW), "--out", str(out), *more]


def without_time(path):
    """What the file says, but for the seconds that a method took."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]


def losses_by_hand(model, tokens):
    """Bits of each block, (blocks,), every block read from an empty cache."""
    blocks = []
    for start in range(0, 2 * WINDOW, WINDOW):
        row = tokens[start : start + WINDOW + 1]
        loss = functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        blocks.append(loss.double() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    return torch.stack(blocks)


def test_a_row_holds_bits_and_a_paired_difference(folder, few, tmp_path):
    out = tmp_path / "map.csv"
    assert sweep.main(arguments(folder, out)) == 0
    rows = sweep.load_map(folder, out)
    assert len(rows) == 1 + len(FEW)
    full, found = sweep.find_row(rows, None), sweep.find_row(rows, FEW[0])

    model = load_checkpoint(folder)
    tokens = text.encode(text.load_text("persuasion"))
    sizes = text.token_bytes()[tokens[1 : 2 * WINDOW + 1]].view(2, WINDOW).sum(1).double()
    before = losses_by_hand(model, tokens)
    for block in model.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            weight = getattr(block, f"{name}_proj").weight
            weight.copy_(round_to_nearest(weight, 2))
    after = losses_by_hand(model, tokens)

    assert full["bits_per_byte"] == pytest.approx((before.sum() / sizes.sum()).item(), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx((after.sum() / sizes.sum()).item(), rel=1e-4)
    expected = ratio_estimate(after - before, sizes)
    assert found["difference"] == pytest.approx(expected.value, rel=1e-3)
    assert found["difference_low"] == pytest.approx(expected.low, rel=1e-3, abs=1e-4)
    assert found["difference_high"] == pytest.approx(expected.high, rel=1e-3, abs=1e-4)
    nats = (after.sum() / (2 * WINDOW)).item() * 0.6931471805599453
    assert found["perplexity"] == pytest.approx(2.718281828459045**nats, rel=1e-3)
    # Rows of 32 and 64, an FP16 scale and a zero point of 2 bits for each.
    assert found["bits_per_weight"] == pytest.approx(2 + 18 * (0.8 / 32 + 0.2 / 64), abs=0.01)
    assert full["difference"] == 0 and full["agreement"] == 1 and full["bits_per_weight"] == 32
    assert {row["checkpoint"] for row in rows} == {checkpoint_digest(folder)}
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["tokens"] for row in rows} == {2 * WINDOW}


def test_the_bench_calibrates_on_the_model_that_is_quantized(bench):
    rows = calibration_rows(text.encode(text.load_text("emma")), 2, WINDOW)
    found = bench.quantize(Recipe("gptq", 2, 16, rotate=True))
    turned = rotate_model(bench.model, 0)
    first = quantize_model(turned, Recipe("gptq", 2, 16), rows)  # its first block sees the same
    for name in ("q_proj", "gate_proj", "down_proj"):
        ours, theirs = (getattr(m.layers[0], name).weight for m in (found.model, first.model))
        assert (ours != theirs).float().mean() < 0.01  # a code may hang on the last digit
    assert bench.base() is bench.base() and bench.base() is not bench.base(Recipe(rotate=True))


def test_the_bench_gathers_fisher_information_where_it_is_needed(bench):
    known = bench.base(Recipe("squeezellm", 2)).knowledge
    assert all(k.fisher is not None and k.inputs is not None for k in known.values())
    assert all(k.fisher is None for k in bench.base(Recipe("gptq", 2)).knowledge.values())
    assert bench.quantize(Recipe("squeezellm", 2)).bits_per_weight < 4


def test_a_smoothed_base_computes_the_same(bench):
    smooth = bench.base(Recipe("round", smooth=0.5)).model
    rows = bench.held_out[None, :64]
    torch.testing.assert_close(smooth(rows), bench.model(rows), rtol=1e-3, atol=1e-3)


def test_variants_are_named_apart_and_cover_every_method():
    recipes = sweep.variants()
    names = [tuple(sweep._names(recipe).values()) for recipe in recipes]
    assert len(set(names)) == len(recipes)
    assert {recipe.method for recipe in recipes} == set(METHODS)
    assert {recipe.bits for recipe in recipes if recipe.method == "gptq"} == {8, 4, 3, 2}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("round", 3), "round 3 bits"),
        (Recipe("gptq", 3, 64, act_order=True), "gptq 3 bits g64 act_order"),
        (Recipe("format", number_format="nf4"), "format number_format=nf4"),
        (Recipe("pb-llm", group=128, keep=0.1), "pb-llm g128 keep=0.1"),
        (Recipe("round", 8, activations=8, smooth=0.5), "round 8 bits activations=8 smooth=0.5"),
    ],
)
def test_a_row_is_named_by_what_is_not_usual(recipe, words):
    assert sweep.label(sweep._names(recipe)) == words


def test_an_interrupted_sweep_goes_on_and_ends_at_the_same_rows(
    folder, few, tmp_path, capsys, monkeypatch
):
    assert sweep.main(arguments(folder, tmp_path / "whole.csv")) == 0
    write, written = maps.write_rows, []

    def interrupted(path, columns, rows):
        write(path, columns, rows)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(maps, "write_rows", interrupted)
    assert sweep.main(arguments(folder, tmp_path / "parts.csv")) == 130
    assert "goes on" in capsys.readouterr().err
    assert len(without_time(tmp_path / "parts.csv")) == 2
    monkeypatch.setattr(maps, "write_rows", write)
    assert sweep.main(arguments(folder, tmp_path / "parts.csv")) == 0
    assert "2/2  round 4 bits" in capsys.readouterr().out  # two were left
    assert without_time(tmp_path / "parts.csv") == without_time(tmp_path / "whole.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.csv", "whole.csv"]


def test_rows_of_another_checkpoint_or_length_are_refused_unless_fresh(
    folder, few, tmp_path, capsys
):
    out = tmp_path / "map.csv"
    assert sweep.main(arguments(folder, out, "--method", "gptq")) == 0
    assert len(without_time(out)) == 2  # the full model and one variant
    assert sweep.main(["--model", str(folder), "--tokens", "1024", "--out", str(out)]) == 2
    assert "measured on 512 tokens, not 1024" in capsys.readouterr().err
    other = out.read_text().replace(checkpoint_digest(folder), "0123456789ab")
    out.write_text(other)
    assert sweep.main(arguments(folder, out)) == 2
    said = capsys.readouterr().err
    assert "holds rows of checkpoint 0123456789ab" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="0123456789ab"):
        sweep.load_map(folder, out)
    assert out.read_text() == other
    assert sweep.main(arguments(folder, out, "--method", "round", "--fresh")) == 0
    assert {row["method"] for row in without_time(out)} == {"full", "round"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace("bits_per_byte_low", "low"),
        lambda content: content[: len(content) * 2 // 3],
        lambda content: content.replace("512", "many"),
        lambda content: content + "one,two\n",
    ],
    ids=["column", "cut", "word", "short row"],
)
def test_an_altered_map_is_named(folder, few, tmp_path, capsys, damage):
    out = tmp_path / "map.csv"
    assert sweep.main(arguments(folder, out)) == 0
    out.write_text(damage(out.read_text()))
    capsys.readouterr()
    assert sweep.main(arguments(folder, out)) == 2
    said = capsys.readouterr().err
    assert "map.csv is altered" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "teachers"), "teachers"),
        (("--tokens", "100"), "512 or more"),
        (("--method", "gtpq"), "gtpq"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, more, words):
    given = ["--out", str(tmp_path / "map.csv"), *more]
    try:
        status = sweep.main(given)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_map_names_the_command(tmp_path, folder):
    with pytest.raises(ValueError, match=r"python -m rooflm\.lab\.quantize\.sweep"):
        sweep.load_map(folder, tmp_path / "map.csv")


def test_rows_of_two_models_stand_beside_each_other(folder, few, tmp_path, capsys):
    out, other = tmp_path / "map.csv", tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert sweep.main(arguments(folder, out, "--method", "round")) == 0
    before = without_time(out)
    assert sweep.main(arguments(other, out, "--method", "gptq")) == 0
    rows = without_time(out)
    assert rows[: len(before)] == before and {row["model"] for row in rows} == {"tiny", "other"}
    assert [row["method"] for row in sweep.load_map(other, out)] == ["full", "gptq"]
    assert sweep.main(arguments(other, out, "--method", "round", "--fresh")) == 0
    assert without_time(out)[: len(before)] == before
    with pytest.raises(ValueError, match="no rows of student"):
        sweep.load_map("student", out)


def test_a_row_compares_as_it_was_measured(folder, few, tmp_path, bench):
    out = tmp_path / "map.csv"
    assert sweep.main(arguments(folder, out, "--method", "round")) == 0
    row = sweep.find_row(sweep.load_map(folder, out), FEW[0])
    found, expected = sweep.comparison(row), bench.loss(bench.quantize(FEW[0]).model)
    assert found.verdict == expected.verdict and found.measure == expected.measure
    assert found.difference.value == pytest.approx(expected.difference.value, rel=1e-3)
    flat = {"difference": 0.1, "difference_low": -0.1, "difference_high": 0.3}
    assert sweep.comparison(flat).verdict == "within noise"
    less = {"difference": -0.2, "difference_low": -0.3, "difference_high": -0.1}
    assert sweep.comparison(less).verdict == "better"


def test_a_changed_layer_is_given_its_own_weight_and_inputs(bench):
    seen = []
    changed = bench.change(lambda w, x: seen.append((w, x)) or 2 * w, ["k_proj"])
    for i, (weight, inputs) in enumerate(seen):
        assert weight is bench.model.layers[i].k_proj.weight
        assert inputs is bench.layer(f"layers.{i}.q_proj")[1]  # q, k and v share their input
        assert torch.equal(changed.layers[i].k_proj.weight, 2 * weight)
        assert torch.equal(changed.layers[i].v_proj.weight, bench.model.layers[i].v_proj.weight)
    assert bench.loss(bench.change(lambda w, x: w)).difference.value == 0


def test_layer_inputs_are_what_the_layers_read(bench):
    rows = bench.held_out[:24].view(2, 12)
    found = layer_inputs(bench.model, rows)
    first = bench.model.layers[0]
    stream = bench.model.embedding(rows)
    torch.testing.assert_close(found["layers.0"], stream)
    torch.testing.assert_close(found["layers.0.k_proj"], first.attn_norm(stream).flatten(0, 1))
    gate, up = (functional.linear(found[f"layers.0.{x}"], getattr(first, x).weight)
                for x in ("gate_proj", "up_proj"))  # fmt: skip
    torch.testing.assert_close(found["layers.0.down_proj"], functional.silu(gate) * up)
    assert len(found) == 2 * 8 and not first.q_proj._forward_pre_hooks


@pytest.mark.parametrize("name", ["teacher", "smollm2"])
def test_the_committed_map_is_whole_and_of_the_committed_model(name):
    """After a new teacher: python -m rooflm.lab.quantize.sweep --fresh."""
    rows = sweep.load_map(name)
    for recipe in (None, *sweep.variants(name)):
        row = sweep.find_row(rows, recipe)
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert 0 <= row["agreement"] <= 1 and row["divergence"] >= 0
    assert min(row["tokens"] for row in rows) >= (16_000 if name == "teacher" else 4_000)
