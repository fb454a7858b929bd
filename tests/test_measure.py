"""What formats lose: closed forms against Max's table, drawn groups and other people's bits."""

import math

import pytest
import torch

from rooflm.lab.quantize.codebook import optimal_partition
from rooflm.lab.quantize.codecs import grid_points, to_format
from rooflm.lab.quantize.float_codecs import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FP16,
    NF4_LEVELS,
    float_points,
    power_of_two,
    round_to_float,
)
from rooflm.lab.quantize.measure import (
    absmax_error,
    crest,
    float_bits,
    format_cost,
    largest,
    lloyd_max,
    normal_error,
    row_sqnr,
    sqnr,
)

INT4 = torch.arange(-7.0, 8.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mxfp4_scale(peaks):
    return power_of_two((torch.frexp(peaks.double())[1] - 3).long())


# --- the ratio ---


def test_a_tenth_of_every_number_is_20_decibels():
    x = torch.full((5, 7), 3.0)
    assert sqnr(x, x * 0.9) == pytest.approx(20, abs=1e-5)
    assert sqnr(x, x) == math.inf


def test_sqnr_of_rows_is_that_of_each_row_alone():
    x = normal(4, 50)
    kept = to_format(x, "int4")
    alone = [sqnr(a, b) for a, b in zip(x, kept, strict=True)]
    assert row_sqnr(x, kept).tolist() == pytest.approx(alone)


def test_the_cost_of_a_format_counts_scales_and_pools_the_noise():
    weights = [normal(4, 64), 0.1 * normal(8, 128, seed=1)]
    bits, found = format_cost(weights, "int4-g64-sym")
    assert bits == 4.25
    kept = [to_format(w, "int4-g64-sym") for w in weights]
    noise = sum((w - k).double().square().sum() for w, k in zip(weights, kept, strict=True))
    energy = sum(w.double().square().sum() for w in weights)
    assert found == pytest.approx(10 * math.log10(energy / noise))


def test_sqnr_refuses_tensors_of_two_shapes():
    with pytest.raises(ValueError, match=r"kept is \(2,\); allowed: \(3,\)"):
        sqnr(torch.ones(3), torch.ones(2))


def test_a_crest_factor_lies_between_1_and_the_root_of_the_length():
    found = crest(torch.stack([torch.ones(64), torch.eye(64)[3], normal(64)]))
    assert found[:2].tolist() == [1.0, 8.0]
    assert 1 < found[2] < 8


# --- levels for normal numbers ---


@pytest.mark.parametrize(
    ("count", "error"), [(1, 1.0), (2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.03454)]
)
def test_the_best_levels_lose_what_max_tabulated(count, error):
    # Max, 1960, table I: to its printed digits.
    assert normal_error(lloyd_max(count)) == pytest.approx(error, abs=6e-5)


def test_sixteen_best_levels_agree_with_max():
    # Table I: 0.009497 and an outermost level of 2.733; its last digit is 4 off.
    assert normal_error(lloyd_max(16)) == pytest.approx(0.009497, rel=1e-3)
    assert lloyd_max(16)[-1].item() == pytest.approx(2.733, abs=1e-3)


@pytest.mark.parametrize(
    ("count", "step", "error"),
    [(4, 0.9957, 0.1188), (8, 0.5860, 0.03744), (16, 0.3352, 0.01154), (32, 0.1881, 0.003495)],
)
def test_evenly_spaced_levels_lose_what_max_tabulated(count, step, error):
    # Max, 1960, table II: the best step and its error.
    levels = (torch.arange(count) - (count - 1) / 2).double()
    assert normal_error(levels * step) == pytest.approx(error, rel=6e-4)
    assert normal_error(levels * step) <= min(normal_error(levels * step * x) for x in (0.98, 1.02))


def test_the_best_levels_are_those_of_an_exhaustive_partition():
    # A normal density on 400 places; the dynamic programme tries every partition of them.
    places = torch.linspace(-5, 5, 401, dtype=torch.float64)[None]
    mass = torch.exp(-places.square() / 2)
    edges = optimal_partition(places, mass, torch.arange(402)[None], 5)
    means = [
        (places[0, a:b] * mass[0, a:b]).sum() / mass[0, a:b].sum()
        for a, b in zip(edges[0, :-1], edges[0, 1:], strict=True)
    ]
    assert lloyd_max(5).tolist() == pytest.approx([m.item() for m in means], abs=0.02)


def test_every_best_level_is_the_mean_of_its_cell():
    levels = lloyd_max(6)
    drawn = normal(2_000_000).double()
    cells = torch.bucketize(drawn, (levels[1:] + levels[:-1]) / 2)
    means = torch.stack([drawn[cells == i].mean() for i in range(6)])
    assert torch.allclose(means, levels, atol=0.01)


@pytest.mark.parametrize("count", [0, 65, 4.0])
def test_lloyd_max_refuses_other_counts(count):
    with pytest.raises(ValueError, match="allowed: a whole number from 1 to 64"):
        lloyd_max(count)


def test_levels_have_to_rise():
    with pytest.raises(ValueError, match="rising"):
        normal_error(torch.tensor([1.0, 1.0]))


# --- groups scaled by their largest ---


def test_the_largest_of_one_and_two_have_their_closed_forms():
    assert largest(1).mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=1e-3)
    assert largest(1).square().mean().item() == pytest.approx(1, rel=1e-3)
    assert largest(2).mean().item() == pytest.approx(2 / math.sqrt(math.pi), rel=1e-3)


@pytest.mark.parametrize("group", [16, 256, 4096])
def test_the_largest_agrees_with_drawn_groups(group):
    drawn = normal(2**22 // group, group).abs().amax(1)
    assert largest(group).mean().item() == pytest.approx(drawn.mean().item(), rel=0.01)
    assert (drawn < largest(group)[2048]).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("name", "levels", "group", "scale"),
    [
        ("int4-g32-sym", INT4, 32, None),
        ("int4", INT4, 512, None),
        ("int3-g64-sym", torch.arange(-3.0, 4.0), 64, None),
        ("nf4", torch.tensor(NF4_LEVELS), 64, None),
        ("fp8-e4m3", float_points(E4M3), 512, None),
        ("fp8-e5m2", float_points(E5M2), 512, None),
        ("mxfp4", float_points(E2M1), 32, mxfp4_scale),
    ],
)
def test_the_expected_error_is_what_the_codec_makes_on_drawn_numbers(name, levels, group, scale):
    x = normal(2048, 512)
    predicted = -10 * math.log10(absmax_error(levels, group, scale))
    # 0.02 dB for a million draws, and as much for scales that are rounded up to FP16.
    assert sqnr(x, to_format(x, name)) == pytest.approx(predicted, abs=0.04)


def test_a_group_of_one_on_two_levels_loses_nothing():
    assert absmax_error(torch.tensor([-1.0, 1.0]), 1) == pytest.approx(0, abs=1e-12)


def test_no_table_of_levels_beats_the_best_one_for_its_count_without_a_scale():
    best = normal_error(lloyd_max(16))
    for levels in (torch.tensor(NF4_LEVELS), grid_points("mxfp4"), torch.arange(16) - 7.5):
        for stretch in torch.linspace(0.2, 4, 40):
            assert normal_error(levels * stretch) > best


# --- bits ---


@pytest.mark.parametrize(
    ("form", "dtype", "code", "widths"),
    [
        (E4M3, torch.float8_e4m3fn, torch.uint8, (1, 4, 3)),
        (E5M2, torch.float8_e5m2, torch.uint8, (1, 5, 2)),
        (FP16, torch.float16, torch.int16, (1, 5, 10)),
        (BF16, torch.bfloat16, torch.int16, (1, 8, 7)),
    ],
)
def test_float_bits_are_those_of_torch(form, dtype, code, widths):
    points = float_points(form)
    if len(points) > 1000:
        points = points[:: len(points) // 500]
    codes = points.to(dtype).view(code).long() % 2 ** sum(widths)
    for x, number in zip(points.tolist(), codes.tolist(), strict=True):
        fields = float_bits(x, form).split()
        assert tuple(map(len, fields)) == widths
        assert int("".join(fields), 2) == number


def test_fp4_bits_are_those_of_the_standard():
    # OCP Microscaling v1.0, table 5.
    assert [float_bits(x, E2M1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, -6.0)] == [
        "0 00 0", "0 00 1", "0 01 0", "0 01 1", "0 10 0", "1 11 1",
    ]  # fmt: skip


@pytest.mark.parametrize("x", [0.3, 8.0, 2.0**-40])
def test_a_number_that_the_format_lacks_has_no_bits(x):
    with pytest.raises(ValueError, match="FP4 E2M1 does not hold"):
        float_bits(x, E2M1)


def test_rounding_first_gives_bits_to_any_number():
    for x in round_to_float(normal(100), E4M3).tolist():
        assert len(float_bits(x, E4M3)) == 10
