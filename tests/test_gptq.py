"""GPTQ: against OBQ written out with least squares, against brute force, and by its properties."""

import itertools

import pytest
import torch

from rooflm.lab.quantize.gptq import gptq, inverse_factor, output_error, sweep
from rooflm.lab.quantize.grids import Grid, decode, fit_grid, project, round_to_nearest, to_groups


def correlated_layer(d_out, d_in, seed, tokens=None, spread=1.0):
    """A random weight and inputs whose channels are mixed and of unequal size, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(d_in, d_in) * (spread * normal(d_in)).exp()
    inputs = normal(tokens or 4 * d_in, d_in) @ mixing / d_in**0.5
    return normal(d_out, d_in), inputs, inputs.T @ inputs / len(inputs)


def obq_in_fixed_order(weight, hessian, fit, group, damp):
    """OBQ by its definition: after each rounding, least squares for all that is still free.

    The free weights are solved for from the original weight each time, on a square root of the
    damped Hessian; no inverse, no factor and no running update is shared with the library.
    """
    d_in = weight.shape[1]
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(d_in, dtype=hessian.dtype)
    values, vectors = torch.linalg.eigh(damped)
    root = (vectors * values.sqrt()).T  # root.T @ root = damped
    now, grids = weight.clone(), []
    for j in range(d_in):
        if j % (group or d_in) == 0:
            grids.append(fit(now[:, j : j + (group or d_in)]))
        now[:, j] = project(now[:, j : j + 1], grids[-1])[:, 0]
        if j + 1 < d_in:
            owed = root[:, : j + 1] @ (weight - now)[:, : j + 1].T
            shift = torch.linalg.lstsq(root[:, j + 1 :], owed).solution.T
            now[:, j + 1 :] = weight[:, j + 1 :] + shift
    return now, grids


@pytest.mark.parametrize("group", [0, 4, 12])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_equals_obq_by_least_squares_in_a_fixed_column_order(group, symmetric):
    for seed in range(5):
        weight, _, hessian = correlated_layer(6, 24, seed)
        expected, _ = obq_in_fixed_order(
            weight, hessian, lambda w: fit_grid(w, 3, symmetric), group, damp=0.01
        )
        for block in (1, 5, 128):
            found = gptq(weight, hessian, 3, group, symmetric, block=block).weight
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# gptq.py of the method's authors fits such a group on weights that the block has not updated yet.
def test_the_grid_of_a_group_smaller_than_the_block_is_fitted_on_updated_weights():
    weight, _, hessian = correlated_layer(6, 24, seed=3)
    _, grids = obq_in_fixed_order(weight, hessian, lambda w: fit_grid(w, 3), 4, damp=0.01)
    found = gptq(weight, hessian, 3, group=4, block=12).grid.scale
    assert torch.equal(found, torch.stack([g.scale for g in grids], 1))
    stale = fit_grid(to_groups(weight, 4), 3).scale
    assert torch.equal(found[:, 0], stale[:, 0])
    assert (found[:, 1:] != stale[:, 1:]).float().mean() > 0.9


@pytest.mark.parametrize("group", [0, 8, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_size_does_not_change_the_result(group, act_order):
    weight, _, hessian = correlated_layer(8, 64, seed=1)
    results = [
        gptq(weight, hessian, 3, group, act_order=act_order, block=block).weight
        for block in (1, 3, 16, 48, 64, 128)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_rounding_when_the_hessian_is_diagonal(group, act_order):
    weight, _, _ = correlated_layer(8, 16, seed=0)
    weight = weight.float()
    hessian = torch.rand(16, generator=torch.Generator().manual_seed(1)).diag()
    for symmetric in (False, True):
        found = gptq(weight, hessian, 3, group, symmetric, act_order).weight
        assert torch.equal(found, round_to_nearest(weight, 3, group, symmetric))


def test_gptq_is_never_better_than_the_best_of_all_codes_and_sometimes_as_good():
    as_good = 0
    for seed in range(40):
        weight, _, hessian = correlated_layer(1, 5, seed)
        found = gptq(weight, hessian, bits=2, damp=0.0)
        every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.float64)
        error = (every - found.grid.zero[0]) * found.grid.scale[0] - weight
        best = ((error @ hessian) * error).sum(1).min().item()
        reached = output_error(weight, found.weight, hessian)
        assert reached >= best * (1 - 1e-9)
        as_good += reached <= best * (1 + 1e-9)
    assert 0 < as_good < 40  # it is greedy


def test_over_a_thousand_layers_the_mean_error_is_below_roundings_and_some_are_lost():
    ratios = []
    for seed in range(1000):
        weight, _, hessian = correlated_layer(4, 8, seed, spread=0.3)
        ours = output_error(weight, gptq(weight, hessian, 3).weight, hessian)
        theirs = output_error(weight, round_to_nearest(weight, 3), hessian)
        ratios.append(ours / theirs)
    ratios = torch.tensor(ratios)
    assert ratios.mean() < 0.75
    # A greedy method: on a few per cent of the layers rounding wins.
    assert 0.005 < (ratios > 1).float().mean() < 0.15


def test_activation_order_rounds_the_columns_of_the_largest_inputs_first():
    weight, _, hessian = correlated_layer(6, 24, seed=5)
    order = hessian.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(24))
    expected, _ = obq_in_fixed_order(
        weight[:, order], hessian[order][:, order], lambda w: fit_grid(w, 3), 0, damp=0.01
    )
    found = gptq(weight, hessian, 3, act_order=True).weight
    torch.testing.assert_close(found[:, order], expected, rtol=0, atol=1e-12)


def test_activation_order_keeps_the_groups_of_the_original_columns():
    weight, _, hessian = correlated_layer(6, 24, seed=6)
    found = gptq(weight, hessian, 3, group=8, act_order=True)
    assert torch.equal(found.grid.scale, fit_grid(to_groups(weight, 8), 3).scale)
    # The plain reader of grouped codes, without any permutation, finds the weight.
    assert torch.equal(decode(to_groups(found.codes, 8), found.grid).reshape(6, 24), found.weight)


def test_static_groups_are_fitted_on_the_weights_as_given():
    weight, _, hessian = correlated_layer(6, 24, seed=11)
    grids = iter([fit_grid(part, 3) for part in weight.split(8, dim=1)])
    expected, _ = obq_in_fixed_order(weight, hessian, lambda _: next(grids), 8, damp=0.01)
    found = gptq(weight, hessian, 3, group=8, static_groups=True, block=5)
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-12)
    assert not torch.equal(found.weight, gptq(weight, hessian, 3, group=8).weight)


def test_activation_order_does_not_depend_on_how_the_columns_are_numbered():
    weight, _, hessian = correlated_layer(6, 24, seed=7)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    plain = gptq(weight, hessian, 3, act_order=True).weight
    shuffled = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], 3, act_order=True).weight
    torch.testing.assert_close(shuffled, plain[:, shuffle], rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_scales_give_exactly_the_weight(symmetric):
    weight, _, hessian = correlated_layer(8, 32, seed=2)
    found = gptq(weight.float(), hessian.float(), 4, 8, symmetric)
    assert found.weight.dtype == torch.float32
    assert found.codes.unique().tolist() == found.codes.unique().round().tolist()
    assert found.codes.min() >= (-8 if symmetric else 0)
    assert found.codes.max() <= (7 if symmetric else 15)
    read = decode(to_groups(found.codes, 8).float(), found.grid).reshape(8, 32)
    assert torch.equal(read, found.weight)


def test_columns_that_were_never_excited_are_rounded_and_move_nothing():
    weight, _, hessian = correlated_layer(6, 24, seed=8)
    weight = weight.float()
    dead = torch.tensor([0, 7, 23])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    live = torch.tensor([j for j in range(24) if j not in dead])
    grid = fit_grid(to_groups(weight, 0), 3)
    for damp in (0.0, 0.01):
        for act_order in (False, True):
            found = gptq(weight, hessian, 3, act_order=act_order, damp=damp).weight
            assert torch.equal(found[:, dead], project(weight[:, None], grid)[:, 0][:, dead])
            # The grid of the whole row, but only the live columns are swept.
            scale, zero = grid.scale[:, 0], grid.zero[:, 0]
            order = hessian[live][:, live].diagonal().argsort(descending=True)
            seen = live[order] if act_order else live
            damped = damp * 21 / 24  # the mean of the diagonal is over all 24
            alone, _ = obq_in_fixed_order(
                weight.double()[:, seen],
                hessian[seen][:, seen],
                lambda _, s=scale, z=zero: Grid(s, z, 3, False),
                0,
                damped,
            )
            torch.testing.assert_close(found[:, seen].double(), alone, rtol=0, atol=1e-6)


def test_a_hessian_of_zeros_leaves_rounding():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptq(weight, torch.zeros(8, 8), 3).weight, round_to_nearest(weight, 3))


# Where a dead column's diagonal is set to 1 before the damping is taken from its mean, it does.
def test_the_unit_of_the_inputs_does_not_matter():
    weight, _, hessian = correlated_layer(6, 24, seed=9)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    plain = gptq(weight, hessian, 3, group=8).weight
    for factor in (2.0**-30, 2.0**30):
        assert torch.equal(gptq(weight, hessian * factor, 3, group=8).weight, plain)


def test_fewer_tokens_than_columns_need_damping():
    weight, _, hessian = correlated_layer(4, 24, seed=0, tokens=8)
    assert torch.isfinite(gptq(weight, hessian, 3, damp=0.01).weight).all()
    with pytest.raises(ValueError, match="no inverse with damp = 0; allowed: a larger damp"):
        gptq(weight, hessian, 3, damp=0.0)


def test_the_factor_is_upper_triangular_and_its_square_the_damped_inverse():
    _, _, hessian = correlated_layer(1, 16, seed=4)
    factor = inverse_factor(hessian, damp=0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))


def test_float32_and_float64_weights_agree():
    for seed in range(10):
        weight, _, hessian = correlated_layer(8, 32, seed)
        weight, hessian = weight.float(), hessian.float()
        single = gptq(weight, hessian, 3, group=8).weight
        double = gptq(weight.double(), hessian.double(), 3, group=8).weight
        assert torch.equal(single.double(), double)


def test_constant_rows_zero_rows_and_outliers_stay_finite():
    weight, _, hessian = correlated_layer(4, 16, seed=0)
    weight[0], weight[1], weight[2, 3] = 0.0, 0.7, 1e4
    found = gptq(weight.float(), hessian.float(), 4, group=4)
    assert torch.isfinite(found.weight).all()
    assert torch.equal(found.weight[0], torch.zeros(16))
    torch.testing.assert_close(found.weight[1], torch.full((16,), 0.7), rtol=1e-2, atol=0)


def test_clipping_is_handed_to_every_grid():
    weight, _, hessian = correlated_layer(6, 24, seed=1)
    expected, _ = obq_in_fixed_order(
        weight, hessian, lambda w: fit_grid(w, 2, clip="mse"), 8, damp=0.01
    )
    found = gptq(weight, hessian, 2, group=8, clip="mse").weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_sweep_alone_prunes_as_least_squares_does():
    # What SparseGPT needs: a rule that fixes some columns at 0 and leaves the others as they are.
    weight, _, hessian = correlated_layer(5, 12, seed=2)
    first, before = 4, weight.clone()
    swept = sweep(
        weight,
        inverse_factor(hessian, damp=0.0),
        lambda j, left: torch.zeros(5, dtype=torch.float64) if j < first else left[:, 0],
        block=3,
    )
    assert torch.equal(weight, before)
    gone, rest = hessian[first:, :first], hessian[first:, first:]
    expected = weight[:, first:] + torch.linalg.solve(rest, gone @ weight[:, :first].T).T
    torch.testing.assert_close(swept[:, first:], expected)
    assert torch.equal(swept[:, :first], torch.zeros(5, first, dtype=torch.float64))


def test_the_output_error_is_that_of_the_outputs():
    weight, inputs, hessian = correlated_layer(5, 12, seed=0)
    quantized = round_to_nearest(weight, 3)
    outputs = inputs @ weight.T - inputs @ quantized.double().T
    assert output_error(weight, quantized, hessian) == pytest.approx(
        outputs.square().sum(1).mean().item(), rel=1e-10
    )


def test_the_arguments_are_left_as_they_were():
    weight, _, hessian = correlated_layer(4, 16, seed=0)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 3, group=4, act_order=True)
    gptq(weight, hessian, 3, group=4)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 0}, "bits is 0; allowed: a whole number from 1 to 8"),
        ({"bits": 1, "symmetric": True}, "allowed: a whole number from 2 to 8"),
        ({"group": 5}, "group is 5; allowed: a divisor of d_in = 16"),
        ({"damp": -1.0}, "damp is -1.0; allowed: a finite number, 0 or more"),
        ({"damp": float("nan")}, "damp is nan"),
        ({"block": 0}, "block is 0; allowed: a whole number from 1"),
        ({"hessian": torch.eye(8)}, r"hessian is \(8, 8\); allowed: \(16, 16\)"),
        ({"hessian": -torch.eye(16)}, "negative square"),
        ({"hessian": torch.full((16, 16), torch.nan)}, "NaN"),
        ({"clip": "best"}, "unknown clip 'best'"),
    ],
)
@pytest.mark.parametrize("group", [0, 4])
def test_bad_arguments_are_named(changed, message, group):
    arguments = {"weight": torch.ones(2, 16), "hessian": torch.eye(16), "bits": 3, "group": group}
    with pytest.raises(ValueError, match=message):
        gptq(**(arguments | changed))
