"""Low rank by the SVD: Eckart and Young, the factors' layers, and pivoted rows."""

import numpy as np
import pytest
import torch

from rooflm.lab.calibrate import calibration_rows, inner_linear, visit_blocks
from rooflm.lab.factorize.apply import factorize
from rooflm.lab.factorize.pivot import (
    PivotedLinear,
    pivot,
    pivot_numbers,
    pivot_rank_of_share,
)
from rooflm.lab.factorize.svd import (
    FactorizedLinear,
    Factors,
    decompose,
    factor_numbers,
    random_factors,
    tails,
    truncate,
)
from rooflm.lab.model import Config
from rooflm.roofline.low_rank import break_even_rank

SHAPES = ((24, 16), (16, 24), (20, 20))


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared(x):
    return x.double().square().sum().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_error_is_the_tail_of_the_singular_values(shape):
    weight = matrix(*shape)
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)  # falling
    found = decompose(weight)
    for rank in range(1, min(shape) + 1):
        error = squared(weight - truncate(found, rank).weight)
        assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4, abs=1e-8)
        assert tails(found.singular)[rank].item() == pytest.approx(
            (singular[rank:] ** 2).sum(), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_matrix_of_the_rank_is_nearer(shape):
    """Alternating least squares from random starts, and the control, never beat the cut."""
    weight = matrix(*shape).double()
    for rank in (1, 5, 11):
        best = squared(weight - truncate(decompose(weight), rank).weight)
        for seed in range(5):
            right = matrix(rank, shape[1], seed=seed).double()
            for _ in range(20):
                left = torch.linalg.lstsq(right.T, weight.T).solution.T
                right = torch.linalg.lstsq(left, weight).solution
            assert squared(weight - left @ right) >= best * (1 - 1e-5)
            assert squared(weight - random_factors(weight, rank, seed).weight) > best


def test_random_directions_keep_their_share_of_the_norm():
    for shape in ((96, 32), (32, 96)):
        weight = matrix(*shape)
        left = [squared(weight - random_factors(weight, 8, s).weight) for s in range(60)]
        assert sum(left) / 60 / squared(weight) == pytest.approx(1 - 8 / 32, abs=0.02)
        one = random_factors(weight, 8, 0)
        assert one.a.shape == (8, shape[1]) and one.b.shape == (shape[0], 8)


def test_random_factors_are_the_best_behind_their_directions():
    weight = matrix(40, 20).double()
    found = random_factors(weight, 6)
    best = torch.linalg.lstsq(found.a.double().T, weight.T).solution.T
    assert torch.allclose(best, found.b.double(), atol=1e-4)


def test_factors_share_the_singular_values_roots():
    found = decompose(matrix(24, 16))
    a, b = truncate(found, 7)
    assert torch.allclose(a.norm(dim=1).double(), found.singular[:7].sqrt(), atol=1e-5)
    assert torch.allclose(b.norm(dim=0).double(), found.singular[:7].sqrt(), atol=1e-5)


def test_numbers_break_even_where_the_roofline_says():
    for d_out, d_in in ((256, 256), (768, 256), (128, 256), (49, 31)):
        last = int(break_even_rank(d_in, d_out))
        assert factor_numbers(d_out, d_in, last) <= d_out * d_in
        assert factor_numbers(d_out, d_in, last + 1) > d_out * d_in


def test_two_layers_compute_what_their_product_does():
    weight, x = matrix(24, 16), matrix(3, 5, 16, seed=1)
    layer = FactorizedLinear(truncate(decompose(weight), 16))
    assert torch.allclose(layer(x), x @ weight.T, atol=2e-2)  # full rank: FP16 rounding alone
    low = FactorizedLinear(truncate(decompose(weight), 4))
    assert torch.allclose(low(x), x @ low.weight.T, atol=1e-5)
    assert sum(p.numel() for p in low.parameters()) == 4 * (24 + 16)
    assert all(torch.equal(p, p.half().float()) for p in low.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_pivoting_changes_nothing_and_stores_less(shape):
    d_out, d_in = shape
    x = matrix(7, d_in, seed=3)
    for rank in (1, 6, min(shape) - 1):
        factors = truncate(decompose(matrix(*shape)), rank)
        found = pivot(factors)
        assert torch.allclose(found.weight, factors.weight, atol=1e-4)
        layer = PivotedLinear(found)
        assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-5)
        assert torch.allclose(layer.weight, factors.weight, atol=1e-2)  # FP16
        held = sum(p.numel() for p in layer.parameters()) + len(found.order)
        assert held == pivot_numbers(d_out, d_in, rank)
        assert held - d_out == factor_numbers(d_out, d_in, rank) - rank**2
        assert held - d_out < d_out * d_in
        assert sorted(found.order.tolist()) == list(range(d_out))
        assert torch.allclose(found.rows, factors.weight[found.order[:rank]], atol=1e-5)


def test_pivots_keep_the_coefficients_small():
    factors = truncate(decompose(matrix(200, 100)), 50)
    assert pivot(factors).rest.abs().max() < 5
    first = torch.linalg.solve(factors.b[:50], factors.b[50:], left=False)  # any rows would do
    assert pivot(factors).rest.norm() < 0.5 * first.norm()


def test_pivot_rank_is_the_largest_that_the_share_allows():
    for d_out, d_in in ((256, 256), (768, 256), (256, 768), (128, 256)):
        for share in (0.9, 0.5, 0.2):
            rank = pivot_rank_of_share(d_out, d_in, share)
            assert pivot_numbers(d_out, d_in, rank) <= share * d_out * d_in
            assert pivot_numbers(d_out, d_in, rank + 1) > share * d_out * d_in


def test_a_factorized_model_is_the_model_with_the_products(sharp):
    model = sharp(Config(64, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48))
    tokens = torch.arange(40).view(2, 20)
    names = [f"layers.{i}.{x}_proj" for i in range(2) for x in ("q", "v", "down")]
    factors, merged = {}, sharp(model.config)
    for name in names:
        block, kind = int(name[7]), name[9:]
        weight = inner_linear(model.layers[block], kind).weight
        factors[name] = truncate(decompose(weight), 6)
        plain = inner_linear(merged.layers[block], kind).weight
        plain.copy_(factors[name].b.half().float() @ factors[name].a.half().float())
    made = factorize(model, factors)
    assert torch.allclose(made.model(tokens), merged(tokens), atol=1e-3)
    assert not torch.allclose(model(tokens), merged(tokens), atol=1e-1)
    kept = 32 * 32 * 2 * 2 + 16 * 32 * 2 + 2 * 48 * 32 * 2 - 32 * 32 * 2
    assert made.bits == 16 * (kept + 2 * 6 * (32 + 32 + 16 + 32 + 48 + 32))
    pivoted = factorize(model, factors, pivoted=True)
    assert torch.allclose(pivoted.model(tokens), merged(tokens), atol=0.2)
    assert pivoted.bits == made.bits + 16 * (2 * (32 + 16 + 32) - 6 * 36)


def test_a_factorized_layer_is_not_taken_for_one_matrix(sharp):
    model = sharp(Config(64, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48))
    weight = model.layers[0].q_proj.weight
    made = factorize(model, {"layers.0.q_proj": truncate(decompose(weight), 4)}).model
    with pytest.raises(AttributeError, match="linear"):
        inner_linear(made.layers[0], "q_proj")
    with pytest.raises(AttributeError, match="linear"):
        next(visit_blocks(made, calibration_rows(torch.arange(64), 1, 8)))
    with pytest.raises(ValueError, match="q_proj is a FactorizedLinear"):
        factorize(made, {})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rank is 17; allowed: a whole number from 1 to 16"):
        truncate(decompose(matrix(24, 16)), 17)
    with pytest.raises(ValueError, match="rank is 0"):
        random_factors(matrix(24, 16), 0)
    with pytest.raises(ValueError, match=r"\(24,\); allowed: \(d_out, d_in\)"):
        decompose(matrix(24))
    with pytest.raises(ValueError, match="infinity or a NaN"):
        decompose(matrix(4, 4) / 0)
    with pytest.raises(ValueError, match="share is 1"):
        pivot_rank_of_share(4, 4, 1.5)
    twice = torch.ones(4, 2)
    with pytest.raises(ValueError, match="rank 1, not 2"):
        pivot(Factors(matrix(2, 6), twice))
