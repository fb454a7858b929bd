"""Single fields of a config.json, checked as they are read.

Chapter: one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rooflm.roofline.families import ALIASES, Family, Flag
from rooflm.roofline.numeric import LARGEST_SIZE, shorten

Config = Mapping[str, Any]


def size(
    config: Config, field: str, family: Family, largest: int = LARGEST_SIZE, smallest: int = 1
) -> int | None:
    """The field under any of its names, checked; the family's default where it is absent."""
    given = {
        name: config[name] for name in ALIASES.get(field, (field,)) if config.get(name) is not None
    }
    for name, value in given.items():
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not smallest <= value <= largest:
            top = "2^40" if largest == LARGEST_SIZE else str(largest)
            raise ValueError(
                f"{name} is {shorten(value)}; allowed: a whole number from {smallest} to {top}"
            )
    if len(set(given.values())) > 1:
        both = " but ".join(f"{name} is {value}" for name, value in given.items())
        raise ValueError(f"{both}; allowed: one value, since both name {field}")
    for value in given.values():
        return int(value)
    return family.defaults.get(field)


def required(config: Config, field: str, family: Family, largest: int = LARGEST_SIZE) -> int:
    """As `size`, for a field without which there is no model."""
    value = size(config, field, family, largest)
    if value is None:
        also = ", ".join(ALIASES.get(field, (field,))[1:])
        raise ValueError(f"{field} is missing" + (f"; allowed names: also {also}" if also else ""))
    return value


def boolean(config: Config, field: str, default: bool) -> bool:
    """True or false; `default` where the field is absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{field} is {shorten(value)}; allowed: true or false")
    return value


def flag(config: Config, family: Family, trait: Flag) -> bool:
    """A trait that is fixed, or that a field of the config decides."""
    if isinstance(trait, bool):
        return trait
    field = trait.removeprefix("!")
    value = boolean(config, field, bool(family.defaults.get(field, False)))
    return value is not trait.startswith("!")
