"""Low rank by what a layer reads: output errors against independent optima."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, layer_inputs
from rooflm.lab.factorize.aware import (
    asvd,
    cholesky,
    errors,
    output_gradients,
    two_sided,
    whitened,
)
from rooflm.lab.factorize.svd import decompose, tails, truncate
from rooflm.lab.model import Config


def layer(d_out=12, d_in=10, tokens=400, seed=0):
    """A weight and inputs whose channels are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, d_in, generator=generator) @ torch.randn(
        d_in, d_in, generator=generator
    )
    inputs = mixed * torch.logspace(-1, 1, d_in)[torch.randperm(d_in, generator=generator)]
    return torch.randn(d_out, d_in, generator=generator), inputs


def output_error(weight, other, inputs):
    """From the outputs themselves, the mean over tokens."""
    return (inputs.double() @ (weight - other).double().T).square().sum(1).mean().item()


def test_output_error_is_the_tail_of_the_whitened_singular_values():
    weight, x = layer()
    hessian = x.T @ x / len(x)
    found = whitened(weight, hessian)
    # Independent: the singular values of the outputs' part that depends on W, X W^T / sqrt(n).
    singular = np.linalg.svd(
        (x.double() @ weight.double().T).numpy() / len(x) ** 0.5, compute_uv=False
    )
    for rank in range(1, 10):
        error = output_error(weight, truncate(found, rank).weight, x)
        assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-3)
        assert tails(found.singular)[rank].item() == pytest.approx(error, rel=1e-3)


def test_errors_are_parts_of_the_weight_and_of_its_outputs():
    weight, x = layer()
    other = weight + 0.1 * layer(seed=1)[0]
    of_weight, of_outputs = errors(weight, other, x.T @ x / len(x))
    assert of_weight == pytest.approx(((other - weight).norm() / weight.norm()).item() ** 2)
    whole = output_error(weight, 0 * weight, x)
    assert of_outputs == pytest.approx(output_error(weight, other, x) / whole, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_whitening_is_never_worse_on_its_inputs(seed):
    """Than the plain SVD, than ASVD at any alpha, than reduced rank regression by descent."""
    weight, x = layer(seed=seed)
    hessian, mean_abs = x.T @ x / len(x), x.abs().mean(0)
    for rank in (2, 5, 8):
        best = output_error(weight, truncate(whitened(weight, hessian), rank).weight, x)
        others = [decompose(weight)] + [asvd(weight, mean_abs, a) for a in (0.25, 0.5, 1.0)]
        for other in others:
            assert best <= output_error(weight, truncate(other, rank).weight, x) * (1 + 1e-5)


def test_alternating_regression_reaches_the_same_error_and_no_less():
    weight, x = layer()
    y, hessian = (x @ weight.T).double(), x.T @ x / len(x)
    best = output_error(weight, truncate(whitened(weight, hessian), 3).weight, x)
    a = torch.randn(3, 10, generator=torch.Generator().manual_seed(5)).double()
    for _ in range(200):  # y ~ (x a^T) b^T, each factor by least squares in turn
        b = torch.linalg.lstsq(x.double() @ a.T, y).solution.T
        a = torch.linalg.lstsq(x.double(), y @ torch.linalg.pinv(b).T).solution.T
    error = output_error(weight, (b @ a).float(), x)
    assert error == pytest.approx(best, rel=1e-3) and error >= best * (1 - 1e-5)


def test_alpha_zero_is_the_plain_svd_and_equal_inputs_change_nothing():
    weight, x = layer()
    plain = truncate(decompose(weight), 4).weight
    found = truncate(asvd(weight, x.abs().mean(0), 0.0), 4).weight
    assert torch.allclose(found, plain, atol=1e-5)
    even = truncate(asvd(weight, torch.full((10,), 3.0), 0.5), 4).weight
    assert torch.allclose(even, plain, atol=1e-5)
    white = truncate(whitened(weight, 7 * torch.eye(10)), 4).weight
    assert torch.allclose(white, plain, atol=1e-5)


def test_asvd_is_optimal_where_inputs_are_uncorrelated_and_alpha_is_one():
    """Then S is the root of H up to a factor, if all channels have one distribution's shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 10, generator=generator) * torch.logspace(-1, 1, 10)
    weight = torch.randn(12, 10, generator=generator)
    ours = output_error(weight, truncate(asvd(weight, x.abs().mean(0), 1.0), 5).weight, x)
    best = output_error(weight, truncate(whitened(weight, x.T @ x / len(x)), 5).weight, x)
    plain = output_error(weight, truncate(decompose(weight), 5).weight, x)
    assert ours == pytest.approx(best, rel=0.01) and plain > 1.5 * best


def test_full_rank_gives_the_weight_back():
    weight, x = layer()
    hessian = x.T @ x / len(x)
    g = torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    for found in (
        asvd(weight, x.abs().mean(0)),
        whitened(weight, hessian),
        two_sided(weight, hessian, g.T @ g / 300),
    ):
        assert torch.allclose(truncate(found, 10).weight, weight, atol=1e-4)
        assert (found.singular.diff() <= 0).all()


def test_two_sided_error_is_its_tail_and_the_least():
    weight, x = layer()
    g = torch.randn(500, 12, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 12)
    hessian, gradients = x.T @ x / len(x), g.T @ g / len(g)

    def cost(other):
        change = (weight - other).double()
        return torch.trace(gradients.double() @ change @ hessian.double() @ change.T).item()

    found = two_sided(weight, hessian, gradients)
    for rank in (2, 5, 8):
        ours = cost(truncate(found, rank).weight)
        assert ours == pytest.approx(tails(found.singular)[rank].item(), rel=1e-3)
        for other in (decompose(weight), whitened(weight, hessian)):
            assert ours <= cost(truncate(other, rank).weight) * (1 + 1e-6)
    one = two_sided(weight, hessian, torch.eye(12))
    assert torch.allclose(one.singular, whitened(weight, hessian).singular, rtol=1e-5)


def test_output_gradients_are_those_of_each_token(sharp):
    model = sharp(Config(40, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24))
    rows = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    found = output_gradients(model, rows)
    assert set(found) == {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert not any(p.requires_grad for p in model.parameters())
    # Independent: dL/dW = sum_t g_t x_t^T, so that one token's step along x gives g itself; here
    # g is taken by differences of the loss in the layer's output, through a bias for one token.
    name, index, kind = "layers.1.up_proj", 1, "up_proj"
    gram = torch.zeros(24, 24, dtype=torch.float64)
    double = model.double()
    for row in rows:
        for token in range(5):
            g = torch.zeros(24, dtype=torch.float64)
            for channel in range(24):
                sides = []
                for step in (1e-5, -1e-5):
                    bump = torch.zeros(1, 5, 24, dtype=torch.float64)
                    bump[0, token, channel] = step

                    def shift(module, inputs, output, bump=bump):
                        return output + bump

                    layer_of = getattr(double.layers[index], kind)
                    handle = layer_of.register_forward_hook(shift)
                    with torch.no_grad():
                        logits = double(row[None, :-1])[0]
                    handle.remove()
                    sides.append(functional.cross_entropy(logits, row[1:], reduction="sum").item())
                g[channel] = (sides[0] - sides[1]) / 2e-5
            gram += torch.outer(g, g)
    expected = gram / 10
    assert torch.allclose(found[name].double(), expected, atol=1e-4 * expected.abs().max())


def test_statistics_of_the_bench_are_what_the_layers_read(sharp):
    """The Hessian that `whitened` is given, from the inputs themselves."""
    model = sharp(Config(40, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=24))
    rows = torch.randint(0, 40, (4, 30), generator=torch.Generator().manual_seed(0))
    x = layer_inputs(model, rows)["layers.0.gate_proj"]
    weight = model.layers[0].gate_proj.weight
    found = whitened(weight, x.T @ x / len(x))
    error = output_error(weight, truncate(found, 5).weight, x)
    assert error == pytest.approx(tails(found.singular)[5].item(), rel=1e-2)


def test_a_silent_channel_costs_nothing_and_breaks_nothing():
    weight, x = layer()
    x[:, 3] = 0
    found = whitened(weight, x.T @ x / len(x))
    error = output_error(weight, truncate(found, 9).weight, x)
    assert torch.isfinite(truncate(found, 9).weight).all()
    assert error < 1e-4 * output_error(weight, 0 * weight, x)
    assert torch.isfinite(truncate(asvd(weight, x.abs().mean(0)), 5).weight).all()


def test_a_channel_of_huge_inputs_does_not_drown_the_others():
    """Sums in float32, of fewer independent tokens than channels, with one channel 1,000 times."""
    weight, x = layer(tokens=400)
    x[:, 3] = 1000 * x[:, 0] + 0.1 * x[:, 3]
    hessian = x.T @ x / len(x)
    lower = cholesky(hessian)
    root = hessian.diagonal().double().sqrt()
    apart = (lower @ lower.T - hessian.double()) / torch.outer(root, root)
    assert apart.abs().max() < 1e-5
    few = x[:6].T @ x[:6] / 6  # of rank 6, not 10
    found = whitened(weight, few)
    cut = truncate(found, 6).weight
    assert torch.isfinite(cut).all()
    assert output_error(weight, cut, x[:6]) < 1e-4 * output_error(weight, 0 * weight, x[:6])


def test_bad_input_is_named():
    weight, x = layer()
    with pytest.raises(ValueError, match="alpha is -1"):
        asvd(weight, x.abs().mean(0), -1)
    with pytest.raises(ValueError, match="mean_abs"):
        asvd(weight, torch.ones(3))
    with pytest.raises(ValueError, match="hessian"):
        whitened(weight, torch.eye(3))
    with pytest.raises(ValueError, match="no Cholesky factor"):
        cholesky(-torch.eye(3))
