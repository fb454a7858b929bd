"""What students are measured by: against brute force, enumeration and examples by hand."""

from itertools import product

import pytest
import torch

from rooflm.lab import train
from rooflm.lab.bench import Bench
from rooflm.lab.decode.writing import token_logs
from rooflm.lab.distill import measure
from rooflm.lab.distill.measure import (
    ALONE,
    COLUMNS,
    GREEDY,
    ON_TEXT,
    Scales,
    distances,
    distinct_share,
    judge_writing,
    repeated,
    repeated_share,
)
from rooflm.lab.evaluate import prepare_reference
from rooflm.lab.model import Config

SMALL = Config(5, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24, window=64)
SMALLER = Config(5, hidden=8, layers=1, heads=2, kv_heads=1, intermediate=16, window=64)


def tokens(*shape, seed=0, vocab=5):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def models(sharp):
    return sharp(SMALL), sharp(SMALLER, seed=1)


@pytest.fixture
def scales(models):
    teacher, _ = models
    bench = Bench(teacher, tokens(4 * 256 + 1), tokens(4, 32, seed=1), torch.ones(5).long())
    return Scales(bench, tokens(600, seed=2), rows=16, prompt=4, new=12)


def test_distances_are_sums_over_the_positions_of_each_block(models):
    teacher, student = models
    text = tokens(3 * 20 + 1)
    found = distances(student, prepare_reference(teacher, text, 20))
    for i in range(3):
        row = text[None, 20 * i : 20 * i + 20]
        p, q = (m(row)[0].double().softmax(-1) for m in (teacher, student))
        expected = (q * (q.log() - p.log())).sum().item()
        assert found.reverse[i].item() == pytest.approx(expected, rel=1e-4)
        rejected = 20 - torch.minimum(p, q).sum().item()
        assert found.rejected[i].item() == pytest.approx(rejected, rel=1e-4)


def test_writing_costs_what_the_models_say(models):
    teacher, student = models
    rows = tokens(11, 9)
    found = judge_writing(rows, 3, teacher, student)
    assert torch.equal(found.tokens, rows[:, 3:])
    for sums, model in ((found.teacher, teacher), (found.own, student)):
        expected = -token_logs(model(rows)[:, 2:-1], rows[:, 3:]).sum(1)
        assert torch.allclose(sums, expected.double(), atol=1e-4)
    bare = judge_writing(rows, 3, teacher)
    assert torch.equal(bare.teacher, found.teacher)
    assert bare.own is None and bare.divergence is None


def test_the_divergence_expects_what_the_two_costs_differ_by(models):
    """Over all continuations of one prompt, each weighed by its chance under the student."""
    teacher, student = models
    answers = torch.tensor(list(product(range(5), repeat=3)))
    rows = torch.cat([tokens(1, 4).expand(len(answers), -1), answers], 1)
    found = judge_writing(rows, 4, teacher, student)
    chances = (-found.own).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    difference = (chances * (found.teacher - found.own)).sum().item()
    assert difference == pytest.approx((chances * found.divergence).sum().item(), abs=1e-4)
    assert difference > 0.01
    noise = [(chances * x.square()).sum() - difference**2 for x in
             (found.teacher - found.own, found.divergence)]  # fmt: skip
    assert noise[1] < noise[0]


def test_repeated_n_grams_by_hand():
    rows = torch.tensor([[1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]])
    assert repeated(rows, 2).tolist() == [3, 4, 0]  # of five each
    assert repeated(rows, 4).tolist() == [1, 2, 0]  # of three
    assert repeated_share(rows, 2).value == pytest.approx(7 / 15)


def test_distinct_n_grams_are_counted_over_rows_together():
    same = torch.tensor([[1, 2, 3]]).expand(4, -1)
    assert distinct_share(same, 2, together=2).value == pytest.approx(0.5)  # 2 of 4 a pair
    assert repeated_share(same, 2).value == 0  # which no row sees alone
    other = torch.arange(12).view(4, 3)
    assert distinct_share(other, 2, together=2).value == 1


def test_the_teacher_itself_is_at_no_distance(scales, models):
    row = scales.measure(models[0])
    assert row["difference"] == 0 and row["agreement"] == 1 and row["acceptance"] == 1
    assert row["divergence"] == pytest.approx(0, abs=1e-6)
    assert row["reverse_divergence"] == pytest.approx(0, abs=1e-6)
    assert row["sequence_divergence"] == pytest.approx(0, abs=1e-6)
    assert row["teacher_nats"] == pytest.approx(row["own_nats"], rel=1e-6)


def test_a_student_has_every_column_within_its_interval(scales, models):
    row = scales.measure(models[1])
    assert set(row) == set(COLUMNS)
    for name in (*ON_TEXT, *ALONE, GREEDY):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    assert row["divergence"] > 0 and row["acceptance"] < 1
    assert len(row["nats"].split()) == 4 and len(row["teacher_row_nats"].split()) == 16
    assert row == scales.measure(models[1])
    total = sum(map(float, row["teacher_row_nats"].split()))
    assert total / (16 * 12) == pytest.approx(row["teacher_nats"], rel=1e-4)


def test_the_authors_text_has_no_writer(scales, models):
    row = scales.measure_text()
    assert set(row) == set(COLUMNS)
    assert row["own_nats"] is None and row["bits_per_byte"] is None and row["nats"] == ""
    rows = scales.text_rows
    expected = -token_logs(models[0](rows)[:, 3:-1], rows[:, 4:]).mean().item()
    assert row["teacher_nats"] == pytest.approx(expected, rel=1e-5)


def test_prompts_are_spread_over_the_whole_text(scales):
    whole = tokens(600, seed=2)
    assert torch.equal(scales.text_rows[0], whole[:16])
    assert torch.equal(scales.text_rows[-1], whole[-16:])


def test_too_few_rows_or_too_short_a_text_is_refused(scales):
    for rows, length in ((8, 600), (100, 100)):
        with pytest.raises(ValueError, match=f"rows is {rows}; allowed: 16 or more, in a text of"):
            Scales(scales.bench, tokens(length), rows, 4, 12)


def test_the_measured_prompts_were_never_trained_on():
    assert measure.ROWS * measure.NEW >= 16_384
    assert train.text.HELD_OUT not in (*train.text.AUSTEN, *train.text.OTHERS)
