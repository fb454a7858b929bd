"""Ranks over layers: the hull against exhaustive search, the threshold against its definition."""

import itertools

import pytest
import torch
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, inner_linear
from rooflm.lab.factorize.ranks import Choice, allocate, choices, hull, threshold, uniform
from rooflm.lab.factorize.sensitivity import sensitivities
from rooflm.lab.factorize.svd import decompose, factor_numbers, tails, truncate
from rooflm.lab.model import Config


def spectrum(k, seed):
    values = torch.rand(k, generator=torch.Generator().manual_seed(seed)).double()
    return values.sort(descending=True).values


def layers(pivot=False):
    shapes = {"a": (6, 6), "b": (9, 5), "c": (5, 8)}
    return {
        name: choices(spectrum(min(shape), seed) * (1 + seed), shape, pivot)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def cost(given, ranks):
    return sum(next(c.cost for c in given[n] if c.rank == r) for n, r in ranks.items())


def numbers(given, ranks):
    return sum(next(c.numbers for c in given[n] if c.rank == r) for n, r in ranks.items())


def best(given, budget):
    """The least cost within a budget, by trying all."""
    fitting = [
        sum(c.cost for c in picked)
        for picked in itertools.product(*given.values())
        if sum(c.numbers for c in picked) <= budget
    ]
    return min(fitting)


@pytest.mark.parametrize("pivot", [False, True])
def test_every_choice_saves_something_and_the_last_is_the_matrix(pivot):
    found = choices(spectrum(5, 0), (9, 5), pivot)
    assert found[-1] == Choice(5, 45, 0.0)
    assert all(a.numbers < b.numbers and a.cost > b.cost for a, b in itertools.pairwise(found))
    if not pivot:  # 3 (9 + 5) = 42 < 45 < 56
        assert [c.rank for c in found] == [1, 2, 3, 5]
        assert [c.numbers for c in found[:3]] == [factor_numbers(9, 5, r) for r in (1, 2, 3)]
    assert found[1].cost == pytest.approx(tails(spectrum(5, 0))[found[1].rank].item())


def test_a_rank_that_takes_as_much_as_the_matrix_is_no_choice():
    assert [c.rank for c in choices(spectrum(6, 0), (6, 6))] == [1, 2, 6]  # 3 · 12 = 36


@pytest.mark.parametrize("pivot", [False, True])
def test_allocation_is_optimal_where_a_step_of_the_hull_ends(pivot):
    """At such budgets no allocation costs less; at others what is given keeps to the budget."""
    given, checked = layers(pivot), 0
    for budget in range(sum(g[0].numbers for g in given.values()), 122):
        ranks = allocate(given, budget)
        assert numbers(given, ranks) <= budget
        assert cost(given, ranks) >= best(given, budget) - 1e-12
        if numbers(given, ranks) == budget and _is_prefix(given, ranks):
            checked += 1
            assert cost(given, ranks) == pytest.approx(best(given, budget), rel=1e-9)
    assert checked > 3


def _is_prefix(given, ranks):
    """Whether the hull's steps that were taken gain more than those that were not."""
    if any(r not in [c.rank for c in hull(given[n])] for n, r in ranks.items()):
        return False
    taken, left = [], []
    for name, g in given.items():
        for a, b in itertools.pairwise(hull(g)):
            gain = (a.cost - b.cost) / (b.numbers - a.numbers)
            (taken if b.rank <= ranks[name] else left).append(gain)
    return not taken or not left or min(taken) >= max(left)


def test_the_hull_is_convex_and_below_every_choice():
    for given in layers().values():
        found = hull(given)
        slopes = [(b.cost - a.cost) / (b.numbers - a.numbers) for a, b in itertools.pairwise(found)]
        assert all(x < y for x, y in itertools.pairwise(slopes))
        for choice in given:
            for a, b in itertools.pairwise(found):
                if a.numbers <= choice.numbers <= b.numbers:
                    share = (choice.numbers - a.numbers) / (b.numbers - a.numbers)
                    assert choice.cost >= a.cost + share * (b.cost - a.cost) - 1e-9


def test_allocation_costs_less_than_equal_shares():
    shapes = {"a": (60, 60), "b": (90, 50), "c": (50, 80)}
    given = {
        name: choices(spectrum(min(shape), i) * 4**i, shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    for share in (0.3, 0.5, 0.8):
        even = uniform(shapes, share)
        budget = sum(factor_numbers(*shapes[n], r) for n, r in even.items())
        assert cost(given, allocate(given, budget)) < 0.7 * cost(given, even)
    whole = sum(d_out * d_in for d_out, d_in in shapes.values())
    assert allocate(given, whole) == {"a": 60, "b": 50, "c": 50}


def test_steps_that_gain_nothing_are_not_taken():
    given = {"a": [Choice(1, 10, 1.0), Choice(2, 20, 1.5), Choice(3, 30, 1.2)]}
    assert allocate(given, 30) == {"a": 1}


def test_threshold_takes_the_smallest_choice_below_one_cost():
    given = layers()
    for budget in range(60, 122, 7):
        found = threshold(given, budget)
        used = numbers(given, found)
        assert used <= budget
        costs = sorted({c.cost for g in given.values() for c in g})

        def at(limit):
            picked = {
                n: min((c for c in g if c.cost <= limit), key=lambda c: c.numbers, default=g[-1])
                for n, g in given.items()
            }
            return {n: c.rank for n, c in picked.items()}

        fitting = [x for x in costs if numbers(given, at(x)) <= budget]
        assert found == at(min(fitting))


def test_equal_shares_are_the_shares():
    shapes = {"a": (256, 256), "b": (768, 256)}
    assert uniform(shapes, 0.5) == {"a": 64, "b": 96}
    assert uniform(shapes, 1) == {"a": 256, "b": 256}
    assert uniform(shapes, 0.5, pivot=True) == {"a": 74, "b": 106}


def test_sensitivities_are_the_losses_of_one_cut_layer_each(sharp):
    config = Config(40, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24)
    model = sharp(config)
    rows = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    found = {
        f"layers.{i}.{kind}": decompose(inner_linear(block, kind).weight)
        for i, block in enumerate(model.layers)
        for kind in LINEARS
    }
    given = sensitivities(model, rows, found, shares=(0.3, 0.6))
    assert set(given) == set(found)

    def loss(of):
        logits = of(rows[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(logits, rows[:, 1:].flatten()).item()

    for name in ("layers.0.k_proj", "layers.1.down_proj"):
        first = given[name][0]
        cut = sharp(config)
        weight = inner_linear(cut.layers[int(name[7])], name[9:]).weight
        weight.copy_(truncate(found[name], first.rank).weight)
        assert first.cost == pytest.approx(loss(cut) - loss(model), abs=1e-5)
        assert first.numbers == first.rank * sum(weight.shape) <= 0.3 * weight.numel()
        assert given[name][-1] == Choice(min(weight.shape), weight.numel(), 0.0)
    assert torch.equal(model(rows), sharp(config)(rows))  # left as it was


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="budget is 10; allowed: 39 or more"):
        allocate(layers(), 10)
    with pytest.raises(ValueError, match="budget is 10"):
        threshold(layers(), 10)
    with pytest.raises(ValueError, match="share is 0"):
        uniform({"a": (4, 4)}, 0)
