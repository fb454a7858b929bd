"""Rows of maps in tables and figures, by hand."""

import itertools

from rooflm.lab import map_tables
from rooflm.lab.estimates import Estimate

FULL = {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "agreement": 1.0,
        "decode_bytes": 8e6, "linear_bits": 160, "bits": 16}  # fmt: skip
ROW = {"difference": 0.0042, "difference_low": 0.0023, "difference_high": 0.0061,
       "agreement": 0.456, "decode_bytes": 3e6, "linear_bits": 40, "bits": 5}  # fmt: skip


def test_cells_are_by_hand():
    found = map_tables.tabulate(
        {"small": ROW, "whole": FULL}, ["loss", "agreement", "MB", "bits"], FULL
    )
    assert found == [("small", "+0.0042 ± 0.0019", "46%", 3, 4), ("whole", "–", "100%", 8, 16)]


def test_bits_without_a_full_model_are_the_maps_own_column():
    bits = {name: x for name, x in ROW.items() if name != "linear_bits"}
    assert map_tables.tabulate({"x": bits}, ["bits"], FULL) == [("x", 5)]
    assert map_tables.tabulate({"x": ROW}, ["bits"]) == [("x", 5)]


def test_a_place_has_the_ends_of_the_loss():
    assert map_tables.places([ROW], lambda row: row["bits"]) == [(5, 0.0042, 0.0023, 0.0061)]


def test_the_lowest_are_what_nothing_as_small_beats_in_whatever_order():
    for items in itertools.permutations([(4, 1), (2, 5), (3, 6), (3, 3), (5, 1)]):
        found = map_tables.lowest(items, lambda x: x[0], lambda x: x[1])
        assert found == [(2, 5), (3, 3), (4, 1)]


def test_an_estimate_in_words_has_its_sign_and_half_its_interval():
    found = Estimate(-0.25, -0.375, -0.125)
    assert found.half == 0.125
    assert found.signed() == "-0.2500 ± 0.1250" and found.signed(2) == "-0.25 ± 0.12"
