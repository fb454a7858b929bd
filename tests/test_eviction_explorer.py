"""The explorer of evicting caches."""

import pytest

from rooflm import show
from rooflm.lab.kvcache.sweep import find_row, load_map


@pytest.fixture(scope="module")
def explorer():
    return show.eviction_explorer(model="teacher")


CHANGES = [("first", "random"), ("second", "tova"), ("model", "smollm2"), ("budget", 16),
           ("measure", "perplexity")]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_what_is_shown(explorer, name, value):
    shown = explorer.show(**{**explorer.start, name: value})
    assert 'role="alert"' not in shown
    assert shown != explorer.show(**explorer.start)


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


def test_the_verdict_is_of_the_map(explorer):
    row = find_row(load_map("teacher"), "h2o", 128)
    words = f"h2o {row['difference']:+.4f} ({row['difference_low']:+.4f}"
    assert words in repr(explorer)
    assert repr(explorer).count("the intervals") == 1


def test_the_table_holds_every_budget_of_both(explorer):
    shown = explorer.show(**explorer.start)
    assert shown.count("<tr>") == 1 + 2 * 5 and "128 (chosen)" in shown


def test_retrieval_has_a_figure_where_it_was_measured(explorer):
    shown = explorer.show(**{**explorer.start, "model": "smollm2", "measure": "retrieval"})
    assert 'role="alert"' not in shown and "<img" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": "retrieval"}, "retrieval was not measured on teacher"),
        ({"first": "h20"}, "h2o"),
        ({"budget": 7}, "budget is 7"),
        ({"measure": "los"}, "loss"),
        ({"model": "teachers"}, "teacher"),
    ],
)
def test_a_setting_that_cannot_be_had_is_one_line(explorer, change, words):
    shown = explorer.show(**{**explorer.start, **change})
    assert 'role="alert"' in shown and words in shown and "<img" not in shown
