"""Heads, channels and layers: removed equals masked, scores against gradients."""

from dataclasses import replace

import pytest
import torch

import rooflm
from rooflm.lab.bench import decode_bytes, linear_weights
from rooflm.lab.calibrate import LINEARS, differentiable, visit_blocks
from rooflm.lab.finetune import next_token_loss
from rooflm.lab.model import Config, FullCache
from rooflm.lab.prune import depth, structured
from rooflm.lab.prune.apply import choose_parts, prune_model, prune_weight, remove_parts
from rooflm.lab.prune.masks import density
from rooflm.lab.prune.recipes import CRITERIA, Recipe, Removal
from rooflm.lab.prune.remove import Structure, blank, choose_channels, choose_heads, remove
from rooflm.lab.prune.sparsegpt import sparsegpt

CONFIG = Config(64, hidden=48, layers=4, heads=6, kv_heads=3, intermediate=40)


@pytest.fixture
def model(sharp):
    return sharp(CONFIG)


@pytest.fixture
def rows():
    return torch.randint(64, (6, 24), generator=torch.Generator().manual_seed(1))


def some(counts, kept, seed):
    """Rising indices, drawn for each layer: (layers, kept)."""
    generator = torch.Generator().manual_seed(seed)
    return choose_channels(torch.rand(CONFIG.layers, counts, generator=generator), kept)


def structure_of(layers=(0, 1, 2, 3), groups=3, heads=2, channels=40):
    kept = some(3, groups, 2)
    scores = torch.rand(CONFIG.layers, 6, generator=torch.Generator().manual_seed(3))
    return Structure(
        torch.tensor(layers), kept, choose_heads(scores, kept, heads, 3), some(40, channels, 4)
    )


STRUCTURES = {
    "channels": {"channels": 13},
    "heads": {"heads": 1},
    "groups": {"groups": 2},
    "layers": {"layers": (0, 3)},
    "all": {"layers": (1, 2, 3), "groups": 2, "heads": 1, "channels": 8},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruned_and_removed_equals_pruned_and_masked(model, rows, name):
    structure = structure_of(**STRUCTURES[name])
    small, twin = remove(model, structure), blank(model, structure)
    full = model(rows)
    torch.testing.assert_close(small(rows), twin(rows), rtol=0, atol=2e-5)
    assert (small(rows) - full).abs().max() > 0.01  # something went
    cache = FullCache()
    steps = torch.cat([small(part, cache) for part in rows.split(8, 1)], 1)
    torch.testing.assert_close(steps, twin(rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_smaller_model_is_what_its_config_says(model, name):
    small = remove(model, structure_of(**STRUCTURES[name]))
    weights = sum(getattr(b, n).weight.numel() for b in small.layers for n in LINEARS)
    assert weights == linear_weights(small.config) < linear_weights(CONFIG)
    assert small.config.head_dim == CONFIG.head_dim
    assert Config.from_dict(small.config.to_dict()) == small.config
    linears = sum(p.numel() for p in small.parameters())
    assert small.to_roofline().parameters == linears
    assert decode_bytes(small.config) == 2 * linears


def test_a_layer_that_another_technique_replaced_is_refused(model):
    model.layers[1].q_proj = torch.nn.Sequential(model.layers[1].q_proj)
    with pytest.raises(ValueError, match="q_proj is a Sequential"):
        remove(model, Structure.whole(CONFIG))


def test_with_everything_kept_nothing_changes(model, rows):
    small = remove(model, Structure.whole(CONFIG))
    assert small.config == CONFIG and torch.equal(small(rows), model(rows))


def test_heads_are_chosen_within_the_groups_that_stay():
    scores = torch.tensor([[9.0, 8, 1, 2, 3, 7]])  # three groups of two
    assert choose_heads(scores, torch.tensor([[1, 2]]), 1, 3).tolist() == [[3, 5]]
    assert choose_heads(scores, torch.tensor([[0, 2]]), 2, 3).tolist() == [[0, 1, 4, 5]]


# ---- scores


def gate_gradients(model, rows):
    """The derivative of the loss by a factor on every head's output and every channel."""
    c = model.config
    heads = torch.ones(c.layers, c.heads, requires_grad=True)
    channels = torch.ones(c.layers, c.intermediate, requires_grad=True)
    hooks = []
    for i, block in enumerate(model.layers):
        width = heads[i].repeat_interleave(c.head_dim)
        hooks.append(block.o_proj.register_forward_pre_hook(lambda m, x, w=width: (x[0] * w,)))
        hooks.append(
            block.down_proj.register_forward_pre_hook(lambda m, x, w=channels[i]: (x[0] * w,))
        )
    found = torch.autograd.grad(next_token_loss(model, rows), (heads, channels))
    for hook in hooks:
        hook.remove()
    return found


def test_the_signed_sum_over_a_groups_outputs_is_the_gradient_of_its_gate(model, rows):
    """The chain rule: the loss's derivative by a factor on a part is sum g w over its outputs."""
    heads, channels = gate_gradients(model, rows)
    for i, products in enumerate(structured.first_order(model, rows)):
        by_channel = products["down_proj"].sum(0)
        by_head = products["o_proj"].sum(0).view(CONFIG.heads, -1).sum(1)
        torch.testing.assert_close(by_channel, channels[i], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(by_head, heads[i], rtol=1e-3, atol=1e-6)
        assert products["up_proj"].sum(1) == pytest.approx(channels[i], rel=1e-3, abs=1e-6)


def test_gradients_are_those_of_the_mean_loss_whatever_the_batch(model, rows):
    found = structured.weight_gradients(model, rows, batch=4)  # 6 rows: 4 and 2
    for name in ("layers.0.q_proj", "layers.3.down_proj"):
        _, i, kind = name.split(".")
        weight = getattr(model.layers[int(i)], kind).weight
        weight.requires_grad_(True)
        (expected,) = torch.autograd.grad(next_token_loss(model, rows), weight)
        weight.requires_grad_(False)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_are_open_to_gradients_inside_alone(model):
    model.embedding.weight.requires_grad_(False)
    model.layers[0].q_proj.weight.requires_grad_(True)  # as somebody left it
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with differentiable(model) as weights:
        assert set(weights) == {f"layers.{i}.{n}" for i in range(CONFIG.layers) for n in LINEARS}
        assert all(w.requires_grad for w in weights.values())
        assert not model.embedding.weight.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with pytest.raises(KeyError), torch.no_grad(), differentiable(model):
        assert torch.is_grad_enabled()
        raise KeyError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_part_that_does_nothing_scores_zero_and_is_the_first_to_go(model, rows):
    with torch.no_grad():
        for block in model.layers:
            block.down_proj.weight[:, 7] = block.gate_proj.weight[7] = 0
            block.up_proj.weight[7] = 0
            for name, dim in (("q_proj", 0), ("o_proj", 1)):
                getattr(block, name).weight.narrow(dim, 3 * 8, 8).zero_()
    for how in structured.SUMS:
        products = structured.first_order(model, rows)
        channel = torch.stack([structured.channel_scores(p, how) for p in products])
        head = torch.stack([structured.head_scores(p, CONFIG, how) for p in products])
        assert (channel.argmin(1) == 7).all() and (channel[:, 7] == 0).all()
        assert (head.argmin(1) == 3).all() and (head[:, 3] == 0).all()


def test_the_scores_of_all_channels_and_groups_add_up_to_the_layers(model, rows):
    products = structured.first_order(model, rows)
    for layer, found in zip(products, structured.layer_scores(products), strict=True):
        parts = (
            structured.channel_scores(layer).sum() + structured.group_scores(layer, CONFIG).sum()
        )
        assert parts.item() == pytest.approx(found.item(), rel=1e-4)


# ---- depth


def test_block_influence_is_one_minus_the_mean_cosine(model, rows):
    seen = []
    hooks = [
        block.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
        for block in model.layers
    ]
    model(rows)
    for hook in hooks:
        hook.remove()
    found = depth.block_influence(model, rows, batch=4)
    for (x, y), influence in zip(seen, found, strict=True):
        cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
        assert influence.item() == pytest.approx(1 - cosine.mean().item(), abs=1e-6)


def test_a_layer_that_adds_nothing_has_no_influence_and_costs_nothing(model, rows):
    with torch.no_grad():
        model.layers[2].o_proj.weight.zero_()
        model.layers[2].down_proj.weight.zero_()
    assert depth.block_influence(model, rows)[2].item() == pytest.approx(0, abs=1e-6)
    without = depth.loss_without(model, rows)
    assert without[2].item() == pytest.approx(next_token_loss(model, rows).item(), rel=1e-5)
    assert len(model.layers) == 4


def test_the_loss_without_a_layer_is_that_of_the_smaller_model(model, rows):
    found = depth.loss_without(model, rows, batch=4)
    for i in range(4):
        layers = torch.tensor([j for j in range(4) if j != i])
        small = remove(model, replace(Structure.whole(CONFIG), layers=layers))
        assert found[i].item() == pytest.approx(next_token_loss(small, rows).item(), rel=1e-5)


# ---- application


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_takes_out_as_many_layers(model, rows, criterion):
    small = remove_parts(model, Removal(criterion, layers=2), rows)
    assert len(small.layers) == 2
    kept = choose_parts(model, Removal(criterion, layers=2), rows).layers.tolist()
    expected = {"last": [0, 1], "first": [2, 3]}
    assert kept == expected.get(criterion, kept) and kept == sorted(set(kept))


def test_a_scratch_model_has_the_shape_and_nothing_else_of_the_removed_one(model, rows):
    removal = Removal("first-order", groups=1, channels=8)
    one = remove_parts(model, removal, rows)
    other = remove_parts(model, replace(removal, criterion="scratch"), rows)
    assert other.config == one.config
    assert other.layers[0].q_proj.weight.std() < 0.2 * one.layers[0].q_proj.weight.std()


def test_later_blocks_are_calibrated_on_what_the_pruned_ones_hand_on(model, rows):
    recipe = Recipe("sparsegpt", 0.5, per="row")
    found = prune_model(model, recipe, rows)
    again = remove(model, Structure.whole(CONFIG))
    for i, (block, known) in enumerate(visit_blocks(again, rows)):
        for name in LINEARS:
            weight = getattr(block, name).weight
            weight.copy_(sparsegpt(weight, known[name].hessian, 0.5, per="row").weight.half())
            assert torch.equal(weight, getattr(found.model.layers[i], name).weight)
    inputs = {
        f"layers.{i}.{name}": x
        for i, (_, known) in enumerate(visit_blocks(model, rows))
        for name, x in known.items()
    }
    once = prune_model(model, replace(recipe, calibration="full"), inputs=inputs).model
    first, last = ([m.layers[i].up_proj.weight for m in (found.model, once)] for i in (0, 3))
    assert torch.equal(*first) and not torch.equal(*last)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("magnitude", 0.5),
        Recipe("wanda", 0.5, "2:4"),
        Recipe("wanda", 0.5, update=True),
        Recipe("sparsegpt", 0.25),
        Recipe("magnitude", 0.5, refit=True),
        Recipe("random", 0.75),
        Recipe("sparsegpt", 0.5, "4:8", bits=4, group=8),
        Recipe("dense", 0.0, bits=3),
    ],
    ids=str,
)
def test_the_masks_say_what_is_zero_and_how_much(model, rows, recipe):
    found = prune_model(model, recipe, rows)
    for name, mask in found.masks.items():
        _, i, kind = name.split(".")
        weight = getattr(found.model.layers[int(i)], kind).weight
        assert not weight[~mask].any()
        assert recipe.bits is not None or weight[mask].all()
        assert torch.equal(weight, weight.half().float())
        assert density(mask) == pytest.approx(1 - recipe.sparsity, abs=0.02)


def test_owl_changes_which_blocks_lose_and_not_how_many_weights_go(model, rows):
    inputs = {
        f"layers.{i}.{name}": x
        for i, (_, known) in enumerate(visit_blocks(model, rows))
        for name, x in known.items()
    }
    found = prune_model(model, Recipe("wanda", 0.5, owl=True), rows, inputs)
    blocks = [
        density(torch.cat([found.masks[f"layers.{i}.{n}"].flatten() for n in LINEARS]))
        for i in range(4)
    ]
    assert sum(blocks) / 4 == pytest.approx(0.5, abs=0.01)
    assert max(blocks) - min(blocks) == pytest.approx(0.16, abs=0.03)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Recipe("wander"), "wander"),
        (lambda: Recipe("wanda", 0.4, "2:4"), "sparsity is 0.4 with 2:4"),
        (lambda: Recipe("wanda", 0.5, bits=4), "bits is given for wanda"),
        (lambda: Recipe("wanda", update=True, refit=True), "refit and update"),
        (lambda: Recipe("dense", 0.5), "sparsity is 0.5 for dense"),
        (lambda: Recipe("wanda", 0.5, "2:4", owl=True), "owl and pattern"),
        (lambda: Removal("influence", channels=3), "influence of channels"),
        (lambda: Removal("largest"), "largest"),
        (lambda: prune_weight(torch.ones(2, 4), None, Recipe("wanda")), "wanda needs"),
        (lambda: depth.without_lowest(torch.ones(3), 3), "removed is 3"),
        (lambda: choose_channels(torch.ones(2, 3), 4), "kept is 4"),
    ],
)
def test_what_is_not_allowed_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_roofline_sees_the_smaller_model(model):
    small = remove(model, structure_of(channels=10))
    step = rooflm.ForwardPass.decode(1, 16)
    whole, part = (
        rooflm.analyze(m.to_roofline(), "nvidia-a6000", step).operators for m in (model, small)
    )
    bytes_of = [
        sum(row.weight_bytes for row in found if row.name == "gate_proj") for found in (whole, part)
    ]
    assert bytes_of[1] * 4 == bytes_of[0]
