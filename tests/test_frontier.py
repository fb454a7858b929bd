"""The closing frontier: made-up maps to points, Pareto by all pairs, the committed file."""

import random

import pytest
import torch

from rooflm.lab import frontier, text
from rooflm.lab.bench import WINDOW, checkpoint_digest, decode_bytes, linear_weights
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.distill import ledger
from rooflm.lab.estimates import Estimate, ratio_estimate
from rooflm.lab.factorize import sweep as factorized
from rooflm.lab.frontier import MAP, Variant
from rooflm.lab.map_points import (
    PARTS,
    Point,
    from_distillation,
    from_factorization,
    from_pruning,
    from_quantization,
    map_points,
    without_twins,
)
from rooflm.lab.model import Config, Transformer
from rooflm.lab.pareto import (
    FRONTIER_COLUMNS,
    beside,
    best_within,
    contrast,
    frontier_rows,
    pareto,
    rivals,
)
from rooflm.lab.prune import sweep as pruned
from rooflm.lab.quantize import sweep as quantized
from rooflm.lab.quantize.bench import make_bench
from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.rows import read_rows
from rooflm.lab.train import CONFIGS

TOKENS = 4 * WINDOW


@pytest.fixture(scope="module", autouse=True)
def short_texts(short_novels):
    with short_novels(20_000):
        yield


def point(read, loss, half=0.001, part="quantized", label="", nats="", tokens=TOKENS):
    ends = loss, loss - half, loss + half
    return Point(part, label, read, Estimate(*ends), Estimate(*ends), False, "a.csv", nats, tokens)


def made(map_file, **cells):
    """A row with every column of a map; what is not given is empty."""
    row = {name: "" if kind is str else None for name, kind in map_file.columns.items()}
    row |= {f"bits_per_byte{end}": 1.5 for end in ("", "_low", "_high")}
    row |= {"difference": 0.1, "difference_low": 0.09, "difference_high": 0.11}
    return row | {"model": "teacher", "tokens": TOKENS} | cells


# ---- the frontier


def dominated(points):
    """By the definition, over all pairs."""
    return [
        p
        for p in points
        if any(
            q.decode_bytes <= p.decode_bytes
            and q.difference.value <= p.difference.value
            and (q.decode_bytes, q.difference.value) != (p.decode_bytes, p.difference.value)
            for q in points
        )
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_nothing_dominates(seed):
    draw = random.Random(seed)
    points = [point(draw.randint(1, 30), draw.randint(-5, 30) / 100) for _ in range(40)]
    found = pareto(points)
    worse = {id(p) for p in dominated(points)}
    places = {(p.decode_bytes, p.difference.value) for p in points if id(p) not in worse}
    assert {(p.decode_bytes, p.difference.value) for p in found} == places
    assert len(found) == len(places)
    assert [p.decode_bytes for p in found] == sorted(p.decode_bytes for p in found)


def test_bytes_that_differ_by_a_maps_rounding_are_the_same():
    worse, better = point(2_861_000.2, 0.2), point(2_861_001.0, 0.1)
    assert pareto([worse, better]) == [better]
    assert pareto([point(2_860_000, 0.2), better])[0].difference.value == 0.2


def test_the_best_within_a_budget_is_on_the_frontier():
    points = [point(10, 0.1), point(5, 0.3), point(20, 0.05), point(6, 0.4)]
    assert best_within(points, 12).difference.value == 0.1
    assert best_within(points, 4) is None
    for most in (5, 9, 10, 30):
        assert best_within(points, most) in pareto(points)


def test_a_point_faces_the_last_of_the_frontier_that_reads_no_more():
    first, second = point(5, 0.3, label="first"), point(10, 0.1, label="second")
    near, far, beyond = point(7, 0.3005), point(8, 0.5), point(12, 0.1005)
    points = [first, second, near, far, beyond]
    found = rivals(points, pareto(points))
    assert [(x.point, x.best) for x in found] == [(near, first), (beyond, second)]
    assert all(not x.apart and not x.paired for x in found)


def test_single_intervals_are_apart_where_they_do_not_overlap():
    best = point(5, 0.1, half=0.01)
    assert not beside(point(6, 0.119, half=0.01), best).apart
    assert beside(point(6, 0.121, half=0.01), best).apart


def test_a_paired_difference_tells_what_intervals_cannot():
    """Blocks that rise and fall together: the difference is sure, the intervals overlap."""
    generator = torch.Generator().manual_seed(0)
    losses = 900 + 60 * torch.randn(4, generator=generator, dtype=torch.float64)
    a, b = (" ".join(f"{x:.7g}" for x in (losses + shift).tolist()) for shift in (0, 5))
    best, other = point(5, 0.1, half=0.05, nats=a), point(6, 0.11, half=0.05, nats=b)
    found = beside(other, best)
    assert found.paired and found.apart
    sizes = text.token_bytes()[text.encode(text.load_text("persuasion"))[1 : TOKENS + 1]]
    by_hand = ratio_estimate(
        torch.full((4,), 5 / 0.6931471805599453), sizes.view(4, WINDOW).sum(1).double()
    )
    assert contrast(other, best).difference.value == pytest.approx(by_hand.value, rel=1e-5)
    unpaired = beside(point(6, 0.11, half=0.05), best)
    assert not unpaired.paired and not unpaired.apart


def test_nothing_is_paired_across_texts_of_other_lengths():
    assert contrast(point(1, 0, nats="1 2", tokens=512), point(1, 0, nats="1 2 3 4")) is None
    assert contrast(point(1, 0), point(1, 0, nats="1 2 3 4")) is None


def test_the_table_counts_rivals_of_both_kinds():
    shifts = [(0, 0, 0, 0), (3, -3, 3, -2), (500, 510, 490, 505)]
    nats = [" ".join(str(900 + 30 * i + x) for i, x in enumerate(shift)) for shift in shifts]
    best = point(5e6, 0.1, nats=nats[0], label="best")
    others = [point(6e6, 0.1, nats=nats[1]), point(6e6, 0.1005), point(6e6, 0.9, nats=nats[2])]
    (row,) = frontier_rows([best, *others])
    assert row == ("5.000 MB", "quantized", "best", "+0.1000 ± 0.0010", "no", "", "1 + 1")


def test_a_step_of_the_frontier_may_be_noise():
    points = [point(5e6, 0.2), point(6e6, 0.1), point(7e6, 0.0995)]
    rows = frontier_rows(points)
    assert [row[FRONTIER_COLUMNS.index("step")] for row in rows] == ["", "sure", "noise"]


# ---- maps to points


def test_quantized_weights_read_their_bits_and_the_rest_in_fp16():
    rows = [
        made(quantized.MAP, method="full", group=0, bits_per_weight=32.0, difference=0.0),
        made(quantized.MAP, method="gptq", bits=4, group=64, bits_per_weight=4.3125),
        made(quantized.MAP, method="awq", bits=4, group=64, bits_per_weight=4.3, options="control"),
        made(quantized.MAP, method="round", bits=8, group=0, bits_per_weight=8.05,
             options="symmetric activations=8"),
        made(quantized.MAP, method="llm-int8", group=0, bits_per_weight=8.05),
    ]  # fmt: skip
    full, four = from_quantization(rows)
    config = CONFIGS["teacher"]
    linear = sum(p.numel() for n, p in Transformer(config).named_parameters() if "_proj" in n)
    rest = sum(p.numel() for p in Transformer(config).parameters()) - linear
    assert (full.part, full.decode_bytes) == ("full", 2.0 * (linear + rest))
    assert (four.part, four.label) == ("quantized", "gptq 4 bits g64")
    assert four.decode_bytes == pytest.approx(linear * 4.3125 / 8 + 2 * rest)


@pytest.mark.parametrize(
    ("cells", "part", "trained"),
    [
        ({"method": "wanda"}, "pruned", False),
        ({"method": "wanda", "options": "steps=60"}, "pruned", True),
        ({"method": "sparsegpt", "options": "bits=4 group=64"}, "pruned + quantized", False),
        ({"method": "dense", "sparsity": 0.0, "options": "bits=3"}, "quantized", False),
        ({"method": "dense", "sparsity": 0.0, "options": "steps=60"}, "full", True),
        ({"method": "influence", "pattern": "layers 1"}, "removed", False),
        ({"method": "first-order", "pattern": "heads 1", "options": "steps=60"}, "removed", True),
        ({"method": "random"}, None, None),
        ({"method": "scratch", "pattern": "heads 1", "options": "steps=60"}, None, None),
        ({"method": "full", "sparsity": 0.0}, None, None),
    ],
)
def test_a_row_of_pruning_is_a_point_of_its_part(cells, part, trained):
    row = made(pruned.MAP, **{"sparsity": 0.5, "decode_bytes": 7.0, "nats": "1 2", **cells})
    found = from_pruning([row])
    assert [(p.part, p.trained, p.decode_bytes, p.nats) for p in found] == (
        [(part, trained, 7.0, "1 2")] if part else []
    )


@pytest.mark.parametrize(
    ("cells", "part", "trained"),
    [
        ({"method": "whitened", "rule": "uniform"}, "factorized", False),
        ({"method": "svd", "rule": "uniform", "options": "steps=60"}, "factorized", True),
        ({"method": "asvd", "options": "bits=4"}, "factorized + quantized", False),
        ({"method": "plain", "options": "bits=4 quantizer=gptq"}, "quantized", False),
        ({"method": "plain", "options": "steps=60"}, "full", True),
        ({"method": "svd-embedding"}, "embedding", False),
        ({"method": "token-train", "options": "rank=4 shuffled"}, None, None),
        ({"method": "plain"}, None, None),
        ({"method": "random"}, None, None),
        ({"method": "laser"}, None, None),
    ],
)  # fmt: skip
def test_a_row_of_factorization_is_a_point_of_its_part(cells, part, trained):
    row = made(factorized.MAP, **{"share": 0.5, "decode_bytes": 9, "nats": "1 2", **cells})
    found = from_factorization([row])
    assert [(p.part, p.trained, p.decode_bytes) for p in found] == (
        [(part, trained, 9.0)] if part else []
    )


def test_students_read_their_own_weights_and_the_teacher_is_none():
    cells = {"steps": 1, "tokens_per_step": 1, "learning_rate": 0.1, "seed": 0, "nats": "1 2"}
    rows = [
        made(ledger.LEDGER, **cells, part=part, objective=objective)
        for part, objective in (
            ("reference", "teacher"), ("reference", "student"), ("reference", "untrained"),
            ("scratch", "forward-kl"), ("continued", "ranked-randomly"), ("continued", "ranked"),
        )
    ]  # fmt: skip
    found = from_distillation(rows)
    assert [p.label.split()[0] for p in found] == ["student", "scratch", "continued"]
    assert all(p.trained and p.part == "distilled" for p in found)
    expected = 2 * sum(p.numel() for p in Transformer(CONFIGS["student"]).parameters())
    assert {p.decode_bytes for p in found} == {float(expected)}


def test_of_a_model_that_two_maps_have_the_one_with_blocks_is_kept():
    plain, with_blocks = point(500_000, 0.1000004), point(500_000.2, 0.1, nats="1 2 3 4")
    other, elsewhere = point(500_000, 0.2), point(500_000, 0.1, part="pruned")
    assert without_twins([plain, with_blocks, other, elsewhere]) == [with_blocks, other, elsewhere]
    assert without_twins([with_blocks, plain]) == [with_blocks]


def test_what_was_measured_again_stands_once():
    taken = [point(5, 0.1, label="a"), point(5, 0.1, part="pruned", label="b")]
    assert frontier.left_of(taken, [point(6, 0.2, label="a")]) == taken[1:]
    assert frontier.left_of(taken, [point(5, 0.1, label="under another name")]) == taken[1:]


# ---- the command


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint(Config(2048, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=64))


@pytest.fixture(scope="module")
def bench(folder):
    return make_bench(folder, TOKENS)


def test_a_students_row_is_its_quantized_loss_less_the_teachers(folder, bench):
    row = frontier.measure(bench, Variant(str(folder), Recipe("gptq", 8, 64)))
    model = load_checkpoint(folder)
    linear, config = linear_weights(model.config), model.config
    with torch.no_grad():
        for block in model.layers:
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                weight = getattr(block, f"{name}_proj").weight
                weight.copy_(round_to_nearest(weight, 8, 64))
    expected = bench.loss(model).difference  # of 8 bits: nearest and GPTQ are as close
    assert row["difference"] == pytest.approx(expected.value, abs=2e-3)
    stored = linear * (8 + (16 + 8) / 64)
    assert row["decode_bytes"] == pytest.approx(decode_bytes(config, stored))
    assert len(row["nats"].split()) == TOKENS // WINDOW and row["trained"] == 1


@pytest.fixture
def few(monkeypatch, folder, bench):
    """The command on the tiny student as its own teacher, with two made-up points beside it."""
    taken = [point(5.0, 0.1, label="one"), point(9.0, 0.0, part="full", label="fp16")]
    monkeypatch.setattr(frontier, "map_points", lambda: taken)
    wanted = [Variant(str(folder), Recipe("gptq", bits, 64)) for bits in (4, 3)]
    monkeypatch.setattr(frontier, "variants", lambda: wanted)
    monkeypatch.setattr(frontier, "make_bench", lambda name, tokens: bench)
    return taken


def test_the_command_writes_all_points_and_prints_the_frontier(few, folder, tmp_path, capsys):
    out = tmp_path / MAP.path.name
    assert frontier.main(["--tokens", str(TOKENS), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 points are in" in printed and "fp16" in printed
    rows = read_rows(out, MAP.columns, "x")
    assert [r["label"] for r in rows[2:]] == ["one", "fp16"]
    assert {r["bits"] for r in [{"bits": r["label"].split()[-3]} for r in rows[:2]]} == {"4", "3"}
    assert all(r["nats"] for r in rows[:2]) and not any(r["nats"] for r in rows[2:])
    points = frontier.load_points(out)
    assert [p.label for p in points[:2]] == ["one", "fp16"]
    assert points[2].difference.value == rows[0]["difference"] and points[2].nats

    before = out.read_text()  # nothing is measured again, and taken points are taken anew
    few.append(point(7.0, 0.05, label="two"))
    assert frontier.main(["--tokens", str(TOKENS), "--out", str(out)]) == 0
    after = out.read_text()
    assert after.startswith("".join(before.splitlines(keepends=True)[:3]))
    assert after.count("\n") == before.count("\n") + 1


def test_students_of_another_checkpoint_are_refused(few, folder, tmp_path, capsys):
    out = tmp_path / MAP.path.name
    assert frontier.main(["--tokens", str(TOKENS), "--out", str(out)]) == 0
    out.write_text(out.read_text().replace(checkpoint_digest(folder), "0" * 12))
    assert frontier.main(["--tokens", str(TOKENS), "--out", str(out)]) == 2
    assert "of checkpoint 000000000000" in capsys.readouterr().err
    with pytest.raises(ValueError, match="of checkpoint 000000000000"):
        frontier.load_points(out)


def test_a_missing_map_is_one_line_before_any_work(monkeypatch, tmp_path, capsys):
    def missing():
        raise ValueError("cannot read pruning_map.csv")

    monkeypatch.setattr(frontier, "map_points", missing)
    assert frontier.main(["--out", str(tmp_path / "x.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        frontier.main(["--tokens", "5"])


# ---- the committed file


def test_the_committed_file_holds_the_maps_as_they_are():
    rows = read_rows(MAP.path, MAP.columns, MAP.command)
    own = [p for p in frontier.load_points() if p.source == MAP.path.name]
    taken = {(p.source, p.part, p.label): p for p in frontier.left_of(map_points(), own)}
    stored = {(r["source"], r["part"], r["label"]): r for r in rows if r["source"] != MAP.path.name}
    assert set(stored) == set(taken)
    for key, row in stored.items():
        assert row["decode_bytes"] == pytest.approx(taken[key].decode_bytes, rel=1e-6), key
        assert row["difference"] == pytest.approx(taken[key].difference.value, abs=1e-6), key
    assert {row["part"] for row in rows} == set(PARTS)


def test_the_committed_file_holds_what_the_command_measures():
    rows = read_rows(MAP.path, MAP.columns, MAP.command)
    own = {(r["part"], r["label"]): r for r in rows if r["source"] == MAP.path.name}
    assert set(own) == {tuple(v.names.values()) for v in frontier.variants()}
    for variant in frontier.variants():
        row = own[tuple(variant.names.values())]
        assert row["checkpoint"] == checkpoint_digest(variant.checkpoint)
        assert len(row["nats"].split()) == row["tokens"] // WINDOW


def test_measured_again_the_quantized_teacher_is_what_its_map_says():
    own = {(p.part, p.label): p for p in frontier.load_points() if p.source == MAP.path.name}
    again = 0
    for p in from_quantization(quantized.load_map()):
        if found := own.get((p.part, p.label)):
            again += 1
            assert found.decode_bytes == pytest.approx(p.decode_bytes, rel=1e-5)
            assert found.difference.value == pytest.approx(p.difference.value, abs=1e-4), p.label
    assert again >= 10
