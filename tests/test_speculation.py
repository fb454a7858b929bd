"""What a pass of speculative decoding yields and costs: against simulation and closed forms."""

import itertools
import math
import random

import numpy as np
import pytest
import sympy

import rooflm
from rooflm import ForwardPass
from rooflm.roofline.speculation import (
    expected_of_lengths,
    expected_tokens,
    speculation,
    speedup_bound,
)

LARGE, SMALL, CARD = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B", "nvidia-h100-sxm"


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_tokens_are_the_sum_over_all_outcomes(acceptance, drafts):
    total = 0.0
    for outcome in itertools.product([True, False], repeat=drafts):
        chance = math.prod(acceptance if kept else 1 - acceptance for kept in outcome)
        kept = outcome.index(False) if False in outcome else drafts
        total += chance * (kept + 1)
    assert expected_tokens(acceptance, drafts) == pytest.approx(total)
    assert expected_of_lengths([acceptance**i for i in range(1, drafts + 1)]) == (
        pytest.approx(total)
    )


def test_tokens_agree_with_a_simulation_within_its_error():
    chance, runs = random.Random(0), 20_000
    for acceptance, drafts in ((0.6, 3), (0.85, 7)):
        found = []
        for _ in range(runs):
            kept = 0
            while kept < drafts and chance.random() < acceptance:
                kept += 1
            found.append(kept + 1)
        mean = sum(found) / runs
        error = (sum((x - mean) ** 2 for x in found) / runs) ** 0.5 / runs**0.5
        assert abs(mean - expected_tokens(acceptance, drafts)) < 4 * error


def test_the_formula_lives_as_array_and_as_symbol():
    a, n = sympy.symbols("a n", positive=True)
    formula = expected_tokens(a, n)
    assert sympy.simplify(formula - (1 - a ** (n + 1)) / (1 - a)) == 0
    found = expected_tokens(np.array([0.5, 1.0, 0.0]), np.array([2.0, 3.0, 4.0]))
    assert found.tolist() == [1.75, 4, 1]


def test_with_a_verification_of_one_step_it_is_the_papers_speedup():
    """Where a decode step costs c and the target 1: arXiv 2211.17192, theorem 3.8."""
    for acceptance, drafts, cost in ((0.5, 2, 0.25), (0.8, 4, 0.1), (0.9, 1, 0.0)):
        by_hand = (1 - acceptance ** (drafts + 1)) / ((1 - acceptance) * (drafts * cost + 1))
        assert speedup_bound(acceptance, drafts, cost) == pytest.approx(by_hand)


def test_times_are_those_of_the_passes():
    found = speculation(LARGE, SMALL, CARD, 0.7, draft_tokens=3, batch=4, context=1000)
    drafts = [ForwardPass.decode(4, context) for context in (1000, 1001, 1002)]
    parts = [rooflm.analyze(SMALL, CARD, step).seconds for step in drafts]
    assert found.draft_seconds == pytest.approx(sum(parts))
    verify = rooflm.analyze(LARGE, CARD, ForwardPass(4, 4, 999, 4)).seconds
    decode = rooflm.analyze(LARGE, CARD, ForwardPass.decode(4, 1000)).seconds
    assert found.verify_seconds == verify and found.decode_seconds == decode
    tokens = 1 + 0.7 + 0.49 + 0.343
    assert found.speedup == pytest.approx(tokens * decode / (sum(parts) + verify))
    assert found.even_tokens == pytest.approx((sum(parts) + verify) / decode)


def test_both_models_have_to_fit():
    found = speculation(LARGE, SMALL, CARD, 0.7, draft_tokens=3, context=1000)
    alone = [rooflm.memory(x, context=1003).weights for x in (LARGE, SMALL)]
    assert found.memory.weights == sum(alone)
    assert found.fits is True
    huge = speculation("meta-llama/Llama-2-70b-hf", SMALL, CARD, 0.7)
    assert huge.fits is False


def test_no_drafts_are_plain_decoding():
    found = speculation(LARGE, SMALL, CARD, 0.7, draft_tokens=np.arange(3))
    assert found.speedup[0] == 1 and found.draft_seconds[0] == 0
    alone = speculation(LARGE, SMALL, CARD, 0.7, draft_tokens=2)
    assert found.speedup[2] == pytest.approx(alone.speedup)


def test_a_draft_of_nothing_costs_nothing_and_a_bad_draft_only_costs():
    lookup = speculation(LARGE, None, CARD, 0.4)
    assert lookup.draft_seconds == 0 and lookup.speedup > 1
    assert speculation(LARGE, SMALL, CARD, 0.0).speedup < 1
    assert speculation(LARGE, None, CARD, 0.0).speedup <= 1


def test_it_stops_paying_where_work_binds():
    batches = np.array([1, 16, 64, 256, 1024])
    found = speculation(LARGE, SMALL, CARD, 0.7, batch=batches, context=256)
    assert found.speedup[0] > 1.5 and found.speedup[-1] < 1
    assert (np.diff(found.speedup) < 1e-9).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acceptance": 1.2}, "acceptance is 1.2"),
        ({"acceptance": np.array([0.5, -0.1])}, "acceptance is"),
        ({"acceptance": 0.5, "draft_tokens": -1}, "draft_tokens is -1"),
        ({"acceptance": 0.5, "context": 0}, "context is 0"),
    ],
)
def test_bad_input_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        speculation(LARGE, SMALL, CARD, **given)
