"""Codecs: bit for bit against ml_dtypes, torch and gguf, and against formulas written out."""

import math
from fractions import Fraction
from statistics import NormalDist

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rooflm import load_format
from rooflm.lab.quantize.codecs import (
    binary,
    grid_points,
    store,
    stored_bytes,
    ternary,
    to_format,
)
from rooflm.lab.quantize.float_codecs import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FP16,
    NF4_LEVELS,
    TF32,
    float_points,
    quantize_scales,
    round_to_float,
)
from rooflm.roofline.formats import format_names

EVERY_NAME = [
    *format_names(),
    "fp8-e5m2",
    *(f"int{bits}-g32{suffix}" for bits in (2, 3, 4, 8) for suffix in ("", "-sym")),
]
REFERENCE = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    BF16: ml_dtypes.bfloat16,
    FP16: np.float16,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def reference_cast(x, dtype, largest):
    """A reference library's rounding, with overflow saturated before it becomes Inf or NaN."""
    x = np.clip(np.asarray(x, np.float32), -largest, largest)
    return x.astype(dtype).astype(np.float32)


def assert_same_bits(ours, theirs):
    ours, theirs = (np.asarray(x, np.float32).view(np.uint32) for x in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)


# ---- float formats


@pytest.mark.parametrize("form", REFERENCE, ids=lambda form: form.name)
def test_rounding_agrees_bit_for_bit_with_the_reference_dtype(form):
    points = float_points(form).float()
    middle = (points[1:] / 2 + points[:-1] / 2).numpy()  # ties, exact in float32
    around = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    spread = (rng.standard_normal(20_000) * np.exp2(rng.uniform(-160, 126, 20_000))).astype("f4")
    near = (rng.standard_normal(20_000) * 4).astype(np.float32)
    fixed = np.array([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 464, 480, 61440, 65520], "f4")
    x = np.concatenate([points.numpy(), middle, *around, spread, near, fixed])
    ours = round_to_float(torch.from_numpy(x), form).numpy()
    assert_same_bits(ours, reference_cast(x, REFERENCE[form], form.largest))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (BF16, torch.bfloat16),
        (FP16, torch.float16),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_rounding_agrees_bit_for_bit_with_torchs_dtype(form, dtype):
    x = torch.cat([normal(5000), 300 * normal(5000), 2.0**-9 * normal(5000)])
    x = x.clamp(-form.largest, form.largest)
    assert_same_bits(round_to_float(x, form), x.to(dtype).float())


@pytest.mark.parametrize("form", REFERENCE, ids=lambda form: form.name)
def test_the_points_of_a_float_format_are_all_finite_codes_of_the_reference(form):
    dtype = np.dtype(REFERENCE[form])
    bits = 4 if form is E2M1 else 8 * dtype.itemsize
    codes = np.arange(2**bits, dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
    with np.errstate(invalid="ignore"):  # the NaNs among the codes
        values = codes.view(dtype).astype(np.float64)
    expected = np.unique(values[np.isfinite(values)])  # one zero of the two
    np.testing.assert_array_equal(float_points(form).numpy(), expected)
    assert form.largest == float(ml_dtypes.finfo(dtype).max) == expected[-1]


def test_tf32_keeps_ten_bits_of_the_mantissa():
    x = normal(5000) * torch.exp2(integers(-100, 100, 5000).float())
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    kept = (bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint64(0x1FFF)  # halves to even, 13 bits off
    assert_same_bits(round_to_float(x, TF32), kept.astype(np.uint32).view(np.float32))


@given(st.floats(width=32, allow_nan=False), st.sampled_from(list(REFERENCE)))
def test_a_float_is_the_nearest_point_and_signs_are_kept(x, form):
    ours = round_to_float(torch.tensor([x]), form).item()
    points = float_points(form)
    assert points.eq(ours).any()
    inside = max(-form.largest, min(form.largest, x))
    assert abs(ours - inside) == (points - inside).abs().min().item()
    assert math.copysign(1, ours) == math.copysign(1, x)


@pytest.mark.parametrize(("name", "form"), [("fp8", E4M3), ("fp8-e5m2", E5M2)])
def test_fp8_rows_fill_the_format(name, form):
    weight = normal(8, 48) * normal(8, 1, seed=1).exp() * 1e-3
    scale = weight.abs().amax(1, keepdim=True).numpy() / np.float32(form.largest)
    elements = reference_cast(weight.numpy() / scale, REFERENCE[form], form.largest)
    assert np.abs(elements).max(1).tolist() == [form.largest] * 8
    assert_same_bits(to_format(weight, name), elements * scale)


def test_unscaled_names_are_casts():
    weight = normal(4, 8)
    assert torch.equal(to_format(weight, "fp16"), weight.half().float())
    assert torch.equal(to_format(weight, "bfloat16"), weight.bfloat16().float())
    assert torch.equal(to_format(weight, "fp32"), weight)
    # inference libraries saturate; torch's own cast gives infinity
    assert to_format(torch.tensor([[1e5, -1e5]]), "fp16").tolist() == [[65504, -65504]]


# ---- block floats


def weights_for_blocks():
    weight = normal(8, 64) * torch.exp2(integers(-20, 4, 8, 4, 1).float()).expand(8, 4, 16).reshape(
        8, 64
    )
    weight[0, :32] = 0
    weight[1, 5] = 300.0
    weight[2] = 0.37
    return weight


@pytest.mark.parametrize("shrink", [1.0, 2.0**-110, 2.0**-130])
def test_mxfp4_follows_the_ocp_rule_with_reference_dtypes(shrink):
    weight = (weights_for_blocks() * shrink).numpy()  # the last ones meet E8M0's lower end
    blocks = weight.reshape(8, 2, 32).astype(np.float64)
    peak = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.where(peak == 0, 1, peak))) - 2  # emax of E2M1
    scale = np.exp2(np.clip(exponent, -127, 127))
    scale_read = scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(scale, scale_read)  # a power of two that E8M0 holds
    elements = reference_cast(blocks / scale, ml_dtypes.float4_e2m1fn, 6)
    assert_same_bits(
        to_format(torch.from_numpy(weight), "mxfp4"), (elements * scale).reshape(8, 64)
    )


def test_mxfp4_saturates_between_six_and_eight():
    block = torch.zeros(1, 32)
    block[0, :3] = torch.tensor([7.9, 5.0, 0.24])  # scale 2^(2 - 2) = 1
    assert to_format(block, "mxfp4")[0, :3].tolist() == [6, 4, 0]
    assert to_format(block / 8, "mxfp4")[0, :2].tolist() == [0.75, 0.5]


def test_nvfp4_follows_the_papers_procedure_with_reference_dtypes():
    # arXiv 2509.25149, appendix: decode scales of the tensor (FP32) and the block (E4M3).
    weight = weights_for_blocks().numpy()
    blocks = weight.reshape(8, 4, 16)
    peak = np.abs(blocks).max(-1, keepdims=True)
    tensor_scale = np.float32(peak.max()) / np.float32(6 * 448)
    scale = reference_cast(peak / np.float32(6) / tensor_scale, ml_dtypes.float8_e4m3fn, 448)
    assert scale.max() == 448
    step = scale * tensor_scale
    ratio = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
    elements = reference_cast(ratio, ml_dtypes.float4_e2m1fn, 6)
    assert_same_bits(to_format(torch.from_numpy(weight), "nvfp4"), (elements * step).reshape(8, 64))


def test_nvfp4_error_stays_within_what_its_two_roundings_allow():
    # FP4 rounds by at most 1 of 6 of the peak; the E4M3 scale moves it by at most 1/16.
    weight = normal(16, 64)
    peak = weight.reshape(16, 4, 16).abs().amax(-1, keepdim=True)
    error = (to_format(weight, "nvfp4") - weight).reshape(16, 4, 16).abs()
    assert (error <= peak * (1 / 6) * (1 + 1 / 16)).all()


# ---- NF4


def test_nf4_levels_are_the_quantiles_of_the_papers_appendix():
    # QLoRA, appendix E, with 1 - (1/30 + 1/32)/2 as the outermost probability: 8 quantiles
    # above 0 and 7 below it, divided by the largest.
    outer = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(outer + (0.5 - outer) * i / 8) for i in range(8)]
    below = [-quantile(outer + (0.5 - outer) * i / 7) for i in range(7)]
    levels = [level / max(above) for level in [*below, 0.0, *reversed(above)]]
    assert pytest.approx(levels, abs=3e-7) == NF4_LEVELS  # the paper's are in single precision


def test_nf4_takes_the_nearest_level_by_brute_force():
    weight = normal(4, 192) * 0.02
    blocks = weight.reshape(4, 3, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    points = torch.tensor(NF4_LEVELS)
    nearest = (blocks[..., None] / scale[..., None] - points).abs().argmin(-1)
    assert torch.equal(to_format(weight, "nf4"), (points[nearest] * scale).reshape(4, 192))
    assert torch.equal(store(weight, "nf4").parts["codes"].numbers, nearest)


def test_double_quantization_is_e4m3_about_the_mean():
    scales = normal(600).abs() + 0.5
    mean = np.float32(scales.double().mean())
    expected = []
    for chunk in np.split((scales.numpy() - mean), [256, 512]):
        outer = np.abs(chunk).max() / np.float32(448)
        elements = reference_cast(chunk / outer, ml_dtypes.float8_e4m3fn, 448)
        expected.append(elements * outer + mean)
    assert_same_bits(quantize_scales(scales).values, np.concatenate(expected))


def test_double_quantized_scales_are_within_a_sixteenth_of_their_distance_to_the_mean():
    scales = normal(512).abs() * 0.1
    read = quantize_scales(scales).values
    distance = (scales - scales.mean()).abs()
    assert ((read - scales).abs() <= distance / 16 + distance.max() / 448 * 2.0**-10 + 1e-7).all()


def test_a_double_quantized_scale_is_never_negative():
    # 0 lies between two steps of E4M3 about the mean; the nearer one may be below it.
    scales = torch.zeros(64, 256)
    scales[:, :8] = normal(64, 8).abs() + 1
    read = torch.stack([quantize_scales(row).values for row in scales])
    assert (read >= 0).all()
    assert (read[:, 8:] > 0).any()


def test_a_block_of_zeros_has_the_code_of_zero():
    weight = torch.zeros(1, 128)
    weight[0, 64:] = 1
    codes = store(weight, "nf4").parts["codes"].numbers.flatten()
    assert [NF4_LEVELS[code] for code in codes] == [0.0] * 64 + [1.0] * 64


def test_double_quantization_costs_little_error():
    weight = normal(64, 256) * 0.02
    plain = (to_format(weight, "nf4") - weight).square().mean().item()
    double = (to_format(weight, "nf4-dq") - weight).square().mean().item()
    assert 0.9 * plain < double < 1.1 * plain


# ---- Q4_1, ternary, binary


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-7, 1000.0])
def test_q4_1_agrees_bit_for_bit_with_gguf(magnitude, shift):
    weight = (normal(16, 96) + shift) * magnitude
    weight[0, :32] = magnitude  # a constant block
    weight[1, 3] = 30 * magnitude
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quants.quantize(weight.numpy(), kind)
    assert_same_bits(to_format(weight, "q4_1"), gguf.quants.dequantize(packed, kind))
    assert stored_bytes((16, 96), "q4_1") == packed.nbytes


def test_ternary_is_the_rounded_ratio_to_the_mean_magnitude():
    weight = normal(6, 40) * 0.05
    gamma = weight.double().abs().mean().item()
    stored = ternary(weight)
    assert stored.parts["scale"].numbers.item() == pytest.approx(gamma, rel=2.0**-10)
    # RoundClip(W / gamma, -1, 1): a half is the threshold
    clear = (weight.abs() / gamma - 0.5).abs() > 0.01
    expected = weight.sign() * (weight.abs() > gamma / 2)
    assert torch.equal(stored.parts["codes"].numbers[clear], expected[clear])


def test_a_ternary_weight_keeps_its_codes_and_loses_scale_by_its_zeros():
    codes = torch.tensor([[1.0, 0.0, -1.0, 0.0], [1.0, 1.0, 0.0, -1.0]])
    stored = ternary(codes * 0.5)
    assert torch.equal(stored.parts["codes"].numbers, codes)
    assert stored.parts["scale"].numbers.item() == 0.5 * 5 / 8  # absmean is no projection
    full = torch.where(codes == 0, -1.0, codes) * 0.5
    assert torch.equal(to_format(full, "ternary"), full)


def test_binary_has_the_scale_of_least_squares_in_each_row():
    weight = normal(5, 64) * normal(5, 1, seed=1).exp()
    ours = (binary(weight).values - weight).square().sum(1)
    for row, error in zip(weight, ours, strict=True):
        signs = torch.where(row < 0, -1.0, 1.0)
        solved = torch.linalg.lstsq(signs[:, None], row[:, None]).solution
        best = (signs * solved.item() - row).square().sum()
        assert best.item() * (1 - 1e-5) <= error.item() <= best.item() * (1 + 1e-5)


def test_a_zero_in_a_binary_row_becomes_plus():  # one bit has no third value
    weight = torch.tensor([[1.0, 0.0, -2.0, 1.0]])
    assert to_format(weight, "binary").tolist() == [[1.0, 1.0, -1.0, 1.0]]


# ---- integers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_bare_integer_is_symmetric_by_row_and_a_grouped_one_has_a_zero_point(bits):
    weight = normal(4, 64) + 0.5
    for name, group, symmetric in (
        (f"int{bits}", 64, True),
        (f"int{bits}-g16", 16, False),
        (f"int{bits}-g16-sym", 16, True),
    ):
        blocks = weight.reshape(4, -1, group).numpy().astype(np.float64)
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        if symmetric:
            lowest, span, steps = -(2 ** (bits - 1)), np.maximum(-low, high), 2 ** (bits - 1) - 1
        else:
            lowest, span, steps = 0, np.maximum(high, 0) - np.minimum(low, 0), 2**bits - 1
        half = (span / steps).astype(np.float16)
        scale = np.where(half < span / steps, np.nextafter(half, np.float16(np.inf)), half)
        scale = scale.astype(np.float64)
        zero = 0 if symmetric else np.rint(np.maximum(-low, 0) / scale)
        codes = np.clip(np.rint(blocks / scale) + zero, lowest, lowest + 2**bits - 1)
        expected = ((codes - zero) * scale).reshape(4, 64)
        np.testing.assert_allclose(to_format(weight, name), expected, rtol=1e-6, atol=0)


# ---- every codec


def weight_of_random_codes(name):
    """A weight that is made of codes and scales of that format, each as large as it may be.

    A fitted scale shows only if a group holds the extreme code that defines it, so each does.
    """
    form = load_format(name)
    rows, columns = 8, 512
    group = form.group or columns
    shape = (rows, columns // group, group)
    scale = torch.rand(rows, columns // group, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    scale = scale.half().float()
    points = grid_points(name)
    codes = points[integers(0, len(points) - 1, *shape)]
    codes[..., 0] = points[-1]
    if form.name.startswith("int"):
        if form.group and not name.endswith("-sym"):
            codes[..., 1] = 0
            codes = codes - integers(0, len(points) - 1, *shape[:2], 1, seed=2)
        else:
            codes = codes.clamp(min=-points[-1])  # the range is that of the highest code
    elif form.name in ("fp16", "bf16", "tf32"):
        scale = torch.ones(1)
    elif form.name in ("ternary", "ternary-ideal"):
        codes, scale = codes[codes != 0][:2048].reshape(8, 1, 256), torch.tensor([0.37]).half()
    elif form.name == "mxfp4":
        scale = torch.exp2(integers(-30, 5, *shape[:2], 1).float())
    elif form.name == "nvfp4":
        block_points = float_points(E4M3)[127:]  # its numbers above 0
        scale = block_points[integers(0, len(block_points) - 1, *shape[:2], 1)]
        scale[0, 0] = 448
        scale = scale * 2.0**-11
    elif form.name == "nf4-dq":
        # 64 scales about a mean of 1; pairs of opposite sign keep that mean.
        half = float_points(E4M3)[integers(0, 252, 32)]
        half[0] = 448
        scale = (1 + torch.cat([half, -half]) * 2.0**-10).reshape(*shape[:2], 1)
    elif form.name == "q4_1":
        minimum = integers(-300, 300, *shape[:2], 1, seed=3) / 256
        codes[..., 1] = 0
        scale = integers(1, 100, *shape[:2], 1, seed=4) / 512
        return (codes * scale + minimum).reshape(rows, columns).float()
    return (codes.float() * scale.float()).reshape(rows, -1)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_weight_made_of_random_codes_and_scales_comes_back_equal(name):
    weight = normal(8, 64) if name == "fp32" else weight_of_random_codes(name)
    assert weight.unique().numel() > 1
    assert torch.equal(to_format(weight, name), weight)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_what_is_stored_fits_its_bits_and_gives_the_values(name):
    weight = normal(8, 256) * 0.02
    parts = store(weight, name).parts
    form = load_format(name)
    codes = parts["codes" if "codes" in parts else "elements"]
    assert codes.numbers.numel() == weight.numel()
    assert codes.bits == pytest.approx(form.element_bits, rel=1e-12)
    assert codes.numbers.unique().numel() <= max(2**form.element_bits, 3)
    if form.name not in ("fp32", "nf4", "nf4-dq"):  # NF4's codes are the indices of its points
        assert torch.isin(codes.numbers.double(), grid_points(name)).all()
    for part_name, part in parts.items():
        if part_name in ("codes", "elements"):
            continue
        numbers = part.numbers.numpy()
        if part_name == "zero":
            held = np.isin(numbers, np.arange(2**part.bits))
        else:
            eight = ml_dtypes.float8_e8m0fnu if name == "mxfp4" else ml_dtypes.float8_e4m3fn
            dtype = {8: eight, 16: np.float16, 32: np.float32}[part.bits]
            held = numbers.astype(dtype).astype(np.float32) == numbers
        assert held.all(), part_name


# Bytes beyond Format.bits: what the formula says it neglects, for d_out rows.
NEGLECTED = {
    **{f"int{bits}": lambda d_out: 2 * d_out for bits in (2, 3, 4, 8)},  # an FP16 scale a row
    "binary": lambda d_out: 2 * d_out,
    "fp8": lambda d_out: 4 * d_out,  # an FP32 scale a row
    "fp8-e5m2": lambda d_out: 4 * d_out,
    "ternary": lambda d_out: 2,  # an FP16 scale a tensor
    "ternary-ideal": lambda d_out: 2,
    "nvfp4": lambda d_out: 4,  # an FP32 scale a tensor
    "nf4-dq": lambda d_out: 4,  # the mean of the scales
}


@pytest.mark.parametrize("name", EVERY_NAME)
def test_stored_bytes_are_format_bits_and_exactly_what_they_neglect(name):
    d_out, d_in = 64, 256  # 256 blocks of NF4: one full group of double quantization
    predicted = Fraction(load_format(name).bits) * d_out * d_in / 8
    neglected = NEGLECTED.get(name, lambda d_out: 0)(d_out)
    assert stored_bytes((d_out, d_in), name) == math.ceil(predicted) + neglected


def test_bits_counted_by_hand_for_one_row():
    assert stored_bytes((1, 128), "int4-g128") == 64 + 2 + 1  # half a byte of zero point
    assert stored_bytes((1, 10), "int3") == 4 + 2
    assert stored_bytes((1, 64), "nvfp4") == 32 + 4 + 4
    assert stored_bytes((1, 64), "mxfp4") == 32 + 2
    assert stored_bytes((2, 64), "nf4-dq") == 64 + 2 + 4 + 4


@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-8, 1.0, 3e4, 1e30, 3.4e38])
def test_constants_zeros_and_outliers_stay_finite_at_any_magnitude(name, magnitude):
    weight = torch.full((4, 256), magnitude)
    weight[1] = 0
    weight[2] = -magnitude
    weight[3, ::2] = -magnitude
    weight[3, 7] = magnitude * 1e-3
    read = to_format(weight, name)
    assert torch.isfinite(read).all()
    if not name.startswith(("ternary", "binary")):
        assert (read[1] == 0).all()
    if magnitude in (1.0, 3e4):
        share = {"nf4-dq": 0.05, "mxfp4": 0.25, "nvfp4": 1 / 16}.get(name, 2.0**-7)
        if not name.startswith("ternary"):  # its one scale is the mean of all
            constant = weight[[0, 2]]
            assert ((read[[0, 2]] - constant).abs() <= share * magnitude).all()


@pytest.mark.parametrize("name", [n for n in EVERY_NAME if not load_format(n).group])
def test_a_single_element_is_a_weight(name):
    for value in (0.0, -0.37):
        read = to_format(torch.tensor([[value]]), name)
        assert read.item() == pytest.approx(value, rel=2.0**-7)


def test_zeros_stay_zero_in_binary_rows_and_ternary_weights():
    weight = normal(3, 8)
    weight[1] = 0
    assert (to_format(weight, "binary")[1] == 0).all()
    assert (to_format(weight, "ternary")[1] == 0).all()
    assert (to_format(torch.zeros(2, 8), "ternary") == 0).all()


@settings(max_examples=60)
@given(st.sampled_from(EVERY_NAME), st.integers(0, 1000), st.integers(-12, 4))
def test_a_power_of_two_passes_through_every_scaled_format(name, seed, power):
    # Scaling by 2^p scales what is read, wherever neither end of a scale's range is met.
    weight = normal(2, 64, seed=seed)
    if "int" in name or name in ("binary", "ternary", "ternary-ideal", "q4_1"):
        power = max(power, -6)  # FP16 scales lose bits below 2^-14
    factor = 2.0**power
    assert torch.equal(to_format(weight * factor, name), to_format(weight, name) * factor)


def test_errors_on_a_normal_weight_fall_in_the_known_order():
    weight = normal(64, 256) * 0.02
    error = {n: (to_format(weight, n) - weight).square().mean().item() for n in EVERY_NAME}
    for better, worse in (
        ("tf32", "bf16"),
        ("fp16", "bf16"),
        ("bf16", "fp8"),
        ("fp8", "fp8-e5m2"),  # a mantissa bit is a factor of 4
        ("int8", "fp8"),  # a normal weight is what uniform codes fit
        ("int8-g32", "int8"),
        ("int4-g32", "int4"),
        ("nf4", "mxfp4"),
        ("nvfp4", "mxfp4"),
        ("int3", "int2"),
        ("ternary", "binary"),
    ):
        assert error[better] < error[worse], (better, worse)
    assert error["fp8-e5m2"] / error["fp8"] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_codec_does_not_write_to_its_weight_and_takes_views_and_parameters(name):
    weight = normal(64, 4)
    before = weight.clone()
    expected = to_format(weight.t().contiguous(), name)
    assert torch.equal(to_format(weight.t(), name), expected)
    assert torch.equal(to_format(torch.nn.Parameter(weight.t()), name), expected)
    assert torch.equal(to_format(weight.t().double(), name), expected)
    assert torch.equal(weight, before)
    assert expected.dtype == torch.float32
    expected.zero_()  # what comes back is not the weight itself
    assert torch.equal(weight, before)


def test_fp32_returns_a_copy():
    weight = normal(2, 4)
    assert to_format(weight, "fp32").data_ptr() != weight.data_ptr()


# ---- what is drawn, and bad arguments


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("int4", list(range(-8, 8))),
        ("int4-g128", list(range(16))),
        ("int2-g8-sym", [-2, -1, 0, 1]),
        ("int1", [-1, 1]),
        ("ternary-ideal", [-1, 0, 1]),
        ("q4_1", list(range(16))),
        ("NVFP4", [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("nf4-dq", list(NF4_LEVELS)),
    ],
)
def test_the_points_of_a_grid(name, points):
    assert grid_points(name).tolist() == points


def test_the_points_of_both_fp8_formats_are_counted():
    # E4M3 has 2 NaN and 2 zeros; E5M2 6 NaN, 2 infinities and 2 zeros.
    assert len(grid_points("fp8")) == len(grid_points("fp8-e4m3")) == 256 - 2 - 1
    assert len(grid_points("fp8-e5m2")) == 256 - 8 - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: to_format(w, "int5"), "unknown number format 'int5'"),
        (lambda w: to_format(w, None), "named by a string"),
        (lambda w: to_format(w, "mxfp4"), "group is 32; .* divisor of d_in = 12"),
        (lambda w: to_format(w, "int4-g128"), "group is 128"),
        (lambda w: to_format(w[0], "int4"), r"weight is \(12,\)"),
        (lambda w: to_format(w[:0], "fp16"), r"weight is \(0, 12\)"),
        (lambda w: to_format(w * float("nan"), "nf4"), "group is 64"),
        (lambda w: to_format(w * float("nan"), "bf16"), "infinity or a NaN"),
        (lambda w: to_format(w / 0, "fp8"), "infinity or a NaN"),
        (lambda w: grid_points("fp32"), "fp32 has 2"),
        (lambda w: grid_points("fp4"), "unknown number format"),
        (lambda w: stored_bytes((4,), "int4"), r"shape is \(4,\); allowed: \(d_out, d_in\)"),
        (lambda w: stored_bytes((0, 4), "int4"), "d_out is 0"),
        (lambda w: stored_bytes((2, 2.5), "int4"), "d_in is 2.5"),
        (lambda w: stored_bytes(8, "int4"), "shape is 8"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(torch.ones(2, 12))
    assert "\n" not in str(error.value)
