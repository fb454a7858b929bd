"""The uniform grid: nearest by brute force, optimal clipping by exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rooflm.lab.quantize.grids import (
    Grid,
    decode,
    encode,
    fit_grid,
    project,
    quantize_activations,
    round_to_nearest,
    round_up_to_fp16,
    static_scale,
    to_groups,
)

KINDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(a, b):
    return (a.double() - b.double()).square().sum(-1)


@st.composite
def groups(draw):
    """A few groups of numbers from 1e-9 to 1e5, with zeros, constants and outliers."""
    width = draw(st.integers(1, 9))
    numbers = st.floats(-1.0, 1.0, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5])
    rows = draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4))
    magnitude = 10.0 ** draw(st.integers(-9, 5))
    return torch.tensor(rows) * magnitude


# ---- the grid and the codes


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_projection_is_the_nearest_of_all_points_of_the_grid(bits, symmetric):
    weight = normal(6, 1, 40)
    grid = fit_grid(weight, bits, symmetric)
    codes = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float32)
    points = (codes - grid.zero) * grid.scale  # (6, 1, 2^bits)
    assert points.shape[-1] == 2**bits
    distance = (weight[..., None] - points[..., None, :]).abs()
    ours = (project(weight, grid) - weight).abs()
    assert torch.equal(ours, distance.amin(-1))


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_codes_and_zero_points_are_whole_numbers_of_that_many_bits(bits, symmetric):
    grid = fit_grid(normal(6, 2, 40), bits, symmetric)
    codes = encode(10 * normal(6, 2, 40), grid)  # most of them beyond the grid
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert (codes == codes.round()).all()
    assert codes.min() == lowest
    assert codes.max() == highest
    assert (grid.zero == grid.zero.round()).all()
    if symmetric:
        assert (grid.zero == 0).all()
    else:
        assert ((grid.zero >= 0) & (grid.zero <= highest)).all()


def test_the_symmetric_scale_takes_the_largest_magnitude_to_the_largest_code():
    grid = fit_grid(torch.tensor([[-7.0, 2.0, 3.5]]), 4, symmetric=True)
    assert grid.scale.item() == 1.0
    assert encode(torch.tensor([[-7.0, 2.0, 3.5]]), grid).tolist() == [[-7, 2, 4]]  # 3.5 to even
    assert encode(torch.tensor([[2.5, -2.5, -9.0]]), grid).tolist() == [[2, -2, -8]]


def test_the_asymmetric_range_contains_zero():
    # All positive: without 0 in the range, the step would be (3 - 2.5) / 3.
    grid = fit_grid(torch.tensor([[2.5, 3.0]]), 2)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 0.0)
    grid = fit_grid(torch.tensor([[-2.5, -3.0]]), 2)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 3.0)


@given(groups(), st.sampled_from(KINDS))
def test_the_error_is_at_most_half_a_step(weight, kind):
    # The scale is at most 65504, so that 2 bits reach 65504 symmetrically: all of `groups`
    # below 6.5e4 is unclipped.
    weight = weight.clamp(-6e4, 6e4)
    grid = fit_grid(weight, *kind)
    error = (project(weight, grid) - weight).abs()
    assert torch.isfinite(error).all()
    # A float32 quotient may round the last bit of a tie.
    assert (error <= grid.scale * (0.5 + 1e-5)).all()


@settings(max_examples=25)
@given(groups(), st.sampled_from(KINDS), st.sampled_from([None, "mse"]))
def test_zero_is_exact_and_the_scale_is_an_fp16_number(weight, kind, clip):
    weight[..., 0] = 0
    grid = fit_grid(weight, *kind, clip)
    assert (project(weight, grid)[..., 0] == 0).all()
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert (grid.scale > 0).all()


@given(st.floats(0, 65504, width=32))
def test_rounding_up_to_fp16_is_numpys_next_half(x):
    half = np.float16(x)
    expected = half if half >= np.float32(x) else np.nextafter(half, np.float16(np.inf))
    assert round_up_to_fp16(torch.tensor(x)).item() == float(expected)


def test_a_scale_below_fp16_does_not_underflow_to_zero():
    # max / 7 = 1.4e-9 is below 2^-24, the smallest FP16 number.
    weight = torch.tensor([[1e-8, -5e-9]])
    grid = fit_grid(weight, 4, symmetric=True)
    assert grid.scale.item() == 2.0**-24
    assert torch.isfinite(project(weight, grid)).all()
    # Where nearest FP16 scale would be 25 % too small, the extremes would be clipped.
    weight = torch.tensor([[7 * 1.4 * 2.0**-24, 0.0]])
    assert fit_grid(weight, 4, symmetric=True).scale.item() == 2.0**-23


# ---- a grid's own points come back


@pytest.mark.parametrize("clip", [None, "mse"])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_weights_made_of_codes_and_scales_come_back_equal(bits, symmetric, clip):
    generator = torch.Generator().manual_seed(bits)
    scale = (torch.rand(8, 3, 1, generator=generator) + 0.01).half().float()
    lowest, highest = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes = torch.randint(lowest, highest + 1, (8, 3, 16), generator=generator).float()
    codes[..., 0], codes[..., 1] = lowest, highest  # a range shows only if it is used
    zero = torch.zeros(8, 3, 1)
    if not symmetric:
        zero = torch.randint(0, highest + 1, (8, 3, 1), generator=generator).float()
    weight = ((codes - zero) * scale).reshape(8, 48)
    ours = round_to_nearest(weight, bits, group=16, symmetric=symmetric, clip=clip)
    assert torch.equal(ours, weight)
    grid = fit_grid(weight.reshape(8, 3, 16), bits, symmetric, clip)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.zero, zero)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_encoding_undoes_decoding_for_every_code(bits, symmetric):
    zero = torch.tensor([[0.0], [0.0 if symmetric else 2**bits - 1]])
    grid = Grid(torch.tensor([[0.123], [3.0]]).half().float(), zero, bits, symmetric)
    codes = torch.arange(grid.lowest, grid.highest + 1).float().expand(2, -1)
    assert torch.equal(encode(decode(codes, grid), grid), codes)


def test_projection_agrees_with_torchs_own_fake_quantization():
    # A power of two as the scale, so that torch's multiplication by 1 / scale is exact.
    weight = normal(4, 64)
    for bits, zero in ((4, 5), (8, 100), (2, 1)):
        scales, zeros = torch.tensor([0.25, 0.5, 0.125, 1.0]), torch.full((4,), float(zero))
        grid = Grid(scales[:, None], zeros[:, None], bits, False)
        theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, 0, 2**bits - 1)
        assert torch.equal(project(weight, grid), theirs)


# ---- constant, zero, single-element groups and outliers


@pytest.mark.parametrize("clip", [None, "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-7, 3e4])
def test_a_constant_group_comes_back_to_fp16_accuracy(value, symmetric, clip):
    # KIVI's reference code divides 0 by 0 here: its range of a constant group is 0.
    for width in (1, 5):
        weight = torch.full((2, width), value)
        ours = round_to_nearest(weight, 4, symmetric=symmetric, clip=clip)
        assert torch.isfinite(ours).all()
        # 2^-10 is one FP16 step of a normal scale; below that, half of the smallest scale.
        torch.testing.assert_close(ours, weight, rtol=2.0**-10, atol=2.0**-25)


def test_a_group_of_zeros_stays_zero_beside_others():
    weight = torch.cat([torch.zeros(1, 8), normal(1, 8)], dim=1)
    for bits, symmetric in KINDS:
        for clip in (None, "mse"):
            ours = round_to_nearest(weight, bits, 8, symmetric, clip)
            assert (ours[:, :8] == 0).all()
            assert torch.isfinite(ours).all()


def test_one_outlier_rounds_its_neighbours_to_zero_and_grouping_saves_them():
    weight = torch.full((1, 32), 0.01)
    weight[0, 3] = 10.0
    whole = round_to_nearest(weight, 4, symmetric=True)
    assert (whole[0, 4:] == 0).all()
    assert whole[0, 3].item() == pytest.approx(10, rel=2.0**-10)
    grouped = round_to_nearest(weight, 4, group=8, symmetric=True)
    torch.testing.assert_close(grouped[0, 8:], weight[0, 8:], rtol=2.0**-10, atol=0)


def test_numbers_beyond_an_fp16_scale_are_clipped_not_infinite():
    weight = torch.tensor([[3e38, -3e38, 1.0]])
    for bits, symmetric in KINDS:
        assert torch.isfinite(round_to_nearest(weight, bits, symmetric=symmetric)).all()
    ours = round_to_nearest(weight, 4, symmetric=True)
    assert ours.tolist() == [[7 * 65504.0, -8 * 65504.0, 0.0]]


# ---- clipping


def fine_search(weight, bits, symmetric):
    """The least squared error over 4000 clip values, each group for itself, in float64."""
    low, high = weight.amin(-1).clamp(max=0).double(), weight.amax(-1).clamp(min=0).double()
    best = torch.full(low.shape, float("inf"), dtype=torch.float64)
    for factor in torch.linspace(0.01, 1, 4000, dtype=torch.float64):
        if symmetric:
            step = torch.maximum(-low, high) * factor / (2 ** (bits - 1) - 1)
            bottom = -(2 ** (bits - 1)) * step
        else:
            step = (high - low) * factor / (2**bits - 1)
            bottom = -torch.round(-low * factor / step).clamp(0, 2**bits - 1) * step
        points = (weight.double() - bottom[..., None]) / step[..., None]
        codes = torch.floor(points + 0.5).clamp(0, 2**bits - 1)
        read = codes * step[..., None] + bottom[..., None]
        best = torch.minimum(best, squared_error(read, weight))
    return best


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False)])
def test_clipping_is_within_a_few_per_cent_of_exhaustive_search(bits, symmetric):
    weight = normal(24, 64)
    weight[::3, 5] *= 8  # outliers in a third of the groups
    ours = squared_error(project(weight, fit_grid(weight, bits, symmetric, "mse")), weight)
    best = fine_search(weight, bits, symmetric)
    # 100 geometric steps of 4 % against 4000 linear ones, on an error that is jagged: a group
    # may lose up to a tenth, and all of them together less than 2 %.
    assert (ours <= 1.10 * best).all()
    assert ours.sum() <= 1.02 * best.sum()
    assert ours.sum() >= 0.995 * best.sum()


@settings(max_examples=25)
@given(groups(), st.sampled_from([(2, True), (2, False), (4, True), (4, False)]))
def test_clipping_is_never_worse_than_the_full_range(weight, kind):
    full = project(weight, fit_grid(weight, *kind))
    clipped = project(weight, fit_grid(weight, *kind, clip="mse"))
    # float32 sums of squares decide; float64 ones may differ in the last digits.
    assert (squared_error(clipped, weight) <= squared_error(full, weight) * (1 + 1e-5)).all()


def normal_distortion(step, bits):
    """The mean squared error of a unit normal on the points (q - 2^(bits-1)) step, integrated."""
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    points = (torch.arange(2**bits, dtype=torch.float64) - 2 ** (bits - 1)) * step
    nearest = (x[:, None] - points).abs().amin(1)
    return torch.trapezoid(nearest.square() * density, x).item()


# Max, "Quantizing for minimum distortion", 1960, table II: what no uniform quantizer of a unit
# normal with 4, 8 or 16 levels can beat. His levels lie half a step off 0; one of ours is 0.
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_a_normal_weight_finds_the_optimal_step_of_the_normal_distribution(bits, bound):
    weight = normal(1, 60_000)
    grid = fit_grid(weight, bits, symmetric=True, clip="mse")
    error = squared_error(project(weight, grid), weight).item() / weight.numel()
    steps = [0.01 * i for i in range(20, 140)]
    distortions = [normal_distortion(step, bits) for step in steps]
    least = min(distortions)
    assert grid.scale.item() == pytest.approx(steps[distortions.index(least)], rel=0.05)
    assert error == pytest.approx(least, rel=0.02)
    assert bound < least < 1.3 * bound


# ---- granularity


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_finer_granularity_never_has_a_larger_step(seed, kind):
    weight = normal(4, 24, seed=seed) * normal(4, 1, seed=seed + 1).exp()
    tensor = fit_grid(weight.reshape(1, 1, -1), *kind).scale
    rows = fit_grid(to_groups(weight, 0), *kind).scale
    groups = fit_grid(to_groups(weight, 8), *kind).scale
    assert (rows <= tensor).all()
    assert (groups <= rows).all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_more_scales_never_leave_a_larger_optimum(bits, symmetric):
    weight = normal(16, 128) * normal(16, 1, seed=1).exp()
    weight[::5, ::17] *= 6
    fits = [{"per_tensor": True}, {}, {"group": 64}, {"group": 32}, {"group": 8}]
    errors = [
        squared_error(
            round_to_nearest(weight, bits, symmetric=symmetric, clip="mse", **fit), weight
        )
        for fit in fits
    ]
    totals = [error.sum().item() for error in errors]
    # The search meets each optimum within 2 %.
    assert all(fine <= 1.02 * coarse for coarse, fine in itertools.pairwise(totals))
    assert totals[-1] < 0.8 * totals[0]


def test_one_group_a_row_is_per_channel_and_one_row_per_channel_is_per_tensor():
    weight = normal(3, 16)
    assert torch.equal(round_to_nearest(weight, 4, group=16), round_to_nearest(weight, 4))
    row = weight[:1]
    assert torch.equal(round_to_nearest(row, 4, per_tensor=True), round_to_nearest(row, 4))


# ---- activations


def test_a_token_with_an_outlier_costs_the_others_nothing_under_token_scales():
    x = normal(2, 5, 32)
    x[1, 4, 7] = 500.0
    per_token = (quantize_activations(x, 8) - x).abs()
    per_tensor = (quantize_activations(x, 8, per="tensor") - x).abs()
    assert per_token[0].max() <= x[0].abs().amax() / 127 / 2 * 1.001
    assert per_tensor[0].max() > 0.9 * 500 / 127 / 2


def test_a_static_scale_saturates_what_calibration_did_not_see():
    scale = static_scale(torch.tensor([[0.5, -1.27], [0.0, 1.0]]))
    assert scale.item() == pytest.approx(0.01, rel=2.0**-10)
    x = torch.tensor([[0.101, -5.0, 5.0]])
    expected = [10 * scale.item(), -128 * scale.item(), 127 * scale.item()]
    assert quantize_activations(x, scale=scale).tolist() == [expected]
    assert torch.equal(
        quantize_activations(x, scale=scale.item()), quantize_activations(x, scale=scale)
    )


def test_a_static_scale_of_the_same_tensor_is_the_dynamic_per_tensor_scale():
    x = normal(3, 7, 16)
    static = quantize_activations(x, scale=static_scale(x))
    assert torch.equal(static, quantize_activations(x, per="tensor"))


# ---- arguments


def test_nothing_is_written_to_the_arguments():  # SmoothQuant's fake_quant.py writes to x
    weight = 3 * normal(4, 16)
    before = weight.clone()
    for symmetric in (False, True):
        round_to_nearest(weight, 3, 8, symmetric, "mse")
        quantize_activations(weight, symmetric=symmetric)
    quantize_activations(weight, scale=0.01)
    project(weight, fit_grid(weight, 4))
    assert torch.equal(weight, before)


def test_a_parameter_and_a_transposed_view_are_quantized_like_their_numbers():
    weight = normal(16, 4)
    expected = round_to_nearest(weight.t().contiguous(), 4, 8)
    assert torch.equal(round_to_nearest(weight.t(), 4, 8), expected)
    parameter = torch.nn.Parameter(weight.t())
    assert torch.equal(round_to_nearest(parameter, 4, 8).detach(), expected)
    grid = fit_grid(parameter, 4, clip="mse")
    assert not grid.scale.requires_grad
    assert not grid.zero.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: round_to_nearest(w, 1, symmetric=True), "bits is 1; .* from 2 to 8"),
        (lambda w: round_to_nearest(w, 9), "bits is 9; .* from 1 to 8"),
        (lambda w: round_to_nearest(w, 4.0), "bits is 4.0"),
        (lambda w: round_to_nearest(w, True), "bits is True"),
        (lambda w: round_to_nearest(w, 4, group=5), "group is 5; .* divisor of d_in = 12"),
        (lambda w: round_to_nearest(w, 4, group=-4), "group is -4"),
        (lambda w: round_to_nearest(w, 4, group=24), "group is 24"),
        (lambda w: round_to_nearest(w, 4, group="4"), "group is '4'"),
        (lambda w: round_to_nearest(w, 4, group=4, per_tensor=True), "per_tensor; allowed: 0"),
        (lambda w: round_to_nearest(w, 4, clip="mes"), "unknown clip 'mes'.*mse"),
        (lambda w: round_to_nearest(w[0], 4), r"weight is \(12,\)"),
        (lambda w: round_to_nearest(w[:0], 4), r"weight is \(0, 12\)"),
        (lambda w: round_to_nearest([[1.0]], 4), "weight is "),
        (lambda w: round_to_nearest(w / 0, 4), "infinity or a NaN"),
        (lambda w: quantize_activations(w, per="row"), "unknown granularity 'row'"),
        (lambda w: quantize_activations(w, scale=0.0), "static scale is 0.0"),
        (lambda w: quantize_activations(w, scale=1.0, symmetric=False), "asymmetric"),
        (lambda w: quantize_activations(w, bits=1), "bits is 1"),
        (lambda w: static_scale(w * float("nan")), "infinity or a NaN"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(torch.ones(2, 12))
    assert "\n" not in str(error.value)
