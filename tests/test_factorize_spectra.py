"""The spectrum of noise, against noise."""

import math

import pytest
import torch

from rooflm.lab.factorize.spectra import energy, noise_spectrum, rank_of_energy


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
