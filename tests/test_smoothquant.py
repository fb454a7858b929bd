"""SmoothQuant: the scales of eq. 4, and a model that computes the same from smoother inputs."""

import copy

import pytest
import torch
from torch import nn

from rooflm.lab.model import Config, FullCache, Transformer
from rooflm.lab.quantize.int8 import vectorwise_product
from rooflm.lab.quantize.smoothquant import (
    NORMS,
    READERS,
    input_peaks,
    plant_outliers,
    smooth_model,
    smoothing_scales,
)

# Grouped queries: 6 query heads of 8 on 3 KV heads, so that a wrong pairing of heads shows.
CONFIG = Config(vocab=50, hidden=48, layers=2, heads=6, kv_heads=3, intermediate=40)
TOKENS = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(9))


def make_model(dtype=torch.float32):
    """Weights large enough for attention to be uneven, and norms that are not 1."""
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.exp() if parameter.dim() == 1 else 0.3 * noise)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def peaks_by_hand(model, tokens):
    """The largest input magnitudes from a pass with hooks of the test's own."""
    found = {}

    def note(name):
        def hook(_, given):
            found[name] = given[0].detach().abs().flatten(0, -2).max(0).values

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def relative_difference(changed, model, tokens=TOKENS):
    with torch.no_grad():
        exact = model(tokens)
        return ((changed(tokens) - exact).abs().max() / exact.abs().max()).item()


def test_scales_are_those_of_equation_4():
    x, w = torch.tensor([8.0, 0.5, 3.0]), torch.tensor([2.0, 0.25, 7.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = [
            a**alpha / b ** (1 - alpha) for a, b in zip(x.tolist(), w.tolist(), strict=True)
        ]
        assert smoothing_scales(x, w, alpha).tolist() == pytest.approx(expected, rel=1e-6)


def test_half_strength_makes_input_and_weight_peaks_equal():
    generator = torch.Generator().manual_seed(2)
    x, w = torch.rand(64, generator=generator) * 30, torch.rand(64, generator=generator)
    s = smoothing_scales(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)
    torch.testing.assert_close(x / s, (x * w).sqrt())


def test_full_strength_makes_all_input_channels_equal():
    x, w = torch.tensor([8.0, 0.5, 3.0]), torch.tensor([2.0, 0.25, 7.0])
    assert torch.equal(x / smoothing_scales(x, w, 1.0), torch.ones(3))


def test_unused_channels_are_left_alone():
    x, w = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        assert torch.equal(smoothing_scales(x, w, alpha), torch.ones(3))


def test_peaks_are_those_of_the_layers_inputs(model):
    found, expected = input_peaks(model, TOKENS), peaks_by_hand(model, TOKENS)
    assert len(expected) == 14  # 7 layers in each of 2 blocks
    for name, peak in expected.items():
        torch.testing.assert_close(found[name], peak)


@pytest.mark.parametrize("places", [NORMS, ("v_proj",), ("up_proj",), tuple(READERS)])
def test_smoothing_leaves_the_logits_unchanged(model, places):
    smooth = smooth_model(model, peaks_by_hand(model, TOKENS), places=places)
    assert 0 < relative_difference(smooth, model) < 1e-4  # rounding; 1e-12 in float64, below


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_smoothing_leaves_the_logits_unchanged_in_float64(strength):
    model = make_model(torch.float64)
    smooth = smooth_model(model, peaks_by_hand(model, TOKENS), strength)
    assert relative_difference(smooth, model) < 1e-12


def test_each_place_changes_what_it_makes_and_its_readers_only(model):
    peaks = peaks_by_hand(model, TOKENS)
    before = dict(model.named_parameters())
    for place, readers in READERS.items():
        after = dict(smooth_model(model, peaks, places=[place]).named_parameters())
        changed = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
        assert changed == {place, *readers}


def test_the_original_model_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    smooth_model(model, peaks_by_hand(model, TOKENS))
    plant_outliers(model, [3], 50.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_peaks_move_as_the_scales_say(model):
    before = peaks_by_hand(model, TOKENS)
    after = peaks_by_hand(smooth_model(model, before), TOKENS)
    block = model.layers[0]
    for name, weights in (
        ("q_proj", [block.q_proj, block.k_proj, block.v_proj]),
        ("gate_proj", [block.gate_proj, block.up_proj]),
    ):
        peak = torch.stack([w.weight.abs().max(0).values for w in weights]).max(0).values
        expected = (before[f"layers.0.{name}"] * peak).sqrt()  # at strength 1/2
        torch.testing.assert_close(after[f"layers.0.{name}"], expected, rtol=1e-4, atol=1e-6)


def test_query_heads_of_a_kv_head_share_the_scale_of_their_largest_peaks(model):
    peaks = peaks_by_hand(model, TOKENS)
    smooth = smooth_model(model, peaks, places=["v_proj"])
    old, new = model.layers[1], smooth.layers[1]
    inputs = peaks["layers.1.o_proj"].view(6, 8)  # (heads, head_dim)
    weights = old.o_proj.weight.abs().amax(0).view(6, 8)
    columns = (new.o_proj.weight / old.o_proj.weight).mean(0).view(6, 8)
    rows = (old.v_proj.weight / new.v_proj.weight).mean(1).view(3, 8)  # (kv_heads, head_dim)
    for kv_head in range(3):
        readers = [2 * kv_head, 2 * kv_head + 1]
        largest = inputs[readers].max(0).values, weights[readers].max(0).values
        expected = (largest[0] / largest[1]).sqrt()
        for found in (rows[kv_head], *columns[readers]):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_values_of_one_query_head_each_are_smoothed_to_equal_peaks():
    torch.manual_seed(3)  # no grouping: eq. 4 holds for v and o channel by channel
    model = Transformer(Config(50, 32, 1, heads=4, kv_heads=4, intermediate=24)).eval()
    before = peaks_by_hand(model, TOKENS)["layers.0.o_proj"]
    smooth = smooth_model(model, {"layers.0.o_proj": before}, places=["v_proj"])
    after = peaks_by_hand(smooth, TOKENS)["layers.0.o_proj"]
    torch.testing.assert_close(after, smooth.layers[0].o_proj.weight.abs().amax(0))


def test_a_cached_decode_of_the_smoothed_model_agrees(model):
    smooth = smooth_model(model, peaks_by_hand(model, TOKENS))
    cache = FullCache()
    with torch.no_grad():
        steps = [smooth(TOKENS[:, :10], cache), smooth(TOKENS[:, 10:11], cache)]
        exact = model(TOKENS[:, :11])
    assert (torch.cat(steps, 1) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_planting_with_a_power_of_two_leaves_the_logits_bit_for_bit(model):
    with torch.no_grad():
        exact = model(TOKENS)
        for places in (NORMS, ("v_proj", "up_proj"), tuple(READERS)):
            planted = plant_outliers(model, [1, 17], 64.0, places)
            assert torch.equal(planted(TOKENS), exact)


def test_planting_with_any_factor_leaves_the_logits_unchanged():
    model = make_model(torch.float64)
    planted = plant_outliers(model, [0, 5, 23], 37.7, READERS)
    assert relative_difference(planted, model) < 1e-12


def test_planting_multiplies_the_chosen_channels_and_no_other(model):
    before = peaks_by_hand(model, TOKENS)
    after = peaks_by_hand(plant_outliers(model, [4, 11], 64.0), TOKENS)
    for name, peak in before.items():
        expected = peak.clone()
        if not name.endswith(("o_proj", "down_proj")):
            expected[[4, 11]] *= 64
        assert torch.equal(after[name], expected)


def test_planting_in_the_values_multiplies_every_query_heads_copy(model):
    before = peaks_by_hand(model, TOKENS)["layers.0.o_proj"].view(6, 8)
    planted = plant_outliers(model, [8 + 5], 64.0, ["v_proj"])  # KV head 1, position 5
    after = peaks_by_hand(planted, TOKENS)["layers.0.o_proj"].view(6, 8)
    expected = before.clone()
    expected[2:4, 5] *= 64  # query heads 2 and 3 read KV head 1
    assert torch.equal(after, expected)


def test_the_residual_stream_does_not_move(model):
    planted = plant_outliers(model, [2], 64.0, tuple(READERS))
    with torch.no_grad():
        assert torch.equal(planted.states(TOKENS), model.states(TOKENS))


def test_smoothing_mends_what_planted_outliers_do_to_an_int8_product(model):
    planted = plant_outliers(model, [4, 11], 64.0)
    smooth = smooth_model(planted, peaks_by_hand(planted, TOKENS))

    def error(model):
        """Of the first block's gate_proj at 8 bits, over the output's power."""
        inputs = []
        layer = model.layers[0].gate_proj
        hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        with torch.no_grad():
            model(TOKENS)
        hook.remove()
        exact = inputs[0].double() @ layer.weight.double().T
        return (vectorwise_product(inputs[0], layer.weight) - exact).square().sum() / (
            exact.square().sum()
        )

    assert error(planted) > 20 * error(model)
    assert error(smooth) < 2 * error(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: smoothing_scales(torch.ones(3), torch.ones(4)), "peaks are (3,) and (4,)"),
        (lambda m: smoothing_scales(torch.ones(3), torch.ones(3), 1.5), "strength is 1.5"),
        (lambda m: smoothing_scales(-torch.ones(3), torch.ones(3)), "the input peak holds"),
        (lambda m: smooth_model(m, {}), "no peak of layers.0.q_proj is given"),
        (lambda m: smooth_model(m, {}, places=["vproj"]), "unknown place 'vproj'; nearest: v_proj"),
        (lambda m: plant_outliers(m, [48], 8.0), "channel is 48; allowed in attn_norm: 0 to 47"),
        (lambda m: plant_outliers(m, [-1], 8.0), "channel is -1"),
        (lambda m: plant_outliers(m, [1], 0.0), "factor is 0.0; allowed: a positive number"),
    ],
)
def test_bad_arguments_are_named_in_one_line(model, call, message):
    with pytest.raises(ValueError) as caught:
        call(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_that_was_replaced_is_refused(model):
    changed = copy.deepcopy(model)
    changed.layers[0].up_proj = nn.Sequential(changed.layers[0].up_proj)
    with pytest.raises(ValueError, match="up_proj is a Sequential; allowed: an unquantized"):
        plant_outliers(changed, [1], 2.0)
