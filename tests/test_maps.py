"""Map files: filled row by row, resumed, refused when they are of something else."""

import pytest

from rooflm.lab import maps
from rooflm.lab.estimates import Estimate

MAP = maps.MapFile(
    ("measurements", "numbers.csv"),
    "python -m numbers",
    ("name", "width"),
    {**maps.HEAD, "name": str, "width": int, "found": float, **maps.TAIL},
)
WANTED = [("a", 1), ("b", 1), ("a", 2), ("a", 1)]


def names(variant):
    return {"name": variant[0], "width": variant[1]}


def fill(path, measure, wanted=WANTED, said=None, model=("teacher", "abc"), fresh=False):
    say = (said if said is not None else []).append
    MAP.fill(
        path, *model, 8, wanted, names, lambda v: {"found": float(measure(v))},
        lambda row: f"{row['name']}{row['width']}", fresh, say,
    )  # fmt: skip


def test_each_variant_is_measured_once_and_found_again(tmp_path):
    path, measured, said = tmp_path / "map.csv", [], []

    def measure(variant):
        measured.append(variant)
        return len(measured)

    fill(path, measure, said=said)
    assert measured == WANTED[:3]
    assert [line.split(";")[0] for line in said] == ["1/3  a1", "2/3  b1", "3/3  a2"]
    rows = MAP.load("teacher", "abc", path)
    assert MAP.find(rows, names(("a", 2)), "a2")["found"] == 3.0
    fill(path, measure, [*WANTED, ("c", 1)])
    assert measured == [*WANTED[:3], ("c", 1)]  # what was there is kept


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path):
    path = tmp_path / "map.csv"

    def measure(variant):
        if variant == ("a", 2):
            raise KeyboardInterrupt
        return 1

    with pytest.raises(KeyboardInterrupt):
        fill(path, measure)
    assert [MAP.key(row) for row in MAP.load("teacher", "abc", path)] == WANTED[:2]


def test_rows_of_two_models_stand_in_one_file_and_fresh_drops_ones_own(tmp_path):
    path = tmp_path / "map.csv"
    fill(path, lambda v: 1)
    fill(path, lambda v: 2, model=("student", "def"))
    fill(path, lambda v: 3, WANTED[:1], fresh=True)
    assert [row["found"] for row in MAP.load("teacher", "abc", path)] == [3.0]
    assert [row["found"] for row in MAP.load("student", "def", path)] == [2.0] * 3


def test_another_checkpoint_another_length_and_nothing_are_one_line(tmp_path):
    path = tmp_path / "map.csv"
    with pytest.raises(ValueError, match="python -m numbers"):
        MAP.load("teacher", "abc", path)
    MAP.check(path, "teacher", "abc", 8)  # no file, nothing to refuse
    fill(path, lambda v: 1)
    with pytest.raises(ValueError, match=r"map\.csv has no rows of student"):
        MAP.load("student", "abc", path)
    with pytest.raises(ValueError, match="checkpoint abc, not xyz"):
        MAP.load("teacher", "xyz", path)
    with pytest.raises(ValueError, match="measured on 8 tokens, not 16"):
        MAP.check(path, "teacher", "abc", 16)
    with pytest.raises(ValueError, match="the map has no row of a3"):
        MAP.find(MAP.load("teacher", "abc", path), names(("a", 3)), "a3")


def test_an_estimate_survives_its_three_columns():
    found = Estimate(0.25, 0.125, 0.5)
    assert maps.estimate(maps.spread("loss", found), "loss") == found
