"""Sampling, on-policy and black-box lessons, the teacher's memory, and the workshop of all."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch

from rooflm.lab import text, train
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.decode.writing import answer_logits, sample, token_logs
from rooflm.lab.distill import workshop
from rooflm.lab.distill.divergences import generalized_jsd, reverse_kl
from rooflm.lab.distill.on_policy import on_policy, own_samples
from rooflm.lab.distill.policy import policy_gradient
from rooflm.lab.distill.ranked import (
    best_of_n,
    model_judge,
    random_judge,
    ranked_batch,
    ranked_lesson,
    ranking_loss,
)
from rooflm.lab.distill.teacher import Teacher
from rooflm.lab.distill.text_only import complete, teacher_corpus
from rooflm.lab.distill.white_box import OBJECTIVES as WHITE_BOX
from rooflm.lab.distill.white_box import white_box
from rooflm.lab.distill.workshop import (
    CONTINUED,
    FROM_START,
    OBJECTIVES,
    SCRATCH,
    Variant,
    Workshop,
    plan_of,
    short_run,
)
from rooflm.lab.evaluate import token_losses
from rooflm.lab.model import Config, Transformer
from rooflm.lab.train import STATE, Plan, Run

SMALL = Config(5, hidden=8, layers=1, heads=2, kv_heads=1, intermediate=16, window=16)
TEACHER = Config(train.VOCAB, 16, 3, 2, 1, 24, window=16)
STUDENT = Config(train.VOCAB, 8, 2, 2, 1, 16, window=16)
PLAN = Plan("student", steps=6, tokens_per_step=64, learning_rate=0.01, warmup=2)
WORDS = "It is a truth universally acknowledged, that a single man must be in want. "


@pytest.fixture(scope="module")
def models():
    """A teacher and a student of the laboratory's vocabulary, small, with sharp distributions."""
    made = []
    for seed, config in enumerate((TEACHER, STUDENT)):
        torch.manual_seed(seed)
        model = Transformer(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
        made.append(model)
    return made


@pytest.fixture
def sources(monkeypatch):
    """Short texts in the place of the novels, and a small student."""
    monkeypatch.setitem(train.CONFIGS, "student", STUDENT)
    found = tuple(text.encode(words * 30) for words in (WORDS, WORDS[::-1]))
    monkeypatch.setattr(train, "training_sources", lambda: found)
    monkeypatch.setattr(train.text, "load_text", lambda name: WORDS * 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


def prompts(rows=4, length=3, seed=0, vocab=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows, length), generator=generator)


# ---- writing


def test_the_likeliest_continuation_is_that_of_passes_without_a_cache(sharp):
    model = sharp(SMALL)
    expected = prompts()
    for _ in range(6):
        following = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], 1)
    assert torch.equal(sample(model, prompts(), 6), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_are_drawn_as_often_as_the_mixture_says(share, sharp):
    model, other = sharp(SMALL), sharp(SMALL, seed=1)
    prompt = prompts(1).expand(20_000, -1)
    drawn = sample(model, prompt, 1, torch.Generator().manual_seed(0), other, share)[:, -1]
    q, p = (m(prompt[:1])[0, -1].softmax(-1) for m in (model, other))
    expected = share * p + (1 - share) * q
    found = torch.bincount(drawn, minlength=5) / len(drawn)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected).abs() <= 4 * error + 1e-9).all()


def test_a_second_token_is_drawn_from_what_the_first_leads_to(sharp):
    model = sharp(SMALL)
    prompt = prompts(1).expand(20_000, -1)
    drawn = sample(model, prompt, 2, torch.Generator().manual_seed(3))
    for first in range(5):
        rows = drawn[drawn[:, -2] == first]
        if len(rows) < 200:
            continue
        expected = model(rows[:1, :-1])[0, -1].softmax(-1)
        found = torch.bincount(rows[:, -1], minlength=5) / len(rows)
        error = (expected * (1 - expected) / len(rows)).sqrt()
        assert ((found - expected).abs() <= 4.5 * error + 1e-9).all()


def test_answer_logits_are_those_that_predict_the_answer(sharp):
    model, rows = sharp(SMALL), prompts(length=9)
    assert torch.allclose(answer_logits(model, rows, 4), model(rows)[:, 3:-1], atol=1e-6)
    logs = token_logs(answer_logits(model, rows, 1), rows[:, 1:])
    for row, found in zip(rows, logs, strict=True):
        assert torch.allclose(-found, token_losses(model, row, 8)[0], atol=1e-5)


def test_a_share_without_another_model_is_refused(sharp):
    with pytest.raises(ValueError, match=r"share is 0.2; allowed: 0 to 1, and 0 without other"):
        sample(sharp(SMALL), prompts(), 1, share=0.2)


# ---- the teacher's memory


def test_answers_that_were_kept_are_the_same_bits(models, tmp_path):
    teacher, student = models
    tokens = prompts(3, 7, vocab=train.VOCAB)
    kept = Teacher(teacher, tmp_path)
    first, again = kept(tokens), kept(tokens)
    assert torch.equal(first, teacher(tokens)) and torch.equal(first, again)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(Teacher(student, tmp_path)(tokens), student(tokens))  # not the other's
    assert torch.equal(kept(tokens.view(7, 3)), teacher(tokens.view(7, 3)))  # nor another shape's
    assert len(list(tmp_path.iterdir())) == 3
    assert not first.requires_grad


def test_a_kept_answer_is_not_computed_again(models, tmp_path, monkeypatch):
    kept, tokens = Teacher(models[0], tmp_path), prompts(2, 5)
    expected = kept(tokens)
    monkeypatch.setattr(Transformer, "states", lambda *_: pytest.fail("asked again"))
    assert torch.equal(kept(tokens), expected)


# ---- white box


@pytest.mark.parametrize("name", WHITE_BOX)
def test_a_white_box_lesson_reads_the_batches_of_a_run_without_a_teacher(name, models, sources):
    teacher, student = models
    lesson = white_box(teacher, sources, PLAN, WHITE_BOX[name])
    for step in (0, 5):
        for ours, theirs in zip(
            lesson.batch(student, step), train.draw(sources, PLAN, step), strict=True
        ):
            assert torch.equal(ours, theirs)
    tokens, following = lesson.batch(student, 2)
    expected = [
        WHITE_BOX[name](student(row[None])[0], teacher(row[None])[0], after).mean()
        for row, after in zip(tokens, following, strict=True)
    ]
    found = lesson.loss(student, tokens, following)
    assert found.item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-4)


# ---- on policy


def test_own_samples_begin_with_text_and_follow_from_model_seed_and_step(models, sources):
    _, student = models
    batch = own_samples(sources, PLAN, row=16, prompt=6)
    (rows,) = batch(student, 3)
    assert rows.shape == (4, 16)
    spans = [s.unfold(0, 6, 1).tolist() for s in sources]
    assert all(any(row[:6].tolist() in span for span in spans) for row in rows)
    torch.manual_seed(5)
    assert torch.equal(batch(student, 3)[0], rows)
    assert not torch.equal(batch(student, 4)[0], rows)
    torch.manual_seed(9)
    other = Transformer(STUDENT).requires_grad_(False)
    (of_other,) = batch(other, 3)
    assert torch.equal(of_other[:, :6], rows[:, :6]) and not torch.equal(of_other, rows)


def test_the_loss_is_taken_where_the_student_wrote(models, sources):
    teacher, student = models
    lesson = on_policy(teacher, sources, PLAN, generalized_jsd, row=16, prompt=6)
    (rows,) = lesson.batch(student, 0)
    expected = generalized_jsd(student(rows)[:, 5:-1], teacher(rows)[:, 5:-1]).mean()
    assert lesson.loss(student, rows).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_policy_gradient_without_rewards_is_on_policy_reverse_kl(models, sources):
    """The single-step part is GKD's; a row of one written token has no other."""
    teacher, _ = models
    gradients = []
    for make in (policy_gradient, lambda *a, **k: on_policy(*a, reverse_kl, **k)):
        torch.manual_seed(2)
        model = Transformer(STUDENT)
        lesson = make(teacher, sources, PLAN, row=7, prompt=6)
        lesson.loss(model, *lesson.batch(model, 0)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_prompts_longer_than_rows_are_refused(sources):
    with pytest.raises(ValueError, match="row is 6; allowed: 7 to 64"):
        own_samples(sources, PLAN, row=6, prompt=6)


# ---- text only


def test_only_text_leaves_the_teacher(models):
    teacher, _ = models
    given = [WORDS, WORDS[3:]]
    found = complete(teacher, given, 40, seed=0)
    assert all(isinstance(x, str) for x in found)
    shortest = min(len(text.encode(x)) for x in given)
    for prompt, answer in zip(given, found, strict=True):
        assert answer.startswith(text.decode(text.encode(prompt)[:shortest]))
    assert found == complete(teacher, given, 40, seed=0)
    assert found != complete(teacher, given, 40, seed=1)


def test_a_corpus_is_written_once_and_goes_on_where_it_was(models, sources, tmp_path):
    teacher, _ = models

    def corpus(folder, tokens=900, seed=0, say=lambda _: None):
        return teacher_corpus(teacher, sources, folder, tokens, seed, 4, 32, say)

    said = []
    whole = corpus(tmp_path / "whole", 256, say=said.append)
    assert len(said) == 2 and len(whole) > 200
    files = sorted((tmp_path / "whole").iterdir())
    files[1].unlink()
    content = files[0].read_bytes()
    said.clear()
    assert torch.equal(corpus(tmp_path / "whole", 256, say=said.append), whole)
    assert len(said) == 1 and files[0].read_bytes() == content
    shorter = corpus(tmp_path / "shorter", 128)
    assert torch.equal(whole[: len(shorter)], shorter)  # a longer corpus begins with it
    assert not torch.equal(corpus(tmp_path / "other", 128, seed=1)[: len(shorter)], shorter)


def test_the_student_reads_the_texts_with_its_own_tokenizer(models, sources, tmp_path):
    teacher, _ = models
    found = teacher_corpus(teacher, sources, tmp_path, 128, 0, 4, 32, lambda _: None)
    (path,) = tmp_path.iterdir()
    texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 4
    expected = [x for t in texts for x in (*text.encode(t).tolist(), 0)]
    assert found.tolist() == expected


# ---- ranked samples


def test_two_samples_are_ranked_by_dpos_loss():
    scores = torch.tensor([[0.3, -1.2], [-4.0, 5.0]], dtype=torch.float64)
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])
    assert torch.allclose(ranking_loss(scores), expected)


def test_the_chances_of_all_orders_sum_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(4))))
    assert (-ranking_loss(scores[orders])).exp().sum().item() == pytest.approx(1)
    by_hand = 1.0
    for i in range(4):
        by_hand *= scores[i].exp().item() / scores[i:].exp().sum().item()
    assert ranking_loss(scores).item() == pytest.approx(-math.log(by_hand))


def test_the_judge_orders_by_nats_per_byte(models):
    teacher, _ = models
    texts = [WORDS, WORDS[:30], "Emma " * 9, "zzxq, zzxq!", WORDS[::-1]]
    costs = []
    for t in texts:
        tokens = text.encode(t)
        losses = token_losses(teacher, tokens, len(tokens) - 1)
        costs.append(losses.sum().item() / len(t.encode("utf-8")))
    order = model_judge(teacher)(texts)
    assert sorted(order) == list(range(5))
    assert [costs[i] for i in order] == sorted(costs)


def test_the_random_judge_is_an_order_that_says_nothing():
    judge = random_judge(0)
    texts = ["a", "bb", "ccc", "dddd"]
    assert sorted(judge(texts)) == [0, 1, 2, 3] and judge(texts) == judge(texts)
    firsts = [judge([f"{i} {t}" for t in texts])[0] for i in range(400)]
    assert all(60 < firsts.count(i) < 140 for i in range(4))


def test_ranked_rows_come_best_first_from_one_prompt(models, sources):
    teacher, student = models
    judge = model_judge(teacher)
    batch = ranked_batch(student, judge, sources, PLAN, samples=2, row=16, prompt=6)
    ranked, before = batch(teacher, 1)  # the model in training is not asked
    assert ranked.shape == (2, 2, 16) and before.shape == (2, 2)
    for group, logs in zip(ranked, before, strict=True):
        assert torch.equal(group[0, :6], group[1, :6])
        assert judge([text.decode(row) for row in group]) == [0, 1]
        expected = token_logs(student(group)[:, 5:-1], group[:, 6:]).sum(-1)
        assert torch.allclose(logs, expected, atol=1e-4)


def test_at_the_start_every_order_is_as_likely(models, sources):
    teacher, student = models
    judge = model_judge(teacher)
    batch = ranked_batch(student, judge, sources, PLAN, samples=4, row=16, prompt=6)
    lesson = ranked_lesson(batch, prompt=6)
    found = lesson.loss(student, *lesson.batch(student, 0))
    assert found.item() == pytest.approx(math.log(24), abs=1e-4)


def test_the_best_of_n_is_the_loss_of_the_first(models, sources):
    teacher, student = models
    judge = model_judge(teacher)
    batch = ranked_batch(student, judge, sources, PLAN, samples=2, row=20, prompt=4)
    lesson = best_of_n(batch, prompt=4)
    ranked, before = lesson.batch(student, 0)
    logs = token_logs(student(ranked[:, 0])[:, 3:-1], ranked[:, 0, 4:])
    assert lesson.loss(student, ranked, before).item() == pytest.approx(-logs.mean().item(), 1e-4)


def test_one_sample_cannot_be_ranked(models, sources):
    for samples in (1, 5):
        with pytest.raises(ValueError, match=rf"samples is {samples}; allowed: 2 to 4, the rows"):
            ranked_batch(models[1], random_judge(), sources, PLAN, samples, row=16)


# ---- one trainer for all


def variant(objective, **other):
    part = CONTINUED if objective in FROM_START else SCRATCH
    return replace(Variant(part, objective, 6, 512, 0.01), **other)


@pytest.fixture
def shop(models, sources, tmp_path, monkeypatch):
    short = partial(teacher_corpus, documents=4, length=32)
    monkeypatch.setattr(workshop, "teacher_corpus", short)
    teacher, student = models
    return Workshop(tmp_path / "runs", teacher, student, say=lambda _: None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_every_parameter(objective, shop):
    model, losses = short_run(shop, variant(objective, steps=3))
    start = Run(plan_of(variant(objective)), "cpu", None, shop.start(variant(objective))).model
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    for (name, new), old in zip(model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(new, old), name


@pytest.mark.parametrize("objective", ["forward-kl", "matching", "own-jsd"])
def test_an_objective_lowers_its_own_loss(objective, shop):
    _, losses = short_run(shop, variant(objective, steps=30))
    assert sum(losses[-5:]) / 5 < losses[0]


def test_the_policy_gradient_lowers_the_reverse_divergence(shop):
    """Its own value says nothing; the divergence on the student's samples does."""
    one_step = variant("own-reverse-kl", part=CONTINUED, steps=1)
    before = short_run(shop, one_step)[1][0]
    shop.student, _ = short_run(shop, variant("policy-gradient", part=CONTINUED, steps=30))
    assert short_run(shop, one_step)[1][0] < before


@pytest.mark.parametrize("objective", ["matching", "own-jsd", "ranked", "teacher-text"])
def test_an_interrupted_run_that_goes_on_equals_one_that_was_not(
    objective, shop, models, tmp_path, monkeypatch
):
    whole = shop.train(variant(objective))
    inner = Run.advance

    def interrupted(self, *batch):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *batch)

    other = Workshop(tmp_path / "parts", *models, say=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.train(variant(objective))
    assert (other.folder / variant(objective).folder / STATE).exists()
    parts = other.train(variant(objective))
    names = ("config.json", "model.safetensors")
    assert all((whole / n).read_bytes() == (parts / n).read_bytes() for n in names)


def test_a_short_run_is_the_start_of_no_other_path(shop):
    """What a chapter trains in memory is what the command writes."""
    found = load_checkpoint(shop.train(variant("forward-kl")))
    model, _ = short_run(shop, variant("forward-kl"))
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.half().float())


def test_a_short_run_takes_the_texts_and_rows_that_it_is_given(models):
    given = text.encode(WORDS * 9), text.encode(WORDS[7:] * 9)
    shop = Workshop(None, *models, sources=given, row=32)
    for objective in ("own-jsd", "policy-gradient", "ranked", "best-of-n"):
        lesson = shop.lesson(variant(objective, tokens_per_step=128))
        rows = lesson.batch(shop.student, 0)[0]
        assert rows.shape[-1] == 32 and rows.numel() == 128
        prompt = rows.flatten(0, -2)[0, :16].tolist()
        assert any(prompt in t.unfold(0, 16, 1).tolist() for t in given)


def test_the_memory_of_the_teacher_changes_no_bit(shop, models):
    bare = Workshop(None, *models)
    with_memory = [short_run(shop, variant("reverse-kl"))[1] for _ in range(2)]
    assert with_memory[0] == with_memory[1] == short_run(bare, variant("reverse-kl"))[1]


def test_a_finished_run_is_not_done_again(shop, monkeypatch):
    first = shop.train(variant("next-token"))
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    assert shop.train(variant("next-token")) == first


def test_a_checkpoint_of_another_plan_is_refused(shop):
    folder = shop.train(variant("next-token"))
    folder.rename(folder.with_name(variant("next-token", seed=1).folder))
    with pytest.raises(ValueError, match="holds a checkpoint of another plan; delete it"):
        shop.train(variant("next-token", seed=1))


def test_a_state_of_another_objective_is_refused(shop, tmp_path):
    run = Run(plan_of(variant("own-jsd")), "cpu")
    run.save_state(tmp_path / STATE)
    other = Run(plan_of(variant("own-forward-kl")), "cpu")
    with pytest.raises(ValueError, match="of a run with objective own-jsd, not own-forward-kl"):
        other.load_state(tmp_path / STATE)


def test_projections_are_dropped_at_the_end(shop):
    found = load_checkpoint(shop.train(variant("matching")))
    assert found.config == STUDENT


def test_the_models_that_are_handed_in_stay_as_they_are(shop, models):
    before = [m.embedding.weight.clone() for m in models]
    for objective in ("ranked", "own-jsd", "matching"):
        part = CONTINUED if objective != "matching" else SCRATCH
        short_run(shop, variant(objective, part=part, steps=2))
    for model, weight in zip(models, before, strict=True):
        assert torch.equal(model.embedding.weight, weight)
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "forward-k"}, "unknown objective 'forward-k'.*forward-kl"),
        ({"part": "scrap"}, "unknown part 'scrap'.*scratch"),
        ({"objective": "ranked"}, "ranked starts from a model that can write, not scratch"),
    ],
)
def test_an_unknown_objective_or_part_is_refused(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        Variant(**{"part": SCRATCH, "objective": "jsd", "steps": 3} | given)
    assert "\n" not in str(caught.value)


def test_without_a_folder_nothing_is_written(models, sources):
    bare = Workshop(None, *models)
    with pytest.raises(ValueError, match="has no folder"):
        bare.train(variant("next-token"))
    with pytest.raises(ValueError, match="teacher-text needs a folder"):
        bare.lesson(variant("teacher-text"))


def test_every_run_of_the_ledger_has_a_folder_of_its_own():
    from rooflm.lab.distill.ledger import KEPT, LOW_RATE, RUNS

    assert len({v.folder for v in RUNS}) == len(RUNS) == len(set(RUNS))
    assert set(KEPT) <= set(RUNS)
    for part in (SCRATCH, CONTINUED):  # equal tokens, and in the comparison one rate for all
        runs = [v for v in RUNS if v.part == part]
        assert len({(v.steps, v.tokens_per_step) for v in runs}) == 1
        assert {v.learning_rate for v in runs} - {LOW_RATE} == {runs[0].learning_rate}
    assert workshop.OBJECTIVES.index("next-token") == 0
