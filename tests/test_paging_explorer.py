"""The explorer of paging: by hand, and every control moves something."""

import re

import pytest

import rooflm
from rooflm import show
from rooflm.show.paging_explorer import PAGING_CONTROLS, paging_plans


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("ipywidgets")
    return show.paging_explorer()


def test_the_plans_are_those_by_hand():
    slots, plans = paging_plans(spread=0.0, prompt=256, output=512, block_tokens=16)
    model = rooflm.load_model("meta-llama/Llama-2-13b-hf")
    held = rooflm.memory(model, context=1)
    free = rooflm.load_hardware("nvidia-a100-40gb").memory_capacity - held.total
    assert slots == int(free // (2 * 40 * 5120 * 2))
    assert plans["longest"].batch == slots // 2048
    assert plans["known length"].batch == slots // 768
    assert plans["paged"].batch == int(slots // (512 + 7.5))
    for plan in plans.values():
        assert plan.used + plan.reserved + plan.internal + plan.spare == pytest.approx(1)
        assert plan.used == pytest.approx(plan.batch * 512 / slots)
    assert plans["paged"].internal == pytest.approx(plans["paged"].batch * 7.5 / slots)


def test_a_shared_start_is_held_once_and_only_in_whole_blocks():
    slots, plans = paging_plans(shared=100, block_tokens=16, spread=0.0)
    own = 128 + 128 + 4 + 7.5
    assert plans["paged"].batch == int((slots - 96) // own)
    _, alone = paging_plans(spread=0.0)
    assert plans["longest"].batch < alone["longest"].batch


@pytest.mark.parametrize("control", PAGING_CONTROLS, ids=lambda control: control.name)
def test_every_control_changes_what_is_shown(explorer, control):
    other = next(x for x in control.options if x != control.default)
    if control.name == "model":
        other = "meta-llama/Llama-2-7b-hf"
    if control.name == "device":
        other = "nvidia-a6000"
    if control.name == "longest":
        other = 4096
    before = explorer.show(**explorer.start)
    after = explorer.show(**(explorer.start | {control.name: other}))
    assert 'role="alert"' not in after

    def table(page):
        return re.search(r"<table.*</table>", page, re.S).group()

    assert table(before) != table(after)


def test_what_cannot_be_had_is_one_line(explorer):
    shown = explorer.show(**(explorer.start | {"output": 8192}))
    assert shown.startswith('<p role="alert">longest is 2048') and shown.count("<p") == 1
    shown = explorer.show(**(explorer.start | {"model": "meta-llama/Llama-2-70b-hf"}))
    assert "leaves no room" in shown and "<table" not in shown
    with pytest.raises(ValueError, match="nearest: block_tokens"):
        paging_plans(block_token=3)
