"""Formats tried on numbers, weights and activations, against closed forms and each other."""

import math
from itertools import pairwise

import pytest
import torch

from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.quantize import trial
from rooflm.lab.quantize.codebook import block_table, on_table, optimal_partition
from rooflm.lab.quantize.codecs import to_format
from rooflm.lab.quantize.float_codecs import E4M3, NF4_LEVELS, float_points
from rooflm.lab.quantize.laws import decibels, float_law, integer_law, range_sqnr
from rooflm.lab.quantize.measure import (
    absmax_error,
    format_cost,
    lloyd_max,
    normal_error,
    sqnr,
    sqnr_after,
)
from rooflm.roofline.formats import load_format

NF4 = torch.tensor(NF4_LEVELS, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- laws ---


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_integer_law_is_exact_for_evenly_spread_numbers(bits):
    x = torch.linspace(-1, 1, 200_001)[None]
    found = sqnr(x, to_format(x, f"int{bits}"))
    assert found == pytest.approx(integer_law(bits, math.sqrt(3)), abs=0.02)


def test_a_bit_is_worth_6_decibels_and_a_doubled_crest_costs_them():
    assert integer_law(8, 2) - integer_law(8, 4) == pytest.approx(6.0206, abs=1e-4)
    assert integer_law(13, 3) - integer_law(12, 3) == pytest.approx(6.0206, abs=5e-3)
    assert float_law(3) - float_law(2) == pytest.approx(6.0206, abs=1e-4)


@pytest.mark.parametrize("scale", [0.01, 0.0123, 0.017])
def test_the_float_law_is_the_exact_integral_at_any_scale(scale):
    exact = decibels(normal_error(float_points(E4M3) * scale))
    assert float_law(3) == pytest.approx(exact, abs=0.1)


def test_the_exact_range_agrees_with_drawn_numbers_when_clipped_and_when_not():
    x, levels = normal(1, 400_000), torch.arange(-7.0, 8.0)
    for reach in (1.0, 2.5, 10.0):
        kept = torch.round(x * 7 / reach).clamp(-7, 7) * reach / 7
        assert range_sqnr(levels, reach) == pytest.approx(sqnr(x, kept), abs=0.03)
    assert range_sqnr(levels, 10.0) == pytest.approx(integer_law(4, 10.0), abs=0.2)


def test_sqnr_after_pools_the_noise_of_all_weights():
    weights = [normal(4, 64), 0.1 * normal(8, 128, seed=1)]
    assert sqnr_after(weights, lambda w: 0.9 * w) == pytest.approx(20, abs=1e-4)
    assert format_cost(weights, "nf4")[1] == sqnr_after(weights, lambda w: to_format(w, "nf4"))


# --- tables ---


def test_nf4_on_a_table_is_the_codec():
    x = normal(16, 256)
    assert torch.allclose(on_table(x, NF4, 64), to_format(x, "nf4"), rtol=1e-6)


def test_a_top_above_the_table_leaves_the_largest_inexact():
    x = torch.tensor([[1.0, 0.2]])
    assert on_table(x, torch.tensor([-0.5, 0.0, 0.5]), 2, 1.0).tolist() == [[0.5, 0.0]]
    assert on_table(torch.zeros(1, 4), NF4, 2).tolist() == [[0.0] * 4]


def as_scaled(peaks):  # the largest of a group is its scale
    return peaks


def test_a_block_table_beats_its_neighbours_in_the_closed_form():
    # Fitted to draws; judged by the integral, which has seen none.
    table = block_table(normal(1, 2**20), 64, 4)
    best = absmax_error(table, 64, as_scaled)
    assert decibels(best) > decibels(absmax_error(NF4, 64)) + 0.4
    assert decibels(best) > decibels(absmax_error(lloyd_max(16), 64)) + 0.1
    for i in range(16):
        for step in (-0.02, 0.02):
            moved = table.clone()
            moved[i] += step
            assert absmax_error(moved, 64, as_scaled) > best


def test_a_block_table_of_few_numbers_is_the_best_partition():
    x = normal(8, 8)
    table = block_table(x, 8, 2)
    peak = x.double().abs().amax(1, keepdim=True)
    values, order = (x.double() / peak).flatten().sort()
    counts = peak.square().expand(8, 8).flatten()[order]
    edges = optimal_partition(values[None], counts[None], torch.arange(65)[None], 4)[0]

    def error(levels):
        return (counts * (values[:, None] - levels).square().amin(1)).sum()

    means = [
        (counts[a:b] * values[a:b]).sum() / counts[a:b].sum() for a, b in pairwise(edges.tolist())
    ]
    assert error(table) <= 1.02 * error(torch.stack(means))


def test_a_block_table_refuses_large_codes():
    with pytest.raises(ValueError, match="allowed: a whole number from 1 to 6"):
        block_table(normal(2, 8), 8, 7)


# --- models ---


def test_with_weights_changes_a_copy():
    model = load_checkpoint("student")
    before = [w.clone() for w in trial.linear_weights(model)]
    changed = trial.with_weights(model, lambda w: 2 * w)
    for old, now, new in zip(
        before, trial.linear_weights(model), trial.linear_weights(changed), strict=True
    ):
        assert torch.equal(old, now) and torch.equal(new, 2 * old)
    assert len(before) == 7 * model.config.layers


def test_the_kinds_hold_every_small_format_of_the_library():
    names = {name for kind in trial.KINDS.values() for name in kind}
    assert {load_format(name).name for name in names} >= {
        "int8", "int4", "int3", "int2", "fp8", "mxfp4", "nvfp4", "nf4", "nf4-dq", "q4_1",
        "ternary", "binary",
    }  # fmt: skip


def test_the_unbeaten_are_those_of_a_scan_from_the_left():
    costs = {str(i): x for i, x in enumerate([(1, 5), (2, 4), (2, 9), (3, 9.5), (3, 9), (4, 8)])}
    assert trial.unbeaten(costs) == ["0", "2", "3"]


def test_stored_losses_fall_as_the_error_does():
    found = {label: (kept, lost) for label, kept, lost in trial.stored_losses()}
    assert {"round 4 bits g64", "format number_format=nf4"} <= set(found)
    assert not any("clip" in label or "activations" in label for label in found)
    ranked = sorted(found.values(), key=lambda x: x[0])
    assert ranked[0][1].difference.value > 100 * ranked[-1][1].difference.value
    kept, _ = found["format number_format=nf4"]
    weights = trial.linear_weights(load_checkpoint("teacher"))
    assert kept == pytest.approx(format_cost(weights, "nf4")[1])


def test_an_outlier_token_ruins_int8_for_the_others_and_not_fp8():
    x = normal(32, 512)
    x[0, 0] = 100.0
    reach, kept = trial.token_sqnr(x, "INT8", "tensor")
    assert reach == pytest.approx(100, rel=0.1)
    assert kept == pytest.approx(integer_law(8, reach), abs=0.5)
    assert trial.token_sqnr(x, "INT8", "token")[1] > 40
    assert trial.token_sqnr(x, "FP8", "tensor")[1] == pytest.approx(float_law(3), abs=0.3)
    with pytest.raises(ValueError, match="allowed: INT8 or FP8"):
        trial.token_sqnr(x, "INT4", "token")


# --- the explorer's trials ---


@pytest.mark.parametrize("name", trial.FORMATS)
@pytest.mark.parametrize("outlier", [0, 16])
def test_a_trial_keeps_to_its_prediction(name, outlier):
    found = trial.try_format(name, 64, "normal", outlier)
    if found.predicted is not None:
        assert found.measured == pytest.approx(found.predicted, abs=0.15)
    levels = found.levels
    assert (levels.diff() > 0).all() and 2 <= len(levels) <= 256
    # The median group holds no other numbers than its levels.
    x = found.numbers
    row = int(x.abs().amax(1).argsort()[len(x) // 2])
    kept = trial._codec(name)(x).values[row].double()
    assert (kept[:, None] - levels).abs().amin(1).max() < 1e-5 * max(1, levels.abs().max())


@pytest.mark.parametrize(
    ("name", "group", "bits"),
    [("int4, symmetric", 64, 4.25), ("int4, zero point", 64, 4.3125), ("nf4", 64, 4.5),
     ("mxfp4", 32, 4.25), ("q4_1", 32, 5.0), ("binary", 256, 1.0625), ("fp8-e4m3", 32, 9.0)],
)  # fmt: skip
def test_a_trial_counts_scales(name, group, bits):
    assert trial.try_format(name, group).bits == bits


def test_heavy_tails_have_the_kurtosis_of_their_distribution_and_unit_power():
    for kind in trial.NUMBERS:
        x = trial.drawn(kind).double()
        assert x.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert trial.drawn("heavy-tailed").double().pow(4).mean() > 5  # 9 for t of 5 degrees
    assert trial.drawn("normal").double().pow(4).mean() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [(("int5", 64), "unknown number format 'int5'"), (("nf4", 24), "group is 24; allowed: 8"),
     (("nf4", 64, "uniform"), "unknown kind of numbers 'uniform'")],
)  # fmt: skip
def test_a_trial_refuses_what_it_does_not_know(setting, message):
    with pytest.raises(ValueError, match=message):
        trial.try_format(*setting)


def test_books_cost_their_numbers_and_lose_less_than_a_shared_grid():
    weights = [normal(8, 256), normal(4, 512, seed=1)]
    bits, found = trial.book_cost(weights, 3)
    assert bits == pytest.approx(3 + 16 * 8 * 12 / 4096)  # 8 FP16 numbers in each of 12 rows
    assert found > sqnr_after(weights, lambda w: to_format(w, "int3")) + 2
