"""The map of factorizations: its rows by hand, its command, and the committed file."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from rooflm.lab import bench as benches
from rooflm.lab import maps, pairs, text
from rooflm.lab.bench import SMOLLM2, WINDOW, checkpoint_digest
from rooflm.lab.calibrate import LINEARS, inner_linear
from rooflm.lab.checkpoints import load_checkpoint, save_checkpoint
from rooflm.lab.evaluate import compare, evaluate
from rooflm.lab.factorize import __main__ as command
from rooflm.lab.factorize import map_rows, sweep
from rooflm.lab.factorize.bench import FactorizeBench, stored_factors
from rooflm.lab.factorize.laser import reduce_rank
from rooflm.lab.factorize.pivot import Pivoted, pivot_numbers
from rooflm.lab.factorize.svd import Factors
from rooflm.lab.factorize.tensor_train import token_train
from rooflm.lab.factorize.variants import Variant, variants
from rooflm.lab.model import Config, Transformer
from rooflm.lab.quantize.gptq import gptq
from rooflm.lab.train import CONFIGS

FEW = [
    Variant(),
    Variant("svd", 0.5, "uniform"),
    Variant("laser", 0.5, layer=0, matrix="up_proj"),
    Variant("token-train", modes="4x4x4", rank=2),
]
CONFIG = Config(2048, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=64)


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """The start of a novel is enough here, and much quicker to encode."""
    whole = text.load_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load_text", lambda name: whole(name)[:6_000])
        patch.setattr(benches, "ROWS", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with the laboratory's vocabulary."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    save_checkpoint(model, path, "none\n")
    return path


@pytest.fixture(scope="module")
def bench(folder):
    return FactorizeBench.load(folder, 2 * WINDOW)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(command, "variants", lambda name, config: FEW)


def arguments(folder, out, *more):
    return ["--model", str(folder), "--tokens", str(2 * WINDOW), "--out", str(out), *more]


def without_time(path):
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]


def weights(config=CONFIG):
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = config.hidden * (2 * queries + 2 * keys)
    return config.layers * (attention + 3 * config.hidden * config.intermediate)


def test_rows_hold_losses_bytes_and_ranks(folder, few, tmp_path):
    out = tmp_path / "map.csv"
    assert command.main(arguments(folder, out)) == 0
    rows = sweep.load_map(folder, out)
    full, low, cut, train = (sweep.find_row(rows, variant) for variant in FEW)

    model = load_checkpoint(folder)
    tokens = text.encode(text.load_text("persuasion"))[: 2 * WINDOW + 1]
    before = evaluate(model, tokens, text.token_bytes(), WINDOW, model)
    for block in model.layers:  # half of the numbers, by a decomposition of NumPy's
        for name in LINEARS:
            weight = inner_linear(block, name).weight
            rank = weight.numel() // 2 // sum(weight.shape)
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    after = evaluate(model, tokens, text.token_bytes(), WINDOW, before and load_checkpoint(folder))
    assert full["difference"] == 0 and full["agreement"] == 1
    assert full["bits_per_byte"] == pytest.approx(before.bits_per_byte.value, rel=1e-5)
    expected = compare(after, before).difference
    assert low["difference"] == pytest.approx(expected.value, rel=2e-2)  # FP16 factors
    assert low["agreement"] == pytest.approx(after.agreement.value, abs=0.02)

    assert full["linear_bits"] == 16 * weights()
    # 64 x 64: rank 16; 32 x 64: rank 10
    per_layer = 5 * 16 * (64 + 64) + 2 * 10 * (32 + 64)
    assert low["linear_bits"] == 16 * 2 * per_layer
    assert low["ranks"].split() == [str(r) for r in (16, 10, 10, 16, 16, 16, 16)] * 2
    rest = 2 * (2048 * 64 + 5 * 64)  # the head, which is the embedding, and the norms
    assert full["decode_bytes"] == 2 * weights() + rest
    assert low["decode_bytes"] == 4 * per_layer + rest
    assert cut["decode_bytes"] == full["decode_bytes"] and cut["correct"]
    numbers = 4 * 2 + 2 * 4 * 2 + 2 * 4  # of one token's train
    assert train["embedding_bits"] == 16 * 2048 * numbers
    assert train["decode_bytes"] == 2 * weights() + 2 * 2048 * numbers + 2 * 5 * 64
    gap = pairs.contrast_rows(low, full).difference
    assert gap.value == pytest.approx(low["difference"], rel=1e-4)
    assert gap.high == pytest.approx(low["difference_high"], rel=1e-4)
    halved = (map_rows.tabulate(rows, {"x": FEW[1]}, ["MB", "bits", "loss", "rule"]))[0]
    assert halved[1:3] == (low["decode_bytes"] / 1e6, low["linear_bits"] / weights())
    assert halved[0] == "x" and halved[4] == "uniform"
    ends = low["difference"], low["difference_low"], low["difference_high"]
    assert map_rows.points(rows, [FEW[1]]) == [(halved[1], *ends)]
    kinds = map_rows.ranks_by_kind(
        low, {f"layers.{i}.{x}": (1, 1) for i in (0, 1) for x in LINEARS}
    )
    assert kinds["q_proj"] == "16 16" and kinds["k_proj"] == "10 10"
    right = [float(x) for x in cut["correct"].split()]
    assert len(right) == 2 and max(right) <= WINDOW
    assert sweep.more_correct(full, full).value == 0
    assert {row["checkpoint"] for row in rows} == {checkpoint_digest(folder)}


def test_an_interrupted_run_goes_on(folder, few, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    assert command.main(arguments(folder, whole)) == 0
    measured, calls = sweep._measured, []

    def stopping(bench, variant):
        calls.append(variant)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(bench, variant)

    monkeypatch.setattr(sweep, "_measured", stopping)
    assert command.main(arguments(folder, broken)) == 130
    assert len(without_time(broken)) == 2
    monkeypatch.setattr(sweep, "_measured", measured)
    assert command.main(arguments(folder, broken)) == 0
    assert without_time(broken) == without_time(whole)


@pytest.mark.parametrize("pivoted", [False, True])
def test_all_rules_keep_to_the_budget(bench, pivoted):
    numbers = pivot_numbers if pivoted else lambda d_out, d_in, r: r * (d_out + d_in)
    whole = weights()
    for method, rule in (
        ("svd", "uniform"),
        ("whitened", "threshold"),
        ("whitened", "measured"),
        ("whitened", "output"),
        ("whitened", "relative"),
        ("two-sided", "loss"),
    ):
        found = bench.ranks(Variant(method, 0.6, rule, pivoted=pivoted))
        assert set(found) == set(bench.shapes)
        used = sum(
            d_out * d_in if found[n] == min(d_out, d_in) else numbers(d_out, d_in, found[n])
            for n, (d_out, d_in) in bench.shapes.items()
        )
        assert used <= 0.6 * whole
        # With measured costs less may do: a model of noise gains by some of the cuts.
        assert used > 0.5 * whole or rule in ("threshold", "measured")


def test_one_kind_is_factorized_alone(bench):
    built = bench.build(Variant("whitened", 0.5, "uniform", kind="down_proj"))
    assert set(built.ranks) == {"layers.0.down_proj", "layers.1.down_proj"}
    assert built.linear_bits == 16 * (weights() - 2 * 64 * 64 + 2 * 16 * 128)


def test_recovery_trains_factors_and_quantizing_takes_what_it_left(bench):
    for pivoted, kind in ((False, Factors), (True, Pivoted)):
        base = Variant("whitened", 0.5, "uniform", pivoted=pivoted)
        before = bench.build(base)
        trained = bench.build(Variant("whitened", 0.5, "uniform", pivoted=pivoted, steps=3))
        assert trained.linear_bits == before.linear_bits
        was, now = (stored_factors(x.model.layers[0], "q_proj") for x in (before, trained))
        assert type(was) is type(now) is kind
        assert was[0].shape == now[0].shape and not torch.allclose(was[0], now[0])
        assert torch.equal(now[0], now[0].half().float())
        variant = Variant(
            "whitened", 0.5, "uniform", pivoted=pivoted, steps=3, bits=8, quantizer="round"
        )
        coded = bench.build(variant)
        held = stored_factors(coded.model.layers[0], "q_proj")
        assert (held.weight - now.weight).norm() < 0.02 * now.weight.norm()
        assert coded.linear_bits < 0.65 * trained.linear_bits


def test_plain_and_corrected_weights_are_the_quantizers(bench):
    built = bench.build(Variant(bits=3, quantizer="gptq"))
    weight, inputs = bench.layer("layers.0.up_proj")
    expected = gptq(weight, inputs.hessian, 3, 64, clip="mse").weight
    assert torch.equal(built.model.layers[0].up_proj.weight, expected)
    corrected = bench.build(Variant(bits=3, quantizer="gptq", rank=4))
    added = 2 * 4 * (5 * 128 + 2 * 96)
    assert corrected.linear_bits == built.linear_bits + 16 * added


def test_a_shuffled_train_puts_channels_and_tokens_back(bench):
    weight = bench.model.embedding.weight
    same = Variant("token-train", modes="8x8", rank=8, shuffled=True)  # uncut
    assert torch.allclose(bench.build(same).model.embedding.weight, weight, atol=1e-5)
    cut = Variant("token-train", modes="8x8", rank=2)
    alike, shuffled = (
        bench.build(Variant(**(cut.__dict__ | {"shuffled": x}))).model.embedding.weight
        for x in (False, True)
    )
    assert torch.equal(alike, token_train(weight, (8, 8), 2).weight)
    assert not torch.allclose(alike, shuffled, atol=1e-3)
    whole = Variant("matrix-train", modes="32x64/8x8", rank=999, shuffled=True)
    assert torch.allclose(bench.build(whole).model.embedding.weight, weight, atol=1e-5)
    untied = bench.build(Variant("svd-embedding", 0.2, untied=True)).model
    assert torch.equal(untied.head.weight, weight)
    assert not torch.allclose(untied.embedding.weight, weight, atol=1e-2)


def test_laser_rows_are_one_cut_matrix(bench):
    built = bench.build(Variant("laser", 0.25, layer=1, matrix="v_proj"))
    expected = reduce_rank(bench.model.layers[1].v_proj.weight, 0.25)
    assert torch.equal(built.model.layers[1].v_proj.weight, expected)
    assert built.linear_bits == 16 * weights()


def made(variant, nats, correct=(), **cells):
    """A row of the map as a dict, its loss by the nats of its blocks."""
    row = {"model": "teacher", "tokens": WINDOW * len(nats), **variant.names, **cells}
    row["nats"] = " ".join(str(x) for x in nats)
    return row | {"correct": " ".join(str(x) for x in correct), "linear_bits": 160}


def spelled(first, last):
    """Bytes of the text of some of the blocks."""
    tokens = text.encode(text.load_text("persuasion"))
    return len(text.decode(tokens[1 + first * WINDOW : 1 + last * WINDOW]).encode())


def test_laser_is_chosen_on_the_first_half_and_tested_on_the_second():
    lucky, useful = (Variant("laser", 0.6, layer=i, matrix="k_proj") for i in (0, 3))
    rows = [
        made(Variant(), [300, 310, 320, 330], [100] * 4),
        made(useful, [299, 309, 319, 328], [101, 101, 99, 99]),
        made(lucky, [298, 307, 322, 332], [90, 90, 108, 108]),
        made(Variant("svd", 0.5, "uniform"), [1, 1, 1, 1]),
    ]
    found = map_rows.laser_trials(rows)
    assert [x.cut for x in found] == [f"block {i}, k_proj, 60% of the rank" for i in (0, 3)]
    first, second = spelled(0, 2) * math.log(2), spelled(2, 4) * math.log(2)
    assert [x.chosen.value for x in found] == pytest.approx([-5 / first, -2 / first])
    assert [x.tested.value for x in found] == pytest.approx([4 / second, -3 / second])
    assert [x.foreseen.value for x in found] == pytest.approx([8 / WINDOW, -1 / WINDOW])


def test_gaps_are_paired_and_of_the_shares_that_are_asked_for():
    plain, white = Variant("svd", 0.9, "uniform"), Variant("whitened", 0.9, "uniform")
    losses = {0.9: (310, 305), 0.5: (340, 350)}
    rows = [made(Variant(), [300] * 4)]
    for share, pair in losses.items():
        for variant, nats in zip((plain, white), pair, strict=True):
            # Blocks are as far apart as their bytes, so that the paired difference has no spread.
            sizes = [spelled(i, i + 1) / 1000 for i in range(4)]
            cells = {"difference": 0.1, "difference_low": 0.05, "difference_high": 0.15}
            row = made(replace(variant, share=share), [nats * x for x in sizes], **cells)
            rows.append(row)
    wanted = {"plain": plain, "white": white}
    table = map_rows.gaps(rows, wanted, [("white", "plain"), ("plain", "white")], (0.9, 0.5))
    by_hand = [(b - a) / 1000 / math.log(2) for a, b in losses.values()]
    assert table[0] == ("white less plain", *(f"{x:+.4f} ± 0.0000" for x in by_hand))
    assert table[1] == ("plain less white", *(f"{-x:+.4f} ± 0.0000" for x in by_hand))
    assert map_rows.gaps(rows, wanted, [("white", "plain")]) == [table[0][:2]]
    assert map_rows.at_shares(rows, wanted, (0.5, 0.9))[1] == ("white", *2 * ["+0.1000 ± 0.0500"])
    assert map_rows.beside(rows, white, plain) == (16, 16, table[0][1])


def test_variants_are_told_apart():
    for name, config in (("teacher", CONFIG), ("smollm2", CONFIG)):
        found = variants(name, config)
        keys = [tuple(v.names.values()) for v in found]
        assert len(set(keys)) == len(keys)
        assert Variant() in found
    assert Variant("laser", 0.5, layer=0, matrix="q_proj").options == "layer=0 matrix=q_proj"
    assert Variant("asvd", 0.5, "uniform", alpha=1.0).options == "alpha=1.0"


def test_bad_input_is_named(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="'svdd'"):
        Variant("svdd", 0.5, "uniform")
    with pytest.raises(ValueError, match="rule is ''"):
        Variant("svd", 0.5)
    with pytest.raises(ValueError, match="rule is 'loss' for random"):
        Variant("random", 0.5, "loss")
    with pytest.raises(ValueError, match="quantizer"):
        Variant(bits=4)
    with pytest.raises(ValueError, match=r"the map has no row of svd 0\.5 uniform"):
        sweep.find_row([], Variant("svd", 0.5, "uniform"))
    with pytest.raises(SystemExit):
        command.main(["--tokens", "3"])
    assert command.main(["--model", "nothing", "--out", str(tmp_path / "x.csv")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["teacher", SMOLLM2])
def test_the_committed_map_holds_every_variant_of_the_committed_model(name):
    rows = sweep.load_map(name)
    wanted = variants(name, CONFIGS["teacher"])  # SmolLM2's choice does not ask for the shape
    assert len(rows) == len(wanted)
    for variant in wanted:
        assert sweep.find_row(rows, variant)["method"] == variant.method
    keys = [sweep.MAP.key(row) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        found = maps.estimate(row, "difference")
        assert found.low <= found.value <= found.high
        assert 0 <= row["agreement"] <= 1 and row["divergence"] >= 0
        assert len(row["nats"].split()) == row["tokens"] // WINDOW
    assert sweep.find_row(rows, Variant())["difference"] == 0
