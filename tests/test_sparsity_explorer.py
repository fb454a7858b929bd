"""The explorer of sparsity."""

import html
import re
import sys

import pytest

import rooflm
from rooflm import ForwardPass, Precision, show
from rooflm.roofline.removal import shrink
from rooflm.show.sparsity_explorer import CONTEXT, sparse_plans

module = sys.modules["rooflm.show.sparsity_explorer"]  # the function of that name hides it
LLAMA = "meta-llama/Llama-2-7b-hf"
CHANGES = [("model", "meta-llama/Llama-3.1-8B"), ("device", "nvidia-v100"), ("values", "int4-g128"),
           ("pattern", "2:4"), ("sparsity", 80), ("phase", "prefill"), ("batch", 256)]  # fmt: skip


@pytest.fixture(scope="module")
def explorer():
    return show.sparsity_explorer()


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_what_is_shown(explorer, changed_parts, name, value):
    changed = changed_parts(explorer, name, value)
    assert {"table", "status"} <= changed
    if name not in ("pattern", "device"):  # the device scales both times under the memory roof
        assert "figure" in changed


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


def test_its_plans_are_the_librarys():
    plans = sparse_plans(sparsity=70, batch=4)
    step = ForwardPass.decode(4, CONTEXT)
    for name, weights in (
        ("dense", "fp16"), ("bitmap", "fp16-70%-bitmap"), ("csr32", "fp16-70%-csr32"),
        ("2:4", "fp16-2:4"),
    ):  # fmt: skip
        expected = rooflm.analyze(LLAMA, "nvidia-a100-80gb", step, Precision(weights))
        assert plans[name].seconds == expected.seconds
    left = rooflm.analyze(shrink(LLAMA, layers=10), "nvidia-a100-80gb", step)
    assert plans["whole layers"].seconds == left.seconds
    prefill = sparse_plans(phase="prefill", values="int8")
    step = ForwardPass.prefill(1, CONTEXT)
    p = Precision("int8-2:4", "int8")
    assert prefill["2:4"].seconds == rooflm.analyze(LLAMA, "nvidia-a100-80gb", step, p).seconds
    assert "tiled-csl" not in prefill


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({}, "7.58 GB of weights for 13.5 GB and 3.91 ms for 6.75 ms: 1.72 times as fast"),
        ({"pattern": "csr16"}, "nothing is saved"),
        ({"pattern": "csr32"}, "it costs time"),
        ({"phase": "prefill", "batch": 16}, "no time is saved"),
        ({"phase": "prefill", "pattern": "2:4"}, "times as fast"),
        ({"phase": "prefill", "pattern": "2:4", "device": "nvidia-v100"}, "no time is saved"),
        ({"pattern": "whole layers"}, "16 of 32 layers left"),
        ({"batch": 1024}, "does not fit"),
    ],
)
def test_the_verdict_says_what_is_saved_and_when_nothing(explorer, setting, words):
    page = explorer.show(**{**explorer.start, **setting})
    assert words in re.search(r'role="status">([^<]+)<', page)[1]


def test_the_table_has_break_even_shares(explorer):
    page = explorer.show(**explorer.start)
    words = html.unescape(page).replace("\xa0", " ")
    assert page.count("<tr>") == 8 and "6.25 %" in words and "66.7 %" in words
    assert "(chosen)" in page and "fp16-2:4" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 100}, "sparsity is 100"),
        ({"sparsity": True}, "sparsity is True"),
        ({"pattern": "ell"}, "unknown pattern"),
        ({"pattern": "tiled-csl", "values": "int8"}, "tiled-csl holds 16-bit values"),
        ({"phase": "train"}, "unknown phase"),
        ({"batch": 0}, "batch is 0"),
        ({"values": "int5"}, "unknown number format"),
    ],
)
def test_a_setting_that_cannot_be_had_is_one_line(explorer, change, words):
    shown = explorer.show(**{**explorer.start, **change})
    assert shown.startswith('<p role="alert">') and words in shown and "<img" not in shown
    with pytest.raises(ValueError, match=words):
        show.sparsity_explorer(**change)


def test_it_starts_where_it_is_told_and_refuses_the_unknown():
    assert show.sparsity_explorer("Qwen3-8B", sparsity=55).start["sparsity"] == 55
    with pytest.raises(ValueError, match="unknown control"):
        sparse_plans(density=0.5)
