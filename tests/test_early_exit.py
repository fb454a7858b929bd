"""Early exit: what leaves where, and that a calibrated threshold keeps its promise."""

import math
import random

import pytest
import torch

from rooflm.lab.decode.early_exit import (
    disagreement,
    first_confident,
    layer_states,
    lowest_threshold,
    p_value,
    saturation,
    softmax_gap,
)
from rooflm.lab.model import Config

CONFIG = Config(32, hidden=16, layers=4, heads=2, kv_heads=1, intermediate=24)


@pytest.fixture
def model(sharp):
    return sharp(CONFIG)


def test_the_states_after_the_last_layer_are_the_models_own(model):
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    states = layer_states(model, tokens)
    assert states.shape == (5, 2, 9, 16)
    torch.testing.assert_close(model.logits(states[-1]), model(tokens))
    torch.testing.assert_close(states[0], model.embedding(tokens))


def test_measures_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    torch.testing.assert_close(softmax_gap(logits), torch.tensor([0.2, 0.7]))
    states = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, -2.0]])[:, None]
    torch.testing.assert_close(saturation(states)[:, 0], torch.tensor([0.5**0.5, -1.0]))


def test_a_token_leaves_at_the_first_confident_layer_or_at_the_last():
    confidence = torch.tensor([[0.2, 0.9, 0.1], [0.8, 0.1, 0.2], [0.1, 0.95, 0.3]])
    assert first_confident(confidence, 0.7).tolist() == [1, 0, 2]
    assert first_confident(confidence, 2.0).tolist() == [2, 2, 2]
    assert first_confident(confidence, 0.0).tolist() == [0, 0, 0]
    assert confidence[-1].tolist() == pytest.approx([0.1, 0.95, 0.3])  # unchanged


def test_disagreement_is_with_the_last_layer():
    choices = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 6, 8]])
    assert disagreement(choices, torch.tensor([0, 0, 0])).tolist() == [0, 0, 1]
    assert disagreement(choices, torch.tensor([1, 1, 2])).tolist() == [0, 1, 0]


def test_lower_thresholds_leave_earlier(model):
    tokens = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))
    confidence = softmax_gap(model.logits(layer_states(model, tokens)[1:]))
    layers = [first_confident(confidence, t).float().mean().item() for t in (0.9, 0.5, 0.2, 0.0)]
    assert layers == sorted(layers, reverse=True) and layers[-1] == 0


def test_p_values_are_no_smaller_than_the_binomials_and_fall_with_samples():
    """For risks of 0 and 1 the exact p-value is the binomial's; a valid bound is not below it."""
    for n, delta in ((20, 0.3), (200, 0.1), (1000, 0.05)):
        for most in (0, 1, int(n * delta / 2), int(n * delta) - 1):
            exact = sum(
                math.comb(n, k) * delta**k * (1 - delta) ** (n - k) for k in range(most + 1)
            )
            assert exact <= p_value(most / n, n, delta) * (1 + 1e-9)
    assert p_value(0.1, 400, 0.2) < p_value(0.1, 100, 0.2) < p_value(0.1, 10, 0.2)
    assert p_value(0.3, 1000, 0.2) == 1


def test_the_promise_is_kept_as_often_as_was_promised():
    """Risks of thresholds are known here; how often does the chosen one break the limit?"""
    chance, samples, delta, epsilon = random.Random(0), 150, 0.1, 0.1
    true = [i / 50 for i in range(26)]  # from the safest threshold down
    broken, chosen = 0, []
    for _ in range(800):
        means = [sum(chance.random() < r for _ in range(samples)) / samples for r in true]
        found = lowest_threshold(means, samples, delta, epsilon)
        chosen.append(-1 if found is None else found)
        broken += found is not None and true[found] > delta
    assert broken / 800 <= epsilon
    assert sum(chosen) / 800 > 1.5  # and it is not for nothing


def test_the_walk_ends_at_the_first_failure():
    assert lowest_threshold([0.0, 0.01, 0.4, 0.0], 500, 0.1) == 1
    assert lowest_threshold([0.4, 0.0], 500, 0.1) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lowest_threshold([0.1], 10, 0.0), "delta is 0"),
        (lambda: lowest_threshold([0.1], 10, 0.1, 1.0), "epsilon is 1"),
        (lambda: p_value(1.5, 10, 0.1), "risk is 1.5"),
        (lambda: p_value(0.5, 0, 0.1), "of 0 samples"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
