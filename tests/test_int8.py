"""LLM.int8(): the integer product by Python's integers, and what taking outliers out buys."""

import math

import numpy
import pytest
import torch

from rooflm.lab.quantize.int8 import Int8Linear, int8_product, vectorwise_product


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp16_not_below(x):
    half = numpy.float16(x)
    return numpy.nextafter(half, numpy.float16(numpy.inf)) if float(half) < x else half


def codes_by_hand(vector):
    """Scale and codes of one vector: absmax over 127, halves to even, in Python numbers."""
    largest = numpy.float32(max(abs(v) for v in vector))
    scale = float(fp16_not_below(float(largest / numpy.float32(127))))
    return scale, [round(float(numpy.float32(v) / numpy.float32(scale))) for v in vector]


def test_the_product_is_the_integer_product_times_both_scales():
    x, weight = random(5, 37), random(4, 37, seed=1)
    found = vectorwise_product(x, weight)
    for i, token in enumerate(x.tolist()):
        for j, row in enumerate(weight.tolist()):
            (s, a), (t, b) = codes_by_hand(token), codes_by_hand(row)
            whole = sum(p * q for p, q in zip(a, b, strict=True))
            assert all(abs(code) <= 127 for code in a + b)
            assert found[i, j].item() == pytest.approx(s * t * whole, rel=1e-7)


def test_accumulation_is_exact_where_float32_would_round():
    # Codes as they are (scale 1); partial sums near 10^9, of which float32 holds 24 bits.
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(64, 128, (4, 200_000), generator=generator)
    weight = torch.randint(64, 128, (3, 200_000), generator=generator)
    weight[:, 100_000:] *= -1
    x[:, 0], weight[:, 0] = 127, 127
    whole = torch.tensor([[(token * row).sum() for row in weight] for token in x])
    assert whole.abs().max() < 2**24 < (x[0] * weight[0]).cumsum(0).max()
    assert torch.equal(vectorwise_product(x.float(), weight.float()), whole.float())


def test_each_output_is_within_half_a_step_of_both_operands():
    x, weight = random(16, 96), random(24, 96, seed=2) * 0.05
    up = 1 + 2**-10  # a scale is rounded up to FP16
    s = x.abs().amax(1, keepdim=True).double() / 127 * up
    t = weight.abs().amax(1, keepdim=True).double() / 127 * up
    exact = x.double() @ weight.double().T
    bound = t.T / 2 * x.abs().double().sum(1, keepdim=True)
    bound = bound + s / 2 * weight.abs().double().sum(1) + 96 * s * t.T / 4
    error = (vectorwise_product(x, weight).double() - exact).abs()
    assert (error <= bound).all()
    assert (error > 0).any()


def test_with_all_columns_outliers_it_is_the_unquantized_product():
    x, weight = random(6, 40), random(8, 40, seed=3)
    y, outliers = int8_product(x, weight, threshold=0.0)
    assert outliers.all()
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_without_outliers_it_is_the_vector_wise_product():
    x, weight = random(6, 40), random(8, 40, seed=4)
    y, outliers = int8_product(x, weight, threshold=math.inf)
    assert not outliers.any()
    assert torch.equal(y, vectorwise_product(x, weight))


def test_a_column_is_an_outlier_if_any_token_reaches_the_threshold():
    x = torch.zeros(2, 3, 5)
    x[0, 1, 2], x[1, 2, 4], x[0, 0, 0] = -6.0, 6.5, 5.99
    assert int8_product(x, torch.ones(3, 5)).outliers.tolist() == [False, False, True, False, True]


def test_outlier_columns_do_not_widen_the_scale_of_the_others():
    x, weight = random(8, 64), random(16, 64, seed=5) * 0.1
    weight[:, 7] = 0.0  # the outliers themselves contribute nothing here
    calm = vectorwise_product(x.clone().index_fill_(1, torch.tensor([7]), 0), weight)
    x[:, 7] = 80.0
    y, outliers = int8_product(x, weight)
    assert outliers.nonzero().flatten().tolist() == [7]
    assert torch.equal(y, calm)


def test_decomposition_mends_what_outliers_do_to_the_vector_wise_product():
    x, weight = random(64, 128), random(32, 128, seed=6) * 0.1
    exact_calm = x.double() @ weight.double().T
    calm = (vectorwise_product(x, weight) - exact_calm).square().mean()
    x[:, [3, 77]] *= 60
    exact = x.double() @ weight.double().T
    naive = (vectorwise_product(x, weight) - exact).square().mean()
    mended = (int8_product(x, weight).y - exact).square().mean()
    assert naive > 100 * calm
    assert mended < 1.5 * calm


def test_removing_as_many_random_columns_mends_nothing():  # the control
    x, weight = random(64, 128), random(32, 128, seed=6) * 0.1
    x[:, [3, 77]] *= 60
    exact = x.double() @ weight.double().T
    others = torch.tensor([10, 90])
    high = x[:, others].double() @ weight[:, others].double().T
    control = vectorwise_product(x.index_fill(1, others, 0), weight) + high
    naive = (vectorwise_product(x, weight) - exact).square().mean()
    assert (control - exact).square().mean() > 0.9 * naive


def test_tokens_of_zeros_and_rows_of_zeros_give_zeros():
    y, outliers = int8_product(torch.zeros(2, 3), torch.zeros(4, 3))
    assert not outliers.any() and torch.equal(y, torch.zeros(2, 4))


def test_leading_dimensions_are_kept_and_arguments_left_alone():
    x, weight = random(2, 3, 16) * 5, random(8, 16, seed=7)
    before = x.clone(), weight.clone()
    y = int8_product(x, weight).y
    assert y.shape == (2, 3, 8) and y.dtype == torch.float32
    flat = int8_product(x.reshape(6, 16), weight).y
    assert torch.equal(y.reshape(6, 8), flat)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


def test_the_layer_computes_the_product_in_the_type_of_its_input():
    x, weight = random(4, 16) * 4, random(8, 16, seed=8)
    layer = Int8Linear(weight, threshold=3.0)
    assert torch.equal(layer(x), int8_product(x, weight, 3.0).y)
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "weight", "threshold", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 6.0, "x is (2, 3) and weight (4, 5)"),
        (torch.ones(2, 3), torch.ones(3), 6.0, "weight (3,)"),
        (torch.ones(0, 3), torch.ones(4, 3), 6.0, "not empty"),
        (torch.ones(2, 3), torch.ones(4, 3), -1.0, "threshold is -1.0; allowed: 0 or more"),
        (torch.ones(2, 3), torch.ones(4, 3), math.nan, "threshold is nan"),
        (torch.full((2, 3), math.nan), torch.ones(4, 3), 6.0, "NaN"),
    ],
)
def test_bad_arguments_are_named_in_one_line(x, weight, threshold, message):
    with pytest.raises(ValueError) as caught:
        int8_product(x, weight, threshold)
    assert message in str(caught.value) and "\n" not in str(caught.value)
