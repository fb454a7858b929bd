"""AWQ: its scales by hand, exactness of the rescaling, and what its search promises."""

import pytest
import torch

from rooflm.lab.quantize.awq import CLIP_RANGES, awq, channel_scales, clip_to_output
from rooflm.lab.quantize.gptq import output_error
from rooflm.lab.quantize.grids import fit_grid, project, round_to_nearest


def layer(d_out, d_in, seed, tokens=64):
    """A random weight and inputs of which a few channels are large."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(d_in, generator=generator).mul(1.5).exp()
    inputs = torch.randn(tokens, d_in, generator=generator) * size
    return torch.randn(d_out, d_in, generator=generator), inputs


def statistics(inputs):
    return inputs.T @ inputs / len(inputs), inputs.abs().mean(0)


def relative_output_error(weight, quantized, inputs):
    expected = inputs.double() @ weight.double().T
    return ((inputs.double() @ quantized.double().T - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("symmetric", [False, True])  # llm-awq crashes on symmetric grids
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("clip", [None, "mse"])
def test_alpha_zero_is_plain_rounding(symmetric, group, clip):
    weight, inputs = layer(8, 32, seed=0)
    found = awq(weight, *statistics(inputs), 3, group, symmetric, alpha=0, clip=clip)
    assert torch.equal(found.weight, round_to_nearest(weight, 3, group, symmetric, clip))
    assert torch.equal(found.scales, torch.ones(32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [None, "mse", "output"])
def test_the_searched_scale_is_never_worse_than_none_on_the_calibration_inputs(symmetric, clip):
    gains = []
    for seed in range(3 if clip == "mse" else 10):
        weight, inputs = layer(8, 32, seed)
        found = awq(weight, *statistics(inputs), 3, 8, symmetric, clip=clip)
        unscaled = awq(weight, *statistics(inputs), 3, 8, symmetric, alpha=0.0, clip=clip)
        ours = relative_output_error(weight, found.weight, inputs)
        theirs = relative_output_error(weight, unscaled.weight, inputs)
        assert ours <= theirs * (1 + 1e-5)
        gains.append(ours / theirs)
    assert sum(gains) / len(gains) < 0.9  # where a few inputs are large, it gains


def test_the_search_finds_the_exponent_of_least_output_error():
    weight, inputs = layer(8, 32, seed=3)
    hessian, mean_abs = statistics(inputs)
    tried = [awq(weight, hessian, mean_abs, 3, 8, alpha=i / 20) for i in range(21)]
    errors = [relative_output_error(weight, t.weight, inputs) for t in tried]
    found = awq(weight, hessian, mean_abs, 3, 8)
    assert found.alpha == errors.index(min(errors)) / 20
    assert torch.equal(found.weight, tried[errors.index(min(errors))].weight)
    assert errors.index(min(errors)) not in (0, 20)


def test_the_scales_are_the_mean_magnitudes_to_the_power_alpha():
    # The mean, not the largest: channel 0 has the largest |x| and the smallest mean |x|.
    inputs = torch.tensor([[100.0, 16.0, 40.0], [0.0, -16.0, -40.0]] + [[0.0, 16.0, 40.0]] * 98)
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    found = awq(weight, *statistics(inputs), 8, alpha=0.5)
    # sqrt(1, 16, 40) = 1, 4, 6.32; sqrt(max * min) = 40^(1/4)
    expected = torch.tensor([1.0, 4.0, 40**0.5]) / 40**0.25
    torch.testing.assert_close(found.scales, expected)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_the_product_of_the_largest_and_the_smallest_scale_is_one(alpha):
    _, inputs = layer(8, 32, seed=1)
    scales = channel_scales(inputs.abs().mean(0), alpha, torch.ones(8, 32))
    assert (scales.max() * scales.min()).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_folded_weight_acts_as_the_stored_one_on_divided_inputs(symmetric):
    weight, inputs = layer(8, 32, seed=2)
    weight, inputs = weight.double(), inputs.double()
    found = awq(weight, *statistics(inputs), 4, 8, symmetric)
    stored = (inputs / found.scales) @ found.stored.double().T
    torch.testing.assert_close(inputs @ found.weight.T, stored, rtol=1e-12, atol=1e-12)
    # The rescaling itself: on weights that need no rounding nothing is lost at all.
    powers = torch.tensor([1.0, 4.0, 0.25, 16.0], dtype=torch.float64)
    whole = torch.randint(-8, 8, (3, 4), generator=torch.Generator().manual_seed(0)).double()
    x = torch.randint(-8, 8, (5, 4), generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal((x / powers) @ (whole * powers).T, x @ whole.T)


def test_what_is_stored_is_the_scaled_weight_on_the_grid_of_its_groups():
    weight, inputs = layer(8, 32, seed=4)
    found = awq(weight, *statistics(inputs), 3, 8)
    assert torch.equal(found.stored, round_to_nearest(weight * found.scales, 3, 8))
    assert all(len(group.unique()) <= 8 for group in found.stored.reshape(-1, 8))
    torch.testing.assert_close(found.weight * found.scales, found.stored)


def test_salient_channels_come_out_closer_than_by_rounding():
    # The mechanism, section 3.1: one input channel is 50 times the others.
    closer = 0
    for seed in range(20):
        weight, inputs = layer(16, 32, seed)
        inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        inputs[:, 5] *= 50
        found = awq(weight, *statistics(inputs), 3).weight
        plain = round_to_nearest(weight, 3)
        closer += (found - weight)[:, 5].norm() < 0.7 * (plain - weight)[:, 5].norm()
    assert closer >= 19


def test_the_unit_of_the_inputs_does_not_matter():
    weight, inputs = layer(8, 32, seed=5)
    plain = awq(weight, *statistics(inputs), 3, 8)
    for factor in (2.0**-20, 2.0**20):
        other = awq(weight, *statistics(inputs * factor), 3, 8)
        assert other.alpha == plain.alpha
        assert torch.equal(other.weight, plain.weight)


def test_dead_input_channels_leave_everything_finite():
    weight, inputs = layer(8, 32, seed=6)
    inputs[:, 3] = 0
    for alpha in (None, 1.0):
        assert torch.isfinite(awq(weight, *statistics(inputs), 3, 8, alpha=alpha).weight).all()
    nothing = awq(weight, *statistics(inputs * 0), 3, 8)
    assert torch.equal(nothing.weight, round_to_nearest(weight, 3, 8))


@pytest.mark.parametrize("group", [0, 8])
def test_clipping_to_the_output_takes_the_best_range_of_each_group(group):
    weight, inputs = layer(4, 16, seed=7)
    hessian, _ = statistics(inputs)
    found = clip_to_output(weight, hessian, 2, group)
    width = group or 16
    for start in range(0, 16, width):
        x = inputs[:, start : start + width].double()
        for row in range(4):
            group_of = weight[row, start : start + width]
            errors = []
            for part in CLIP_RANGES:  # 1, 0.95, ..., 0.5
                grid = fit_grid(group_of.clamp(part * group_of.min(), part * group_of.max()), 2)
                errors.append((x @ (project(group_of, grid) - group_of).double()).norm())
            reached = (x @ (found[row, start : start + width] - group_of).double()).norm()
            assert reached.item() == pytest.approx(min(errors).item(), rel=1e-4)


def test_the_clip_search_judges_by_the_inputs_that_the_stored_weight_will_see():
    weight, inputs = layer(8, 32, seed=9)
    weight, inputs = weight.double(), inputs.double()
    found = awq(weight, *statistics(inputs), 3, 8, alpha=0.7, clip="output")
    divided = inputs / found.scales
    expected = clip_to_output(weight * found.scales, statistics(divided)[0], 3, 8)
    torch.testing.assert_close(found.stored, expected, rtol=1e-9, atol=0)


def test_clipping_to_the_output_mends_an_outlier_that_no_input_excites():
    weight, inputs = layer(4, 16, seed=8)
    weight[:, 3] = 6.0
    inputs[:, 3] *= 1e-4
    hessian, mean_abs = statistics(inputs)
    clipped = awq(weight, hessian, mean_abs, 3, alpha=0.0, clip="output").weight
    plain = awq(weight, hessian, mean_abs, 3, alpha=0.0).weight
    assert output_error(weight, clipped, hessian) < 0.7 * output_error(weight, plain, hessian)


def test_the_arguments_are_left_as_they_were():
    weight, inputs = layer(8, 32, seed=0)
    hessian, mean_abs = statistics(inputs)
    before = weight.clone(), hessian.clone(), mean_abs.clone()
    awq(weight, hessian, mean_abs, 3, 8, clip="output")
    for now, then in zip((weight, hessian, mean_abs), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; allowed: a number from 0 to 1, or None"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"steps": 0}, "steps is 0; allowed: a whole number from 1"),
        ({"clip": "best"}, "unknown clip 'best'"),
        ({"group": 5}, "group is 5; allowed: a divisor of d_in = 8"),
        ({"bits": 9}, "bits is 9; allowed: a whole number from 1 to 8"),
        ({"mean_abs": torch.ones(4)}, r"mean_abs is of shape \(4,\); allowed: \(8,\)"),
        ({"mean_abs": -torch.ones(8)}, "mean_abs is of shape"),
        ({"hessian": torch.eye(4)}, r"hessian is \(4, 4\); allowed: \(8, 8\)"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {
        "weight": torch.ones(2, 8),
        "hessian": torch.eye(8),
        "mean_abs": torch.ones(8),
        "bits": 3,
    }
    with pytest.raises(ValueError, match=message):
        awq(**(arguments | changed))
