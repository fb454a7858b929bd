"""The spectrum of noise, against noise."""

import math

import pytest
import torch

from rooflm.lab.factorize.spectra import (
    energy,
    kept_at_break_even,
    noise_spectrum,
    rank_of_energy,
)
from rooflm.lab.factorize.timing import factor_times


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


def test_times_are_ratios_to_the_whole_matrix():
    found = factor_times(64, (8, 16), tokens=4, runs=2)
    assert list(found) == [8, 16] and all(x > 0 for x in found.values())
