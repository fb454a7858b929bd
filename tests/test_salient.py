"""Kept channels, outliers, exhaustive search and rows of the map, by hand and brute force."""

import itertools
import math

import pytest
import torch

from rooflm.lab.calibrate import InputStatistics
from rooflm.lab.quantize import exhaustive, gptq, map_rows, outliers, salient, sweep
from rooflm.lab.quantize.grids import Grid, fit_grid, round_to_nearest, to_groups
from rooflm.lab.quantize.methods import METHODS, Knowledge, Recipe


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(weight, tokens=64):
    x = drawn(tokens, weight.shape[1], seed=3) * torch.linspace(0.2, 3, weight.shape[1])
    inputs = InputStatistics(x.T @ x / tokens, x.abs().mean(0), x.abs().amax(0), tokens)
    return Knowledge(inputs, drawn(*weight.shape, seed=4).square())


# --- kept channels -----------------------------------------------------------------------------


def test_only_the_channels_of_largest_inputs_are_kept():
    weight, mean_abs = drawn(6, 40), torch.arange(40.0)
    found = salient.keep_salient(weight, mean_abs, 3, share=0.05)
    assert found.kept.nonzero().flatten().tolist() == [38, 39]
    rounded = round_to_nearest(weight, 3)
    assert torch.equal(found.weight[:, :38], rounded[:, :38])
    assert torch.equal(found.weight[:, 38:], weight[:, 38:].half().float())
    # codes, a scale and a zero point a row, two columns of FP16 with an index each
    assert found.bits_per_weight == (6 * 40 * 3 + 6 * (16 + 3) + 2 * (16 * 6 + 16)) / 240


def test_the_controls_keep_as_many_channels_and_others():
    weight, mean_abs = drawn(6, 200), torch.arange(200.0)
    weight[:, 7] *= 100
    found = {x: salient.keep_salient(weight, mean_abs, 3, 20, 0.01, x) for x in salient.CHOICES}
    assert {int(f.kept.sum()) for f in found.values()} == {2}
    assert found["weights"].kept[7] and found["inputs"].kept[199]
    assert not torch.equal(found["random"].kept, found["inputs"].kept)
    assert len({f.bits_per_weight for f in found.values()}) == 1
    again = salient.keep_salient(weight, mean_abs, 3, 20, 0.01, "random", seed=1)
    assert not torch.equal(again.kept, found["random"].kept)


def test_nothing_kept_is_rounding_and_all_kept_is_fp16():
    weight, mean_abs = drawn(4, 16), torch.ones(16)
    none = salient.keep_salient(weight, mean_abs, 2, share=0)
    assert torch.equal(none.weight, round_to_nearest(weight, 2)) and not none.kept.any()
    assert torch.equal(
        salient.keep_salient(weight, mean_abs, 2, share=1).weight, weight.half().float()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 1.5}, "share is 1.5"),
        ({"mean_abs": torch.ones(5)}, "mean_abs is"),
        ({"chosen": "input"}, "inputs"),
    ],
)
def test_keep_salient_refuses(change, words):
    given = {"weight": drawn(4, 16), "mean_abs": torch.ones(16), "bits": 3} | change
    with pytest.raises(ValueError, match=words):
        salient.keep_salient(**given)


# --- controls of recipes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.control])
def test_a_control_differs_from_its_method_and_stores_as_many_bits(name):
    weight = drawn(32, 64)
    group = {"spqr": 16, "awq": 32, "salient": 32, "pb-llm": 32}.get(name, 0)
    recipe = {"method": name, "bits": 3, "group": group, "keep": 0.1}
    ours, control = (
        METHODS[name].quantize(weight, known(weight), Recipe(**recipe, control=c))
        for c in (False, True)
    )
    assert not torch.equal(ours.weight, control.weight)
    assert ours.bits_per_weight == control.bits_per_weight


def test_squeezellm_without_sensitivity_is_plain_k_means():
    weight = drawn(4, 40)
    recipe = Recipe("squeezellm", 2, control=True)
    by_recipe = METHODS["squeezellm"].quantize(weight, known(weight), recipe).weight
    for row, found in zip(weight, by_recipe, strict=True):
        for centre in found.unique():  # each centre is the mean of what it stands for
            assert centre == pytest.approx(row[found == centre].mean().item(), abs=2e-3)


def test_a_method_without_a_control_refuses_one():
    with pytest.raises(ValueError, match=r"control is given for round; allowed for: salient, awq"):
        Recipe("round", control=True)


# --- outliers ----------------------------------------------------------------------------------


def test_the_largest_entry_is_found_across_leading_dimensions():
    x = torch.ones(2, 3, 5)
    x[1, 0, 4] = -7
    found = outliers.largest(x)
    assert (found.token, found.channel) == (3, 4)
    assert found.peak_over_rms == pytest.approx(7 / math.sqrt((29 + 49) / 30))
    assert found.share == pytest.approx(49 / 78)


def test_equal_channels_hold_their_part_of_the_power_and_one_can_hold_all():
    assert outliers.power_share(torch.ones(3, 200), 0.01) == pytest.approx(0.01)
    alone = torch.zeros(3, 200)
    alone[:, 5] = 2
    assert outliers.power_share(alone) == 1.0
    assert outliers.power_share(torch.zeros(2, 4)) == 0.0
    assert outliers.largest(torch.zeros(2, 4))[2:] == (1.0, 0.0)


def test_outliers_refuse():
    with pytest.raises(ValueError, match="not empty"):
        outliers.largest(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="part is 0"):
        outliers.power_share(torch.ones(2, 4), 0)


# --- exhaustive search -------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_choice_of_codes_beats_the_best(symmetric):
    weight, x = drawn(5, 3).double(), drawn(7, 3, seed=1).double()
    hessian = x.T @ x / 7
    grid = fit_grid(to_groups(weight, 0), 2, symmetric)
    found = exhaustive.best_of_all(weight, hessian, grid)
    levels = [-2, -1, 0, 1] if symmetric else range(4)
    for row, best, scale, zero in zip(weight, found, grid.scale, grid.zero, strict=True):
        least = min(
            ((x @ (row - (torch.tensor(q) - zero.squeeze()) * scale.squeeze())).square().mean())
            for q in itertools.product(levels, repeat=3)
        )
        assert (x @ (row - best)).square().mean() == pytest.approx(least.item())


def test_gptq_and_rounding_are_never_below_the_best():
    for seed in range(20):
        weight, x = drawn(8, 4, seed=seed).double(), drawn(6, 4, seed=seed + 50).double()
        hessian = x.T @ x / 6
        by_gptq = gptq.gptq(weight, hessian, 2, damp=0.001)
        best = exhaustive.best_of_all(weight, hessian, by_gptq.grid)
        least = exhaustive.row_errors(weight, best, hessian)
        for q in (by_gptq.weight, round_to_nearest(weight, 2)):
            assert (exhaustive.row_errors(weight, q, hessian) >= least - 1e-9).all()


def test_row_errors_add_up_to_the_output_error():
    weight, q, x = drawn(5, 6), drawn(5, 6, seed=1), drawn(9, 6, seed=2)
    hessian = x.T @ x / 9
    total = exhaustive.row_errors(weight, q, hessian).sum().item()
    assert total == pytest.approx((x @ (weight - q).T).square().sum().item() / 9, rel=1e-5)


def test_too_many_choices_are_refused():
    grid = Grid(torch.ones(2, 1, 1), torch.zeros(2, 1, 1), 4, False)
    with pytest.raises(ValueError, match="4294967296 choices"):
        exhaustive.best_of_all(drawn(2, 8), torch.eye(8), grid)


# --- rows of the map ---------------------------------------------------------------------------


def row(bits, loss, half, method="gptq", options="", **more):
    ends = {"difference_low": loss - half, "difference_high": loss + half}
    made = {"method": method, "bits": 3, "group": 0, "options": options, "divergence": loss}
    return {**made, "bits_per_weight": bits, "difference": loss, **ends, "agreement": 0.5, **more}


def test_the_frontier_is_what_no_cheaper_row_beats():
    rows = [row(b, e, 0.1) for b, e in [(4, 0.1), (2, 0.5), (3, 0.6), (3, 0.3), (5, 0.1), (2, 0.7)]]
    found = [(r["bits_per_weight"], r["difference"]) for r in map_rows.frontier(rows)]
    assert found == [(2, 0.5), (3, 0.3), (4, 0.1)]
    for r in rows:  # brute force: every row is on it, or one with as few bits is no worse
        dominated = any(b <= r["bits_per_weight"] and e <= r["difference"] for b, e in found)
        assert dominated


def test_winners_are_the_least_loss_and_what_overlaps_it():
    rows = [
        row(2, 0.5, 0.1),
        row(2.2, 0.3, 0.1),
        row(2.4, 0.45, 0.1),
        row(2.1, 0.55, 0.1),
        row(4, 0, 0),
    ]
    found = [r["difference"] for r in map_rows.winners(rows, 2.5)]
    assert found == [0.3, 0.45, 0.5]
    with pytest.raises(ValueError, match="no row has 1 bits"):
        map_rows.winners(rows, 1)


def test_weights_only_leaves_out_activations_controls_and_the_full_model():
    kept = row(3, 0.1, 0, options="clip=mse")
    others = [row(3, 0.1, 0, options="activations=8"), row(3, 0.1, 0, options="control")]
    others += [row(32, 0.0, 0, method="full"), row(8, 0.0, 0, method="llm-int8")]
    assert map_rows.weights_only([kept, *others]) == [kept]


def test_rows_for_tables_say_what_the_map_says():
    rows = sweep.load_map("teacher")
    recipe = Recipe("gptq", 3, clip="mse")
    stored = sweep.find_row(rows, recipe)
    ((name, loss, share, kl),) = map_rows.tabulate(
        rows, {"x": recipe}, ["loss", "agreement", "divergence"]
    )
    assert (name, kl, share) == ("x", stored["divergence"], f"{stored['agreement']:.0%}")
    value, half = (float(part) for part in loss.split(" ± "))
    assert value == pytest.approx(stored["difference"], abs=6e-5)
    assert value + half == pytest.approx(stored["difference_high"], abs=2e-4)
    wide = map_rows.at_widths(rows, {"x": recipe}, [(3, 0), (2, 64)])
    assert wide == [
        ("x", loss, map_rows.loss_words(sweep.find_row(rows, Recipe("gptq", 2, 64, clip="mse"))))
    ]


def test_a_method_stands_beside_its_control():
    rows = sweep.load_map("teacher")
    recipe = Recipe("pb-llm", group=128, keep=0.1)
    ours, control = (
        sweep.find_row(rows, Recipe("pb-llm", group=128, keep=0.1, control=c))
        for c in (False, True)
    )
    name, bits, *losses, apart, less = map_rows.beside_control(rows, recipe)
    assert (name, bits) == (sweep.label(recipe), ours["bits_per_weight"])
    assert losses == [map_rows.loss_words(ours), map_rows.loss_words(control)]
    assert apart == ("yes" if ours["difference_high"] < control["difference_low"] else "no")
    assert float(less[:-1]) == pytest.approx(
        100 * (1 - ours["divergence"] / control["divergence"]), abs=0.5
    )


def test_intervals_part_only_where_they_do_not_touch():
    recipe = Recipe("owq", 3)
    for half, apart in ((0.04, "yes"), (0.06, "no")):
        rows = [row(3, 0.1, half, method="owq"), row(3, 0.2, half, method="owq", options="control")]
        assert map_rows.beside_control(rows, recipe)[4:] == (apart, "50%")
