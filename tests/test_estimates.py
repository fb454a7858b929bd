"""Confidence intervals: against printed tables, textbook formulas and simulated truths."""

import math
import statistics

import pytest
import torch

from rooflm.lab.estimates import Estimate, ratio_estimate, share_estimate, t_quantile

TRIALS = 400
# Student's t, two-sided 95 %: Abramowitz and Stegun, table 26.10.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 60: 2.0, 120: 1.98}


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def coverage(draw, truth, estimate, seed=0):
    """The share of the intervals of many samples in which the truth lies."""
    generator = torch.Generator().manual_seed(seed)
    found = [estimate(*draw(generator)) for _ in range(TRIALS)]
    return sum(e.low <= truth <= e.high for e in found) / TRIALS


def series(generator, blocks, memory):
    """Normal deviates, each correlated with the one before it."""
    noise = torch.randn(blocks, generator=generator, dtype=torch.float64).tolist()
    values = [noise[0]]
    for new in noise[1:]:
        values.append(memory * values[-1] + math.sqrt(1 - memory**2) * new)
    return torch.tensor(values, dtype=torch.float64)


def independent_t(y, x):
    """The textbook interval of a mean, blind to the order."""
    values = y / x
    half = t_quantile(len(values) - 1) * values.std().item() / len(values) ** 0.5
    middle = values.mean().item()
    return Estimate(middle, middle - half, middle + half)


@pytest.mark.parametrize("degrees", TABLE)
def test_student_quantiles_are_those_of_the_printed_table(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=6e-4)


def test_student_quantiles_fall_to_the_normal_one():
    found = [t_quantile(degrees) for degrees in (1, 2, 3, 8, 50, 400, 1000, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=3e-3)


def test_equal_denominators_give_the_textbook_interval_of_a_mean():
    y = vector(1, 4, 2, 3, 0, 5)  # neighbours lie on opposite sides: no memory to allow for
    found = ratio_estimate(3 * y, torch.full((6,), 3.0))
    expected = independent_t(y, torch.ones(6))
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_a_ratio_is_the_sum_over_the_sum_not_the_mean_of_ratios():
    found = ratio_estimate(vector(1, 30), vector(1, 10))
    assert found.value == pytest.approx(31 / 11)


def test_blocks_of_one_ratio_leave_no_doubt():
    bytes_per_block = vector(100, 300, 200)
    found = ratio_estimate(1.5 * bytes_per_block, bytes_per_block)
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(1.5)


def test_memory_between_neighbours_widens_the_interval():
    values = [1.0] * 8 + [2.0] * 8
    together = ratio_estimate(vector(*values), torch.ones(16))
    apart = ratio_estimate(vector(*values[::2], *values[1::2][::-1]), torch.ones(16))
    mixed = ratio_estimate(vector(*[1.0, 2.0] * 8), torch.ones(16))
    assert together.value == apart.value == mixed.value == 1.5
    assert together.high > apart.high > mixed.high


@pytest.mark.parametrize("blocks", [4, 8, 32])
def test_bits_per_byte_are_covered_where_block_lengths_vary(blocks):
    def draw(generator):
        lengths = 1500 + 500 * torch.rand(blocks, generator=generator, dtype=torch.float64)
        rates = 1.7 + 0.3 * torch.randn(blocks, generator=generator, dtype=torch.float64)
        return lengths * rates, lengths

    assert 0.93 <= coverage(draw, 1.7, ratio_estimate) <= 0.98


@pytest.mark.parametrize(("blocks", "least"), [(32, 0.9), (128, 0.92)])
def test_a_text_with_memory_is_covered_and_its_shuffled_blocks_would_not_be(blocks, least):
    def draw(generator):
        return 6 + series(generator, blocks, memory=0.35), torch.ones(blocks)

    assert least <= coverage(draw, 6.0, ratio_estimate) <= 0.98
    assert coverage(draw, 6.0, independent_t) < 0.88


def test_tokens_taken_as_independent_would_cover_far_too_little():
    blocks, window = 16, 64

    def tokens(generator):
        scene = torch.randn(blocks, 1, generator=generator)
        return 3 + 0.4 * scene + torch.randn(blocks, window, generator=generator)

    def by_token(generator):
        values = tokens(generator).flatten()
        return values, torch.ones(len(values))

    def by_block(generator):
        return tokens(generator).sum(1), torch.full((blocks,), float(window))

    assert coverage(by_token, 3.0, independent_t) < 0.6
    assert coverage(by_block, 3.0, ratio_estimate) > 0.93


@pytest.mark.parametrize("share", [0.6, 0.95, 0.9997])
@pytest.mark.parametrize("blocks", [8, 32])
def test_shares_are_covered_up_to_the_edge(share, blocks):
    window, spread = 512, 300.0

    def draw(generator):  # beta-binomial: the share differs a little from block to block
        a, b = torch.full((blocks,), share * spread), torch.full((blocks,), (1 - share) * spread)
        a, b = (torch._standard_gamma(t, generator=generator) for t in (a, b))
        totals = torch.full((blocks,), float(window))
        return torch.binomial(totals, a / (a + b), generator=generator), totals

    assert coverage(draw, share, share_estimate) >= (0.85 if share > 0.999 else 0.93)


def test_a_share_without_spread_between_blocks_is_wilsons_interval():
    counts, totals = vector(90, 90, 90, 90), torch.full((4,), 100.0)
    found, t, n = share_estimate(counts, totals), TABLE[3], 400
    # The ends are the shares p from which 0.9 lies t standard errors of p away.
    for end in (found.low, found.high):
        assert abs(0.9 - end) == pytest.approx(t * (end * (1 - end) / n) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("agreed", [0.0, 1.0])
def test_full_agreement_still_leaves_room_for_doubt(agreed):
    found = share_estimate(torch.full((8,), 512 * agreed), torch.full((8,), 512.0))
    assert found.value == agreed
    assert 0 <= found.low < found.high <= 1
    assert found.high - found.low < 0.01


@pytest.mark.parametrize("sums", [((1.0,), (2.0,)), ((), ()), ((1.0, 2.0), (0.0, 0.0))])
def test_too_little_to_estimate_from_is_refused(sums):
    with pytest.raises(ValueError, match="blocks") as caught:
        ratio_estimate(vector(*sums[0]), vector(*sums[1]))
    assert "\n" not in str(caught.value)
