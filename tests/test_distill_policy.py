"""The policy gradient of the sequence-level reverse KL, against enumeration of all sequences."""

from itertools import product

import pytest
import torch

from rooflm.lab.decode.writing import token_logs
from rooflm.lab.distill.divergences import reverse_kl
from rooflm.lab.distill.policy import policy_loss, rewards_to_go

VOCAB, LENGTH = 3, 3
SEQUENCES = torch.tensor(list(product(range(VOCAB), repeat=LENGTH)))  # (27, 3)


def tables(seed):
    """Logits after every prefix, a table for each length: any distribution of sequences."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(VOCAB**n, VOCAB) for n in range(LENGTH)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def logits_of(table, rows):
    """(rows, LENGTH, VOCAB): what the tables say after each prefix of the rows."""
    places = torch.zeros(len(rows), dtype=torch.int64)
    found = []
    for n in range(LENGTH):
        found.append(table[n][places])
        places = places * VOCAB + rows[:, n]
    return torch.stack(found, 1)


def sequence_logs(table):
    return token_logs(logits_of(table, SEQUENCES), SEQUENCES).sum(1)  # (27,)


def exact_gradient(student, teacher):
    """Of KL(q || p) over all sequences, by its definition."""
    at = [t.clone().requires_grad_(True) for t in student]
    ours, theirs = sequence_logs(at), sequence_logs(teacher)
    (ours.exp() * (ours - theirs)).sum().backward()
    return [t.grad for t in at]


def expected_gradient(student, teacher, loss, chances=None):
    """Of a loss of one row, (rows, n), weighed by the chance of each sequence."""
    at = [t.clone().requires_grad_(True) for t in student]
    found = loss(logits_of(at, SEQUENCES), logits_of(teacher, SEQUENCES), SEQUENCES).sum(1)
    weights = sequence_logs(student).exp() if chances is None else chances
    (weights * found).sum().backward()
    return [t.grad for t in at]


def same(found, expected, tolerance=1e-12):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_its_expected_gradient_is_that_of_the_sequences_reverse_kl(seed):
    student, teacher = tables(seed), tables(seed + 50)

    def loss(ours, theirs, tokens):
        return policy_loss(ours, theirs, tokens, normalize=False)

    assert same(expected_gradient(student, teacher, loss), exact_gradient(student, teacher))


def test_a_reward_is_a_number_through_which_no_gradient_flows():
    """At the last token, which nothing follows, a row asks for the single-step part alone."""
    student, teacher = tables(9), tables(59)
    at = logits_of(student, SEQUENCES).requires_grad_(True)
    theirs = logits_of(teacher, SEQUENCES)
    policy_loss(at, theirs, SEQUENCES, normalize=False).sum().backward()
    alone = logits_of(student, SEQUENCES).requires_grad_(True)
    reverse_kl(alone, theirs).sum().backward()
    assert torch.allclose(at.grad[:, -1], alone.grad[:, -1])
    assert not torch.allclose(at.grad[:, 0], alone.grad[:, 0])


def test_the_single_step_part_alone_is_not_that_gradient():
    student, teacher = tables(1), tables(51)
    alone = expected_gradient(student, teacher, lambda ours, theirs, _: reverse_kl(ours, theirs))
    exact = exact_gradient(student, teacher)
    assert torch.allclose(alone[-1], exact[-1])  # nothing follows the last token
    assert not torch.allclose(alone[0], exact[0], atol=0.05)


def test_it_agrees_with_the_naive_policy_gradient():
    """Eq. 2 of the paper, reward R_t - 1 with R_t from t on, without the decomposition."""
    student, teacher = tables(2), tables(52)

    def naive(ours, theirs, tokens):
        logs = token_logs(ours, tokens)
        rewards = (token_logs(theirs, tokens) - logs).detach()
        to_go = rewards.flip(1).cumsum(1).flip(1)
        return -(to_go - 1) * logs

    assert same(expected_gradient(student, teacher, naive), exact_gradient(student, teacher))


def test_the_baseline_of_the_other_rows_changes_no_expectation():
    student, teacher = tables(3), tables(53)
    at = [t.clone().requires_grad_(True) for t in student]
    ours, theirs = logits_of(at, SEQUENCES), logits_of(teacher, SEQUENCES)
    chances = sequence_logs(student).exp()
    total = 0.0
    for i, j in product(range(len(SEQUENCES)), repeat=2):  # every batch of two
        rows = torch.tensor([i, j])
        found = policy_loss(
            ours[rows], theirs[rows], SEQUENCES[rows], normalize=False, baseline=True
        )
        total = total + chances[i] * chances[j] * found.sum(1).mean()
    total.backward()
    assert same([t.grad for t in at], exact_gradient(student, teacher))


def test_the_baseline_lowers_the_noise():
    student, teacher = tables(4), [t + 2 for t in tables(54)]
    generator = torch.Generator().manual_seed(0)
    chances = sequence_logs(student).exp()
    spread = {}
    for baseline in (False, True):
        gradients = []
        for _ in range(200):
            at = [t.clone().requires_grad_(True) for t in student]
            rows = SEQUENCES[torch.multinomial(chances, 8, True, generator=generator)]
            ours, theirs = logits_of(at, rows), logits_of(teacher, rows)
            policy_loss(ours, theirs, rows, False, baseline).sum(1).mean().backward()
            gradients.append(at[0].grad.flatten())
        spread[baseline] = torch.stack(gradients).var(0).sum().item()
    assert spread[True] < spread[False]


def test_sampled_gradients_are_unbiased_within_their_error():
    student, teacher = tables(5), tables(55)
    generator = torch.Generator().manual_seed(1)
    chances, exact = sequence_logs(student).exp(), exact_gradient(student, teacher)
    drawn = torch.multinomial(chances, 4000, True, generator=generator)
    found = []
    for index in range(len(SEQUENCES)):  # the gradient of each sequence once
        at = [t.clone().requires_grad_(True) for t in student]
        rows = SEQUENCES[index : index + 1]
        ours, theirs = logits_of(at, rows), logits_of(teacher, rows)
        policy_loss(ours, theirs, rows, normalize=False).sum().backward()
        found.append(torch.cat([t.grad.flatten() for t in at]))
    each = torch.stack(found)[drawn]
    error = each.std(0) / len(each) ** 0.5
    difference = (each.mean(0) - torch.cat([g.flatten() for g in exact])).abs()
    assert (difference <= 4 * error + 1e-12).all()


def test_with_a_mixture_a_single_token_is_weighed_back_exactly():
    """The paper's approximation is exact where one token is the whole sequence."""
    student, teacher, share = tables(6)[0], tables(56)[0], 0.2
    at = student.clone().requires_grad_(True)
    tokens = torch.arange(VOCAB)[:, None]
    ours, theirs = (x.expand(VOCAB, -1)[:, None] for x in (at, teacher))
    found = policy_loss(ours, theirs, tokens, share=share)[:, 0]
    mixture = share * teacher.softmax(-1) + (1 - share) * student.softmax(-1)
    (mixture[0] * found).sum().backward()
    exact = student.clone().requires_grad_(True)
    reverse_kl(exact, teacher).sum().backward()
    assert torch.allclose(at.grad, exact.grad)


def test_without_the_teacher_in_the_mixture_no_weight_is_left():
    student, teacher = tables(7), tables(57)
    ours, theirs = logits_of(student, SEQUENCES), logits_of(teacher, SEQUENCES)
    for normalize in (False, True):
        plain = policy_loss(ours, theirs, SEQUENCES, normalize)
        nearly = policy_loss(ours, theirs, SEQUENCES, normalize, share=1e-12)
        assert torch.allclose(plain, nearly)


def test_what_follows_is_summed_or_averaged():
    rewards = torch.tensor([[1.0, 2, 4, 8], [0, 0, 0, 3]])
    assert rewards_to_go(rewards, False).tolist() == [[14, 12, 8, 0], [3, 3, 3, 0]]
    means = [[14 / 3, 6, 8, 0], [1, 1.5, 3, 0]]
    assert rewards_to_go(rewards, True).tolist() == [pytest.approx(row) for row in means]


def test_a_teacher_that_is_the_student_asks_for_nothing():
    student = tables(8)

    def loss(ours, theirs, tokens):
        return policy_loss(ours, theirs, tokens)

    for gradient in expected_gradient(student, student, loss):
        assert gradient.abs().max() < 1e-12
