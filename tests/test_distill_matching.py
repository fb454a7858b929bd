"""Matched layers: traces are those of the model, losses have their closed forms."""

import pytest
import torch

from rooflm.lab.distill.divergences import forward_kl
from rooflm.lab.distill.matching import (
    attention_loss,
    hidden_loss,
    layer_pairs,
    matching,
    projections,
    trace,
)
from rooflm.lab.kvcache.attention import attention_maps
from rooflm.lab.model import Config, Transformer
from rooflm.lab.train import Plan, Run

TEACHER = Config(40, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48, window=16)
STUDENT = Config(40, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24, window=16)
PLAN = Plan("student", steps=9, tokens_per_step=64, learning_rate=0.01, warmup=3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=0):
    return torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sources(monkeypatch):
    from rooflm.lab import train

    monkeypatch.setitem(train.CONFIGS, "student", STUDENT)
    numbers = torch.Generator().manual_seed(5)
    return tuple(torch.randint(40, (300,), generator=numbers) for _ in range(2))


def test_a_trace_ends_where_the_model_ends(sharp):
    model = sharp(TEACHER)
    found = trace(model, tokens())
    assert len(found.hidden) == len(found.pairs) == 3
    assert torch.allclose(found.hidden[-1], model.states(tokens()), atol=1e-6)
    assert torch.allclose(model.logits(found.hidden[-1]), model(tokens()), atol=1e-5)


def test_traced_attention_is_the_mean_over_heads(sharp):
    model = sharp(TEACHER)
    found, maps = trace(model, tokens()), attention_maps(model, tokens())
    for i, weights in enumerate(maps):
        assert torch.allclose(found.attention(i), weights.flatten(1, 2).mean(1), atol=1e-6)
        assert torch.allclose(found.attention(i).sum(-1), torch.ones(3, 12), atol=1e-6)
        assert (found.attention(i).triu(1) == 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (4, 6, [0, 2, 3, 5]),
        (2, 4, [1, 3]),
        (3, 3, [0, 1, 2]),
        (1, 5, [4]),
    ],
)
def test_layers_are_paired_by_depth_and_the_last_with_the_last(student, teacher, pairs):
    assert layer_pairs(student, teacher) == list(enumerate(pairs))


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(ValueError, match="student_layers is 4; allowed: 1 to 2"):
        layer_pairs(4, 2)


def test_a_projection_that_explains_all_costs_nothing_and_none_costs_one():
    student, projection = random(50, 4), random(7, 4, seed=1)
    teacher = student @ projection.T
    assert hidden_loss(student, teacher, projection).item() == pytest.approx(0, abs=1e-20)
    assert hidden_loss(student, teacher, torch.zeros_like(projection)).item() == pytest.approx(1)


def test_the_best_projection_is_that_of_least_squares():
    student, teacher = random(60, 4), random(60, 7, seed=1)
    best = torch.linalg.lstsq(student, teacher).solution.T
    at = best.clone().requires_grad_(True)
    hidden_loss(student, teacher, at).backward()
    assert at.grad.abs().max() < 1e-12
    assert hidden_loss(student, teacher, best + 0.01 * random(7, 4)) > hidden_loss(
        student, teacher, best
    )


def test_the_loss_of_attention_is_a_kl_of_rows():
    student, teacher = (random(2, 5, 5, seed=s).softmax(-1) for s in range(2))
    expected = forward_kl(student.log(), teacher.log()).mean()
    assert attention_loss(student, teacher).item() == pytest.approx(expected.item())
    assert attention_loss(teacher, teacher).item() == 0


def test_what_no_query_sees_costs_nothing_and_has_no_gradient():
    at = random(4, 4).requires_grad_(True)
    hidden = torch.ones(4, 4).triu(1).bool()
    student = at.masked_fill(hidden, -torch.inf).softmax(-1)
    teacher = random(4, 4, seed=1).masked_fill(hidden, -torch.inf).softmax(-1)
    found = attention_loss(student, teacher)
    found.backward()
    assert found > 0 and at.grad.isfinite().all()
    assert (at.grad[hidden] == 0).all() and (at.grad[3] != 0).all()


def test_gradients_reach_every_layer_through_the_trace():
    torch.manual_seed(0)
    model = Transformer(STUDENT)
    found = trace(model, tokens())
    (found.attention(1).square().sum() + found.hidden[1].square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name != "final_norm.weight":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_without_layers_matching_is_the_forward_kl(sharp, sources):
    teacher = sharp(TEACHER)
    torch.manual_seed(1)
    model = Transformer(STUDENT)
    lesson = matching(teacher, STUDENT, sources, PLAN, hidden_share=0, attention_share=0)
    read, following = lesson.batch(model, 3)
    expected = forward_kl(model(read), teacher(read)).mean()
    assert lesson.loss(model, read, following).item() == pytest.approx(expected.item(), rel=1e-5)
    whole = matching(teacher, STUDENT, sources, PLAN)
    assert whole.loss(model, read, following) > expected


def test_the_projections_learn_and_the_layers_come_nearer(sharp, sources):
    teacher = sharp(TEACHER)
    lesson = matching(teacher, STUDENT, sources, PLAN)
    before = [p.detach().clone() for p in lesson.extra.parameters()]
    run = Run(Plan("student", 60, 64, 0.01, warmup=3), "cpu", lesson)
    start = run.advance(*lesson.batch(run.model, 0))
    losses = [run.advance(*lesson.batch(run.model, step)) for step in range(1, 60)]
    assert losses[-1] < 0.8 * start
    for old, new in zip(before, lesson.extra.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_projections_follow_from_the_seed_and_keep_the_size_of_a_state():
    first, again, other = (projections(STUDENT, TEACHER, seed) for seed in (0, 0, 1))
    assert len(first) == 2 and first[0].shape == (32, 16)
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    states = random(2000, 16).float()
    mapped = states @ first[0].T
    assert mapped.square().mean().item() == pytest.approx(1, rel=0.25)
