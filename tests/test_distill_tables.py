"""The tables of distillation: what is printed of a row, and what counts as a difference."""

import math
from dataclasses import replace

import pytest
import torch

from rooflm.lab import pairs, text
from rooflm.lab.bench import WINDOW
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.distill import tables
from rooflm.lab.distill.divergences import at_temperature, forward_kl
from rooflm.lab.distill.ledger import (
    LEDGER,
    continued,
    find_row,
    load_ledger,
    names,
    scratch,
)
from rooflm.lab.distill.tables import seed_spread, tabulate, verdict, words
from rooflm.lab.evaluate import prepare_reference
from rooflm.lab.model import Transformer
from rooflm.lab.pairs import contrast_rows
from rooflm.lab.train import CONFIGS

TOKENS = 8 * WINDOW


def row_of(variant, nats=None, **other):
    """A row with a number in every column."""
    row = {name: kind() for name, kind in LEDGER.columns.items()} | names(variant)
    cell = "" if nats is None else " ".join(f"{x:.7g}" for x in nats)
    return row | {"nats": cell, "tokens": TOKENS} | other


def blocks(seed=0):
    """Nats of eight blocks."""
    return 900 + 50 * torch.rand(8, generator=torch.Generator().manual_seed(seed))


def test_half_the_interval_stands_behind_a_value():
    row = row_of("teacher", own_nats=3.25, own_nats_low=3.0, own_nats_high=3.5)
    assert words(row, "own_nats") == "3.250 ± 0.250"


def test_shares_are_percentages():
    for column in tables.SHARES:
        ends = {f"{column}_low": 0.25, f"{column}_high": 0.27}
        assert words(row_of("teacher", **{column: 0.26}, **ends), column) == "26.0% ± 1.0%"


def test_a_text_without_a_writer_leaves_a_gap():
    row = row_of("text", own_nats=None, bits_per_byte=None)
    assert words(row, "own_nats") == words(row, "bits_per_byte") == "–"


def test_an_unknown_column_is_named():
    with pytest.raises(ValueError, match=r"unknown column 'acceptans'.*acceptance"):
        words(row_of("teacher"), "acceptans")


def test_a_table_keeps_the_order_asked_for():
    rows = [row_of("teacher", agreement=1.0), row_of("student", agreement=0.5)]
    found = tabulate(rows, {"small": "student", "large": "teacher"}, ["agreement"])
    assert [(name, cell[:5]) for name, cell in found] == [("small", "50.0%"), ("large", "100.0")]


def test_beside_a_baseline_is_the_difference_of_nats_over_bytes():
    ours, theirs = blocks(), blocks() + 3.0
    rows = [row_of(scratch("jsd"), ours), row_of(scratch("next-token"), theirs), row_of("text")]
    wanted = {"jsd": scratch("jsd"), "alone": scratch("next-token"), "author": "text"}
    found = dict(tabulate(rows, wanted, ["beside"], scratch("next-token")))
    size = pairs.block_bytes(text.HELD_OUT, TOKENS, WINDOW).sum().item()
    expected = -3.0 * 8 / math.log(2) / size
    assert found["jsd"].startswith(f"{expected:+.4f} ± ")
    assert found["alone"] == found["author"] == "–"


@pytest.mark.parametrize("column", ["beside", "verdict"])
def test_a_difference_needs_a_baseline(column):
    with pytest.raises(ValueError, match=f"'{column}' needs a baseline"):
        tabulate([row_of("teacher")], {"teacher": "teacher"}, [column])


def test_the_verdict_takes_the_seeds_of_its_own_part():
    def run(make, nats, seed, bits):
        return row_of(make("jsd", seed=seed), nats, bits_per_byte=bits)

    far = blocks() + 3.0
    rows = [row_of("student", blocks())]
    rows += [run(scratch, far, 0, 2.0), run(scratch, far, 1, 2.0)]  # seeds that agree
    rows += [run(continued, far, 0, 2.0), run(continued, far, 1, 9.0)]  # seeds far apart
    wanted = {"quiet": scratch("jsd"), "noisy": continued("jsd")}
    found = dict(tabulate(rows, wanted, ["verdict"], "student"))
    assert found == {"quiet": "more", "noisy": "within noise"}


def test_the_chapter_names_runs_that_the_ledger_holds():
    rows = load_ledger()
    for runs in (tables.NEW_WEIGHTS, tables.TRAINED_FURTHER):
        found = [LEDGER.key(find_row(rows, variant)) for variant in runs.values()]
        assert len(set(found)) == len(runs)


def test_points_stand_in_the_order_of_the_runs():
    rows = [row_of("teacher", agreement=1.0, acceptance=0.9), row_of("student", agreement=0.5)]
    found = tables.plane(rows, {"b": "student", "a": "teacher"}, "agreement", "acceptance")
    assert found == ([0.5, 1.0], [0.0, 0.9])


def test_seeds_part_by_the_root_mean_square_of_their_pairs():
    rows = [
        row_of(scratch("next-token"), bits_per_byte=2.0),
        row_of(scratch("next-token", seed=1), bits_per_byte=2.3),
        row_of(scratch("jsd"), bits_per_byte=1.0),
        row_of(scratch("jsd", seed=1), bits_per_byte=1.4),
        row_of(scratch("reverse-kl"), bits_per_byte=9.0),  # one seed only
        row_of(scratch("jsd", learning_rate=1e-3), bits_per_byte=5.0),  # another rate is no seed
        row_of("teacher", bits_per_byte=1.5),
        row_of("student", bits_per_byte=1.6),
    ]
    assert seed_spread(rows) == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 2))


def test_without_a_second_seed_there_is_no_spread():
    with pytest.raises(ValueError, match="no two rows differ by the seed"):
        seed_spread([row_of(scratch("jsd")), row_of("teacher"), row_of("student")])


def test_a_difference_counts_beyond_both_noises():
    base = blocks()
    noise = torch.tensor([1.0, -1.0] * 4)
    worse, same = row_of(scratch("jsd"), base + 3 + noise), row_of(scratch("jsd"), base + noise)
    alone = row_of(scratch("next-token"), base)
    apart = contrast_rows(worse, alone).difference.value
    assert verdict(worse, alone, 0.0) == "more"
    assert verdict(alone, worse, 0.0) == "less"
    assert verdict(same, alone, 0.0) == "within noise"  # its interval holds 0
    assert verdict(worse, alone, 0.49 * apart) == "more"
    assert verdict(worse, alone, 0.51 * apart) == "within noise"  # two seeds part by more


# ---- what training costs


def test_a_log_is_cut_where_the_learning_rate_falls():
    tokens, bits = tables.training_curve("student")
    assert tokens == [6144 * 50 * i for i in range(1, 11)]  # 800 steps, the last third falls
    assert len(bits) == 10 and bits[0] > bits[-1] > 1.7


def test_a_way_costs_two_flops_a_parameter_and_pass():
    lab = {name: load_checkpoint(name) for name in ("student", "teacher")}
    n_s, n_t = (sum(p.numel() for p in model.parameters()) for model in lab.values())
    student, teacher = (model.to_roofline() for model in lab.values())
    found = tables.training_costs(student, teacher, "nvidia-h100-sxm", 12, 64)
    expected = {
        "text alone": 6 * n_s,
        "text with logits": 6 * n_s + 2 * n_t,
        "teacher's text": 6 * n_s + 2 * n_t,
        "own text, scored": 8 * n_s + 2 * n_t,
    }
    for way, flops in expected.items():
        assert found[way].flops == pytest.approx(flops, rel=0.08), way  # attention comes on top


def test_reading_is_quicker_than_writing():
    pair = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
    found = tables.training_costs(*pair, "nvidia-h100-sxm", 64, 2048)
    own, theirs = found["own text, scored"], found["teacher's text"]
    reading = found["text with logits"].reading_s - found["text alone"].reading_s
    assert theirs.writing_s > 4 * reading  # the teacher writes a token, or reads it
    assert 0 < own.writing_s < theirs.writing_s
    assert found["text alone"].writing_s == found["text with logits"].writing_s == 0


def test_a_token_is_named_by_whole_bits():
    assert [8 * tables.crossing_bytes(v)[0] for v in (2, 2048, 2049, 128256)] == [1, 11, 12, 17]
    assert tables.crossing_bytes(128256, 10)[1:] == (10 * (16 + 17) / 8, 256512)


# ---- two models beside each other


def logits(seed=0, positions=5, vocab=7):
    made = torch.randn(2, positions, vocab, generator=torch.Generator().manual_seed(seed))
    return 3 * made.double()


def test_the_softened_gradient_is_that_of_the_divergence():
    student, teacher = logits()
    for row in tables.softened(student, teacher, (0.5, 1.0, 3.0)):
        z = student.clone().requires_grad_(True)
        at_temperature(forward_kl, row["temperature"])(z, teacher).sum().backward()
        assert row["times T squared"] == pytest.approx(z.grad.norm(dim=-1).mean().item())


def test_a_high_temperature_leaves_the_teacher_even():
    student, teacher = logits()
    (row,) = tables.softened(student, teacher, [1e4])
    assert row["entropy"] == pytest.approx(math.log(7), abs=1e-6)


def test_a_model_is_at_no_distance_from_itself():
    torch.manual_seed(0)
    config = replace(CONFIGS["student"], layers=1, hidden=16, heads=2, kv_heads=1, intermediate=16)
    model = Transformer(config).requires_grad_(False)
    tokens = torch.randint(0, config.vocab, (129,), generator=torch.Generator().manual_seed(1))
    reference = prepare_reference(model, tokens, 64)
    entropy, forward, reverse = tables.on_text(model, reference)
    assert forward == pytest.approx(0, abs=1e-6) and reverse == pytest.approx(0, abs=1e-6)
    assert 0 < entropy < math.log(config.vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # logits of 0: every token is as likely
    even, forward, _ = tables.on_text(model, reference)
    assert even == pytest.approx(math.log(config.vocab), rel=1e-5)
    # against an even student the forward KL is what the teacher lacks of the full entropy
    assert forward == pytest.approx(math.log(config.vocab) - entropy, abs=1e-5)


def test_two_modes_are_two_halves():
    one, half, three = [0.9, 0.1, 1e-9, 1e-9], [0.45, 0.5, 0.05, 1e-9], [0.34, 0.33, 0.33, 1e-9]
    assert tables.two_modes(torch.tensor([one, three, half, one]).log()) == 2
