"""The explorer of low rank."""

import re

import pytest

import rooflm
from rooflm import Calibration, ForwardPass, Precision, show
from rooflm.roofline.factorized import factorize
from rooflm.show.low_rank_explorer import CONTEXT, low_rank_costs

LLAMA = "meta-llama/Llama-2-7b-hf"
CHANGES = [("model", "meta-llama/Llama-3.1-8B"), ("device", "nvidia-v100"), ("projection", "down"),
           ("weights", "int4-g128"), ("share", 80), ("tokens", 512), ("overhead", 5)]  # fmt: skip


@pytest.fixture(scope="module")
def explorer():
    return show.low_rank_explorer(overhead=2)


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_what_is_shown(explorer, changed_parts, name, value):
    changed = changed_parts(explorer, name, value)
    assert {"table", "status"} <= changed
    if name != "model":  # q_proj of both is as large
        assert "figure" in changed


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("projection", ["q", "o", "gate", "down"])
def test_its_costs_are_those_of_the_models_rows(projection, tokens):
    found = low_rank_costs(projection=projection, tokens=tokens, overhead=2, share=40)
    step, start = ForwardPass.decode(tokens, CONTEXT), Calibration(overhead=2e-6)
    reports = {
        name: rooflm.analyze(m, "nvidia-a6000", step, Precision(), calibration=start)
        for name, m in (("dense", LLAMA), ("factors", factorize(LLAMA, share=0.4)))
    }
    for name, cost in (("dense", found.dense), ("factors", found.factors)):
        rows = [r for r in reports[name].operators if r.name.startswith(f"{projection}_proj")]
        assert cost.seconds == pytest.approx(sum(r.seconds for r in rows))
        assert cost.flops == sum(r.flops for r in rows)
        assert cost.bytes == sum(r.bytes for r in rows)
        assert cost.numbers * 2 == sum(r.weight_bytes for r in rows)
    assert found.passes == (reports["dense"].seconds, reports["factors"].seconds)


def test_at_the_break_even_of_time_the_verdict_turns(explorer):
    even = low_rank_costs(overhead=5).even["time"]
    full = low_rank_costs().even["numbers"]
    assert even < full
    for rank, faster in ((even * 0.99, True), (even * 1.01, False)):
        found = low_rank_costs(overhead=5, share=100 * rank / full)
        assert (found.factors.seconds < found.dense.seconds) == faster


def test_a_bias_and_a_plain_mlp_are_counted():
    found = low_rank_costs(model="facebook/opt-125m", projection="up", share=50)
    assert found.dense.numbers == (768 + 1) * 3072
    assert found.factors.numbers == found.rank * (768 + 3072) + 3072


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({}, "time is saved below rank 1,954"),
        ({"share": 100}, "rank 2048 takes 1.04 of the time"),
        ({"model": "facebook/opt-125m", "overhead": 10}, "no rank saves time"),
        ({"tokens": 1}, "1 token:"),
    ],
)
def test_the_verdict_says_when_a_rank_pays(explorer, setting, words):
    page = explorer.show(**{**explorer.start, **setting})
    assert words in re.search(r'role="status">([^<]+)<', page)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 0}, "share is 0"),
        ({"projection": "gate", "model": "facebook/opt-125m"}, "unknown projection of"),
        ({"tokens": 0}, "batch is 0"),
        ({"overhead": -1}, "calibration overhead"),
        ({"weights": "int5"}, "unknown number format"),
        ({"model": "DeepSeek-V3"}, "softmax attention"),
    ],
)
def test_a_setting_that_cannot_be_had_is_one_line(explorer, change, words):
    shown = explorer.show(**{**explorer.start, **change})
    assert shown.startswith('<p role="alert">') and words in shown and "<img" not in shown
    with pytest.raises(ValueError, match=words):
        show.low_rank_explorer(**change)


def test_it_starts_where_it_is_told_and_refuses_the_unknown():
    assert show.low_rank_explorer("Qwen3-8B", share=55).start["share"] == 55
    with pytest.raises(ValueError, match="unknown control"):
        low_rank_costs(rank=8)


def test_bars_put_the_factors_of_a_projection_with_it():
    step = ForwardPass.decode(1, 100)
    reports = {
        name: rooflm.analyze(m, "nvidia-a6000", step)
        for name, m in (("dense", LLAMA), ("half", factorize(LLAMA, share=0.5)))
    }
    alt = show.operator_bars(reports).alt
    assert "_proj_a" not in alt and "gate/up/down_proj" in alt
