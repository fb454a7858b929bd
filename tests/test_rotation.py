"""Rotations: orthogonal, fast, harmless to a model, and harmful to outliers only."""

import copy

import pytest
import torch
from torch import nn

from rooflm.lab.model import Config, FullCache, Transformer
from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.rotation import (
    RotatedLinear,
    block_size,
    fast_hadamard,
    hadamard,
    incoherence,
    random_signs,
    rotate_features,
    rotate_model,
    rotate_weight,
    unrotate_features,
    unrotate_weight,
)

# Grouped queries, and widths that are no powers of two: 96 = 3 x 32, 80 = 5 x 16.
CONFIG = Config(vocab=50, hidden=96, layers=2, heads=6, kv_heads=3, intermediate=80)
TOKENS = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(9))


def make_model(dtype=torch.float32):
    """Weights large enough for attention to be uneven, and norms that are not 1."""
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.exp() if parameter.dim() == 1 else 0.2 * noise)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def relative_difference(changed, model, tokens=TOKENS):
    with torch.no_grad():
        exact = model(tokens)
        return ((changed(tokens) - exact).abs().max() / exact.abs().max()).item()


def signs_of(n, seed=0, dtype=torch.float32):
    return random_signs(n, torch.Generator().manual_seed(seed), dtype)


def parity_matrix(n):
    """Sylvester's matrix by its other definition: (-1)^(bits that i and j share)."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64
    )


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_sylvesters_matrix_has_the_parity_of_shared_bits(n):
    expected = parity_matrix(n) / n**0.5
    torch.testing.assert_close(hadamard(n, torch.float64), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("n", "block"), [(768, 256), (576, 64), (1536, 512), (96, 32), (128, 128), (7, 1)]
)
def test_other_sizes_are_blocks_of_the_largest_power_of_two(n, block):
    assert block_size(n) == block
    matrix = hadamard(n, torch.float64)
    assert (matrix != 0).sum() == n * block
    for start in range(0, n, block):
        inner = matrix[start : start + block, start : start + block]
        torch.testing.assert_close(inner, parity_matrix(block) / block**0.5)


@pytest.mark.parametrize("n", [16, 96, 576, 768])
def test_rotations_are_orthogonal(n):
    q = rotate_features(torch.eye(n, dtype=torch.float64), signs_of(n, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (q[:, 0] < 0).any() and (q[:, 0] > 0).any()


@pytest.mark.parametrize("n", [1, 2, 16, 96, 80, 5])
def test_the_fast_transform_is_the_product_with_the_matrix(n):
    x = torch.randn(3, 4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(fast_hadamard(x), x @ hadamard(n, torch.float64))
    assert torch.equal(x, before)


def test_the_transform_and_the_rotation_are_undone():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(fast_hadamard(fast_hadamard(x)), x)
    signs = signs_of(96, 3, torch.float64)
    torch.testing.assert_close(unrotate_features(rotate_features(x, signs), signs), x)


def test_signs_are_fair_and_repeat_with_the_seed():
    signs = signs_of(10_000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 0.04  # four deviations of a fair coin
    assert torch.equal(signs, signs_of(10_000)) and not torch.equal(signs, signs_of(10_000, 1))


def test_a_rotated_weight_on_rotated_inputs_gives_rotated_outputs():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(24, 96, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 96, generator=generator, dtype=torch.float64)
    inner, outer = signs_of(96, 5, torch.float64), signs_of(24, 6, torch.float64)
    q_in = inner[:, None] * hadamard(96, torch.float64)
    q_out = outer[:, None] * hadamard(24, torch.float64)
    torch.testing.assert_close((x @ q_in) @ rotate_weight(weight, inner).T, x @ weight.T)
    turned = rotate_weight(weight, inner, outer)
    torch.testing.assert_close((x @ q_in) @ turned.T, x @ weight.T @ q_out)
    torch.testing.assert_close(unrotate_weight(turned, inner, outer), weight)
    torch.testing.assert_close(unrotate_weight(rotate_weight(weight, inner), inner), weight)


def test_a_rotated_hessian_is_that_of_the_rotated_inputs():
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    signs = signs_of(32, 8, torch.float64)
    turned = rotate_features(x, signs)
    found = rotate_weight(x.T @ x / 40, signs, signs)
    torch.testing.assert_close(found, turned.T @ turned / 40)


def test_incoherence_is_1_for_equal_magnitudes_and_largest_for_one_alone():
    assert incoherence(torch.full((6, 4), -3.0)) == pytest.approx(1, rel=1e-12)
    alone = torch.zeros(6, 4)
    alone[2, 3] = -5
    assert incoherence(alone) == pytest.approx(24**0.5, rel=1e-12)
    assert incoherence(alone * 7) == pytest.approx(24**0.5, rel=1e-12)
    assert incoherence(torch.zeros(6, 4)) == 1


def outlier_weight():
    generator = torch.Generator().manual_seed(10)
    weight = torch.randn(64, 96, generator=generator)
    weight[torch.arange(64), torch.randint(0, 96, (64,), generator=generator)] *= 25
    return weight


def test_rotation_lowers_the_incoherence_and_the_error_of_a_matrix_with_outliers():
    weight, inner, outer = outlier_weight(), signs_of(96, 11), signs_of(64, 12)
    turned = rotate_weight(weight, inner, outer)
    assert incoherence(weight) > 12 and incoherence(turned) < 5
    plain = (round_to_nearest(weight, 4) - weight).square().sum()
    rounded = unrotate_weight(round_to_nearest(turned, 4), inner, outer)
    assert (rounded - weight).square().sum() < plain / 2


def test_rotation_buys_nothing_for_a_matrix_without_outliers():  # the control
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(13))
    inner, outer = signs_of(96, 14), signs_of(64, 15)
    turned = rotate_weight(weight, inner, outer)
    plain = (round_to_nearest(weight, 4) - weight).square().sum()
    rounded = (round_to_nearest(turned, 4) - turned).square().sum()
    assert 0.9 < rounded / plain < 1.1


def test_an_error_made_on_the_rotated_weight_keeps_its_size():
    weight, inner, outer = outlier_weight(), signs_of(96, 16), signs_of(64, 17)
    turned = rotate_weight(weight, inner, outer)
    rounded = round_to_nearest(turned, 3)
    there = (rounded - turned).square().sum()
    here = (unrotate_weight(rounded, inner, outer) - weight).square().sum()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=0)


@pytest.mark.parametrize("online", [True, False])
def test_a_rotated_models_logits_are_the_originals(model, online):
    assert 0 < relative_difference(rotate_model(model, 3, online=online), model) < 1e-4
    exact = make_model(torch.float64)
    assert relative_difference(rotate_model(exact, 3, online=online), exact) < 1e-10


def test_a_rotated_model_counts_its_own_head(model):
    turned = rotate_model(model, online=False)
    counted = sum(p.numel() for p in turned.parameters())
    assert (
        turned.to_roofline().parameters
        == counted
        == model.to_roofline().parameters + 96 * len(model.embedding.weight)
    )


def test_any_orthogonal_rotation_of_the_residual_stream_leaves_the_logits():
    model = make_model(torch.float64)
    with torch.no_grad():  # its principal axes: the energy gathers in the first channels
        states = model.states(TOKENS).flatten(0, 1)
        axes = torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)
        turned = rotate_model(model, residual=axes)
        energy = turned.states(TOKENS).flatten(0, 1).square().mean(0)
    assert relative_difference(turned, model) < 1e-10
    assert energy[0] == energy.max() and energy[0] > 3 * states.square().mean(0).max()


def test_the_residual_stream_turns_by_the_given_rotation():
    model = make_model(torch.float64)
    noise = torch.randn(96, 96, generator=torch.Generator().manual_seed(18), dtype=torch.float64)
    q = torch.linalg.qr(noise).Q
    with torch.no_grad():
        found, before = rotate_model(model, residual=q).states(TOKENS), model.states(TOKENS)
    torch.testing.assert_close(found, before @ q, rtol=1e-10, atol=1e-10)


def test_norms_are_folded_and_the_head_is_untied(model):
    turned = rotate_model(model)
    norms = [turned.final_norm, *(n for b in turned.layers for n in (b.attn_norm, b.mlp_norm))]
    assert all(torch.equal(norm.weight, torch.ones(96)) for norm in norms)
    assert model.head is None and isinstance(turned.head, nn.Linear)
    assert not torch.allclose(turned.head.weight, turned.embedding.weight)


def test_a_model_with_a_head_of_its_own_keeps_it():
    model = make_model(torch.float64)
    model.head = nn.Linear(96, 50, bias=False, dtype=torch.float64)
    assert relative_difference(rotate_model(model), model) < 1e-10


def test_the_original_model_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    rotate_model(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_model_and_another_seed_another(model):
    first, again, other = (rotate_model(model, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.1.q_proj.weight"], other["layers.1.q_proj.weight"])
    one, two = first["layers.0.v_proj.weight"], first["layers.1.v_proj.weight"]
    assert not torch.equal(one, two)


def test_a_cached_decode_of_the_rotated_model_agrees(model):
    turned, cache = rotate_model(model), FullCache()
    with torch.no_grad():
        steps = [turned(TOKENS[:, :10], cache), turned(TOKENS[:, 10:11], cache)]
        exact = model(TOKENS[:, :11])
    assert (torch.cat(steps, 1) - exact).abs().max() < 1e-4 * exact.abs().max()


def captured_inputs(module, model):
    found = []
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return found[0].flatten(0, -2)


def test_the_inner_layer_of_a_rotated_linear_sees_rotated_inputs():
    model = make_model(torch.float64)
    down = rotate_model(model).layers[0].down_proj
    assert isinstance(down, RotatedLinear)
    assert torch.equal(down.weight, down.linear.weight)
    x = torch.randn(4, 80, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    torch.testing.assert_close(down(x), x @ hadamard(80, torch.float64) @ down.weight.T)


def test_rotation_spreads_outliers_of_every_input_it_turns():
    """Outliers in the residual stream, the values and the MLP, none of them in a norm."""
    model = make_model(torch.float64)
    with torch.no_grad():
        for block in model.layers:
            block.attn_norm.weight.fill_(1)
            block.mlp_norm.weight.fill_(1)
            block.v_proj.weight[5] *= 40
            block.up_proj.weight[11] *= 40
            block.o_proj.weight[7] *= 40
        model.embedding.weight[:, 7] *= 40
    turned = rotate_model(model)
    for name in ("q_proj", "gate_proj", "o_proj", "down_proj"):
        before = captured_inputs(getattr(model.layers[0], name), model)
        layer = getattr(turned.layers[0], name)
        after = captured_inputs(layer.linear if name == "down_proj" else layer, turned)
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
        assert incoherence(after) < 0.6 * incoherence(before), name


def test_a_channel_that_only_the_norm_makes_large_needs_no_rotation(model):
    planted = copy.deepcopy(model)
    with torch.no_grad():
        planted.layers[0].attn_norm.weight[3] *= 64
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(planted.layers[0], name).weight[:, 3] /= 64
    eye = torch.eye(96)
    one, two = (rotate_model(m, residual=eye).layers[0] for m in (model, planted))
    torch.testing.assert_close(one.q_proj.weight, two.q_proj.weight)


def test_bad_arguments_are_named_in_one_line(model):
    with pytest.raises(ValueError, match=r"residual is \(95, 96\); allowed: \(96, 96\)"):
        rotate_model(model, residual=torch.ones(95, 96))
    with pytest.raises(ValueError, match=r"differs from the identity by 1e\+02"):
        rotate_model(model, residual=torch.ones(96, 96))
    with pytest.raises(ValueError, match="down_proj is a RotatedLinear; allowed: an unquantized"):
        rotate_model(rotate_model(model))
    with pytest.raises(ValueError, match="n is 0; allowed"):
        hadamard(0)
