"""What every explorer keeps: a page without controls, a widget with them, one line for errors."""

import base64
import html
import re

import pytest

from rooflm import show
from rooflm.show.explorer import WIDGET, Control, whole_setting

# Each with words of its figure's alternative text.
EXPLORERS = {
    "distillation_explorer": "reverse KL: mean -2",
    "eviction_explorer": "",
    "explorer": "",
    "finetuning_explorer": "",
    "fits_explorer": "",
    "formats_explorer": "int4, symmetric: 15 levels",
    "kv_bits_explorer": "",
    "low_rank_explorer": "two factors over one matrix",
    "methods_explorer": "",
    "paging_explorer": "",
    "sparsity_explorer": "time over that of dense weights",
}


@pytest.fixture(scope="module")
def made():
    return {name: getattr(show, name)() for name in EXPLORERS}


def test_no_explorer_is_left_out():
    public = {name for name in show.__all__ if name.endswith("explorer")}
    assert public == set(EXPLORERS)


@pytest.mark.parametrize("name", EXPLORERS)
def test_it_is_a_page_and_a_widget(made, name):
    bundle = made[name]._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == made[name].widget().model_id
    page = bundle["text/html"]
    assert base64.b64decode(re.search(r'base64,([^"]+)"', page)[1]).startswith(b"\x89PNG")
    alt = html.unescape(re.search(r'<img alt="([^"]+)"', page)[1])
    assert len(alt) > 20 and EXPLORERS[name] in alt
    assert "<table" in page and "<select" not in page and "<input" not in page
    assert 'role="alert"' not in page


@pytest.mark.parametrize("name", EXPLORERS)
def test_it_starts_at_values_that_its_controls_offer(made, name):
    for control in made[name].controls:
        assert control.default in control.options
        labels = [c.label for c in made[name].controls]
    assert len(set(labels)) == len(labels) and all(labels)


@pytest.mark.parametrize(
    "name", ["distillation_explorer", "low_rank_explorer", "sparsity_explorer"]
)
def test_every_choice_can_be_had(made, name):
    explorer = made[name]
    for control in explorer.controls:
        if control.name not in ("model", "device"):
            for value in control.options:
                shown = explorer.show(**{**explorer.start, control.name: value})
                status = re.search(r'role="status">([^<]+)<', shown)
                assert status and "None" not in status[1] and status[1].endswith(".")


@pytest.mark.parametrize("name", EXPLORERS)
def test_an_unknown_control_is_named(name):
    with pytest.raises(ValueError, match="unknown control 'colours'"):
        getattr(show, name)(colours=3)


def test_a_setting_is_whole_with_what_is_left_out_at_the_start():
    controls = [
        Control("batch", "Batch", "steps", (1, 2), 2),
        Control("a", "A", "choice", "xy", "x"),
    ]
    assert whole_setting(controls, {"a": "y"}) == {"batch": 2, "a": "y"}
    assert whole_setting(controls, {}) == {"batch": 2, "a": "x"}
    with pytest.raises(ValueError, match=r"unknown control 'bach'.*batch"):
        whole_setting(controls, {"bach": 1})
