"""The explorer of distillation: its students against what is known of the best Gaussian."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest

from rooflm import show
from rooflm.show.distillation_explorer import toy_students

CHANGES = [("beta", 0.1), ("distance", 3.0), ("weight", 0.9), ("temperature", 2.0)]
STEP = 1.06  # between two spreads of the grid, as a factor


@pytest.fixture(scope="module")
def explorer():
    return show.distillation_explorer()


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_control_changes_what_is_shown(explorer, name, value):
    shown, start = explorer.show(**{**explorer.start, name: value}), explorer.show(**explorer.start)
    assert 'role="alert"' not in shown
    for pattern in (r"<tbody>.*</tbody>", r'role="status">([^<]+)<', r'base64,([^"]+)"'):
        new, old = (re.search(pattern, text, re.DOTALL)[0] for text in (shown, start))
        assert new != old, pattern


def test_no_control_is_left_untried(explorer):
    assert {name for name, _ in CHANGES} == {control.name for control in explorer.controls}


@pytest.mark.parametrize("distance", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("weight", [0.5, 0.7, 0.95])
def test_the_forward_kl_matches_mean_and_variance(distance, weight):
    """A Gaussian of least forward KL has the moments of what it is fitted to."""
    _, _, students = toy_students(distance=distance, weight=weight)
    found = students["forward KL"]
    mean = distance / 2 * (1 - 2 * weight)
    variance = 0.5**2 + weight * (1 - weight) * distance**2
    assert found.mean == pytest.approx(mean, abs=0.051)
    assert 1 / STEP < found.spread / math.sqrt(variance) < STEP


@pytest.mark.parametrize("weight", [0.6, 0.9])
def test_the_reverse_kl_takes_the_larger_of_two_distant_modes(weight):
    _, _, students = toy_students(distance=6.0, weight=weight)
    found = students["reverse KL"]
    assert found.mean == pytest.approx(-3, abs=0.051) and 1 / STEP < found.spread / 0.5 < STEP
    # Within a mode the teacher is `weight` times a Gaussian, so that the KL is -log(weight).
    assert found.reverse == pytest.approx(-math.log(weight), abs=0.002)
    assert found.accepted == pytest.approx(weight, abs=0.005)


def test_of_one_mode_every_objective_finds_the_teacher():
    _, teacher, students = toy_students(distance=0.0, beta=0.3)
    assert list(students) == ["forward KL", "JSD, beta 0.3", "reverse KL"]
    for found in students.values():
        assert found.mean == pytest.approx(0, abs=1e-9)
        assert abs(found.density - teacher).max() < 0.06
        assert found.accepted > 0.97


def test_each_objective_is_best_at_itself():
    _, _, students = toy_students(distance=3.0)
    assert min(students, key=lambda name: students[name].forward) == "forward KL"
    assert min(students, key=lambda name: students[name].reverse) == "reverse KL"


def test_the_numbers_are_integrals_of_the_densities():
    cells, teacher, students = toy_students(distance=3.0, weight=0.7)
    width = cells[1] - cells[0]
    assert teacher.sum() * width == pytest.approx(1)
    for found in students.values():
        q = found.density
        assert q.sum() * width == pytest.approx(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            forward = np.where(teacher > 0, teacher * np.log(teacher / q), 0).sum() * width
        assert found.forward == pytest.approx(forward, rel=1e-6)
        assert found.accepted == pytest.approx(np.minimum(teacher, q).sum() * width)
        assert (q * cells).sum() * width == pytest.approx(found.mean, abs=0.01)


def test_from_small_to_large_beta_covering_turns_into_seeking():
    spreads = []
    for beta in (0.1, 0.3, 0.5, 0.7, 0.9):
        _, _, students = toy_students(beta=beta, distance=3.0, weight=0.6)
        spreads.append(students[f"JSD, beta {beta}"].spread)
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 1.4 and spreads[-1] < 0.6


def test_two_equal_modes_are_decided_the_same_way_always():
    _, _, students = toy_students(weight=0.5, distance=5.0)
    assert students["reverse KL"].mean == pytest.approx(-2.5, abs=0.051)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_at_the_ends_there_are_two_students(beta):
    assert list(toy_students(beta=beta)[2]) == ["forward KL", "reverse KL"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"beta": 0.0}, "covers both modes"),
        ({"beta": 1.0}, "seeks one mode"),
        ({"distance": 0.0}, "One mode;"),
        ({"temperature": 4.0}, "at temperature 4"),
    ],
)
def test_the_verdict_says_what_the_student_does(explorer, setting, words):
    page = explorer.show(**{**explorer.start, **setting})
    assert words in re.search(r'role="status">([^<]+)<', page)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": 1.5}, "beta is 1.5; allowed: 0 to 1"),
        ({"weight": 0.2}, "weight is 0.2"),
        ({"distance": 9}, "distance is 9"),
        ({"temperature": 0}, "temperature is 0"),
        ({"beta": "half"}, "beta is 'half'"),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        toy_students(**change)


def test_an_unknown_control_names_the_right_ones():
    with pytest.raises(ValueError, match="unknown control"):
        show.distillation_explorer(width=1)
    with pytest.raises(ValueError, match="unknown control"):
        toy_students(width=1)


def test_show_needs_no_torch_until_a_student_is_fitted():
    code = "import sys; from rooflm import show; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
