"""Divergences between next-token distributions: gradients, closed forms, limits, bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from rooflm.lab.distill.divergences import (
    at_temperature,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    mix,
    reverse_kl,
    skew_kl,
    total_variation,
)
from rooflm.lab.distill.white_box import OBJECTIVES

seeds = st.integers(0, 10_000)
shares = st.floats(0.02, 0.98)
DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd 0.1": lambda s, t: generalized_jsd(s, t, 0.1),
    "jsd 0.5": generalized_jsd,
    "jsd 0.9": lambda s, t: generalized_jsd(s, t, 0.9),
    "skew": lambda s, t: skew_kl(s, t, 0.1),
    "total variation": total_variation,
    "forward at 2": at_temperature(forward_kl, 2.0),
    "reverse at 0.5": at_temperature(reverse_kl, 0.5),
}


def logits(*shape, seed=0, scale=2.0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * drawn


def coins(p, q):
    """Logits of two coins: teacher p, student q."""
    return tuple(torch.tensor([x, 1 - x], dtype=torch.float64).log() for x in (q, p))


def coin_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def central_difference(function, at, step=1e-6):
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = [at.clone() for _ in range(2)]
        moved[0].view(-1)[i] += step
        moved[1].view(-1)[i] -= step
        found.view(-1)[i] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


# ---- gradients


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_central_differences(name, seed):
    student, teacher = logits(3, 5, seed=seed), logits(3, 5, seed=seed + 100)
    at = student.clone().requires_grad_(True)
    DIVERGENCES[name](at, teacher).sum().backward()
    numerical = central_difference(lambda x: DIVERGENCES[name](x, teacher).sum(), student)
    assert torch.allclose(at.grad, numerical, atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_the_objectives_are_those_of_central_differences(name):
    student, teacher, following = logits(4, 6), logits(4, 6, seed=1), torch.tensor([0, 5, 2, 2])
    at = student.clone().requires_grad_(True)
    OBJECTIVES[name](at, teacher, following).mean().backward()
    numerical = central_difference(
        lambda x: OBJECTIVES[name](x, teacher, following).mean(), student
    )
    assert torch.allclose(at.grad, numerical, atol=1e-7)


@given(seeds, st.floats(0.5, 8))
def test_the_softened_loss_has_hintons_gradient(seed, temperature):
    """d/dz of T^2 KL at temperature T is T (q - p)."""
    student, teacher = logits(7, seed=seed).requires_grad_(True), logits(7, seed=seed + 1)
    at_temperature(forward_kl, temperature)(student, teacher).backward()
    q, p = ((x.detach() / temperature).softmax(-1) for x in (student, teacher))
    assert torch.allclose(student.grad, temperature * (q - p), atol=1e-9)


def test_at_a_high_temperature_distillation_matches_centred_logits():
    student, teacher = (x - x.mean() for x in (logits(9), logits(9, seed=1)))
    at = student.clone().requires_grad_(True)
    at_temperature(forward_kl, 1e4)(at, teacher).backward()
    assert torch.allclose(at.grad, (student - teacher) / 9, atol=1e-3)


def test_the_gradients_of_the_ends_are_those_of_the_two_kls():
    student, teacher = logits(2, 6), logits(2, 6, seed=5)

    def gradient(divergence):
        at = student.clone().requires_grad_(True)
        divergence(at, teacher).sum().backward()
        return at.grad

    b = 1e-8
    near_0 = gradient(lambda s, t: generalized_jsd(s, t, b)) / b
    near_1 = gradient(lambda s, t: generalized_jsd(s, t, 1 - b)) / b
    assert torch.allclose(near_0, gradient(forward_kl), atol=1e-4)
    assert torch.allclose(near_1, gradient(reverse_kl), atol=1e-4)


# ---- closed forms


@given(shares, shares, shares)
def test_on_two_tokens_all_are_those_of_coins(p, q, beta):
    student, teacher = coins(p, q)
    m = beta * p + (1 - beta) * q
    assert forward_kl(student, teacher).item() == pytest.approx(coin_kl(p, q), abs=1e-9)
    assert reverse_kl(student, teacher).item() == pytest.approx(coin_kl(q, p), abs=1e-9)
    expected = beta * coin_kl(p, m) + (1 - beta) * coin_kl(q, m)
    assert generalized_jsd(student, teacher, beta).item() == pytest.approx(expected, abs=1e-9)
    assert skew_kl(student, teacher, beta).item() == pytest.approx(coin_kl(p, m), abs=1e-9)
    assert total_variation(student, teacher).item() == pytest.approx(abs(p - q), abs=1e-9)


def test_one_distribution_by_hand():
    # P = (1/2, 1/4, 1/4), Q = (1/4, 1/2, 1/4)
    teacher, student = torch.tensor([2.0, 1, 1]).log(), torch.tensor([1.0, 2, 1]).log()
    assert forward_kl(student, teacher).item() == pytest.approx(math.log(2) / 4)
    assert reverse_kl(student, teacher).item() == pytest.approx(math.log(2) / 4)
    # M = (3/8, 3/8, 1/4): both halves are (1/2) log(4/3) + (1/4) log(2/3)
    jsd = math.log(4 / 3) / 2 + math.log(2 / 3) / 4
    assert generalized_jsd(student, teacher).item() == pytest.approx(jsd)
    assert total_variation(student, teacher).item() == pytest.approx(1 / 4)


@given(seeds)
def test_both_kls_are_those_of_torch_distributions(seed):
    student, teacher = logits(4, 11, seed=seed), logits(4, 11, seed=seed + 1)
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    assert torch.allclose(forward_kl(student, teacher), kl_divergence(p, q), atol=1e-12)
    assert torch.allclose(reverse_kl(student, teacher), kl_divergence(q, p), atol=1e-12)


@given(seeds, shares)
def test_an_accepted_draft_has_the_chance_that_both_share(seed, _):
    student, teacher = logits(8, seed=seed), logits(8, seed=seed + 1)
    shared = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum()
    assert total_variation(student, teacher).item() == pytest.approx(1 - shared.item(), abs=1e-12)


def test_a_sure_teacher_is_a_hard_label():
    student, following = logits(3, 5), torch.tensor([4, 0, 2])
    sure = torch.nn.functional.one_hot(following, 5).double() * 1e3
    assert torch.allclose(forward_kl(student, sure), cross_entropy(student, following))


def test_cross_entropy_keeps_the_shape_of_the_positions():
    student, following = logits(2, 3, 7), torch.tensor([[0, 1, 2], [6, 5, 4]])
    found = cross_entropy(student, following)
    assert found.shape == (2, 3)
    for i, j in ((0, 0), (1, 2)):
        chance = student[i, j].softmax(-1)[following[i, j]]
        assert found[i, j].item() == pytest.approx(-math.log(chance))


def test_mixing_is_linear_in_the_losses():
    hard, soft = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
    assert mix(hard, soft, 0.25).tolist() == [4.0, 6.0]
    assert torch.equal(mix(hard, soft, 1.0), hard) and torch.equal(mix(hard, soft, 0.0), soft)


# ---- limits, bounds, symmetries


@given(seeds)
def test_the_jsd_divided_by_its_share_ends_at_the_two_kls(seed):
    student, teacher = logits(5, seed=seed), logits(5, seed=seed + 1)
    for b in (1e-5, 1e-7):
        near_0 = generalized_jsd(student, teacher, b).item()
        near_1 = generalized_jsd(student, teacher, 1 - b).item()
        assert near_0 / b == pytest.approx(forward_kl(student, teacher).item(), rel=2e3 * b)
        assert near_1 / b == pytest.approx(reverse_kl(student, teacher).item(), rel=2e3 * b)
        assert near_0 < 1e-3 and near_1 < 1e-3  # undivided it vanishes


@given(seeds, shares)
def test_swapping_the_models_swaps_the_shares_of_the_jsd(seed, beta):
    a, b = logits(6, seed=seed), logits(6, seed=seed + 1)
    assert generalized_jsd(a, b, beta).item() == pytest.approx(
        generalized_jsd(b, a, 1 - beta).item(), abs=1e-12
    )


@given(seeds, shares, st.sampled_from([1.0, 20.0]))
def test_skew_and_jsd_stay_below_their_bounds(seed, share, scale):
    student, teacher = logits(9, seed=seed, scale=scale), logits(9, seed=seed + 1, scale=scale)
    assert skew_kl(student, teacher, share).item() <= -math.log(share) + 1e-9
    coin = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert generalized_jsd(student, teacher, share).item() <= coin + 1e-9


def test_disjoint_distributions_reach_the_bounds():
    student, teacher = torch.tensor([500.0, 0, 0]), torch.tensor([0.0, 500, 0])
    assert generalized_jsd(student, teacher).item() == pytest.approx(math.log(2))
    assert skew_kl(student, teacher, 0.1).item() == pytest.approx(-math.log(0.1))
    assert total_variation(student, teacher).item() == pytest.approx(1)
    assert forward_kl(student, teacher).item() == pytest.approx(500)


def test_a_skew_of_0_is_the_forward_kl_and_of_1_nothing():
    student, teacher = logits(4, 6), logits(4, 6, seed=3)
    assert torch.equal(skew_kl(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(skew_kl(student, teacher, 1.0), torch.zeros(4, dtype=torch.float64))


@given(seeds)
def test_pinsker_the_kls_bound_the_total_variation(seed):
    student, teacher = logits(6, seed=seed), logits(6, seed=seed + 1)
    distance = total_variation(student, teacher).item()
    for kl in (forward_kl, reverse_kl):
        assert distance**2 <= kl(student, teacher).item() / 2 + 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_0_for_equal_distributions_and_positive_for_others(name):
    student, teacher = logits(50, 6), logits(50, 6, seed=1)
    same = student + logits(50, 1, seed=2)  # a constant moves no distribution
    assert DIVERGENCES[name](same, student).abs().max() < 1e-12
    assert (DIVERGENCES[name](student, teacher) > 1e-6).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]])
    found = DIVERGENCES[name](student, teacher)
    found.sum().backward()
    assert found.isfinite().all() and student.grad.isfinite().all()


def test_the_forward_kl_covers_two_modes_and_the_reverse_seeks_one():
    """The best bell of one width on two bells: between them, or on one of them."""
    places = torch.linspace(-6, 6, 121, dtype=torch.float64)
    bells = torch.stack([-((places - m) ** 2) / 0.5 for m in (-3.0, 3.0)])
    teacher = torch.logsumexp(bells + torch.tensor([[0.45], [0.55]]).log(), 0)
    students = torch.stack([-((places - m) ** 2) / 0.5 for m in places])  # a mean at each place
    covering = places[forward_kl(students, teacher.expand_as(students)).argmin()].item()
    seeking = places[reverse_kl(students, teacher.expand_as(students)).argmin()].item()
    assert covering == pytest.approx(0.1 * 3, abs=0.06)  # the mean of the mixture
    assert seeking == pytest.approx(3, abs=0.06)


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: generalized_jsd(x, x, 0.0), "beta is 0.0; allowed: between 0 and 1, without"),
        (lambda x: generalized_jsd(x, x, 1), "beta is 1; allowed"),
        (lambda x: skew_kl(x, x, 1.5), "skew is 1.5; allowed: 0 to 1"),
        (lambda x: skew_kl(x, x, math.nan), "skew is nan"),
        (lambda x: mix(x, x, -0.1), "hard_share is -0.1; allowed: 0 to 1"),
        (lambda x: at_temperature(forward_kl, 0)(x, x), "temperature is 0; allowed: a positive"),
        (lambda x: at_temperature(forward_kl, math.inf), "temperature is inf"),
    ],
)
def test_a_share_or_temperature_out_of_range_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.zeros(2, 3))
    assert "\n" not in str(caught.value)
