"""The explorer of methods and the figure with error bars."""

import io

import matplotlib.image
import pytest

from rooflm import show
from rooflm.lab.quantize.methods import Recipe
from rooflm.lab.quantize.sweep import find_row, load_map
from rooflm.show.frontier import LINEAR_BELOW


@pytest.fixture(scope="module")
def explorer():
    return show.methods_explorer()


CHANGES = [("first", "awq"), ("second", "round clip=mse"), ("model", "smollm2"), ("bits", 2),
           ("group", "64"), ("measure", "divergence"), ("measure", "agreement")]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_what_is_shown(explorer, name, value):
    assert name in {control.name for control in explorer.controls}
    shown = explorer.show(**{**explorer.start, name: value})
    assert 'role="alert"' not in shown
    assert shown != explorer.show(**explorer.start)


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


def test_the_verdict_is_of_the_map(explorer):
    row = find_row(load_map("teacher"), Recipe("gptq", 3))
    assert f"gptq {row['difference']:+.4f} ({row['difference_low']:+.4f}" in repr(explorer)
    assert repr(explorer).count("the intervals part") == 1  # 0.0350 and 0.0193
    four = explorer.show(**{**explorer.start, "bits": 4})
    assert "the intervals overlap" in four


def test_the_table_holds_every_width_of_both(explorer):
    shown = explorer.show(**explorer.start)
    rows = [r for r in load_map("teacher") if r["method"] in ("round", "gptq")]
    rows = [r for r in rows if r["options"] == "" and r["group"] == 0]
    assert shown.count("<tr>") == 1 + len(rows)
    assert len(rows) >= 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": "owq", "model": "smollm2"}, "owq was not measured on smollm2"),
        ({"first": "no such"}, "no such was not measured"),
        ({"bits": 7}, "bits is 7"),
        ({"group": "32"}, "64, row"),
        ({"measure": "los"}, "loss"),
        ({"model": "teachers"}, "teacher"),
    ],
)
def test_a_setting_that_cannot_be_had_is_one_line(explorer, change, words):
    shown = explorer.show(**{**explorer.start, **change})
    assert 'role="alert"' in shown and words in shown and "<img" not in shown


def test_a_variant_with_one_group_is_shown_at_its_own(explorer):
    shown = explorer.show(**{**explorer.start, "first": "spqr", "second": "billm"})
    assert 'role="alert"' not in shown and "billm" in shown


def test_it_starts_where_it_is_told_and_refuses_the_unknown():
    assert show.methods_explorer("awq", bits=2).start["first"] == "awq"
    with pytest.raises(ValueError, match="control"):
        show.methods_explorer(bit=2)


def pixels(figure):
    return matplotlib.image.imread(io.BytesIO(figure.png))


def test_a_frontier_draws_its_error_bars_and_line():
    points = {"a": [show.Measured(2, 0.1, 0.05, 0.2), show.Measured(3, 0.01, 0.005, 0.02)]}
    bare = {"a": [show.Measured(2, 0.1), show.Measured(3, 0.01)]}
    with_bars = show.frontier(points, "bits", "loss")
    inside = show.Measured(2.5, 0.03)  # its bar moves no axis
    plain = {"a": [*points["a"], inside]}
    barred = {"a": [*points["a"], inside._replace(low=0.02, high=0.06)]}
    assert show.frontier(plain, "b", "l").png != show.frontier(barred, "b", "l").png
    assert with_bars.png != show.frontier(bare, "bits", "loss").png
    assert with_bars.png != show.frontier(points, "bits", "loss", line=[(2, 0.1), (3, 0.01)]).png
    assert with_bars.png != show.frontier(points, "bits", "loss", joined=True).png
    assert with_bars.png == show.frontier(points, "bits", "loss").png
    assert pixels(with_bars).shape[1] <= 1000


def test_a_frontier_holds_values_below_zero():
    points = {"a": [show.Measured(8, -LINEAR_BELOW / 2, -LINEAR_BELOW, 0), show.Measured(2, 1)]}
    shown = show.frontier(points, "bits", "loss")
    assert "a: 1 at 2, -0.0005 at 8" in shown.alt
    assert (
        show.frontier(points, "bits", "loss", alt="a text of more than twenty letters").alt[:6]
        == "a text"
    )


@pytest.mark.parametrize(
    ("series", "options", "words"),
    [
        ({}, {}, "no points"),
        ({"a": []}, {}, "no points"),
        ({"a": [show.Measured(1, 1, 2, 3)]}, {}, "allowed: one that holds it"),
        ({"a": [show.Measured(1, 1)]}, {"yscale": "log2"}, "log, linear"),
    ],
)
def test_a_frontier_refuses(series, options, words):
    with pytest.raises(ValueError, match=words):
        show.frontier(series, "x", "y", **options)
