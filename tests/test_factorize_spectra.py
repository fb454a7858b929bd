"""The spectrum of noise, against noise; of outputs, against noise that reads the same inputs."""

import math

import pytest
import torch

from rooflm.lab.factorize.spectra import (
    energy,
    kept_at_break_even,
    left_out,
    noise_spectrum,
    rank_of_energy,
    strongest,
)
from rooflm.lab.factorize.timing import factor_times
from rooflm.lab.quantize.gptq import output_error


@pytest.mark.parametrize("shape", [(256, 256), (768, 256), (128, 512)])
def test_noise_has_the_spectrum_of_noise(shape):
    for seed in range(3):
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        found = torch.linalg.svdvals(noise.double())
        found = found / found.norm()
        law = noise_spectrum(*shape)
        assert law.shape == found.shape and law.square().sum().item() == pytest.approx(1)
        assert (law - found).abs().max() < 0.04 * law[0]  # the largest one varies most
        assert (energy(law) - energy(found)).abs().max() < 0.01


def test_the_edges_are_those_of_the_law():
    law = noise_spectrum(4000, 1000) * math.sqrt(1000)  # squares over their mean
    assert law[0].item() == pytest.approx(1.5, rel=0.01)  # 1 + sqrt(1/4)
    assert law[-1].item() == pytest.approx(0.5, rel=0.03)
    square = noise_spectrum(1000, 1000)
    assert square[-1] < 0.01 * square[0]  # the quarter circle goes down to 0


def test_energy_is_the_share_that_a_rank_keeps():
    singular = torch.rand(9, generator=torch.Generator().manual_seed(0)).sort(descending=True)[0]
    shares = [singular[:r].square().sum() / singular.square().sum() for r in range(10)]
    assert torch.allclose(energy(singular), torch.stack(shares).double(), atol=1e-6)
    for share in (0.5, 0.9, 0.99, 1.0):
        rank = rank_of_energy(singular, share)
        assert energy(singular)[rank] >= share - 1e-9
        assert rank == 0 or energy(singular)[rank - 1] < share
    assert rank_of_energy(singular, 0) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="share is 2"):
        rank_of_energy(torch.ones(3), 2)
    with pytest.raises(ValueError, match="d_out"):
        noise_spectrum(0, 4)


def test_the_break_even_rank_keeps_no_more_of_noise_than_its_law_says():
    noise = [torch.randn(96, 64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    kept, law = kept_at_break_even(noise)
    assert kept == pytest.approx(law, abs=0.01)
    low = [torch.randn(96, 5) @ torch.randn(5, 64)]
    assert kept_at_break_even(low)[0] == pytest.approx(1)
    rank = 96 * 64 // (96 + 64)
    singular = torch.linalg.svdvals(noise[0].double())
    assert kept_at_break_even(noise[:1])[0] == pytest.approx(
        (singular[:rank].square().sum() / singular.square().sum()).item()
    )


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (48, 96)])
def test_noise_in_place_of_a_weight_is_its_control(shape):
    inputs = drawn(500, shape[1]) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    hessian = inputs.T @ inputs / 500
    found = left_out(drawn(*shape, seed=7), hessian, 0.5)
    assert found.weight == pytest.approx(found.noise, rel=0.1)
    assert found.outputs == pytest.approx(found.noise_outputs, rel=0.2)
    assert found.noise_outputs < 0.3 * found.noise  # the inputs alone make the spectrum steep
    white = left_out(drawn(*shape, seed=7), torch.eye(shape[1]), 0.5)
    assert white.outputs == pytest.approx(white.weight)
    assert white.noise_outputs == pytest.approx(white.noise)


def test_what_is_left_out_of_the_outputs_is_the_best_cuts_error():
    weight, inputs = drawn(40, 24), drawn(300, 24) @ drawn(24, 24, seed=1)
    hessian = inputs.T @ inputs / 300
    rank = 40 * 24 // (2 * (40 + 24))
    outputs = inputs @ weight.T  # the best cut projects the outputs on their main directions
    axes = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank]
    cut = axes.T @ (axes @ weight)
    expected = output_error(weight, cut, hessian) / output_error(weight, 0 * weight, hessian)
    found = left_out(weight, hessian, 0.5)
    assert found.outputs == pytest.approx(expected, rel=1e-6)
    assert found.weight == pytest.approx(1 - energy(torch.linalg.svdvals(weight))[rank].item())


@pytest.mark.parametrize("tokens", [50, 8])
def test_a_strong_direction_need_not_be_a_strong_channel(tokens):
    one = 0.01 * drawn(tokens, 12)
    one[:, 5] += 3
    channels, directions = strongest(one)
    assert channels > 0.99 and directions >= channels
    axis = torch.ones(12, dtype=torch.float64) / math.sqrt(12)
    channels, directions = strongest(0.01 * drawn(tokens, 12) + 3 * axis)
    assert channels == pytest.approx(1 / 12, rel=0.1) and directions > 0.99
    assert strongest(one, part=1) == pytest.approx((1, 1))


def test_times_are_ratios_to_the_whole_matrix():
    found = factor_times(64, (8, 16), tokens=4, runs=2)
    assert list(found) == [8, 16] and all(x > 0 for x in found.values())
