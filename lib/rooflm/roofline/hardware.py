"""Devices: a memory roof, a compute roof for each number format, and what surrounds them.

Every number comes from `data/hardware.csv`, one number a row with its own source. Peaks are
dense and with FP32 accumulation, link rates are per direction. What a vendor does not publish
is absent here: None, or no entry in `peaks`. A rate for 2:4 weights stands beside the dense one
under a name of its own, and counts the FLOPs of the dense product.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from rooflm.roofline.datafiles import data_path
from rooflm.roofline.formats import STAND_INS, Format, load_format, operand_rate
from rooflm.roofline.numeric import Number, minimum, positive, shorten, unknown
from rooflm.roofline.sparsity import TWO_FOUR

_TWO_FOUR = f"-{TWO_FOUR}"


@dataclass(frozen=True)
class Hardware:
    """A device as the roofline model sees it.

    Parameters
    ----------
    name : its id.
    bandwidth : W, bytes per second of device memory.
    peaks : P, FLOP/s by format ("fp16", "int8"); a pair of operand formats that has a rate of
        its own stands under both names, wider last ("int4*fp16"); a product with 2:4 weights
        under that of its dense rate and "-2:4" ("fp16-2:4").
    memory_capacity : bytes, or None where not published.
    onchip_memory : bytes of the largest on-chip memory, or None.
    link_bandwidth : bytes per second per direction to the host, or None.
    power : watts, or None.

    Raises
    ------
    ValueError
        for a roof that is not a positive number, or a format that no matmul unit has.

    >>> chip = Hardware("mine", bandwidth=1e12, peaks={"fp16": 200e12})
    >>> chip.ridge_point("fp16")
    200.0
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, float]
    memory_capacity: float | None = None
    onchip_memory: float | None = None
    link_bandwidth: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "bandwidth", positive(f"bandwidth of {self.name}", self.bandwidth, "B/s"))
        if not isinstance(self.peaks, Mapping) or not self.peaks:
            raise ValueError(
                f"peaks of {self.name} is {shorten(self.peaks)}; allowed: {{format: FLOP/s}}"
            )
        for key in self.peaks:
            parts = str(key).removesuffix(_TWO_FOUR).split("*")
            if len(parts) > 2 or any(part not in STAND_INS for part in parts):
                raise unknown("peak format", key, STAND_INS)
        checked = {
            key: positive(f"peak {key} of {self.name}", value, "FLOP/s")
            for key, value in self.peaks.items()
        }
        put(self, "peaks", MappingProxyType(checked))
        for name in ("memory_capacity", "onchip_memory", "link_bandwidth", "power"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, positive(f"{name} of {self.name}", value, _UNITS[name]))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled
        others = (getattr(self, name) for name in _UNITS)
        return Hardware, (self.name, self.bandwidth, dict(self.peaks), *others)

    def __hash__(self) -> int:
        return hash((self.name, self.bandwidth, tuple(self.peaks.items())))

    def rate(self, x: Format, y: Format) -> tuple[str, float]:
        """The format at which a product of x and y computes here, and its peak in FLOP/s.

        The wider operand's; the pair's own where the device has one; the next wider format
        where the device lacks it (`formats.STAND_INS`); that rate's own for 2:4 where an operand
        is so and the device has one. Any other sparse operand computes dense.

        Raises
        ------
        ValueError
            where the device has neither the format nor a wider one.
        """
        name, peak = self._dense_rate(x, y)
        if TWO_FOUR in (x.layout.name, y.layout.name) and name + _TWO_FOUR in self.peaks:
            name += _TWO_FOUR
            peak = self.peaks[name]
        return name, peak

    def _dense_rate(self, x: Format, y: Format) -> tuple[str, float]:
        if x.computes_as != y.computes_as:
            for pair in (f"{x.computes_as}*{y.computes_as}", f"{y.computes_as}*{x.computes_as}"):
                if pair in self.peaks:
                    return pair, self.peaks[pair]
        return self._rate(operand_rate(x, y))

    def _rate(self, wanted: str) -> tuple[str, float]:
        for name in STAND_INS[wanted]:
            if name in self.peaks:
                return name, self.peaks[name]
        raise ValueError(
            f"{self.name} has no published rate for {wanted} or wider; it has: "
            + ", ".join(self.peaks)
        )

    def peak(self, name: str) -> float:
        """P in FLOP/s for operands of that format, or of the next wider one it has.

        Parameters
        ----------
        name : a number format, or one of the rates that `peaks` may have ("fp4").
        """
        if name in STAND_INS:
            return self._rate(name)[1]
        form = load_format(name)
        return self.rate(form, form)[1]

    def ridge_point(self, name: str = "fp16") -> float:
        """P/W, the arithmetic intensity in FLOP/B at which the two roofs meet."""
        return self.peak(name) / self.bandwidth

    def attainable(self, intensity: Number, name: str = "fp16") -> Number:
        """min(P, I W) in FLOP/s (survey, equation of section 2.2)."""
        return minimum(self.peak(name), intensity * self.bandwidth)


_UNITS = {
    "memory_capacity": "B",
    "onchip_memory": "B",
    "link_bandwidth": "B/s",
    "power": "W",
}


def load_hardware(name: str | Hardware) -> Hardware:
    """The device of that name in `data/hardware.csv`; a `Hardware` passes through.

    >>> load_hardware("nvidia-a6000").bandwidth
    768000000000.0
    """
    if isinstance(name, Hardware):
        return name
    if not isinstance(name, str):
        raise ValueError(f"a device is named by a string or is a Hardware, not {shorten(name)}")
    devices = _devices()
    key = name.strip().lower()
    if key not in devices:
        raise unknown("device", name, devices, "; all: rooflm hardware")
    return devices[key]


def hardware_names() -> list[str]:
    """The names in `data/hardware.csv`, in its order."""
    return list(_devices())


def hardware_rows() -> list[dict[str, str]]:
    """The rows of `data/hardware.csv`: device, quantity, value, unit, source, date."""
    with data_path("hardware.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@lru_cache(maxsize=1)
def _devices() -> dict[str, Hardware]:
    numbers: dict[str, dict[str, float]] = {}
    for row in hardware_rows():
        numbers.setdefault(row["device"], {})[row["quantity"]] = float(row["value"])
    return {
        device: Hardware(
            device,
            bandwidth=of["memory_bandwidth"],
            peaks={q.removeprefix("peak_"): of[q] for q in of if q.startswith("peak_")},
            **{name: of.get(name) for name in _UNITS},
        )
        for device, of in numbers.items()
    }
