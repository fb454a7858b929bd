"""The explorer of formats and its figures: grids of levels, and points beside curves."""

import subprocess
import sys
import time

import pytest

from rooflm import show
from rooflm.lab.quantize import trial
from rooflm.show.formats_explorer import FORMATS_CONTROLS, explore_formats


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("ipywidgets")
    return show.formats_explorer()


def widgets_of(explorer):
    row, shown = explorer.widget().children
    return {c.name: w for c, w in zip(explorer.controls, row.children, strict=True)}, shown


def test_the_controls_offer_what_the_laboratory_can_try():
    options = {control.name: control.options for control in FORMATS_CONTROLS}
    assert options["number_format"] == trial.FORMATS
    assert options["numbers"] == trial.NUMBERS
    assert options["group"] == trial.GROUPS


@pytest.mark.parametrize("control", [control.name for control in FORMATS_CONTROLS])
def test_every_control_changes_what_is_shown(explorer, control):
    made, shown = widgets_of(explorer)
    before, start = shown.value, made[control].value
    values = [v for _, v in made[control].options] if control in ("group", "outlier") else None
    values = values or list(made[control].options)
    made[control].value = next(v for v in reversed(values) if v != start)
    assert shown.value != before and 'role="status"' in shown.value
    made[control].value = start
    assert shown.value == before


def test_every_setting_is_quick_and_none_fails(explorer):
    explorer.show(**explorer.start)
    begin, count = time.monotonic(), 0
    for name in trial.FORMATS:
        for outlier in (0, 64):
            setting = {"number_format": name, "group": 16, "numbers": "heavy-tailed"}
            assert 'role="status"' in explorer.show(outlier=outlier, **setting)
            count += 1
    assert (time.monotonic() - begin) / count < 1.5  # 0.2 s on a quiet machine


def test_a_setting_that_cannot_be_computed_is_one_line(explorer):
    page = explorer.show(**{**explorer.start, "number_format": "int5"})
    assert page.startswith('<p role="alert">') and "int5" in page and "<table" not in page
    with pytest.raises(ValueError, match="unknown control"):
        show.formats_explorer(bits=4)
    with pytest.raises(ValueError, match="unknown number format"):
        show.formats_explorer("int5")


def test_explorer_and_library_agree(explorer):
    found = explore_formats(number_format="nvfp4", group=16, outlier=8)
    assert found.measured == trial.try_format("nvfp4", 16, "normal", 8).measured
    assert f"{found.measured:.1f} dB" in explorer.show(
        number_format="nvfp4", group=16, numbers="normal", outlier=8
    )


def test_a_block_that_is_not_the_standards_is_named(explorer):
    setting = {**explorer.start, "number_format": "mxfp4"}
    assert "own block is 32" in explorer.show(**setting)
    assert "own block" not in explorer.show(**{**setting, "group": 32})


def test_show_needs_no_torch_until_formats_are_explored():
    code = (
        "import sys; from rooflm import show; show.formats_explorer; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- figures ---


def test_a_grid_says_how_many_levels_it_has_and_their_steps():
    figure = show.grids({"FP4": [-2, -1, 0, 1, 2, 4]}, "multiples", ([-1, 0, 1], [1, 2, 1]))
    assert figure.alt == (
        "Levels under the density of the numbers, multiples. "
        "FP4: 6 levels from -2 to 4, steps from 1 to 2."
    )
    assert figure.png.startswith(b"\x89PNG")
    assert "density" not in show.grids({"one": [1.0]}, "x", reach=2.0).alt


@pytest.mark.parametrize(
    ("levels", "density", "message"),
    [({}, None, "at least one format"), ({"a": []}, None, "levels of a"),
     ({"a": [1, float("nan")]}, None, "finite"), ({"a": [1]}, ([1, 2], [1]), "as many")],
)  # fmt: skip
def test_grids_refuse_what_cannot_be_drawn(levels, density, message):
    with pytest.raises(ValueError, match=message):
        show.grids(levels, "x", density)


def test_a_scatter_says_what_its_points_and_curves_span():
    points = {"measured": ([1, 2, 4], [10, 20, 30])}
    figure = show.scatter(
        points, "bits", "dB", "log2", curves={"bound": ([1, 4], [6, 24])},
        names={"measured": ["a", "", "c"]}, intervals={"measured": ([9, 19, 29], [11, 21, 31])},
    )  # fmt: skip
    assert figure.alt == (
        "dB against bits. measured: 3 points, 1 to 4 across, 10 to 30 up; "
        "bound: a curve, 1 to 4 across, 6 to 24 up."
    )
    plain = show.scatter(points, "bits", "dB")
    assert plain.png != figure.png and show.scatter(points, "bits", "dB").png == plain.png
    assert show.scatter(points, "bits", "dB", alt="Points that were measured.").alt.startswith("P")


@pytest.mark.parametrize(
    ("given", "message"),
    [({"points": {"a": ([1], [1, 2])}}, "as many"),
     ({"names": {"b": ["x"]}}, "names are given for b"),
     ({"names": {"a": ["x"]}}, "names of a are not 2"),
     ({"intervals": {"a": ([1], [2, 3])}}, "intervals of a"),
     ({"xscale": "cubic"}, "xscale is 'cubic'")],
)  # fmt: skip
def test_scatter_refuses_what_cannot_be_drawn(given, message):
    settings = {"points": {"a": ([1, 2], [3, 4])}, "xlabel": "x", "ylabel": "y"} | given
    with pytest.raises(ValueError, match=message):
        show.scatter(**settings)
