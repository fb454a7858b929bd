"""OWQ and SpQR: what is kept, what it costs, and whether sensitivity beats chance."""

import numpy
import pytest
import torch

from rooflm.lab.quantize.gptq import gptq, inverse_factor, output_error
from rooflm.lab.quantize.grids import decode, fit_grid, project, round_to_nearest, to_groups
from rooflm.lab.quantize.sensitive import (
    column_sensitivity,
    keep_columns,
    outlier_gain,
    quantize_scales,
    spqr,
    stored_bits,
)


def layer(d_out, d_in, seed, salient=()):
    """A random FP16 weight (in float32) and a Hessian; the salient inputs are 10 times larger."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    inputs = torch.randn(4 * d_in, d_in, generator=generator) @ mixing
    inputs[:, list(salient)] *= 10
    weight = torch.randn(d_out, d_in, generator=generator).half().float()
    return weight, inputs.T @ inputs / len(inputs)


# ---- OWQ


@pytest.mark.parametrize("chosen", ["sensitive", "random"])
@pytest.mark.parametrize("group", [0, 8])
def test_as_many_columns_are_kept_as_asked_for_and_rounding_keeps_them_exactly(chosen, group):
    weight, hessian = layer(8, 32, seed=0)
    for columns in (0, 1, 5, 32):
        found = keep_columns(
            weight, hessian, 3, columns, group, method="round", chosen=chosen, seed=4
        )
        assert found.kept.all(0).sum() == found.kept.any(0).sum() == columns
        assert torch.equal(found.weight[found.kept], weight[found.kept])
    assert torch.equal(found.weight, weight)  # all 32


def test_the_columns_kept_are_those_whose_rounding_alone_costs_most_at_the_output():
    weight, hessian = layer(8, 32, seed=1, salient=(3, 17))
    rounded = round_to_nearest(weight, 3, 8)
    costs = []
    for j in range(32):
        only = weight.clone()
        only[:, j] = rounded[:, j]
        costs.append(output_error(weight, only, hessian))
    scores = column_sensitivity(weight, hessian, 3, 8)
    torch.testing.assert_close(scores, torch.tensor(costs, dtype=torch.float64), rtol=1e-5, atol=0)
    kept = keep_columns(weight, hessian, 3, 4, 8).kept[0]
    assert set(torch.where(kept)[0].tolist()) == set(scores.topk(4).indices.tolist())
    assert kept[3] and kept[17]


def test_nothing_kept_is_the_base_method():
    weight, hessian = layer(8, 32, seed=2)
    for symmetric in (False, True):
        plain = gptq(weight, hessian, 3, symmetric=symmetric).weight
        assert torch.equal(keep_columns(weight, hessian, 3, 0, 0, symmetric).weight, plain)
        plain = gptq(weight, hessian, 3, 8, symmetric, static_groups=True).weight
        assert torch.equal(keep_columns(weight, hessian, 3, 0, 8, symmetric).weight, plain)
        plain = round_to_nearest(weight, 3, 8, symmetric)
        found = keep_columns(weight, hessian, 3, 0, 8, symmetric, method="round").weight
        assert torch.equal(found, plain)


def test_kept_columns_take_up_all_errors_of_the_others_as_least_squares_would():
    weight, hessian = layer(8, 32, seed=3)
    found = keep_columns(weight, hessian, 3, 4, 8, damp=0.01)
    kept = found.kept[0]
    damped = hessian.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    error = (weight - found.weight).double()[:, ~kept]
    shift = torch.linalg.solve(damped[kept][:, kept], damped[kept][:, ~kept] @ error.T).T
    expected = weight.double()[:, kept] + shift
    # But for FP16's rounding, which the kept columns hand on among themselves.
    torch.testing.assert_close(found.weight.double()[:, kept], expected, rtol=0, atol=2e-3)
    assert shift.abs().mean() > 0.05
    assert torch.equal(found.weight[:, kept], found.weight[:, kept].half().float())
    assert not torch.equal(found.weight[:, kept], weight[:, kept])


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_kept_columns_do_not_widen_the_grid_of_their_group(method):
    weight, hessian = layer(8, 32, seed=4)
    weight[:, 5] = torch.linspace(-100, 100, 8).half().float()
    hessian[5, 5] *= 1e6
    found = keep_columns(weight, hessian, 3, 1, 8, method=method)
    assert found.kept[0, 5]
    without = weight.clone()
    without[:, 5] = 0
    assert torch.equal(found.grid.scale, fit_grid(to_groups(without, 8), 3).scale)


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_codes_scales_and_kept_columns_give_exactly_the_weight(method):
    weight, hessian = layer(8, 32, seed=5)
    found = keep_columns(weight, hessian, 3, 3, 8, method=method)
    dense = decode(to_groups(found.codes, 8).float(), found.grid).reshape(8, 32)
    assert torch.equal(dense[found.kept], torch.zeros(24))
    assert torch.equal(torch.where(found.kept, found.weight, dense), found.weight)


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_sensitive_columns_beat_as_many_random_ones_in_the_mean(method):
    ratios = []
    for seed in range(40):
        weight, hessian = layer(8, 32, seed, salient=(3, 17, 20))
        errors = [
            output_error(
                weight,
                keep_columns(weight, hessian, 3, 3, method=method, chosen=c, seed=seed).weight,
                hessian,
            )
            for c in ("sensitive", "random")
        ]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.6


def test_the_random_columns_come_from_the_seed_alone():
    weight, hessian = layer(8, 32, seed=6)
    draws = [keep_columns(weight, hessian, 3, 4, chosen="random", seed=s).kept for s in (1, 1, 2)]
    torch.manual_seed(99)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(
        draws[0], keep_columns(weight * 2, hessian, 3, 4, chosen="random", seed=1).kept
    )


# ---- SpQR


@pytest.mark.parametrize("chosen", ["sensitive", "random"])
def test_as_many_weights_are_kept_as_asked_for(chosen):
    weight, hessian = layer(16, 32, seed=0)
    for outliers in (0.0, 0.01, 0.1, 1.0):
        found = spqr(weight, hessian, 3, 8, outliers, chosen=chosen)
        assert found.kept.sum() == round(outliers * 16 * 32)
        assert torch.equal(found.weight[found.kept], found.weight[found.kept].half().float())
    assert torch.equal(found.weight, weight)  # all kept: FP16 makes no error on FP16 weights


def test_kept_weights_are_exact_when_the_hessian_is_diagonal():
    weight, hessian = layer(16, 32, seed=1)
    found = spqr(weight, hessian.diagonal().diag(), 3, 8, 0.1)
    assert torch.equal(found.weight[found.kept], weight[found.kept])


def test_spqr_with_nothing_kept_and_plain_scales_is_gptq():
    weight, hessian = layer(16, 32, seed=2)
    found = spqr(weight, hessian, 3, 8, outliers=0.0, scale_rows=0)
    plain = gptq(weight, hessian, 3, 8)
    assert torch.equal(found.weight, plain.weight) and torch.equal(found.codes, plain.codes)


def test_the_gain_of_an_outlier_is_the_groups_error_with_it_less_that_without_it():
    weight, hessian = layer(4, 16, seed=3)
    cost = 1 / (2 * inverse_factor(hessian).diagonal().square())
    gains = outlier_gain(weight, cost, 3, 8)
    for row in range(4):
        for start in (0, 8):
            group, price = weight[row, start : start + 8].double(), cost[start : start + 8]
            whole = (price * (group - project(group, fit_grid(group, 3))).square()).sum()
            for i in range(8):
                others = [k for k in range(8) if k != i]
                rest = group[others]
                # The grid of the seven, which holds 0 in any case.
                error = (price[others] * (rest - project(rest, fit_grid(rest, 3))).square()).sum()
                assert gains[row, start + i].item() == pytest.approx(
                    (whole - error).item(), rel=1e-9, abs=1e-12
                )


# The largest weight of a group sits on the grid: judged by its own error it would never be kept.
def test_the_weight_that_widens_its_group_has_the_largest_gain():
    weight, hessian = layer(4, 16, seed=4)
    weight[2, 5] = 50.0
    cost = 1 / (2 * inverse_factor(hessian).diagonal().square())
    assert outlier_gain(weight, cost, 3, 8).argmax() == 2 * 16 + 5
    assert spqr(weight, hessian, 3, 8, outliers=1 / 64, scale_rows=4).kept[2, 5]


def test_sensitive_weights_beat_as_many_random_ones_in_the_mean():
    ratios = []
    for seed in range(20):
        weight, hessian = layer(16, 32, seed, salient=(3, 17, 20))
        errors = [
            output_error(
                weight, spqr(weight, hessian, 3, 8, 0.03, chosen=c, seed=seed).weight, hessian
            )
            for c in ("sensitive", "random")
        ]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.9


def test_the_scales_of_a_block_of_rows_lie_on_one_grid_of_few_points():
    weight, hessian = layer(32, 32, seed=5)
    found = spqr(weight, hessian, 3, 8, 0.01, scale_bits=3, scale_rows=16)
    for block in found.grid.scale[..., 0].reshape(2, 16, 4).transpose(1, 2).flatten(0, 1):
        points = block.double().unique()
        assert 2 <= len(points) <= 8
        base, top = points[0], points[-1]
        assert base == base.half()
        steps = (points - base) / ((top - base) / 7)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    dense = decode(to_groups(found.codes, 8).float(), found.grid).reshape(32, 32)
    assert torch.equal(torch.where(found.kept, found.weight, dense), found.weight)


def test_the_second_level_takes_the_nearest_of_its_points():
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(32, 1, generator=generator) + 0.5).half().float()
    idle = torch.zeros(32, 1, dtype=torch.bool)
    found = quantize_scales(scale, idle, bits=3, rows=16)
    for block in (slice(0, 16), slice(16, 32)):
        low, high = scale[block].min(), scale[block].max()
        step = ((high - low) / 7).half().float()
        points = low + step * torch.arange(8)
        nearest = points[(scale[block] - points).abs().argmin(1)]
        torch.testing.assert_close(found[block, 0], nearest, rtol=1e-6, atol=0)
    same = torch.full((16, 1), 0.25)
    assert torch.equal(quantize_scales(same, idle[:16], 3, 16), same)


def test_a_group_of_zeros_does_not_spoil_the_scales_of_its_block():
    weight, hessian = layer(16, 32, seed=6)
    weight *= 0.01
    plain = spqr(weight, hessian, 3, 8, 0.0)
    weight[3, :8] = 0
    found = spqr(weight, hessian, 3, 8, 0.0)
    assert torch.equal(found.weight[3, :8], torch.zeros(8))
    assert found.grid.scale.max() <= 2 * plain.grid.scale.max()
    nothing = spqr(torch.zeros(16, 32), hessian, 3, 8, 0.0)
    assert torch.equal(nothing.weight, torch.zeros(16, 32))


# ---- what is stored


def bits_of_codes(codes, bits):
    """The codes written out bit by bit, and counted."""
    whole = codes.flatten().to(torch.int64).numpy()
    assert whole.min() >= 0 and whole.max() < 2**bits
    return sum(((whole >> place) & 1).astype(numpy.bool_).size for place in range(bits))


def bits_of(array):
    return 8 * array.nbytes


@pytest.mark.parametrize("group", [0, 8])
def test_bits_of_kept_columns_are_those_of_the_arrays_that_store_them(group):
    weight, hessian = layer(8, 32, seed=0)
    found = keep_columns(weight, hessian, 3, 5, group)
    kept = found.kept[0]
    counted = (
        bits_of_codes(found.codes, 3)
        + bits_of(found.grid.scale.numpy().astype(numpy.float16))
        + bits_of_codes(found.grid.zero, 3)
        + bits_of(found.weight[:, kept].numpy().astype(numpy.float16))
        + bits_of(torch.where(kept)[0].numpy().astype(numpy.uint16))
    )
    assert found.bits_per_weight == counted / weight.numel()


def test_bits_of_spqr_are_those_of_the_arrays_that_store_it():
    weight, hessian = layer(32, 32, seed=1)
    found = spqr(weight, hessian, 3, 8, 0.05, scale_bits=3, scale_rows=16)
    rows, columns = torch.where(found.kept)  # compressed sparse rows
    offsets = torch.searchsorted(rows, torch.arange(33))
    blocks = found.grid.scale.reshape(2, 16, 4)
    base = blocks.amin(1)
    step = (blocks.amax(1) - base) / 7
    codes = ((blocks - base[:, None]) / step[:, None]).round()
    counted = (
        bits_of_codes(found.codes, 3)
        + bits_of_codes(codes, 3)
        + bits_of(base.numpy().astype(numpy.float16))
        + bits_of(step.numpy().astype(numpy.float16))
        + bits_of_codes(found.grid.zero, 3)
        + bits_of(found.weight[rows, columns].numpy().astype(numpy.float16))
        + bits_of(columns.numpy().astype(numpy.uint16))
        + bits_of(offsets.numpy().astype(numpy.uint32))
    )
    assert found.bits_per_weight == counted / weight.numel()


def test_bits_agree_with_the_formats_and_with_the_papers_sum():
    from rooflm import load_format

    for name, group, symmetric in (("int4-g128", 128, False), ("int3-g64-sym", 64, True)):
        bits = int(name[3])
        assert stored_bits(256, 256, bits, group, symmetric) / 256**2 == load_format(name).bits
    # SpQR, section 4: b + (b_s + b_z)/16 + 64/(16 * 16) + 32 r, with the zero points' own
    # second level, which integer zero points do without: 32/256, and 1 % of outliers.
    found = stored_bits(4096, 4096, 3, 16, outliers=167772, scale_bits=3, scale_rows=16) / 4096**2
    assert found == pytest.approx(3 + 6 / 16 + 32 / 256 + 32 * 0.01, abs=0.01)


def test_the_arguments_are_left_as_they_were():
    weight, hessian = layer(16, 32, seed=0)
    before = weight.clone(), hessian.clone()
    keep_columns(weight, hessian, 3, 4, 8)
    keep_columns(weight, hessian, 3, 4, 8, method="round")
    spqr(weight, hessian, 3, 8, 0.05)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": 17}, "columns is 17; allowed: 0 to d_in = 16"),
        ({"columns": -1}, "columns is -1; allowed: a whole number from 0"),
        ({"method": "best"}, "unknown method 'best'; allowed: gptq, round"),
        ({"chosen": "all"}, "unknown choice 'all'; allowed: random, sensitive"),
        ({"group": 5}, "group is 5; allowed: a divisor of d_in = 16"),
        ({"hessian": torch.eye(4)}, r"hessian is \(4, 4\); allowed: \(16, 16\)"),
    ],
)
def test_bad_arguments_of_keep_columns_are_named(changed, message):
    arguments = {"weight": torch.ones(4, 16), "hessian": torch.eye(16), "bits": 3, "columns": 1}
    with pytest.raises(ValueError, match=message):
        keep_columns(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outliers": 1.5}, "outliers is 1.5; allowed: a share from 0 to 1"),
        ({"outliers": float("nan")}, "outliers is nan"),
        ({"scale_rows": 3}, "scale_rows is 3; allowed: 0 or a divisor of 4"),
        ({"scale_bits": 0}, "scale_bits is 0; allowed: a whole number from 1 to 8"),
        ({"group": 0}, "group is 0; allowed: a whole number from 1"),
        ({"chosen": "all"}, "unknown choice 'all'"),
    ],
)
def test_bad_arguments_of_spqr_are_named(changed, message):
    arguments = {
        "weight": torch.ones(4, 16),
        "hessian": torch.eye(16),
        "bits": 3,
        "group": 8,
        "scale_rows": 4,
    }
    with pytest.raises(ValueError, match=message):
        spqr(**(arguments | changed))
