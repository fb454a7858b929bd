"""Sampling by rejection: the target's own distribution, by chi-square and by closed forms."""

import itertools
import math

import pytest
import torch

from rooflm.lab.decode.chances import GREEDY, Sampling, chances, draw, one_hot, rank
from rooflm.lab.decode.rejection import (
    acceptance,
    residual,
    verify,
    verify_candidates,
    verify_sequences,
)

DRAWS = 200_000


def random_chances(*shape, seed=0, sharp=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def pairs_drawn(p, q, draws, seed=0, check=verify):
    """Counts of the first two tokens that come out of two drafts, (vocab * vocab,)."""
    vocab, generator = p.shape[-1], torch.Generator().manual_seed(seed)
    first = draw(q[0, 0].expand(draws, vocab), generator)
    second = draw(q[1, first], generator)
    rows = torch.stack([p[0, 0].expand(draws, vocab), p[1, first], p[2, second]], 1)
    drafts = torch.stack([q[0, 0].expand(draws, vocab), q[1, first]], 1)
    kept, token = check(rows, drafts, torch.stack([first, second], 1), generator)
    one = torch.where(kept > 0, first, token)
    alone = draw(p[1, one], generator)  # the target's own, where one token came out
    two = torch.where(kept > 1, second, torch.where(kept == 1, token, alone))
    return (one * vocab + two).bincount(minlength=vocab**2).tolist()


@pytest.fixture(scope="module")
def models():
    """The target and the draft as tables: what comes after each token at each of three places."""
    return random_chances(3, 4, 4, seed=1), random_chances(3, 4, 4, seed=2)


def expected_pairs(p):
    return [float(p[0, 0, i] * p[1, i, j]) for i, j in itertools.product(range(4), repeat=2)]


def test_two_drafts_come_out_as_the_target_draws_them(models, chi_square):
    p, q = models
    counts = pairs_drawn(p, q, DRAWS)
    statistic, limit = chi_square(counts, expected_pairs(p))
    assert statistic < limit


@pytest.mark.parametrize("planted", ["place", "residual", "ratio"])
def test_the_chi_square_test_sees_a_planted_bug(models, chi_square, planted):
    p, q = models

    def wrong(rows, drafts, drafted, generator):
        u = torch.rand(drafted.shape, generator=generator, dtype=rows.dtype)
        at = rows[:, 1:] if planted == "place" else rows[:, :2]  # an off-by-one in the rule
        target, draft = (x.gather(-1, drafted[..., None])[..., 0] for x in (at, drafts))
        passed = u * target < draft if planted == "ratio" else u * draft < target
        kept = passed.int().cumprod(-1).sum(-1)
        own, other = rows[torch.arange(len(rows)), kept], torch.zeros_like(rows[:, 0])
        if planted != "residual":
            beyond = torch.cat([drafts, torch.zeros_like(rows[:, :1])], 1)
            other = beyond[torch.arange(len(rows)), kept]
        return kept, draw(residual(own, other), generator)

    counts = pairs_drawn(p, q, 20_000, check=wrong)
    statistic, limit = chi_square(counts, expected_pairs(p))
    assert statistic > 2 * limit


def test_a_draft_is_kept_as_often_as_the_two_overlap():
    p, q = random_chances(5, seed=3), random_chances(5, seed=4)
    generator = torch.Generator().manual_seed(0)
    rows, drafts = torch.stack([p, p]).expand(20_000, 2, 5), q.expand(20_000, 1, 5)
    kept = verify(rows, drafts, draw(drafts, generator), generator).kept.sum().item()
    share, expected = kept / 20_000, float(acceptance(p, q))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))
    assert expected == pytest.approx(float(1 - (p - q).abs().sum() / 2))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_several_candidates_come_out_as_the_target_draws_them(most, chi_square):
    p, q = random_chances(5, seed=5), random_chances(5, seed=6)
    generator, left = torch.Generator().manual_seed(0), q.expand(DRAWS, 5)
    candidates = []
    for _ in range(most):
        candidates.append(draw(left, generator))
        left = left.scatter(-1, candidates[-1][:, None], 0.0)
    tried = torch.stack(candidates, 1)
    which, token = verify_candidates(p.expand(DRAWS, 5), q.expand(DRAWS, 5), tried, generator)
    kept = which >= 0
    assert torch.equal(token[kept], tried[kept, which[kept]])
    statistic, limit = chi_square(token.bincount(minlength=5).tolist(), p.tolist())
    assert statistic < limit
    share = kept.double().mean().item()
    if most == 1:
        assert share == pytest.approx(float(acceptance(p, q)), abs=0.005)
    else:
        assert share > float(acceptance(p, q)) + 0.01


@pytest.mark.parametrize("most", [1, 2, 4])
def test_independent_candidates_come_out_as_the_target_draws_them(most, chi_square):
    p, q = random_chances(5, seed=10), random_chances(5, seed=11)
    generator = torch.Generator().manual_seed(0)
    tried = draw(q.expand(DRAWS, most, 5), generator)
    which, token = verify_sequences(p, q, tried, generator)
    kept = which >= 0
    assert torch.equal(token[kept], tried[kept, which[kept]])
    statistic, limit = chi_square(token.bincount(minlength=5).tolist(), p.tolist())
    assert statistic < limit
    share, alone = kept.double().mean().item(), float(acceptance(p, q))
    if most == 1:
        assert share == pytest.approx(alone, abs=0.005)
    else:
        assert alone + 0.01 < share < 1 - (1 - alone) ** most + 0.005


def test_with_every_token_as_a_candidate_one_is_always_kept():
    p, q = random_chances(4, seed=7), random_chances(4, seed=8)
    generator = torch.Generator().manual_seed(1)
    for order in itertools.permutations(range(4)):
        assert verify_candidates(p, q, torch.tensor(order), generator).which >= 0


def test_equal_distributions_keep_everything():
    p = random_chances(3, 6, seed=9)
    generator = torch.Generator().manual_seed(0)
    rows = p.expand(500, 3, 6)
    assert (verify(rows, rows[:, :2], draw(rows[:, :2], generator), generator).kept == 2).all()


def test_greedy_keeps_a_draft_exactly_where_it_is_the_targets_own():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    p, generator = chances(logits, GREEDY), torch.Generator()
    best = logits.argmax(-1)
    for first, second in itertools.product(range(6), repeat=2):
        drafted = torch.tensor([first, second])
        found = verify(p, one_hot(drafted, p[:2]), drafted, generator)
        kept = 0 if first != best[0] else 1 if second != best[1] else 2
        assert found == (kept, int(best[kept]))


def test_what_is_left_is_what_the_target_has_more():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(residual(p, q), torch.tensor([1.0, 0.0, 0.0]))
    p, q = torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.2, 0.2, 0.6])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.6, 0.4, 0.0]))
    assert torch.equal(residual(p, p), p)


def test_shapes_that_do_not_fit_are_named():
    p = random_chances(3, 4)
    with pytest.raises(ValueError, match="for drafts \\(1,\\)"):
        verify(p, p[:2], torch.tensor([1]), torch.Generator())


# ---- the distribution that is drawn from


def test_the_filters_by_hand():
    p = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    logits = p.log()
    cases = {
        Sampling(): [0.4, 0.1, 0.3, 0.2],
        Sampling(top_k=2): [4 / 7, 0, 3 / 7, 0],
        Sampling(top_p=0.7): [4 / 7, 0, 3 / 7, 0],
        Sampling(top_p=0.71): [4 / 9, 0, 3 / 9, 2 / 9],
        Sampling(top_p=1e-9): [1, 0, 0, 0],
        Sampling(min_p=0.5): [4 / 9, 0, 3 / 9, 2 / 9],
        Sampling(min_p=0.51): [4 / 7, 0, 3 / 7, 0],
        Sampling(temperature=0.5): [16 / 30, 1 / 30, 9 / 30, 4 / 30],
        Sampling(temperature=0.5, top_k=3, top_p=0.8): [16 / 25, 0, 9 / 25, 0],
        GREEDY: [1, 0, 0, 0],
    }
    for sampling, expected in cases.items():
        found = chances(logits, sampling)
        assert found.tolist() == pytest.approx(expected, abs=1e-9), sampling


def test_equal_tokens_are_taken_in_their_order():
    p = torch.tensor([0.1, 0.3, 0.3, 0.3])
    assert rank(p).tolist() == [3, 0, 1, 2]
    assert chances(p.log(), Sampling(top_k=2))[3] == 0
    assert chances(p.log(), GREEDY).argmax() == 1


def test_draws_have_the_distribution_and_never_what_has_no_chance(chi_square):
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = draw(p.expand(40_000, 5), generator)
    counts = found.bincount(minlength=5).tolist()
    statistic, limit = chi_square(counts, p.tolist())
    assert statistic < limit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": 2}, "min_p is 2"),
    ],
)
def test_bad_settings_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**given)
