"""Devices: the file's rows, the stand-ins for a missing format, ridge points."""

import csv
import math
import re

import pytest

import rooflm
from rooflm.roofline.datafiles import data_path
from rooflm.roofline.formats import STAND_INS
from rooflm.roofline.hardware import hardware_rows

QUANTITIES = {
    "memory_capacity": "B",
    "memory_bandwidth": "B/s",
    "onchip_memory": "B",
    "link_bandwidth": "B/s",
    "power": "W",
}


def test_every_row_is_one_sourced_and_dated_number():
    with data_path("hardware.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header == ["device", "quantity", "value", "unit", "source", "date"]
    for row in hardware_rows():
        assert math.isfinite(float(row["value"])) and float(row["value"]) > 0, row
        kind = row["quantity"].removeprefix("peak_")
        expected = QUANTITIES.get(row["quantity"])
        if expected is None:
            assert kind.removesuffix("-2:4") in STAND_INS, row
            expected = "OP/s" if kind.startswith("int") else "FLOP/s"
        assert row["unit"] in (expected, "FLOP/s" if expected == "OP/s" else expected), row
        assert len(row["source"]) > 15, row
        assert re.fullmatch(r"\d{4}(-\d\d){0,2}", row["date"]), row


def test_no_number_stands_twice():
    keys = [(row["device"], row["quantity"]) for row in hardware_rows()]
    assert len(keys) == len(set(keys))


def test_there_are_at_least_24_devices_with_both_roofs():
    names = rooflm.hardware_names()
    assert len(names) >= 24
    for name in names:
        device = rooflm.load_hardware(name)
        assert device.bandwidth > 1e9
        assert max(device.peaks.values()) > 1e11


def test_the_surveys_ridge_points_on_the_a6000(a6000):
    # Survey, Figures 5 and 6: 155 TFLOP/s, 310 TOP/s.
    assert a6000.peaks["fp16"] == 309.677e12 / 2
    assert round(a6000.ridge_point("fp16"), 1) == 201.6
    assert round(a6000.ridge_point("int8"), 1) == 403.3


# Dense peaks with FP32 accumulation, as whitepapers print them: a sparse number is twice these.
DENSE = {
    ("nvidia-v100", "fp16"): 125e12,
    ("nvidia-a100-80gb", "fp16"): 312e12,
    ("nvidia-a100-80gb", "int8"): 624e12,
    ("nvidia-h100-sxm", "bf16"): 989.4e12,
    ("nvidia-h100-sxm", "fp8"): 1978.9e12,
    ("nvidia-h200", "fp16"): 989.4e12,
    ("nvidia-b200", "fp16"): 2250e12,
    ("amd-mi300x", "fp16"): 1307.4e12,
    ("google-tpu-v5e", "bf16"): 197e12,
}


@pytest.mark.parametrize(("key", "peak"), DENSE.items())
def test_peaks_are_dense(key, peak):
    assert rooflm.load_hardware(key[0]).peaks[key[1]] == pytest.approx(peak, rel=0.005)


def test_h100_bandwidth_is_the_published_one():  # LLM-Viewer has 3072 GB/s
    assert rooflm.load_hardware("nvidia-h100-sxm").bandwidth == 3350e9


@pytest.mark.parametrize(
    ("has", "wanted", "stands_in"),
    [
        ({"fp16": 1e12}, "fp8", "fp16"),
        ({"bf16": 1e12}, "fp8", "bf16"),
        ({"tf32": 1e12}, "fp16", "tf32"),
        ({"fp32": 1e12}, "bf16", "fp32"),
        ({"int8": 2e12, "fp16": 1e12}, "int4", "int8"),
        ({"fp16": 1e12}, "int4", "fp16"),
        ({"fp16": 1e12, "fp8": 2e12}, "mxfp4", "fp8"),
        ({"fp16": 1e12, "fp4": 4e12}, "nvfp4", "fp4"),
    ],
)
def test_a_missing_format_computes_at_the_next_wider_one(has, wanted, stands_in):
    x = rooflm.load_format(wanted)
    assert rooflm.Hardware("chip", 1e12, has).rate(x, x) == (stands_in, has[stands_in])


def test_a_rate_of_the_pair_itself_is_used_where_there_is_one():
    chip = rooflm.Hardware("chip", 1e12, {"fp16": 1e12, "int8": 2e12, "int4*int8": 3e12})
    w4, a8 = rooflm.load_format("int4"), rooflm.load_format("int8")
    assert chip.rate(w4, a8) == chip.rate(a8, w4) == ("int4*int8", 3e12)
    assert chip.rate(a8, a8) == ("int8", 2e12)


def test_a_device_with_nothing_as_wide_says_so():
    x = rooflm.load_format("fp32")
    with pytest.raises(ValueError, match="chip has no published rate for fp32 or wider"):
        rooflm.Hardware("chip", 1e12, {"fp16": 1e12}).rate(x, x)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bandwidth": 0}, "bandwidth of chip is 0"),
        ({"bandwidth": float("nan")}, "bandwidth of chip is nan"),
        ({"bandwidth": "fast"}, "bandwidth of chip is 'fast'"),
        ({"bandwidth": 10**400}, "bandwidth of chip is an integer of"),
        ({"peaks": {}}, "peaks of chip is {}"),
        ({"peaks": {"fp16*int8*int4": 1e12}}, "unknown peak format 'fp16*int8*int4'"),
        ({"peaks": {"fp17": 1e12}}, "unknown peak format 'fp17'"),
        ({"peaks": {"fp16-1:4": 1e12}}, "unknown peak format 'fp16-1:4'"),
        ({"peaks": {"fp16": -1}}, "peak fp16 of chip is -1"),
        ({"memory_capacity": float("inf")}, "memory_capacity of chip is inf"),
    ],
)
def test_a_roof_that_cannot_be_is_refused(arguments, named):
    with pytest.raises(ValueError) as error:
        rooflm.Hardware("chip", **({"bandwidth": 1e12, "peaks": {"fp16": 1e12}} | arguments))
    assert named in str(error.value)


def test_an_unknown_device_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest: nvidia-a6000"):
        rooflm.load_hardware("nvidia-a600")
    with pytest.raises(ValueError, match="nearest: nvidia-h100-pcie, nvidia-h100-sxm;"):
        rooflm.load_hardware("H100")


def test_a_peak_is_asked_for_by_its_rate_or_by_a_format_that_uses_it():
    b200 = rooflm.load_hardware("nvidia-b200")
    assert b200.peak("fp4") == b200.peak("mxfp4") == b200.peak("nvfp4") == b200.peaks["fp4"]
    assert b200.ridge_point("fp4") == b200.peaks["fp4"] / b200.bandwidth


# ---- 2:4

# What vendors print with sparsity; the dense number stands beside it.
WITH_SPARSITY = {
    ("nvidia-a100-40gb", "fp16"): 624e12,
    ("nvidia-a100-80gb", "int8"): 1248e12,
    ("nvidia-a40", "bf16"): 299.4e12,
    ("nvidia-l4", "fp8"): 485e12,
    ("nvidia-l40s", "fp16"): 733e12,
    ("nvidia-h100-pcie", "fp16"): 1513e12,
    ("nvidia-h100-sxm", "fp8"): 3957.8e12,
    ("nvidia-h200", "fp16"): 1979e12,
    ("nvidia-b200", "fp8"): 9000e12,
    ("amd-mi300x", "fp16"): 2614.9e12,
}


@pytest.mark.parametrize(("key", "peak"), WITH_SPARSITY.items())
def test_a_rate_for_two_of_four_is_the_printed_one(key, peak):
    device, form = rooflm.load_hardware(key[0]), rooflm.load_format(key[1])
    weights = rooflm.load_format(f"{key[1]}-2:4")
    assert device.rate(weights, form) == (f"{key[1]}-2:4", peak)
    assert device.rate(form, form) == (key[1], device.peaks[key[1]])


def test_every_rate_for_two_of_four_is_about_twice_the_dense_one():
    found = 0
    for device in map(rooflm.load_hardware, rooflm.hardware_names()):
        for name, peak in device.peaks.items():
            if name.endswith("-2:4"):
                found += 1
                dense = device.peaks[name.removesuffix("-2:4")]
                assert peak == pytest.approx(2 * dense, rel=0.025), (device.name, name)
    assert found > 50


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "50%-bitmap", "50%-csr16", "60%-tiled-csl"])
def test_any_other_sparsity_computes_dense(pattern):
    a100, fp16 = rooflm.load_hardware("nvidia-a100-80gb"), rooflm.load_format("fp16")
    assert a100.rate(rooflm.load_format(f"fp16-{pattern}"), fp16) == ("fp16", 312e12)


@pytest.mark.parametrize(
    ("device", "weights", "activations", "rate"),
    [
        ("nvidia-v100", "fp16-2:4", "fp16", "fp16"),  # no units for it
        ("google-tpu-v5e", "bf16-2:4", "bf16", "bf16"),
        ("nvidia-a100-80gb", "int4-g128-2:4", "fp16", "fp16-2:4"),  # computes as FP16
        ("nvidia-a100-80gb", "fp8-2:4", "fp8", "fp16-2:4"),  # the stand-in's own
        ("nvidia-a100-80gb", "int4-2:4", "int4", "int4"),  # none is published for 2:4
        ("nvidia-h100-sxm", "int8-2:4", "int8", "int8-2:4"),
    ],
)
def test_two_of_four_uses_the_rate_of_its_product_where_there_is_one(
    device, weights, activations, rate
):
    found = rooflm.load_hardware(device)
    name, peak = found.rate(rooflm.load_format(weights), rooflm.load_format(activations))
    assert (name, peak) == (rate, found.peaks[rate])


def test_a_peak_and_a_ridge_of_two_of_four_are_asked_for_by_name(a6000):
    assert a6000.peak("fp16-2:4") == 309.677e12
    assert a6000.ridge_point("fp16-2:4") == pytest.approx(2 * a6000.ridge_point("fp16"))
    assert a6000.ridge_point("fp16-50%-bitmap") == a6000.ridge_point("fp16")
