"""Evaluation: token by token in float64, and against simulated truths."""

import math

import pytest
import torch
from torch import nn

from rooflm.lab import evaluate as module
from rooflm.lab.evaluate import (
    BlockSums,
    compare,
    evaluate,
    prepare_reference,
    summarize,
    token_losses,
)
from rooflm.lab.model import Config, Transformer

WINDOW, VOCAB = 8, 48
CONFIG = Config(VOCAB, hidden=16, layers=2, heads=4, kv_heads=2, intermediate=24, window=WINDOW)


def make_model(seed=0, spread=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(CONFIG)
        for parameter in model.parameters():
            parameter.data += spread * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def damaged(model, amount):
    copy = Transformer(model.config).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    copy.load_state_dict(
        {
            k: v + amount * torch.randn(v.shape, generator=generator)
            for k, v in model.state_dict().items()
        }
    )
    return copy


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokens():  # five blocks, and three tokens that are left over
    return torch.randint(VOCAB, (5 * WINDOW + 4,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def token_bytes():
    return torch.arange(VOCAB) % 5 + 1


def log_probabilities(model, tokens):
    """Of every prediction, each from its own prefix of its block, (blocks, window, vocab)."""
    found = []
    for start in range(0, len(tokens) - WINDOW, WINDOW):
        for length in range(1, WINDOW + 1):
            logits = model(tokens[None, start : start + length])[0, -1].double()
            found.append(logits - logits.exp().sum().log())
    return torch.stack(found).view(-1, WINDOW, VOCAB)


def blocks_of(losses, **more):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    sizes = torch.full((len(losses),), 100.0, dtype=torch.float64)
    return summarize(BlockSums(sizes, 4 * sizes, losses, **more))


# ---- losses, perplexity, bits per byte


def test_a_loss_is_that_of_a_prediction_from_the_block_so_far(model, tokens):
    found = token_losses(model, tokens, WINDOW, batch=2)
    logs = log_probabilities(model, tokens)
    assert found.shape == (5, WINDOW) and found.dtype == torch.float32
    for block in range(5):
        for i in range(WINDOW):
            following = tokens[block * WINDOW + i + 1]
            assert found[block, i].item() == pytest.approx(
                -logs[block, i, following].item(), abs=1e-5
            )


def test_perplexity_is_the_exponential_of_nats_per_token(model, tokens, token_bytes):
    found = evaluate(model, tokens, token_bytes, WINDOW)
    logs = log_probabilities(model, tokens).flatten(0, 1)
    nats = -logs[torch.arange(5 * WINDOW), tokens[1 : 5 * WINDOW + 1]].sum().item()
    assert found.perplexity.value == pytest.approx(math.exp(nats / (5 * WINDOW)), rel=1e-5)
    text_bytes = sum(token_bytes[t].item() for t in tokens[1 : 5 * WINDOW + 1])
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    for estimate in (found.perplexity, found.bits_per_byte):
        assert estimate.low < estimate.value < estimate.high
    assert found.agreement is None and found.divergence is None


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokens, token_bytes):
    ignorant = make_model()
    ignorant.embedding.weight.zero_()
    found = evaluate(ignorant, tokens, token_bytes, WINDOW).perplexity
    assert found.value == pytest.approx(VOCAB, rel=1e-5)
    assert found.low == pytest.approx(found.high, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("logits_at_once", [1, 3 * VOCAB, 2**21])
def test_how_many_positions_are_computed_at_once_changes_nothing(
    batch, logits_at_once, model, tokens, token_bytes, monkeypatch
):
    expected = evaluate(model, tokens, token_bytes, WINDOW, damaged(model, 0.1))
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", logits_at_once)
    found = evaluate(model, tokens, token_bytes, WINDOW, damaged(model, 0.1), batch)
    for name in ("losses", "agreed", "divergences", "bytes"):
        assert torch.allclose(
            getattr(found.blocks, name), getattr(expected.blocks, name), atol=1e-4
        )


def test_the_logits_of_a_text_are_never_held_at_once(model, tokens, token_bytes, monkeypatch):
    seen = []
    inner = Transformer.logits
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 3 * VOCAB)
    monkeypatch.setattr(
        Transformer, "logits", lambda self, x: seen.append(x.shape[:-1].numel()) or inner(self, x)
    )
    token_losses(model, tokens, WINDOW)
    evaluate(model, tokens, token_bytes, WINDOW, reference=model)
    assert max(seen) == 3 and sum(seen) == 2 * 5 * WINDOW


# ---- against a reference


def test_agreement_and_divergence_are_those_of_the_whole_distributions(model, tokens, token_bytes):
    variant = damaged(model, 0.15)
    found = evaluate(variant, tokens, token_bytes, WINDOW, reference=model)
    p, q = log_probabilities(model, tokens), log_probabilities(variant, tokens)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()  # of the model from the reference
    assert 0 < agreed < 1
    assert found.agreement.value == pytest.approx(agreed)
    assert found.divergence.value == pytest.approx(divergence, rel=1e-4)
    assert divergence != pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-2)


def test_a_model_agrees_with_itself(model, tokens, token_bytes):
    found = evaluate(model, tokens, token_bytes, WINDOW, reference=model)
    assert found.agreement.value == 1 and found.agreement.high == 1
    assert (found.divergence.value, found.divergence.low) == pytest.approx((0, 0), abs=1e-6)
    for measure in module.MEASURES:
        assert compare(found, found, measure).verdict == "within noise"


def test_a_prepared_reference_runs_once_for_any_number_of_variants(
    model, tokens, token_bytes, monkeypatch
):
    runs = []
    inner = Transformer.states
    monkeypatch.setattr(
        Transformer, "states", lambda self, *rest: runs.append(self) or inner(self, *rest)
    )
    reference = prepare_reference(model, tokens, WINDOW)
    assert runs == [model]
    for amount in (0.01, 0.1, 0.2):
        variant = damaged(model, amount)
        found = evaluate(variant, tokens, token_bytes, WINDOW, reference)
        assert runs.pop() is variant and runs == [model]
        expected = evaluate(variant, tokens, token_bytes, WINDOW, model)
        assert str(found) == str(expected)
        del runs[1:]


@pytest.mark.parametrize("untied", [False, True])
def test_a_prepared_reference_outlives_a_change_of_its_model(untied, tokens, token_bytes):
    model, variant = make_model(), make_model(seed=3)
    if untied:
        model.head = nn.Linear(CONFIG.hidden, VOCAB, bias=False).requires_grad_(False)
    reference = prepare_reference(model, tokens, WINDOW)
    expected = evaluate(variant, tokens, token_bytes, WINDOW, reference)
    for parameter in model.parameters():  # as a technique might that works in place
        parameter.zero_()
    assert str(evaluate(variant, tokens, token_bytes, WINDOW, reference)) == str(expected)


def test_a_larger_damage_is_called_worse(model, tokens, token_bytes):
    text = torch.randint(VOCAB, (40 * WINDOW + 1,), generator=torch.Generator().manual_seed(4))
    reference = prepare_reference(model, text, WINDOW)
    small, large = (
        evaluate(damaged(model, amount), text, token_bytes, WINDOW, reference)
        for amount in (0.02, 0.2)
    )
    for measure in ("agreement", "divergence"):
        assert compare(large, small, measure).verdict == "worse"
        assert compare(small, large, measure).verdict == "better"


# ---- comparison of two models on the same blocks


def test_a_small_loss_everywhere_is_seen_through_the_noise_of_the_text():
    generator = torch.Generator().manual_seed(0)
    text = 300 + 40 * torch.randn(32, generator=generator, dtype=torch.float64)
    cost = 2 + torch.randn(32, generator=generator, dtype=torch.float64)
    before, after = blocks_of(text), blocks_of(text + cost)
    assert after.bits_per_byte.value < before.bits_per_byte.high  # each alone could not tell
    for measure in ("bits_per_byte", "perplexity"):
        found = compare(after, before, measure)
        assert found.verdict == "worse" and compare(before, after, measure).verdict == "better"
        ours, theirs = getattr(after, measure), getattr(before, measure)
        assert found.difference.value == pytest.approx(ours.value - theirs.value)


def test_a_cost_that_comes_and_goes_is_within_noise():
    generator = torch.Generator().manual_seed(0)
    text = 300 + 40 * torch.randn(32, generator=generator, dtype=torch.float64)
    change = 5 * torch.randn(32, generator=generator, dtype=torch.float64)
    for measure in ("bits_per_byte", "perplexity"):
        found = compare(blocks_of(text + change), blocks_of(text), measure)
        assert found.verdict == "within noise" and found.difference.value != 0


def test_more_agreement_is_better_and_more_divergence_is_worse():
    losses = torch.full((8,), 300.0)
    few, many = torch.full((8,), 90.0), torch.full((8,), 97.0)
    a = blocks_of(losses, agreed=few, divergences=few)
    b = blocks_of(losses, agreed=many, divergences=many)
    assert compare(b, a, "agreement").verdict == "better"
    assert compare(b, a, "divergence").verdict == "worse"
    assert compare(b, a, "divergence").difference.value == pytest.approx(0.07)


@pytest.mark.parametrize("measure", ["bits_per_byte", "perplexity"])
def test_nineteen_in_twenty_comparisons_cover_the_true_difference(measure):
    generator, covered, trials = torch.Generator().manual_seed(5), 0, 300
    # Nats per token are 3 and 3.05 in the long run; a block holds 100 tokens, 400 bytes.
    expected = {"bits_per_byte": 0.05 / math.log(2) / 4, "perplexity": math.exp(3.05) - math.exp(3)}
    for _ in range(trials):
        text, noise = torch.randn(2, 24, generator=generator, dtype=torch.float64)
        before = 300 + 30 * text
        found = compare(blocks_of(before + 5 + 4 * noise), blocks_of(before), measure).difference
        covered += found.low <= expected[measure] <= found.high
    assert 0.92 <= covered / trials <= 0.99


def test_the_divergence_is_never_given_a_negative_bound():
    found = blocks_of([300.0] * 3, divergences=torch.tensor([0.0, 0.0, 1.0]))
    assert found.divergence.low == 0 and found.divergence.value > 0


def test_a_hopeless_model_has_an_infinite_perplexity_not_an_overflow():
    assert blocks_of([1e6, 2e6]).perplexity.high == math.inf


def test_an_evaluation_prints_as_one_line(model, tokens, token_bytes):
    line = str(evaluate(model, tokens, token_bytes, WINDOW, reference=model))
    assert "\n" not in line
    assert "perplexity" in line and "agreement 1 (" in line


# ---- refusals


def test_what_cannot_be_evaluated_is_refused_in_one_line(model, tokens, token_bytes):
    broken = damaged(model, math.inf)
    reference = prepare_reference(model, tokens, WINDOW)
    found = evaluate(model, tokens, token_bytes, WINDOW)
    longer = evaluate(model, tokens, token_bytes, WINDOW - 1)
    cases = {
        "allowed: 17 or more": lambda: evaluate(model, tokens[:16], token_bytes, WINDOW),
        "allowed: 9 or more": lambda: token_losses(model, tokens[:8], WINDOW),
        "token 99 stands": lambda: token_losses(model, tokens.clamp(min=99), WINDOW),
        "token -1 stands": lambda: token_losses(model, tokens - tokens.min() - 1, WINDOW),
        r"allowed: int64, \(tokens,\)": lambda: token_losses(model, tokens[None], WINDOW),
        "float32": lambda: token_losses(model, tokens.float(), WINDOW),
        "window is 0": lambda: token_losses(model, tokens, 0),
        "batch is 0": lambda: evaluate(model, tokens, token_bytes, WINDOW, batch=0),
        r"token_bytes is of shape \(47,\)": lambda: evaluate(
            model, tokens, token_bytes[1:], WINDOW
        ),
        "another text": lambda: evaluate(model, tokens.flip(0), token_bytes, WINDOW, reference),
        "with another window": lambda: evaluate(model, tokens, token_bytes, WINDOW - 1, reference),
        "not finite": lambda: evaluate(broken, tokens, token_bytes, WINDOW),
        "unknown measure 'bits'; nearest: bits_per_byte": lambda: compare(found, found, "bits"),
        "different blocks": lambda: compare(found, longer),
        "agreement needs a reference": lambda: compare(found, found, "agreement"),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
