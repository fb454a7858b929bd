"""The explorer of cache bits: its numbers by hand, and every control moves it."""

import html
import re

import pytest

from rooflm import show
from rooflm.show.kv_bits_explorer import KV_BITS_CONTROLS, cache_share, kv_bits_steps


def text_of(page):
    return html.unescape(re.sub(r"<img[^>]*>|<[^>]+>", " ", page))


def test_bytes_of_the_cache_by_hand():
    """Llama-2-13b: 40 layers of 2 x 5120 numbers a token; int4-g32 takes 4 + 20/32 bits."""
    fp16, _, coded = kv_bits_steps(batch=2, context=1000, kv_cache="int4-g32").values()
    numbers = 2 * 1000 * 40 * 2 * 5120
    assert fp16.memory.kv_cache == numbers * 2
    assert coded.memory.kv_cache == pytest.approx(numbers * (4 + 20 / 32) / 8)


def test_figure_11_of_the_survey_is_in_reach():
    """At 50,000 tokens the cache passes the weights, and 4 bits shrink what is held."""
    plan = kv_bits_steps(batch=1, context=50_000, weights="fp16", kv_cache="int2-g128")
    fp16, _, coded = plan.values()
    assert fp16.memory.kv_cache > fp16.memory.weights > coded.memory.kv_cache
    assert cache_share(fp16) > 0.5 > cache_share(coded)


def test_fewer_bits_never_take_longer():
    for batch, context in ((1, 128), (16, 4096), (256, 1024)):
        _, before, after = kv_bits_steps(batch=batch, context=context).values()
        assert after.seconds <= before.seconds and after.lower_bound <= before.lower_bound


@pytest.mark.parametrize("control", KV_BITS_CONTROLS, ids=lambda control: control.name)
def test_every_control_changes_what_is_shown(control):
    shown = show.kv_bits_explorer()
    start = shown.start
    other = next(value for value in reversed(control.options) if value != control.default)
    assert shown.show(**start | {control.name: other}) != shown.show(**start)


def test_a_bad_setting_is_one_line():
    with pytest.raises(ValueError, match="unknown control"):
        kv_bits_steps(colour="red")
    with pytest.raises(ValueError, match="unknown number format"):
        kv_bits_steps(kv_cache="int5")
    page = show.kv_bits_explorer().show(
        model="meta-llama/Llama-2-13b-hf", device="nvidia-a6000", batch=1, context=128,
        weights="int5", kv_cache="fp16",
    )  # fmt: skip
    assert 'role="alert"' in page and "\n" not in page


def test_the_page_says_what_the_setting_costs():
    shown = show.kv_bits_explorer()
    words = text_of(shown.html)
    assert "int4-g32" in words and "this device" in words and repr(shown).startswith("Explorer. ")
