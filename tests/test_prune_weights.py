"""Scores, masks and SparseGPT: against least squares, brute force and the papers' definitions."""

import itertools

import pytest
import torch

from rooflm.lab.prune import masks, owl, scores
from rooflm.lab.prune.exact import best_masks, damped, refit
from rooflm.lab.prune.sparsegpt import compensate, prune_and_compensate, sparsegpt
from rooflm.lab.prune.ways import pruned_each_way, random_layer, relative_error
from rooflm.lab.quantize.exhaustive import row_errors
from rooflm.lab.quantize.gptq import gptq, inverse_factor, output_error
from rooflm.lab.quantize.grids import fit_grid, project, to_groups


def correlated_layer(d_out, d_in, seed, spread=1.0):
    """A random weight and inputs whose channels are mixed and of unequal size, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(d_in, d_in) * (spread * normal(d_in)).exp()
    inputs = normal(4 * d_in, d_in) @ mixing / d_in**0.5
    return normal(d_out, d_in), inputs, inputs.T @ inputs / len(inputs)


def random_mask(d_out, d_in, kept, seed):
    return masks.keep_highest(scores.draw(torch.zeros(d_out, d_in), seed), kept)


def least_squares_row(row, inputs, mask):
    """The kept weights of one row at least squares, from the inputs; none of the library's algebra.

    Columns are scaled to length one for the sake of conditioning.
    """
    sizes = inputs.norm(dim=0)
    scaled = inputs / sizes
    solved = torch.linalg.lstsq(scaled[:, mask], inputs @ row, driver="gelsd").solution
    result = torch.zeros_like(row)
    result[mask] = solved / sizes[mask]
    return result


def column_after_column(weight, inputs, decide):
    """Pruning by its definition: after each column, least squares for all that is not fixed yet.

    What is free is solved for from the original weight each time, on the inputs themselves.
    `decide(j, now)` returns the mask of column j's rows.
    """
    now, sizes = weight.clone(), inputs.norm(dim=0)
    for j in range(weight.shape[1]):
        now[:, j] *= decide(j, now)
        if j + 1 < weight.shape[1]:
            owed = inputs[:, : j + 1] @ (weight - now)[:, : j + 1].T
            free = (inputs / sizes)[:, j + 1 :]
            shift = torch.linalg.lstsq(free, owed, driver="gelsd").solution.T
            now[:, j + 1 :] = weight[:, j + 1 :] + shift / sizes[j + 1 :]
    return now


# ---- scores and masks


def test_wanda_scores_what_the_output_loses_when_one_weight_goes():
    weight, inputs, hessian = correlated_layer(3, 6, seed=0)
    found = scores.wanda(weight, hessian)
    for i, j in itertools.product(range(3), range(6)):
        without = weight.clone()
        without[i, j] = 0
        lost = (inputs @ (weight - without).T).square().sum(1).mean().sqrt()
        assert found[i, j].item() == pytest.approx(lost.item())


def test_the_surgeons_score_is_the_error_that_least_squares_leaves():
    weight, inputs, hessian = correlated_layer(1, 6, seed=1)
    found = scores.surgeon(weight, inverse_factor(hessian, damp=0).diagonal())
    for j in range(6):  # column j goes; those to its left stay as they are, those right of it adapt
        mask = torch.arange(6) > j
        moved = weight[0].clone()
        moved[j:] = least_squares_row(
            torch.where(torch.arange(6) >= j, weight[0], 0), inputs, mask
        )[j:]
        left = (inputs @ (weight[0] - moved)).square().mean()
        assert found[0, j].item() == pytest.approx(left.item(), rel=1e-8)


def test_wanda_prunes_within_each_output_row():
    weight, _, hessian = correlated_layer(16, 32, seed=2)
    weight *= torch.logspace(-2, 2, 16, dtype=torch.float64)[:, None]  # rows of unequal size
    within = masks.unstructured(scores.wanda(weight, hessian), 0.5, "row")
    across = masks.unstructured(scores.wanda(weight, hessian), 0.5, "layer")
    assert (within.sum(1) == 16).all()
    assert across.sum() == within.sum() == 256
    assert not across[0].any() and across[-1].all()


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9])
def test_no_pruned_weight_scores_above_a_kept_one(per, sparsity):
    found = scores.draw(torch.zeros(7, 20), 3)
    mask = masks.unstructured(found, sparsity, per)
    assert masks.density(mask) == pytest.approx(1 - sparsity, abs=1e-9)
    for s, m in zip(found, mask, strict=True) if per == "row" else [(found, mask)]:
        assert m.all() or s[m].min() > s[~m].max()


def test_equal_scores_still_give_the_exact_count():
    assert masks.unstructured(torch.ones(4, 10), 0.3).sum() == 28
    assert masks.n_of_m(torch.zeros(4, 8), 2, 4).sum() == 16


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_keeps_the_best_n_of_every_m(pattern):
    n, m = masks.read_pattern(pattern)
    found = scores.draw(torch.zeros(5, 24), 4)
    mask = masks.make_mask(found, 0.5, pattern)
    for s, kept in zip(found.view(-1, m), mask.view(-1, m), strict=True):
        best = max(itertools.combinations(range(m), n), key=lambda places: s[list(places)].sum())
        assert kept.nonzero()[:, 0].tolist() == list(best)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: masks.unstructured(torch.ones(2, 2), 1.0), "sparsity is 1.0"),
        (lambda: masks.unstructured(torch.ones(2, 2), 0.5, "rows"), "rows"),
        (lambda: masks.n_of_m(torch.ones(2, 6), 2, 4), "2:4 on rows of 6"),
        (lambda: masks.read_pattern("4:2"), "4:2"),
        (lambda: owl.block_sparsities([0.0, 1.0], 0.95, spread=0.2), "a block would lose"),
        (lambda: best_masks(torch.ones(1, 40), torch.eye(40), 20), "kept is 20 of 40"),
    ],
)
def test_what_is_out_of_range_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---- SparseGPT's update


@pytest.mark.parametrize("seed", range(5))
def test_each_column_is_made_up_for_by_least_squares_on_the_columns_to_its_right(seed):
    weight, inputs, hessian = correlated_layer(6, 20, seed)
    mask = random_mask(6, 20, 10, seed)
    expected = column_after_column(weight, inputs, lambda j, now: mask[:, j])
    for block in (1, 7, 128):
        found = prune_and_compensate(weight, hessian, mask, damp=0, block=block).weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert torch.equal(found != 0, mask)


def test_with_the_pruned_columns_first_the_update_is_least_squares_on_the_kept_weights():
    for seed in range(20):
        weight, inputs, hessian = correlated_layer(4, 16, seed)
        mask = (torch.arange(16) >= 1 + seed % 12).expand(4, 16)
        found = compensate(weight, hessian, mask, damp=0).weight
        for row, ours, kept in zip(weight, found, mask, strict=True):
            expected = least_squares_row(row, inputs, kept)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)


def test_otherwise_its_error_is_never_below_that_of_least_squares_and_mostly_below_no_update():
    # Not always below: a part of what it moves, it moves to weights that are to go themselves.
    sums, worse = torch.zeros(3, dtype=torch.float64), 0
    for seed in range(50):
        weight, inputs, hessian = correlated_layer(8, 24, seed, spread=0.0)
        mask = masks.unstructured(scores.wanda(weight, hessian), 0.5)
        swept = compensate(weight, hessian, mask, damp=0).weight
        rows = zip(weight, mask, strict=True)
        solved = torch.stack([least_squares_row(row, inputs, kept) for row, kept in rows])
        errors = [row_errors(weight, w, hessian) for w in (solved, swept, weight * mask)]
        assert (errors[1] >= errors[0] * (1 - 1e-9)).all()
        found = torch.stack([e.sum() for e in errors])
        sums += found
        worse += int(found[1] > found[2])
    assert 2 * sums[0] < sums[1] < sums[2]
    assert 0 < worse < 25


def test_refit_is_least_squares_on_the_kept_weights():
    for seed in range(5):
        weight, inputs, hessian = correlated_layer(6, 16, seed)
        mask = random_mask(6, 16, 7, seed)
        found = refit(weight, hessian, mask)
        for row, ours, kept in zip(weight, found, mask, strict=True):
            torch.testing.assert_close(
                ours, least_squares_row(row, inputs, kept), rtol=0, atol=1e-7
            )


def test_refit_on_a_damped_hessian_is_a_ridge_that_holds_to_the_weight_as_it_was():
    weight, inputs, hessian = correlated_layer(3, 8, seed=5)
    mask = random_mask(3, 8, 4, 5)
    # 1 % of the mean diagonal for each weight: as many further inputs of that size, one a channel
    extra = (0.01 * hessian.diagonal().mean() * len(inputs)).sqrt() * torch.eye(8)
    more = torch.cat([inputs, extra.double()])
    found = refit(weight, damped(hessian), mask)
    for row, ours, kept in zip(weight, found, mask, strict=True):
        expected = least_squares_row(row, more, kept)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    blank = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(damped(blank), torch.eye(4, dtype=torch.float64))


def test_the_mask_of_a_block_is_chosen_by_the_weights_as_updated_by_then():
    weight, inputs, hessian = correlated_layer(6, 16, seed=8)
    chosen = {}

    def decide(j, now):
        start = j // 4 * 4
        if j % 4 == 0:  # the error of each of the four columns alone, the columns right of it free
            errors = torch.empty(6, 4, dtype=torch.float64)
            for k in range(4):
                free = inputs[:, start + k + 1 :]
                alone = inputs[:, start + k, None] * now[:, start + k]
                if free.shape[1]:
                    alone = alone - free @ torch.linalg.lstsq(free, alone, driver="gelsd").solution
                errors[:, k] = alone.square().mean(0)
            order = errors.flatten().argsort(descending=True)
            kept = torch.zeros(24, dtype=torch.bool)
            kept[order[:12]] = True
            chosen[start] = kept.view(6, 4)
        return chosen[start][:, j - start]

    expected = column_after_column(weight, inputs, decide)
    found = sparsegpt(weight, hessian, 0.5, damp=0, block=4)
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-8)
    assert torch.equal(found.mask, torch.cat([chosen[i] for i in (0, 4, 8, 12)], 1))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_holds_and_its_result_does_not_depend_on_the_block(pattern):
    weight, _, hessian = correlated_layer(6, 48, seed=9)
    n, m = masks.read_pattern(pattern)
    found = [sparsegpt(weight, hessian, pattern=pattern, block=b) for b in (1, 10, 128)]
    assert (found[0].mask.view(6, -1, m).sum(-1) == n).all()
    for other in found[1:]:
        torch.testing.assert_close(other.weight, found[0].weight, rtol=0, atol=1e-9)


def test_the_sparsity_is_that_of_every_block_of_columns():
    weight, _, hessian = correlated_layer(10, 64, seed=10)
    across = sparsegpt(weight, hessian, 0.7, block=16).mask.view(10, 4, 16)
    within = sparsegpt(weight, hessian, 0.75, per="row", block=16).mask.view(10, 4, 16)
    assert across.sum((0, 2)).tolist() == [48] * 4  # 30 % of 160
    assert (within.sum(2) == 4).all() and not (across.sum(2) == 4.8).all()


def test_with_nothing_pruned_the_weight_is_as_it_was():
    weight, _, hessian = correlated_layer(4, 12, seed=11)
    assert torch.equal(sparsegpt(weight, hessian, 0.0).weight, weight)


def test_an_input_that_is_always_zero_is_pruned_and_moves_nothing():
    weight, inputs, _ = correlated_layer(4, 12, seed=12)
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs / len(inputs)
    found = sparsegpt(weight, hessian, 0.5)
    assert not found.mask[:, 5].any() and found.weight.isfinite().all()


def test_over_a_thousand_random_layers_sparsegpt_errs_less_than_wanda_and_wanda_than_magnitude():
    found = {name: torch.zeros(1000) for name in ("sparsegpt", "wanda", "magnitude", "random")}
    for seed in range(1000):
        weight, _, hessian = correlated_layer(4, 12, seed, spread=0.5)
        power = output_error(weight, torch.zeros_like(weight), hessian)
        by = {
            "wanda": scores.wanda(weight, hessian),
            "magnitude": scores.magnitude(weight),
            "random": scores.draw(weight, seed),
        }
        results = {name: weight * masks.unstructured(x, 0.5) for name, x in by.items()}
        results["sparsegpt"] = sparsegpt(weight, hessian, 0.5, per="row").weight
        for name, result in results.items():
            found[name][seed] = output_error(weight, result, hessian) / power
    for ours, theirs in itertools.pairwise(found.values()):
        difference = theirs - ours
        assert difference.mean() > 5 * difference.std() / 1000**0.5  # five standard errors
    lost = (found["sparsegpt"] > found["wanda"]).float().mean()
    assert 0.1 < lost < 0.5  # a greedy method: its mean is lower, not every layer's error


def test_no_method_beats_the_best_of_all_masks_and_sparsegpt_sometimes_finds_it():
    found = 0
    for seed in range(40):
        weight, _, hessian = correlated_layer(2, 8, seed)
        best, mask = best_masks(weight, hessian, 4)
        ours = sparsegpt(weight, hessian, 0.5, per="row", damp=0)
        wanda = masks.unstructured(scores.wanda(weight, hessian), 0.5)
        optimum = row_errors(weight, best, hessian)
        for other in (
            ours.weight,
            refit(weight, hessian, ours.mask),
            refit(weight, hessian, wanda),
        ):
            assert (row_errors(weight, other, hessian) >= optimum * (1 - 1e-9)).all()
        found += (ours.mask == mask).all(1).sum().item()
    assert 0 < found < 60


def test_the_best_mask_is_the_best_by_least_squares_on_the_inputs():
    weight, inputs, hessian = correlated_layer(1, 6, seed=21)
    errors = {}
    for places in itertools.combinations(range(6), 3):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(places)] = True
        fitted = least_squares_row(weight[0], inputs, mask)
        errors[places] = (inputs @ (weight[0] - fitted)).square().mean().item()
    best, mask = best_masks(weight, hessian, 3)
    assert tuple(mask[0].nonzero()[:, 0].tolist()) == min(errors, key=errors.get)
    assert row_errors(weight, best, hessian).item() == pytest.approx(min(errors.values()))


def test_every_way_keeps_half_of_each_row_and_least_squares_is_the_better_of_its_mask():
    for seed in range(20):
        weight, hessian = random_layer(seed)
        found = pruned_each_way(weight, hessian, 0.5, damp=0)
        assert all(((w != 0).sum(1) == 6).all() for w in found.values())
        error = {name: relative_error(weight, w, hessian) for name, w in found.items()}
        assert error["Wanda, least squares"] <= min(error["Wanda"], error["Wanda, update"])
        assert error["SparseGPT, least squares"] <= error["SparseGPT"] * (1 + 1e-9)
        assert torch.equal(found["Wanda"] != 0, found["Wanda, update"] != 0)
        assert relative_error(weight, torch.zeros_like(weight), hessian) == 1


# ---- the joint form


def test_joint_rounding_follows_the_definition_on_a_grid_that_is_given():
    weight, inputs, hessian = correlated_layer(5, 12, seed=30)
    mask = random_mask(5, 12, 6, 30)
    grid = fit_grid(to_groups(weight, 4), 3)
    now = weight.clone()
    for j in range(12):
        own = grid._replace(scale=grid.scale[:, j // 4], zero=grid.zero[:, j // 4])
        now[:, j] = project(now[:, j : j + 1], own)[:, 0] * mask[:, j]
        if j < 11:
            owed = inputs[:, : j + 1] @ (weight - now)[:, : j + 1].T
            shift = torch.linalg.lstsq(inputs[:, j + 1 :], owed, driver="gelsd").solution.T
            now[:, j + 1 :] = weight[:, j + 1 :] + shift
    found = prune_and_compensate(weight, hessian, mask, grid=grid, damp=0)
    torch.testing.assert_close(found.weight, now, rtol=0, atol=1e-8)


@pytest.mark.parametrize("group", [0, 8])
def test_jointly_pruned_weights_lie_on_few_levels_and_err_less_than_rounding_afterwards(group):
    ours = theirs = 0.0
    for seed in range(20):
        weight, _, hessian = correlated_layer(6, 32, seed)
        joint = sparsegpt(weight, hessian, 0.5, bits=3, group=group)
        alone = sparsegpt(weight, hessian, 0.5)
        grid = fit_grid(to_groups(alone.weight, group), 3)
        later = project(to_groups(alone.weight, group), grid).reshape(weight.shape) * alone.mask
        levels = [len(part.unique()) for part in to_groups(joint.weight, group).flatten(0, 1)]
        assert max(levels) <= 8 and (joint.weight[~joint.mask] == 0).all()
        ours += output_error(weight, joint.weight, hessian)
        theirs += output_error(weight, later, hessian)
    assert ours < 0.9 * theirs


def test_rounding_with_nothing_pruned_is_gptq_on_the_same_grids():
    weight, _, hessian = correlated_layer(6, 32, seed=31)
    every = torch.ones_like(weight, dtype=torch.bool)
    found = compensate(weight, hessian, every, bits=3, group=8).weight
    expected = gptq(weight, hessian, 3, 8, static_groups=True).weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# ---- OWL


def test_owl_prunes_blocks_with_outliers_less_and_keeps_the_mean():
    shares = [0.02, 0.05, 0.01, 0.03]
    found = owl.block_sparsities(shares, 0.7)
    assert sum(found) / 4 == pytest.approx(0.7)
    assert max(found) - min(found) == pytest.approx(2 * owl.SPREAD)
    assert sorted(range(4), key=lambda i: found[i]) == sorted(range(4), key=lambda i: -shares[i])
    assert owl.block_sparsities([0.1] * 3, 0.7) == pytest.approx([0.7] * 3)


def test_the_outlier_share_counts_over_all_layers_of_a_block_together():
    parts = [torch.ones(2, 45), torch.tensor([[40.0] * 10])]
    # the mean is (90 + 400) / 100 = 4.9: ten of a hundred exceed five times it
    assert owl.outlier_share(parts) == pytest.approx(0.1)
    assert owl.outlier_share(parts, times=9.0) == 0.0
