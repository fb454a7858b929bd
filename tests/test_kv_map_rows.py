"""Rows of tables from the map of KV caches, by hand."""

import pytest

from rooflm.lab.kvcache import map_rows, sweep

ROW = {"method": "h2o", "budget": 8, "weights": "fp32", "bytes_per_token": 1000.0,
       "difference": 0.01, "difference_low": 0.0, "difference_high": 0.02, "divergence": 0.5,
       "exact": 0.25, "exact_low": 0.1, "exact_high": 0.5, "cases": 4, "answered": "0100",
       "log_probability": -3.0, "log_probability_low": -4.0,
       "log_probability_high": -2.0}  # fmt: skip
FULL = ROW | {"method": "full", "budget": 0, "bytes_per_token": 4000.0}


def test_cells_are_by_hand():
    h2o = {"H2O": ("h2o", 8)}
    told = {"MB": 0.512, "bits": 8.0, "loss": "+0.0100 ± 0.0100", "divergence": 0.5,
            "answered": "1 of 4", "retrieved": "25% (10% to 50%)",
            "ln p": "-3.0 ± 1.0"}  # fmt: skip
    assert map_rows.tabulate([ROW, FULL], h2o, told) == [("H2O", *told.values())]
    assert map_rows.at_budgets([ROW], {"H2O": "h2o"}, [8]) == [("H2O", "+0.0100 ± 0.0100")]


def test_the_full_cache_adds_no_loss_but_rounded_weights_do():
    rounded = FULL | {"weights": "int4-g64"}
    keys = {"full": ("full",), "W4": ("full", 0, "int4-g64")}
    rows = map_rows.tabulate([FULL, rounded], keys, ["loss"])
    assert rows == [("full", "–"), ("W4", "+0.0100 ± 0.0100")]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no row of h2o 9"):
        map_rows.tabulate([ROW], {"H2O": ("h2o", 9)}, ["loss"])
    with pytest.raises(ValueError, match="colour"):
        map_rows.tabulate([ROW], {"H2O": ("h2o", 8)}, ["colour"])


def test_kivi_stores_three_bits_and_a_recent_window():
    rows = sweep.load_map("smollm2")
    ((_, bits),) = map_rows.tabulate(rows, {"KIVI": ("kivi-2",)}, ["bits"])
    assert bits == pytest.approx((480 * 3 + 32 * 16) / 512)  # 480 at 3 bits, 32 in FP16
