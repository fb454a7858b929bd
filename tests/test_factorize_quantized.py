"""Factors in few bits, corrections of quantized weights, and LASER's cuts."""

import pytest
import torch

from rooflm.lab.factorize.laser import SHARES, Cut, correct_tokens, laser, reduce_rank, scan
from rooflm.lab.factorize.pivot import pivot
from rooflm.lab.factorize.quantized import correct, fit_second, quantize_factors
from rooflm.lab.factorize.svd import decompose, tails, truncate
from rooflm.lab.model import Config
from rooflm.lab.quantize.gptq import output_error
from rooflm.lab.quantize.grids import round_to_nearest


def layer(d_out=48, d_in=64, tokens=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=generator) @ torch.randn(
        d_in, d_in, generator=generator
    )
    return torch.randn(d_out, d_in, generator=generator), x


def test_the_refitted_factor_is_least_squares_on_the_outputs():
    weight, x = layer()
    a = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    found = fit_second(weight, a, x.T @ x / len(x))
    best = torch.linalg.lstsq((x @ a.T).double(), (x @ weight.T).double()).solution.T
    assert torch.allclose(found.double(), best, rtol=1e-3, atol=1e-3 * best.abs().max())


@pytest.mark.parametrize("pivoted", [False, True])
def test_bits_count_codes_scales_zeros_and_places(pivoted):
    weight, x = layer()
    factors = truncate(decompose(weight), 16)
    given = pivot(factors) if pivoted else factors
    coded = quantize_factors(given, weight, x.T @ x / len(x), 4, "round", group=32)
    second = 48 - 16 if pivoted else 48
    expected = 4 * (16 * 64 + second * 16)  # codes
    expected += 20 * (16 * 2 + second)  # FP16 scales and 4-bit zeros: 2 groups a row, then 1
    assert coded.bits == expected + (16 * 48 if pivoted else 0)
    assert coded.factors.weight.shape == weight.shape
    for part in coded.factors[:2]:
        for group in part.split(32, 1):
            assert max(len(row.unique()) for row in group) <= 16


@pytest.mark.parametrize("pivoted", [False, True])
def test_gptq_on_factors_loses_less_than_rounding_them(pivoted):
    for seed in range(3):
        weight, x = layer(seed=seed)
        hessian = x.T @ x / len(x)
        factors = truncate(decompose(weight), 24)
        given = pivot(factors) if pivoted else factors
        errors = {
            q: output_error(
                weight, quantize_factors(given, weight, hessian, 3, q, 32).factors.weight, hessian
            )
            for q in ("round", "gptq")
        }
        assert errors["gptq"] < 0.9 * errors["round"]


def test_many_bits_leave_the_factors_error_alone():
    weight, x = layer()
    hessian = x.T @ x / len(x)
    factors = truncate(decompose(weight), 24)
    coded = quantize_factors(factors, weight, hessian, 8, "round", 32)
    apart = (coded.factors.weight - factors.weight).norm() / factors.weight.norm()
    assert apart < 0.01


def test_a_correction_takes_the_largest_part_of_the_output_error():
    weight, x = layer()
    hessian = x.T @ x / len(x)
    rounded = round_to_nearest(weight, 2, 32)
    before = output_error(weight, rounded, hessian)
    # The error's output is X (W - Q)^T; a correction of rank r leaves the tail of its spectrum.
    spectrum = torch.linalg.svdvals(x.double() @ (weight - rounded).double().T / len(x) ** 0.5)
    assert before == pytest.approx(spectrum.square().sum().item(), rel=1e-3)
    for rank in (1, 4, 12):
        found = correct(weight, rounded, hessian, rank)
        error = output_error(weight, rounded + found.weight, hessian)
        assert error == pytest.approx(tails(spectrum)[rank].item(), rel=1e-3)


def test_a_cut_matrix_has_the_rank_and_stays_dense():
    weight = layer()[0]
    found = reduce_rank(weight, 0.25)
    assert found.shape == weight.shape
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 12
    squares = torch.linalg.svdvals(weight.double()).square()
    assert (weight - found).square().sum().item() == pytest.approx(squares[12:].sum().item())
    assert torch.linalg.matrix_rank(reduce_rank(weight, 0.01).double(), rtol=1e-5) == 1


def test_laser_cuts_one_matrix_of_one_layer(sharp):
    config = Config(40, hidden=16, layers=3, heads=2, kv_heads=1, intermediate=24)
    model = sharp(config)
    cut = laser(model, Cut(1, "up_proj", 0.5))
    changed = [
        name
        for (name, ours), theirs in zip(cut.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    ]
    assert changed == ["layers.1.up_proj.weight"]
    assert torch.equal(model(torch.arange(9)[None]), sharp(config)(torch.arange(9)[None]))
    every = list(scan(config))
    assert len(every) == len(set(every)) == 3 * 7 * len(SHARES)


def test_correct_tokens_are_counted_block_by_block(sharp):
    model = sharp(Config(40, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=24))
    tokens = torch.randint(0, 40, (41,), generator=torch.Generator().manual_seed(0))
    found = correct_tokens(model, tokens, 10, batch=3)
    expected = []
    for start in range(0, 40, 10):
        row = tokens[start : start + 11]
        expected.append((model(row[None, :-1])[0].argmax(-1) == row[1:]).sum().item())
    assert found.tolist() == expected


def test_bad_input_is_named(sharp):
    weight, _ = layer()
    with pytest.raises(ValueError, match="'awq'"):
        quantize_factors(truncate(decompose(weight), 4), weight, torch.eye(64), 4, "awq")
    with pytest.raises(ValueError, match="matrix"):
        Cut(0, "mlp", 0.5)
    with pytest.raises(ValueError, match="share is 0"):
        Cut(0, "up_proj", 0)
    model = sharp(Config(40, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=24))
    with pytest.raises(ValueError, match="layer is 4; allowed: 0 to 0"):
        laser(model, Cut(4, "up_proj", 0.5))
