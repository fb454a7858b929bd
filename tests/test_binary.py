"""Binary and ternary weights, PB-LLM and BiLLM: least squares, brute force, bits by hand."""

import itertools
from fractions import Fraction

import pytest
import torch

from rooflm.lab.quantize.billm import (
    billm,
    find_break_point,
    find_salient_columns,
    residual_binarize,
)
from rooflm.lab.quantize.binary import (
    binarize,
    compensate_blocks,
    hessian_saliency,
    most_salient,
    pb_llm,
    ternarize,
)
from rooflm.lab.quantize.codecs import to_format
from rooflm.lab.quantize.gptq import output_error
from rooflm.lab.quantize.grids import round_to_nearest

FP16 = 2**-10  # relative room for a scale that is rounded up to FP16


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(d_in, seed=0, tokens=256):
    """Of inputs that are correlated, and unequal by channel."""
    x = random(tokens, d_in, seed=seed) @ random(d_in, d_in, seed=seed + 1)
    x = x * torch.linspace(0.2, 3, d_in)
    return x.T @ x / tokens


def squared_error(weight, approximation):
    return (weight.double() - approximation.double()).square().sum().item()


# binary


def test_the_binary_scale_is_the_least_squares_solution_for_the_signs():
    weight = random(6, 33)
    for row, found in zip(weight, binarize(weight), strict=True):
        signs = torch.where(row < 0, -1.0, 1.0)
        best = torch.linalg.lstsq(signs[:, None], row[:, None]).solution
        torch.testing.assert_close(found, signs * best[0], rtol=FP16, atol=0)


def least_error(row, values):
    """The least squared error over all codes of those values, each with its best scale."""
    codes = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * len(row))
    codes = codes[codes.any(1)]
    scales = (codes @ row.double()) / codes.square().sum(1)
    return (row.double() - codes * scales[:, None]).square().sum(1).min().item()


def test_no_other_signs_and_scale_are_better_than_binary():
    weight = random(3, 7, seed=1)
    for row, found in zip(weight, binarize(weight), strict=True):
        room = FP16**2 * row.square().sum().item()
        assert squared_error(row, found) == pytest.approx(least_error(row, (-1, 1)), abs=room)


def test_a_bit_has_no_value_for_zero():
    weight = torch.tensor([[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert binarize(weight).tolist() == [[0.5, 0.5, -0.5, 0.5], [0.0] * 4]


def test_binary_agrees_with_the_codec():
    weight = random(9, 50, seed=2)
    assert torch.equal(binarize(weight), to_format(weight, "binary"))


def test_groups_are_rows_of_their_own():
    weight = random(5, 24, seed=3)
    assert torch.equal(binarize(weight, 8).view(15, 8), binarize(weight.view(15, 8)))
    for rule in ("least squares", "twn", "absmean"):
        grouped = ternarize(weight, 8, rule).view(15, 8)
        assert torch.equal(grouped, ternarize(weight.view(15, 8), rule=rule))


# ternary


def test_least_squares_ternary_is_the_best_of_all_codes():
    weight = torch.cat((random(8, 7, seed=4), random(4, 7, seed=5) ** 3))
    for row, found in zip(weight, ternarize(weight), strict=True):
        room = FP16**2 * row.square().sum().item()
        assert squared_error(row, found) == pytest.approx(least_error(row, (-1, 0, 1)), abs=room)


def test_twn_keeps_what_exceeds_three_quarters_of_the_mean():
    weight = torch.tensor([[4.0, -2.0, 1.0, -1.0]])  # mean 2, threshold 1.5
    assert ternarize(weight, rule="twn").tolist() == [[3.0, -3.0, 0.0, 0.0]]


def test_absmean_is_bitnets_round_and_clip():
    weight = torch.tensor([[4.0, -2.0, 1.1, -0.9]])  # mean 2: rounds of 2, -1, 0.55, -0.45
    assert ternarize(weight, rule="absmean").tolist() == [[2.0, -2.0, 2.0, 0.0]]


def test_a_whole_row_in_one_absmean_group_agrees_with_the_codec():
    weight = random(1, 64, seed=6)
    torch.testing.assert_close(
        ternarize(weight, rule="absmean"), to_format(weight, "ternary"), rtol=0, atol=0
    )


def test_of_the_ternary_rules_least_squares_errs_least_and_all_beat_binary():
    weight = random(64, 256, seed=7)
    errors = {r: squared_error(weight, ternarize(weight, rule=r)) for r in ("twn", "absmean")}
    best = squared_error(weight, ternarize(weight))
    assert best <= errors["twn"] < 1.01 * best  # 0.75 E|w| is the optimum for normal weights
    assert best <= errors["absmean"] < squared_error(weight, binarize(weight))


def test_constant_and_zero_rows_are_exact():
    weight = torch.tensor([[0.5, -0.5, 0.5], [0.0, 0.0, 0.0]])
    assert torch.equal(ternarize(weight), weight)
    assert torch.equal(ternarize(weight, rule="twn"), weight)
    assert torch.equal(ternarize(weight, rule="absmean"), weight)
    assert torch.equal(binarize(weight), weight)


# saliency


def test_hessian_saliency_is_what_the_error_grows_by_when_the_weight_is_forced_to_zero():
    weight, hessian = random(2, 6, seed=8), hessian_of(6).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    root = torch.linalg.cholesky(damped).T  # |root e|^2 = e H e
    score = hessian_saliency(weight, hessian)
    for i, j in itertools.product(range(2), range(6)):
        others = [k for k in range(6) if k != j]
        forced = -weight[i, j].double() * root[:, j]  # the weight's error, fixed at -w
        best = torch.linalg.lstsq(root[:, others], -forced[:, None]).solution
        error = (root[:, others] @ best + forced[:, None]).square().sum().item()
        assert score[i, j].item() == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 1.0])
def test_the_salient_fraction_is_exact(fraction):
    score = random(13, 17, seed=9).round()  # many equal scores
    mask = most_salient(score, fraction)
    assert mask.sum() == round(fraction * 13 * 17)
    if 0 < fraction < 1:
        assert score[mask].min() >= score[~mask].max()


# PB-LLM


def test_nothing_salient_is_binary_and_all_salient_is_8_bit_rounding():
    weight = random(8, 40, seed=10)
    assert torch.equal(pb_llm(weight, 0.0).weight, binarize(weight))
    rounded = round_to_nearest(weight, 8, symmetric=True)
    assert torch.equal(pb_llm(weight, 1.0).weight, rounded)


def test_salient_weights_are_on_an_8_bit_grid_and_the_others_on_two_values():
    weight = random(6, 50, seed=11)
    found = pb_llm(weight, 0.2)
    assert found.salient.sum() == 60
    for row, mask, values in zip(weight, found.salient, found.weight, strict=True):
        rest = row[~mask]
        torch.testing.assert_close(
            values[~mask], rest.sign() * rest.abs().mean(), rtol=FP16, atol=0
        )
        step = row[mask].abs().max() / 127
        assert ((values[mask] - row[mask]).abs() <= step / 2 * (1 + FP16) + 1e-6).all()


def test_blocks_have_scales_of_their_own_for_the_weights_that_the_whole_matrix_ranked():
    weight = random(6, 50, seed=11)
    found = pb_llm(weight, 0.2, hessian=torch.eye(50), block=20)  # compensates nothing
    assert torch.equal(found.salient, most_salient(weight.abs(), 0.2))
    for row, mask, values in zip(weight, found.salient, found.weight, strict=True):
        assert ((values - row).abs()[mask] < row.abs().max() / 200).all()
        for part in (slice(0, 20), slice(20, 40), slice(40, 50)):
            rest = row[part][~mask[part]]
            expected = rest.sign() * rest.abs().mean()
            torch.testing.assert_close(values[part][~mask[part]], expected, rtol=FP16, atol=0)


@pytest.mark.parametrize(
    ("fraction", "block", "bits"),
    [
        # eq. 3 for 10 % at 8 bits: 0.9 + 0.8 + 1 for the bitmap; then two FP16 scales a row
        (0.1, 0, Fraction(27, 10) + Fraction(32, 200)),
        (0.1, 50, Fraction(27, 10) + Fraction(32, 50)),
        (0.1, 60, Fraction(27, 10) + Fraction(4 * 32, 200)),  # blocks of 60, 60, 60 and 20
        (0.0, 0, 1 + Fraction(16, 200)),
        (1.0, 0, 8 + Fraction(16, 200)),
    ],
)
def test_the_bits_of_pb_llm_count_the_bitmap_and_the_scales(fraction, block, bits):
    found = pb_llm(random(20, 200, seed=12), fraction, hessian=hessian_of(200), block=block)
    assert found.bits == pytest.approx(float(bits), rel=1e-12)


def test_the_error_falls_with_the_salient_fraction():
    weight = random(32, 128, seed=13)
    errors = [squared_error(weight, pb_llm(weight, f).weight) for f in (0, 0.02, 0.1, 0.3, 0.6, 1)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[3]


def test_as_many_random_weights_at_8_bits_buy_less():  # the control
    weight, hessian = random(32, 128, seed=14), hessian_of(128)
    large = pb_llm(weight, 0.1).weight
    drawn = pb_llm(weight, 0.1, "random", seed=3).weight
    assert squared_error(weight, large) < 0.8 * squared_error(weight, drawn)
    salient = pb_llm(weight, 0.1, "hessian", hessian).weight
    assert output_error(weight, salient, hessian) < 0.9 * output_error(weight, drawn, hessian)


def test_random_salience_repeats_with_its_seed():
    weight = random(8, 32, seed=15)
    first, again, other = (pb_llm(weight, 0.25, "random", seed=s).salient for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# compensation


def test_columns_behind_a_block_move_to_the_least_squares_optimum():
    weight, hessian = random(3, 12, seed=16).double(), hessian_of(12).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    root = torch.linalg.cholesky(damped).T
    seen = []

    def quantize(part, columns):
        seen.append(part)
        return part.round()

    compensate_blocks(weight, hessian, quantize, 5)
    # Step by step: the best values of the free columns, given all that is fixed so far.
    expected, fixed = weight.clone(), 0
    for part in seen:
        width = part.shape[1]
        torch.testing.assert_close(
            part.double(), expected[:, fixed : fixed + width], rtol=1e-4, atol=1e-5
        )
        expected[:, fixed : fixed + width] = part.double().round()
        fixed += width
        error = (expected[:, :fixed] - weight[:, :fixed]) @ root[:, :fixed].T
        best = torch.linalg.lstsq(root[:, fixed:], -error.T).solution
        expected[:, fixed:] = weight[:, fixed:] + best.T
    assert [part.shape[1] for part in seen] == [5, 5, 2]


def test_an_uncorrelated_hessian_compensates_nothing():
    weight = random(4, 12, seed=17)
    hessian = torch.diag(torch.linspace(1, 3, 12))
    found = compensate_blocks(weight, hessian, lambda part, _: binarize(part), 4)
    assert torch.equal(found, binarize(weight, 4))


def test_compensation_lowers_the_output_error_of_most_layers():
    # It is greedy: on some layers it loses.
    partly, twice = 0, 0
    for seed in range(12):
        weight, hessian = random(12, 64, seed=seed), hessian_of(64, seed=100 + seed)
        # The identity is a Hessian that compensates nothing; magnitudes do not ask it.
        found, blind = (pb_llm(weight, 0.1, hessian=h, block=16) for h in (hessian, torch.eye(64)))
        assert torch.equal(found.salient, blind.salient)
        partly += output_error(weight, found.weight, hessian) < output_error(
            weight, blind.weight, hessian
        )
        found, blind = (
            billm(weight, hessian, 16, most_columns=3, points=10, compensate=c)
            for c in (True, False)
        )
        twice += output_error(weight, found.weight, hessian) < output_error(
            weight, blind.weight, hessian
        )
    assert partly >= 10 and twice >= 10


# BiLLM


def test_residual_binarization_is_never_worse_and_has_four_values_a_row():
    weight = torch.cat((random(30, 40, seed=18), random(30, 40, seed=19) ** 5))
    twice, once = residual_binarize(weight), binarize(weight)
    for row, a, b in zip(weight, twice, once, strict=True):
        assert squared_error(row, a) <= squared_error(row, b)
        assert len(a.unique()) <= 4
    assert squared_error(weight[:30], twice[:30]) < 0.6 * squared_error(weight[:30], once[:30])


def test_the_second_binarization_is_the_first_of_what_is_left():
    weight = random(5, 21, seed=20)
    columns = torch.arange(21) % 3 == 0
    left = weight - binarize(weight)
    torch.testing.assert_close(residual_binarize(weight), binarize(weight) + binarize(left))
    found = residual_binarize(weight, columns)
    assert torch.equal(found[:, columns], residual_binarize(weight[:, columns]))
    assert not found[:, ~columns].any()


def split_error(weight, eligible, p):
    """Eq. 11 by least squares, set by set and row by row."""
    error = 0.0
    for row, counted in zip(weight.double(), eligible, strict=True):
        for part in (row[counted & (row.abs() <= p)], row[counted & (row.abs() > p)]):
            if len(part):
                signs = part.sign()[:, None]
                best = torch.linalg.lstsq(signs, part[:, None]).solution
                error += (part[:, None] - signs @ best).square().sum().item()
    return error


def test_the_break_point_is_the_best_of_all_when_all_are_tried():
    for seed in range(5):
        weight = random(4, 12, seed=seed) ** (1 + 2 * (seed % 2))
        eligible = (torch.arange(12) % 4 != 1).expand(4, 12)
        found = find_break_point(weight, eligible, points=36)
        errors = [split_error(weight, eligible, p.item()) for p in weight[eligible].abs()]
        assert split_error(weight, eligible, found) == pytest.approx(min(errors), rel=1e-9)
        assert split_error(weight, eligible, found) < split_error(weight, eligible, 1e9)


def test_a_hundred_break_points_are_nearly_as_good_as_all():
    weight, eligible = random(16, 64, seed=21), torch.ones(16, 64, dtype=torch.bool)
    few, all_ = (find_break_point(weight, eligible, n) for n in (100, 16 * 64))
    few, all_ = split_error(weight, eligible, few), split_error(weight, eligible, all_)
    assert all_ <= few < 1.002 * all_


def test_a_break_point_parts_two_magnitudes():
    weight = torch.tensor([[0.1, -0.1, 5.0, -5.0, 0.1, 0.1]])
    assert find_break_point(weight, torch.ones(1, 6, dtype=torch.bool), 6) == pytest.approx(0.1)
    assert find_break_point(weight, torch.zeros(1, 6, dtype=torch.bool)) == 0


def test_the_number_of_salient_columns_is_the_best_of_all():
    found = []
    for seed in range(6):
        weight = random(8, 10, seed=seed)
        weight[:, seed] *= 8 if seed % 2 else 1
        order = weight.square().sum(0).argsort(descending=True)
        errors = []
        for count in range(6):  # eq. 5, set by set
            sets = weight[:, order[:count]], weight[:, order[count:]]
            errors.append(sum(squared_error(w, binarize(w)) for w in sets if w.numel()))
        chosen = find_salient_columns(weight, order, 5)
        found.append(min(range(6), key=errors.__getitem__))
        assert set(chosen.nonzero().flatten().tolist()) == set(order[: found[-1]].tolist())
    assert 1 in found and len(set(found)) > 1


def test_billm_puts_every_weight_of_a_block_on_one_of_eight_values_of_its_row():
    weight, hessian = random(6, 40, seed=22), hessian_of(40)
    found = billm(weight, hessian, block=20, most_columns=4, points=20)
    for start in (0, 20):
        salient = found.salient[:, start : start + 20]
        assert (salient == salient[0]).all() and salient[0].sum() <= 4
        for values, chosen in zip(found.weight[:, start : start + 20], salient, strict=True):
            assert len(values[chosen].unique()) <= 4 and len(values[~chosen].abs().unique()) <= 2


def test_a_block_of_billm_is_made_of_its_parts():
    """One block, nothing to compensate: each part by the functions tested above."""
    weight, hessian = random(6, 24, seed=23), hessian_of(24)
    found = billm(weight, hessian, block=24, most_columns=5, points=40)
    inverse = torch.linalg.inv(
        hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24)
    )
    score = weight.double().square().sum(0) / inverse.diagonal()
    chosen = find_salient_columns(weight, score.argsort(descending=True), 5)
    assert torch.equal(found.salient, chosen.expand(6, 24))
    p = find_break_point(weight, ~found.salient, 40)
    for i, row in enumerate(weight):
        assert torch.equal(found.weight[i, chosen], residual_binarize(weight[:, chosen])[i])
        for part in (~chosen & (row.abs() <= p), ~chosen & (row.abs() > p)):
            if part.any():
                assert torch.equal(found.weight[i, part], binarize(row[None, part])[0])


def test_the_bits_of_billm_count_marks_and_scales():
    weight, hessian = random(16, 48, seed=24), hessian_of(48)
    found = billm(weight, hessian, block=16, most_columns=3)
    stored = 0
    for start in (0, 16, 32):
        salient = int(found.salient[0, start : start + 16].sum())
        stored += 16 * (2 * salient + (1 + 1) * (16 - salient))  # codes, sides of the split
        stored += 16  # a mark a column
        stored += 16 * 16 * (2 + (2 if salient else 0))  # FP16 scales a row
    assert found.bits == pytest.approx(stored / (16 * 48), rel=1e-12)
    assert found.salient.any()


def test_without_salient_columns_and_a_split_billm_is_binary():
    weight, hessian = random(8, 32, seed=25), torch.eye(32)
    found = billm(weight, hessian, block=8, most_columns=0, points=1)
    assert torch.equal(found.weight, binarize(weight, 8))


def test_each_part_of_billm_lowers_the_error():
    weight, hessian = random(32, 128, seed=26), torch.eye(128)
    weight[:, [5, 40, 100]] *= 4
    plain, split, both = (
        billm(weight, hessian, 64, most_columns=m, points=p).weight
        for m, p in ((0, 1), (0, 100), (8, 100))
    )
    errors = [squared_error(weight, w) for w in (plain, split, both)]
    assert errors[2] < 0.9 * errors[1] < 0.9 * 0.7 * errors[0]


def test_arguments_are_left_alone():
    weight, hessian = random(8, 32, seed=27), hessian_of(32)
    before = weight.clone(), hessian.clone()
    billm(weight, hessian, 8), pb_llm(weight, 0.1, "hessian", hessian, block=8), ternarize(weight)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, h: binarize(w, 7), "group is 7; allowed: a divisor of d_in = 16"),
        (lambda w, h: ternarize(w, rule="mean"), "unknown rule 'mean'; nearest: absmean"),
        (lambda w, h: pb_llm(w, 1.2), "fraction is 1.2; allowed: from 0 to 1"),
        (lambda w, h: pb_llm(w, 0.1, "hess"), "unknown criterion 'hess'; nearest: hessian"),
        (lambda w, h: pb_llm(w, 0.1, "hessian"), "hessian is None"),
        (lambda w, h: pb_llm(w, 0.1, block=8), "hessian is None"),
        (lambda w, h: pb_llm(w, 0.1, hessian=h, block=-8), "block is -8"),
        (lambda w, h: billm(w, h[:8, :8]), "hessian is (8, 8); allowed: (16, 16)"),
        (lambda w, h: billm(w, h, block=0), "block is 0"),
        (lambda w, h: billm(w, h, points=0), "points is 0"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call(random(4, 16), torch.eye(16))
    assert message in str(caught.value) and "\n" not in str(caught.value)
