"""Recovery: zeros stay zero, no gradient reaches them, and what is left learns."""

import pytest
import torch

from rooflm.lab.bench import linear_weights
from rooflm.lab.calibrate import LINEARS
from rooflm.lab.finetune import next_token_loss, text_batches
from rooflm.lab.model import Config
from rooflm.lab.prune import apply
from rooflm.lab.prune.apply import prune_model, remove_parts
from rooflm.lab.prune.recipes import Recipe, Removal
from rooflm.lab.recovery import MaskedLinear, recover, recovered, zeros

CONFIG = Config(64, hidden=48, layers=4, heads=6, kv_heads=3, intermediate=40)


@pytest.fixture
def model(sharp):
    return sharp(CONFIG)


@pytest.fixture
def rows():
    return torch.randint(64, (6, 24), generator=torch.Generator().manual_seed(1))


def test_recovery_lowers_the_loss_and_leaves_zeros_zero(model, rows):
    pruned = prune_model(model, Recipe("magnitude", 0.6)).model
    batches = text_batches(rows.flatten(), 4, 16)
    found = recover(pruned, batches, 12, 3e-3)
    assert next_token_loss(found, rows) < 0.9 * next_token_loss(pruned, rows)
    assert zeros(found) == zeros(pruned) > 0.59 * linear_weights(CONFIG)
    for ours, theirs in zip(found.layers, pruned.layers, strict=True):
        for name in LINEARS:
            assert torch.equal(getattr(ours, name).weight == 0, getattr(theirs, name).weight == 0)
            assert type(getattr(ours, name)) is torch.nn.Linear
    assert not any(p.requires_grad for p in found.parameters())


def test_no_gradient_reaches_what_is_masked(model, rows):
    """A step of plain descent by hand on the kept weights alone is what the first step follows."""
    pruned = prune_model(model, Recipe("magnitude", 0.5)).model
    weight = pruned.layers[0].up_proj.weight
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(next_token_loss(pruned, rows), weight)
    weight.requires_grad_(False)
    found = recover(pruned, iter([rows]), 1, 1e-4)
    moved = found.layers[0].up_proj.weight - weight
    # The first step of Adam is the rate times the sign of the gradient.
    expected = torch.where(weight != 0, -1e-4 * gradient.sign(), 0.0)
    clear = gradient.abs() > 1e-5
    torch.testing.assert_close(moved[clear], expected[clear], rtol=0.02, atol=2e-6)


def test_a_masked_layer_neither_uses_nor_trains_what_is_masked():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    mask = weight.abs() > 0.5
    layer, x = MaskedLinear(weight, mask), torch.ones(1, 6)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)
    with torch.no_grad():
        layer.weight[~mask] = 7.0
        torch.testing.assert_close(layer(x), (weight * mask).sum(1)[None])


def test_a_removed_model_recovers_in_all_its_weights(model, rows):
    small = remove_parts(model, Removal("first-order", channels=20), rows)
    found = apply.recovered(small, Removal(channels=20, steps=6), rows.flatten().repeat(2))
    assert zeros(found) <= zeros(small) and found.config == small.config
    assert not torch.equal(found.layers[0].q_proj.weight, small.layers[0].q_proj.weight)


def test_what_recovers_is_stored_in_fp16_and_drawn_by_its_seed(model, rows):
    tokens = rows.flatten().repeat(2)
    found = [recovered(model, tokens, 2, 1e-3, keep_zeros=False, seed=s) for s in (0, 0, 1)]
    weights = [m.layers[1].down_proj.weight for m in found]
    assert torch.equal(weights[0], weights[0].half().float())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
