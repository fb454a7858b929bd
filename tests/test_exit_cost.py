"""What a decode step with exits costs: by hand, by enumeration, and at its ends."""

import itertools

import pytest

import rooflm
from rooflm import ForwardPass
from rooflm.roofline.early_exit import early_exit

MODEL, CARD, CONTEXT = "meta-llama/Llama-2-7b-hf", "nvidia-a6000", 1024
ALL = [1.0] * 32
HALF = [1.0] * 16 + [0.5] * 16


def parts(batch):
    """A layer, its key and value projections, the head, and all outside the layers, s."""
    if not batch:
        return 0.0, 0.0, 0.0, 0.0
    rows = rooflm.analyze(MODEL, CARD, ForwardPass.decode(batch, CONTEXT)).operators
    inside = [row for row in rows if row.block not in ("embedding", "head")]
    outside = [row for row in rows if row.block in ("embedding", "head")]
    keys = sum(row.seconds for row in inside if row.name in ("k_proj", "v_proj"))
    head = next(row.seconds for row in outside if row.name == "lm_head")
    rest = sum(row.seconds for row in outside)
    return sum(row.seconds for row in inside), keys, head, rest


def step(needed, batch=1, **other):
    return early_exit(MODEL, CARD, needed, batch, CONTEXT, **other)


def test_without_exits_it_is_the_decode_step():
    found = step(ALL, batch=4)
    whole = rooflm.analyze(MODEL, CARD, ForwardPass.decode(4, CONTEXT)).seconds
    assert found.seconds == pytest.approx(whole) == found.full
    assert found.speedup == pytest.approx(1) and found.filling == found.testing == 0


def test_one_token_by_hand():
    layer, keys, head, rest = parts(1)
    found = step(HALF, measure="softmax")
    assert found.layers == pytest.approx(24 * layer)
    assert found.filling == pytest.approx(8 * keys)  # half of sixteen layers are skipped
    assert found.testing == pytest.approx((16 + 7.5) * head)  # after all but the last of 32
    assert found.rest == pytest.approx(rest)


@pytest.mark.parametrize("leave", ["alone", "together"])
def test_a_batch_is_the_mean_over_all_outcomes(leave):
    """Three sequences; each needs the last sixteen layers or not, as a coin says."""
    costs, expected = [parts(b) for b in range(4)], 0.0
    for outcome in itertools.product((0, 1), repeat=3):
        staying = sum(outcome) if leave == "alone" else 3 * max(outcome)
        layer, keys, *_ = costs[staying]
        expected += (16 * costs[3][0] + 16 * (layer + costs[3][1] - keys)) / 8
    found = step(HALF, batch=3, leave=leave)
    assert found.layers + found.filling == pytest.approx(expected)


def speedups(leave, context):
    return [
        early_exit(MODEL, CARD, HALF, batch, context, leave).speedup for batch in (1, 4, 16, 64)
    ]


def test_the_saving_of_weights_falls_with_the_batch_and_that_of_the_cache_does_not():
    short, long = speedups("alone", 16), speedups("alone", 4096)
    assert short[0] > 1.2 > short[1] > short[2] and short[2] < 1.01
    assert long[-1] > 1.2 > long[1] > 1


def test_together_the_last_one_decides():
    alone, together = speedups("alone", 1024), speedups("together", 1024)
    assert together[0] == pytest.approx(alone[0])
    assert all(x > y for x, y in zip(alone[1:], together[1:], strict=True))
    assert together == sorted(together, reverse=True) and together[-1] == pytest.approx(1)


def test_a_head_after_every_layer_can_cost_more_than_the_exits_save():
    assert step(HALF).speedup > 1.2
    assert step(HALF, measure="softmax").speedup < 1


@pytest.mark.parametrize(
    ("needed", "other", "words"),
    [
        ([1.0] * 31, {}, "needed has 31 chances; allowed: 32"),
        ([0.9] * 32, {}, "allowed: 1 first, then falling"),
        ([1.0, 0.5, 0.6] + [0.1] * 29, {}, "allowed: 1 first, then falling"),
        (ALL, {"leave": "early"}, "unknown leave 'early'"),
        (ALL, {"measure": "entropy"}, "unknown measure 'entropy'"),
        (ALL, {"batch": 0}, "batch is 0"),
    ],
)
def test_bad_input_is_named(needed, other, words):
    with pytest.raises(ValueError, match=words):
        step(needed, **other)


def test_layers_of_several_kinds_are_refused():
    with pytest.raises(ValueError, match="2 kinds of layers"):
        early_exit("google/gemma-3-27b-pt", CARD, [1.0] * 62)
