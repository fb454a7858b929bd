"""The explorer of what fits."""

import re
import sys

import pytest

from rooflm import Hardware, memory, show
from rooflm.show.fits_explorer import explore_fits, fits_explorer

module = sys.modules["rooflm.show.fits_explorer"]  # the function of that name hides it
CHANGES = [("model", "meta-llama/Llama-2-7b-hf"), ("device", "nvidia-a6000"), ("weights", "int8"),
           ("kv_cache", "int4"), ("batch", 4), ("context", 4096)]  # fmt: skip


@pytest.fixture(scope="module")
def explorer():
    return fits_explorer()


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_figure_and_table(explorer, name, value):
    shown = explorer.show(**{**explorer.start, name: value})
    start = explorer.show(**explorer.start)
    assert 'role="alert"' not in shown
    for pattern in (r'base64,([^"]+)"', r"<tbody>.*</tbody>", r'role="status">([^<]+)<'):
        new, old = (re.search(pattern, text, re.DOTALL)[0] for text in (shown, start))
        assert new != old, pattern


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


def test_every_choice_can_be_had(explorer):
    for control in explorer.controls:
        if control.kind == "choice" and control.name != "model":
            for value in control.options:
                assert "None" not in module._verdict(**{**explorer.start, control.name: value})


def test_its_limits_fit_and_one_more_does_not():
    setting = {"model": "Qwen/Qwen3-8B", "device": "nvidia-l4", "batch": 2, "context": 3072}
    found = explore_fits(**setting)
    assert memory(found.model, batch=found.largest_batch, context=3072).fits(found.device)
    assert not memory(found.model, batch=found.largest_batch + 1, context=3072).fits(found.device)
    assert memory(found.model, batch=2, context=found.largest_context).fits(found.device)
    assert not memory(found.model, batch=2, context=found.largest_context + 1).fits(found.device)
    assert found.token_bytes == 2 * 36 * 8 * 128 * 2


def test_its_words_follow_the_memory(monkeypatch):
    assert "fits with" in repr(fits_explorer())
    assert "GB short" in repr(fits_explorer(batch=8))
    assert "the weights alone are too large" in repr(fits_explorer("Llama-2-70b-hf"))
    chip = Hardware("chip", 1e12, {"fp16": 1e12})
    monkeypatch.setattr(module, "load_hardware", lambda name: chip)
    shown = fits_explorer().show(**fits_explorer().start)
    assert shown.count("not published") >= 3 and 'role="alert"' not in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "Llama-9"}, "unknown model"),
        ({"device": "nvidia-h1000"}, "unknown device"),
        ({"weights": "int5"}, "unknown number format"),
        ({"batch": 0}, "batch is 0"),
        ({"context": -1}, "context is -1"),
    ],
)
def test_a_setting_that_cannot_be_had_is_one_line(explorer, change, words):
    shown = explorer.show(**{**explorer.start, **change})
    assert 'role="alert"' in shown and words in shown and "<img" not in shown
    assert "\n" not in shown
    with pytest.raises(ValueError, match=words):
        fits_explorer(**change)


def test_it_starts_where_it_is_told_and_refuses_the_unknown():
    assert show.fits_explorer("Qwen3-8B", batch=3).start["model"] == "Qwen/Qwen3-8B"
    with pytest.raises(ValueError, match="control"):
        fits_explorer(bach=2)
