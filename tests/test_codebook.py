"""SqueezeLLM's codebooks, against brute force over all partitions and the exact optimum."""

import itertools

import pytest
import torch

from rooflm import load_format
from rooflm.lab.quantize.codebook import (
    RUNS_PER_CLUSTER,
    lloyd,
    nearest,
    optimal_partition,
    squeezellm,
)
from rooflm.lab.quantize.grids import round_to_nearest


def row_and_importance(rows, n, seed):
    """Rows with heavy tails, and an importance that spans orders of magnitude, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(rows, n) * (0.7 * normal(rows, n)).exp(), (1.5 * normal(rows, n)).exp()


def cost(weight, quantized, importance):
    return (importance * (weight - quantized.double()).square()).sum(-1)


def best_of_all_assignments(row, importance, clusters):
    """The least weighted error over every assignment of values to clusters, intervals or not."""
    every = torch.tensor(list(itertools.product(range(clusters), repeat=len(row))))
    total = torch.zeros(len(every), dtype=torch.float64)
    for cluster in range(clusters):
        held = (every == cluster) * importance  # (assignments, n)
        mean = (held @ row) / held.sum(1).clamp(min=1e-300)
        total += (held * (row - mean[:, None]).square()).sum(1)
    return total.min().item()


def optima(weight, importance, clusters):
    return torch.tensor(
        [optimum(*each, clusters) for each in zip(weight, importance, strict=True)],
        dtype=torch.float64,
    )


def optimum(row, importance, clusters):
    """The exact optimum over intervals of the sorted row: plain dynamic programming."""
    row, order = row.sort()
    importance, n = importance[order], len(row)
    start = torch.zeros(1, dtype=torch.float64)
    sums = [torch.cat([start, (importance * row**p).cumsum(0)]) for p in range(3)]
    least = [0.0] + [float("inf")] * n
    for _ in range(clusters):
        before, least = torch.tensor(least, dtype=torch.float64), [0.0]
        for end in range(1, n + 1):
            mass, moment, energy = (s[end] - s[:end] for s in sums)
            least.append((before[:end] + energy - moment**2 / mass).min().item())
        least = torch.minimum(before, torch.tensor(least, dtype=torch.float64)).tolist()
    return least[-1]


@pytest.mark.parametrize("bits", [1, 2])
def test_the_codebook_of_a_short_row_is_the_best_of_all_assignments(bits):
    for seed in range(4):
        weight, importance = row_and_importance(1, 8 if bits == 1 else 6, seed)
        best = best_of_all_assignments(weight[0], importance[0], 2**bits)
        found = squeezellm(weight, importance, bits)
        # But for the centroids' rounding to FP16.
        assert cost(weight, found.weight, importance).item() == pytest.approx(best, rel=2e-3)


def test_no_codebook_beats_the_optimum_and_those_of_short_rows_reach_it():
    for bits in (1, 2, 3):
        n = RUNS_PER_CLUSTER * 2**bits
        weight, importance = row_and_importance(4, n, seed=bits)
        best = optima(weight, importance, 2**bits)
        ratio = cost(weight, squeezellm(weight, importance, bits).weight, importance) / best
        assert (ratio >= 1 - 1e-9).all()
        assert (ratio < 1.002).all()


def test_the_codebooks_of_longer_rows_come_within_two_per_cent_of_the_optimum():
    for bits in (2, 3, 4):
        weight, importance = row_and_importance(3, 200, seed=bits)
        best = optima(weight, importance, 2**bits)
        ratio = cost(weight, squeezellm(weight, importance, bits).weight, importance) / best
        assert (ratio >= 1 - 1e-9).all()
        assert ratio.mean() < 1.02


def test_every_value_takes_its_nearest_centroid():
    weight, importance = row_and_importance(4, 100, seed=0)
    found = squeezellm(weight, importance, 3)
    distances = (weight[:, :, None] - found.centroids[:, None, :]).abs()
    reached = (weight - found.weight).abs()
    assert torch.equal(reached, distances.amin(2))
    assert torch.equal(found.weight, found.centroids.gather(1, found.codes))


def test_every_centroid_is_the_weighted_mean_of_its_values():
    weight, importance = row_and_importance(4, 100, seed=1)
    found = squeezellm(weight, importance, 3)
    for row in range(4):
        for code in range(8):
            held = found.codes[row] == code
            mean = (importance * weight)[row, held].sum() / importance[row, held].sum()
            assert found.centroids[row, code].item() == pytest.approx(mean.item(), rel=2**-11)


def test_lloyd_never_raises_the_error():
    weight, importance = row_and_importance(4, 100, seed=2)
    values, order = weight.sort(dim=1)
    counts = importance.gather(1, order)
    edges = (torch.arange(9) * 100 // 8).expand(4, 9)  # equal shares: a poor start
    costs = [
        cost(values, nearest(values, lloyd(values, counts, edges, i))[0], counts).sum().item()
        for i in (1, 2, 3, 5, 10, 100)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.9 * costs[0]


def test_the_partition_uses_only_the_places_it_is_offered():
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0, 12.0, 20.0]], dtype=torch.float64)
    ones = torch.ones_like(values)
    free = optimal_partition(values, ones, torch.arange(7)[None], 3)
    assert free.tolist() == [[0, 2, 5, 6]]
    # {0} {1, 10} {11, 12, 20} costs 40.5 + 48.7; the other two ways cost 92.7.
    bound = optimal_partition(values, ones, torch.tensor([[0, 1, 3, 4, 6]]), 3)
    assert bound.tolist() == [[0, 1, 3, 6]]


def test_importance_moves_the_centroids_to_where_it_is():
    weight, _ = row_and_importance(8, 64, seed=3)
    importance = torch.ones(64, dtype=torch.float64)
    importance[:8] = 1e6
    found = squeezellm(weight, importance, 3).weight
    plain = squeezellm(weight, torch.ones(64), 3).weight
    assert (found - weight)[:, :8].norm() < 0.01 * (plain - weight)[:, :8].norm() + 2e-2
    assert cost(weight, plain, torch.ones(64)).sum() < cost(weight, found, torch.ones(64)).sum()


def test_a_codebook_beats_the_uniform_grid_on_heavy_tails():
    weight, importance = row_and_importance(16, 128, seed=4)
    for bits in (2, 3, 4):
        ours = cost(weight, squeezellm(weight, importance, bits).weight, importance)
        uniform = cost(weight, round_to_nearest(weight, bits), importance)
        assert (ours < uniform).all()
        assert ours.sum() < 0.3 * uniform.sum()


@pytest.mark.parametrize("n", [8, 40, 1000])
def test_a_row_of_few_values_keeps_them_all(n):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(5, 8, generator=generator).half().float() * 10 ** torch.linspace(-2, 1, 8)
    levels = levels.half().float()
    codes = torch.randint(8, (5, n), generator=generator)
    weight = levels.gather(1, codes)
    assert torch.equal(
        squeezellm(weight, torch.rand(n, generator=generator) + 0.1, 3).weight, weight
    )


def test_quantizing_twice_changes_nothing():
    weight, importance = row_and_importance(8, 300, seed=5)
    once = squeezellm(weight, importance, 3).weight
    assert torch.equal(squeezellm(once, importance, 3).weight, once)


def test_constant_rows_zero_rows_and_short_rows_are_exact():
    weight = torch.stack([torch.zeros(100), torch.full((100,), 0.75), torch.full((100,), -3.0)])
    assert torch.equal(squeezellm(weight, torch.ones(100), 4).weight, weight)
    short = torch.tensor([[0.5], [-2.0]])
    assert torch.equal(squeezellm(short, torch.ones(1), 4).weight, short)
    few = torch.tensor([[0.5, -2.0, 0.25]])
    assert torch.equal(squeezellm(few, torch.ones(3), 4).weight, few)


def test_values_without_importance_take_their_nearest_centroid_and_move_none():
    weight, importance = row_and_importance(4, 60, seed=6)
    importance[:, 40:] = 0.0
    found = squeezellm(weight, importance, 3)
    alone = squeezellm(weight[:, :40], importance[:, :40], 3)
    assert torch.isfinite(found.weight).all()
    ratio = cost(weight, found.weight, importance) / cost(
        weight[:, :40], alone.weight, importance[:, :40]
    )
    assert (ratio < 1.02).all() and (ratio > 0.98).all()
    unknown = squeezellm(weight, torch.zeros(60), 3).weight  # nothing is known: all count alike
    assert torch.equal(unknown, squeezellm(weight, torch.ones(60), 3).weight)


def test_neither_the_order_of_the_weights_nor_the_unit_of_importance_matters():
    weight, importance = row_and_importance(4, 100, seed=7)
    plain = squeezellm(weight, importance, 3).weight
    shuffle = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        squeezellm(weight[:, shuffle], importance[:, shuffle], 3).weight, plain[:, shuffle]
    )
    assert torch.equal(squeezellm(weight, importance * 2.0**-40, 3).weight, plain)


def test_rows_have_nothing_to_do_with_each_other():
    weight, importance = row_and_importance(150, 40, seed=8)
    together = squeezellm(weight, importance, 2).weight
    for row in (0, 63, 64, 149):
        alone = squeezellm(weight[row : row + 1], importance[row : row + 1], 2).weight
        assert torch.equal(together[row : row + 1], alone)


def test_bits_count_the_codes_and_a_codebook_of_fp16_values_for_each_row():
    weight, importance = row_and_importance(8, 128, seed=9)
    found = squeezellm(weight.float(), importance.float(), 3)
    assert found.weight.dtype == torch.float32
    assert found.codes.min() == 0 and found.codes.max() == 7
    assert torch.equal(found.centroids, found.centroids.half().float())
    stored = found.codes.numel() * 3 + 8 * found.centroids.half().numpy().nbytes
    assert found.bits_per_weight == stored / weight.numel()
    assert found.bits_per_weight - load_format("int3").bits == 16 * 8 / 128


def test_the_arguments_are_left_as_they_were():
    weight, importance = row_and_importance(4, 40, seed=0)
    before = weight.clone(), importance.clone()
    squeezellm(weight, importance, 3)
    assert torch.equal(weight, before[0]) and torch.equal(importance, before[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 0}, "bits is 0; allowed: a whole number from 1 to 6"),
        ({"bits": 7}, "bits is 7; allowed: a whole number from 1 to 6"),
        ({"bits": 3.0}, "bits is 3.0; allowed: a whole number from 1 to 6"),
        ({"iterations": 0}, "iterations is 0; allowed: a whole number from 1"),
        ({"importance": torch.ones(4)}, r"importance is \(4,\); allowed: \(2, 8\) or \(8,\)"),
        ({"importance": -torch.ones(8)}, "importance holds a negative"),
        ({"weight": torch.full((2, 8), torch.nan)}, "weight holds an infinity or a NaN"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {"weight": torch.ones(2, 8), "importance": torch.ones(8), "bits": 3}
    with pytest.raises(ValueError, match=message):
        squeezellm(**(arguments | changed))
