"""Training through rounding: the gradient rules, the grid, the data that a model writes."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS
from rooflm.lab.finetune import (
    fit,
    next_token_loss,
    replace_weights,
    row_batches,
    text_batches,
    unfrozen,
)
from rooflm.lab.model import Config, Transformer
from rooflm.lab.quantize.grids import Grid, fit_grid, project, round_to_nearest, to_groups
from rooflm.lab.quantize.llm_qat import distill, generate_data, soft_cross_entropy
from rooflm.lab.quantize.qat import (
    QuantizationAwareLinear,
    fake_quantize,
    fake_quantize_tokens,
    frozen,
    initial_step,
    learned_step_quantize,
    project_straight_through,
    quantization_aware,
)

CONFIG = Config(vocab=23, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24, window=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def tiny_model(config=CONFIG, spread=0.5):
    """Random weights large enough that next tokens are far from equally likely."""
    model = Transformer(config)
    generator = seeded(7)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * spread * parameter.shape[1] ** -0.5
    model.embedding.weight.data *= 4
    return model.eval().requires_grad_(False)


def tokens(rows, length, seed=0, vocab=CONFIG.vocab):
    return torch.randint(vocab, (rows, length), generator=seeded(seed))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the straight-through estimator


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(b, s) for b in (2, 3, 4, 8) for s in (False, True)]
)
@pytest.mark.parametrize("clip", [None, "mse"])
def test_the_forward_pass_is_rounding_to_the_bit(bits, symmetric, clip):
    weight = normal(6, 24).requires_grad_()
    ours = fake_quantize(weight, bits, 8, symmetric, clip)
    assert torch.equal(ours.detach(), round_to_nearest(weight, bits, 8, symmetric, clip=clip))


def test_the_gradient_passes_where_the_code_does_not_saturate_and_stops_elsewhere():
    # 3 bits, step 1: codes -4 to 3. 3.5 rounds to the even 4, beyond the grid; -4.5 to -4.
    x = torch.tensor([-9.0, -4.6, -4.5, -4.4, -0.5, 0.0, 2.7, 3.4, 3.5, 3.6, 9.0])
    expected = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    grid = Grid(torch.ones(1), torch.zeros(1), 3, symmetric=True)
    x.requires_grad_()
    project_straight_through(x, grid).sum().backward()
    assert x.grad.tolist() == expected


def test_the_gradient_stops_at_both_ends_of_an_asymmetric_grid():
    # 2 bits, step 1, zero point 1: points -1, 0, 1, 2.
    x = torch.tensor([-1.6, -1.4, 0.2, 2.4, 2.6], requires_grad=True)
    grid = Grid(torch.ones(1), torch.ones(1), 2, symmetric=False)
    upstream = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    project_straight_through(x, grid).backward(upstream)
    assert x.grad.tolist() == [0.0, 20.0, 30.0, 40.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_value_and_gradient_are_those_of_torchs_fake_quantization(bits):
    weight, upstream = 8 * normal(6, 32), normal(6, 32, seed=1)
    scale, zero = torch.linspace(0.05, 0.3, 6), torch.tensor([0, 1, 2, 3, 1, 0], dtype=torch.int32)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    grid = Grid(scale[:, None], zero[:, None].float(), bits, symmetric=False)
    y = project_straight_through(ours, grid)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, 0, 2**bits - 1)
    torch.testing.assert_close(y, expected)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad == 0).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_full_range_never_stops_a_gradient(bits):
    # The released code of LLM-QAT drops it where |x| >= 2, although nothing is clipped there.
    weight = (3 * normal(5, 32)).requires_grad_()
    upstream = normal(5, 32, seed=1)
    fake_quantize(weight, bits, symmetric=True).backward(upstream)
    torch.testing.assert_close(weight.grad, upstream)
    x = (3 * normal(2, 5, 32)).requires_grad_()
    fake_quantize_tokens(x, bits).backward(upstream.expand(2, 5, 32))
    torch.testing.assert_close(x.grad, upstream.expand(2, 5, 32))


def test_the_arguments_are_left_alone():
    weight, step = normal(4, 8), torch.full((4, 2, 1), 0.25)
    before = weight.clone(), step.clone()
    fake_quantize(weight, 3, 4)
    learned_step_quantize(weight, step, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(step, before[1])


# ---- learned step sizes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_steps_gradient_is_the_numerical_one_with_each_rounding_held(bits):
    # LSQ lets round(w/s) vary with s as w/s does: the distance to it is held where it is.
    group, highest = 8, 2 ** (bits - 1) - 1
    weight = 2 * normal(3, 16).double()
    step = torch.tensor([0.25, 0.5, 0.75]).reshape(3, 1, 1).repeat(1, 2, 1).double()
    upstream = normal(3, 16, seed=1).double()
    grouped = weight.reshape(3, 2, group)
    codes = torch.round(grouped / step)
    ends = codes.clamp(-highest - 1, highest)
    assert (codes != ends).any()

    def value(s):
        q = torch.where(codes == ends, grouped / s + (codes - grouped / step), ends) * s
        return (q * upstream.reshape(3, 2, group)).sum(-1, keepdim=True)

    numerical = (value(step + 1e-6) - value(step - 1e-6)) / 2e-6
    learned = step.float().requires_grad_()
    learned_step_quantize(weight.float(), learned, bits).backward(upstream.float())
    balance = 1 / math.sqrt(group * highest)  # section 2.2
    torch.testing.assert_close(learned.grad.double(), numerical * balance, rtol=1e-4, atol=1e-5)


def test_a_learned_weight_is_on_the_grid_of_its_fp16_step():
    step = torch.tensor([[[0.2]], [[0.3]]])  # neither is an FP16 number
    q = learned_step_quantize(normal(2, 50), step, 3)
    stored = torch.tensor([[0.2000732421875], [0.300048828125]])  # the next FP16 numbers above
    codes = q / stored
    assert torch.allclose(codes, codes.round(), atol=1e-6)
    assert codes.min() >= -4
    assert codes.max() <= 3


def test_at_2_bits_a_learned_step_beats_the_full_range():
    # The full range wastes its points on outliers; gradient descent on the step does not.
    weight = normal(16, 64)
    step = initial_step(weight, 2).requires_grad_()
    optimizer = torch.optim.Adam([step], lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        (learned_step_quantize(weight, step, 2) - weight).square().mean().backward()
        optimizer.step()
    learned = (learned_step_quantize(weight, step, 2) - weight).square().mean().item()
    rounded = (round_to_nearest(weight, 2, symmetric=True) - weight).square().mean().item()
    assert learned < 0.5 * rounded


# ---- a model in training


def on_some_grid(group, steps):
    """Whether numbers are whole multiples of one, and no further apart than that many of it."""
    gaps = group.unique().diff()
    units = [gaps.amin() / k for k in range(1, steps + 1)] if len(gaps) else []
    return not units or any(
        (group / u - (group / u).round()).abs().max() < 1e-4 and gaps.sum() / u < steps + 0.5
        for u in units
    )


@pytest.mark.parametrize("learned", [False, True])
def test_after_training_every_weight_is_on_its_grid(learned):
    model = tiny_model()
    aware = quantization_aware(model, 3, group=8, learned=learned)
    fit(aware, row_batches(tokens(16, 12), 4), next_token_loss, 5, 1e-2)
    final = frozen(aware)
    batch = tokens(2, 10, seed=3)
    assert torch.equal(final(batch), aware(batch).detach())
    for block, old in zip(final.layers, model.layers, strict=True):
        for name in LINEARS:
            layer = getattr(block, name)
            assert type(layer) is torch.nn.Linear
            assert not torch.equal(layer.weight, getattr(old, name).weight)
            assert all(on_some_grid(g, 7) for g in to_groups(layer.weight, 8).flatten(0, 1))


def test_16_bits_change_no_logit():
    model, batch = tiny_model(), tokens(2, 12)
    assert torch.equal(quantization_aware(model, 16)(batch).detach(), model(batch))


def test_keys_and_values_are_rounded_token_by_token_and_queries_are_not():
    aware = quantization_aware(tiny_model(), 16, kv_bits=2)
    seen = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(aware.layers[1], name)
        layer.register_forward_hook(lambda m, x, y, name=name: seen.__setitem__(name, y.detach()))
    aware(tokens(2, 12))
    for name in ("k_proj", "v_proj"):
        y = seen[name].flatten(0, 1)
        assert max(len(row.unique()) for row in y) <= 3  # of 8: -s, 0 and s
        assert len(y.unique()) > 9  # a scale for each token
    assert min(len(row.unique()) for row in seen["q_proj"].flatten(0, 1)) == 16


def test_the_inputs_of_every_linear_layer_are_rounded():
    model = tiny_model()
    aware, batch = quantization_aware(model, 16, activation_bits=4), tokens(2, 12)

    def rounded(x):
        return project(x, fit_grid(x, 4, symmetric=True))

    by_hand = copy.deepcopy(model)
    for block in by_hand.layers:
        for name in LINEARS:
            getattr(block, name).register_forward_pre_hook(lambda m, x: (rounded(x[0]),))
    assert torch.equal(aware(batch).detach(), by_hand(batch))
    assert not torch.equal(by_hand(batch), model(batch))
    assert torch.equal(frozen(aware)(batch), by_hand(batch))


def test_training_learns_through_all_three_roundings_and_leaves_the_model_alone():
    model = tiny_model()
    before = weights(model)
    aware = quantization_aware(model, 3, group=8, activation_bits=8, kv_bits=4)
    batch = tokens(4, 13)
    losses = fit(aware, itertools.repeat(batch), next_token_loss, 25, 2e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert same(before, weights(model))
    assert not any(p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_model_and_another_does_not():
    def trained(seed):
        aware = quantization_aware(tiny_model(), 3)
        losses = fit(aware, text_batches(tokens(1, 99)[0], 4, 8, seed), next_token_loss, 3, 1e-2)
        return losses, weights(aware)

    first, again, other = trained(1), trained(1), trained(2)
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert first[0] != other[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bits": 0}, "bits is 0; allowed: 1 to 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4, "kv_bits": 9}, "kv_bits is 9"),
        ({"bits": 4, "activation_bits": 1}, "bits is 1; allowed"),
        ({"bits": 1}, "bits is 1; allowed"),
        ({"bits": 4, "group": 5}, "group is 5"),
        ({"bits": 4, "learned": True, "symmetric": False}, "learned step"),
        ({"bits": 4, "clip": "max"}, "clip"),
    ],
)
def test_bad_arguments_are_refused_when_the_model_is_made(arguments, named):
    with pytest.raises(ValueError, match=named):
        quantization_aware(tiny_model(), **arguments)


def test_a_layer_that_was_replaced_before_is_refused():
    with pytest.raises(ValueError, match="QuantizationAwareLinear"):
        quantization_aware(quantization_aware(tiny_model(), 4), 4)


# ---- the training loop


class Slope(torch.nn.Module):
    """A loss whose gradient is the same everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.still = torch.nn.Parameter(torch.zeros(3), requires_grad=False)


SLOPE = torch.tensor([5.0, -0.1, 300.0])


def slope_loss(model, batch):
    return (model.weight * SLOPE).sum()


def test_adam_on_a_slope_moves_by_the_rate_which_rises_and_falls_to_zero():
    # With a constant gradient, both moments cancel: each step moves by the rate, whatever
    # the gradient's size.
    model, places = Slope(), [torch.zeros(3)]
    fit(model, range(20), slope_loss, 20, 0.01, lambda *_: places.append(model.weight.data.clone()))
    moves = torch.stack(places).diff(dim=0)
    rates = [0.5, 1.0] + [1 - i / 19 for i in range(1, 19)]
    expected = -0.01 * torch.tensor(rates)[:, None] * SLOPE.sign()
    torch.testing.assert_close(moves, expected, rtol=1e-3, atol=1e-8)
    assert model.still.tolist() == [0, 0, 0]


def test_a_steps_gradient_lives_on_in_adams_moments_alone():
    # Gradient g, then 0: the second step's moments are 0.9 (0.1 g) and 0.95 (0.05 g^2), each
    # divided by its correction, and the rate of the last of two steps is half its peak.
    model, places = Slope(), []
    fit(
        model,
        [torch.ones(()), torch.zeros(())],
        lambda model, batch: batch * slope_loss(model, batch),
        2,
        0.01,
        lambda *_: places.append(model.weight.data.clone()),
    )
    ratio = (0.9 * 0.1 / (1 - 0.9**2)) / math.sqrt(0.95 * 0.05 / (1 - 0.95**2))
    expected = -0.01 * 0.5 * ratio * SLOPE.sign()
    torch.testing.assert_close(places[1] - places[0], expected, rtol=1e-3, atol=1e-8)


def test_progress_tells_the_step_and_its_loss():
    seen = []
    losses = fit(Slope(), range(9), slope_loss, 4, 0.1, lambda *now: seen.append(now))
    assert seen == list(zip((1, 2, 3, 4), losses, strict=True))


def test_the_loop_refuses_what_cannot_be_trained():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(tiny_model(), [], next_token_loss, 1, 0.1)
    with pytest.raises(ValueError, match="there were 2 batches; needed: one for each of 3"):
        fit(Slope(), range(2), slope_loss, 3, 0.1)
    with pytest.raises(ValueError, match="learning_rate is 2"):
        fit(Slope(), range(2), slope_loss, 2, 2)
    with pytest.raises(ValueError, match="the loss of step 0 is nan"):
        fit(Slope(), range(2), lambda m, b: m.weight.sum() * math.nan, 2, 0.1)


def test_batches_are_windows_of_the_text():
    text = torch.arange(100, 150)
    batches = list(itertools.islice(text_batches(text, 6, 4), 40))
    rows = torch.cat(batches)
    assert rows.shape == (240, 5)
    assert (rows.diff(dim=1) == 1).all()
    assert set(rows[:, 0].tolist()) == set(range(100, 146))  # every window there is
    with pytest.raises(ValueError, match="50 tokens; allowed: more than 50"):
        text_batches(text, 1, 50)


def test_the_loss_is_the_mean_negative_log_likelihood_of_the_next_token():
    model, batch = tiny_model(), tokens(3, 7)
    chances = model(batch).double().softmax(-1)
    expected = [
        -math.log(chances[r, i, batch[r, i + 1]].item()) for r in range(3) for i in range(6)
    ]
    assert next_token_loss(model, batch).item() == pytest.approx(sum(expected) / 18, rel=1e-5)


def test_full_fine_tuning_trains_a_copy():
    model = tiny_model()
    copied = unfrozen(model)
    assert all(p.requires_grad for p in copied.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    copied.embedding.weight.data.zero_()
    assert model.embedding.weight.abs().sum() > 0


def test_layers_are_replaced_by_name_and_shape():
    seen = []
    replace_weights(tiny_model(), lambda name, w: seen.append((name, w.shape)) or torch.nn.Module())
    assert len(seen) == 2 * 7
    assert ("k_proj", (8, 16)) in seen
    assert ("down_proj", (16, 24)) in seen


# ---- LLM-QAT's data and labels


def deviations(hits, chances):
    """Each token's count in deviations from its expectation; independent rows."""
    expected, variance = chances.sum(0), (chances * (1 - chances)).sum(0)
    return (hits - expected) / variance.sqrt()


def test_generated_text_starts_uniform_goes_on_greedy_and_then_samples_the_softmax():
    config = Config(vocab=7, hidden=8, layers=1, heads=1, kv_heads=1, intermediate=8)
    model, count = tiny_model(config, 1.0), 3000
    text = generate_data(model, count, 8, seeded(1))
    assert text.shape == (count, 8)
    # An independent account: no cache, every prefix afresh.
    chances = model(text[:, :-1]).double().softmax(-1)  # [:, i] predicts text[:, i + 1]
    likeliest = text[:, 1:] == chances.argmax(-1)
    uniform = torch.full((count, 7), 1 / 7, dtype=torch.float64)
    assert deviations(functional.one_hot(text[:, 0], 7).sum(0), uniform).abs().max() < 4
    assert likeliest[:, :2].all()  # tokens 1 and 2 of at least 3
    assert not likeliest[:, 4:].all(0).any()
    for position in (5, 6, 7):
        hits = functional.one_hot(text[:, position], 7).sum(0)
        assert deviations(hits, chances[:, position - 1]).abs().max() < 4
    # Token 3 is greedy where 4 or 5 tokens are, token 4 where 5 are.
    for position, greedy in ((3, 2 / 3), (4, 1 / 3)):
        top = chances[:, position - 1].amax(-1)
        rate = greedy + (1 - greedy) * top
        spread = (rate * (1 - rate)).sum().sqrt()
        assert abs(likeliest[:, position - 1].sum() - rate.sum()) < 4 * spread


def test_generation_follows_from_its_generator():
    model = tiny_model()
    first, again = (generate_data(model, 3, 9, seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, generate_data(model, 3, 9, seeded(6)))


def test_soft_cross_entropy_is_the_divergence_plus_the_labels_entropy():
    ours, theirs = normal(4, 9, 23), normal(4, 9, 23, seed=1)
    p = torch.distributions.Categorical(logits=theirs.double())
    q = torch.distributions.Categorical(logits=ours.double())
    expected = (torch.distributions.kl_divergence(p, q) + p.entropy()).mean().item()
    assert soft_cross_entropy(ours, theirs).item() == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_the_difference_of_the_distributions():
    ours, theirs = normal(9, 23).requires_grad_(), normal(9, 23, seed=1).requires_grad_()
    soft_cross_entropy(ours, theirs).backward()
    expected = (ours.detach().softmax(-1) - theirs.detach().softmax(-1)) / 9
    torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-7)
    assert theirs.grad is None


def test_distillation_on_its_own_text_brings_a_2_bit_model_back_to_its_teacher():
    teacher = tiny_model()
    text = generate_data(teacher, 32, 16, seeded())
    student = quantization_aware(teacher, 2, group=8)
    unseen = tokens(8, 16, seed=9)
    floor = soft_cross_entropy(teacher(unseen), teacher(unseen)).item()

    def divergence():
        with torch.no_grad():
            return soft_cross_entropy(student(unseen), teacher(unseen)).item() - floor

    before = divergence()
    losses = distill(student, teacher, text, 60, 3e-3)
    assert len(losses) == 60
    assert 0 < divergence() < 0.5 * before


def test_a_quantization_aware_layer_is_a_layer():
    layer = QuantizationAwareLinear(normal(6, 16), 4, input_bits=8)
    x = normal(2, 3, 16, seed=1)
    by_hand = fake_quantize_tokens(x, 8) @ round_to_nearest(layer.weight, 4, symmetric=True).T
    torch.testing.assert_close(layer(x).detach(), by_hand.detach())
