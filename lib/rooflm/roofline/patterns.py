"""Which kind each layer of a config is: its list, its pattern, or its family's rule.

Source: the configuration modules of Hugging Face transformers 5.23 for each `model_type`.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from typing import Any

from rooflm.roofline.families import Family
from rooflm.roofline.fields import Config, boolean, required, size
from rooflm.roofline.numeric import shorten

LARGEST_LAYERS = 100_000
_KINDS = {
    "attention": ("full_attention", "sliding_attention"),
    "chunked": ("full_attention", "chunked_attention"),
    "delta": ("full_attention", "linear_attention"),
    "lightning": ("full_attention", "linear_attention"),
}
# The letters of hybrid_override_pattern, and the names in layers_block_type, old and new.
_LETTERS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*",
    "mlp": "-", "moe": "E",
}  # fmt: skip


def layer_count(config: Config, family: Family) -> int:
    """How many layers there are: the config's number, or the length of its list of kinds."""
    listed = config.get("layers_block_type")
    given = size(config, "num_hidden_layers", family, LARGEST_LAYERS)
    if given is None and family.mixer == "pattern" and isinstance(listed, (list, tuple)) and listed:
        return min(len(listed), LARGEST_LAYERS)
    return required(config, "num_hidden_layers", family, LARGEST_LAYERS)


def layer_kinds(config: Config, family: Family, layers: int) -> list[str]:
    """A name of `_KINDS` for every layer: the config's list, or the family's rule."""
    allowed = _KINDS[family.mixer]
    given = config.get("layer_types")
    differ = _has_window(config, family) if family.mixer == "attention" else True
    if family.mixer == "chunked":  # an explicit null switches chunks off
        differ = config.get("attention_chunk_size", True) is not None
    if given is not None:
        listed = one_per_layer("layer_types", given, layers)
        names = allowed if family.mixer != "attention" or _may_window(family) else allowed[:1]
        for kind in listed:
            if kind not in names:
                raise ValueError(f"layer_types holds {shorten(kind)}; allowed: {', '.join(names)}")
        return listed if differ else ["full_attention"] * layers
    if not differ:
        return ["full_attention"] * layers
    if family.mixer == "lightning":
        raise ValueError(f"layer_types is missing; allowed: a list of {', '.join(allowed)}")
    return [
        "full_attention" if full else allowed[1] for full in _full_layers(config, family, layers)
    ]


def layer_letters(config: Config, layers: int) -> str:
    """A letter a layer: M Mamba-2, * attention, - MLP, E experts (Nemotron-H)."""
    listed = config.get("layers_block_type")
    if listed is not None:
        kinds = one_per_layer("layers_block_type", listed, layers)
        for kind in kinds:
            if not isinstance(kind, str) or kind not in _LETTERS:
                allowed = ", ".join(_LETTERS)
                raise ValueError(f"layers_block_type holds {shorten(kind)}; allowed: {allowed}")
        return "".join(_LETTERS[kind] for kind in kinds)
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != layers or set(pattern) - set("M*-E"):
        raise ValueError(
            f"hybrid_override_pattern is {shorten(pattern)}; "
            f"allowed: {layers} of the letters M, *, - and E, one for each layer"
        )
    return pattern


def sparse_layers(config: Config, family: Family, layers: int) -> list[bool]:
    """Which layers have experts."""
    if not family.experts or not size(config, family.experts, family, smallest=0):
        return [False] * layers
    first = size(config, "first_k_dense_replace", family, smallest=0) or 0
    step = size(config, family.expert_step, family) or 1 if family.expert_step else 1
    if family.expert_list and config.get(family.expert_list) is not None:
        sparse = _layer_numbers(config, family.expert_list)
        return [i in sparse for i in range(layers)]
    dense = _layer_numbers(config, "mlp_only_layers")
    return [i >= first and (i + 1) % step == 0 and i not in dense for i in range(layers)]


def one_per_layer(field: str, given: object, layers: int) -> list[Any]:
    """The list that a field holds, checked to have an entry for every layer."""
    if not isinstance(given, (list, tuple)) or len(given) != layers:
        raise ValueError(
            f"{field} is {shorten(given)}; allowed: a list of {layers}, one for each layer"
        )
    return list(given)


def _full_layers(config: Config, family: Family, layers: int) -> list[bool]:
    """Which layers see everything, by the family's rule."""
    if family.full_list and config.get(family.full_list):
        listed = one_per_layer(family.full_list, config[family.full_list], layers)
        if not all(type(one) is int and one in (0, 1) for one in listed):
            raise ValueError(f"{family.full_list} is {shorten(listed)}; allowed: a list of 0 and 1")
        return [one == 0 for one in listed]
    every = family.every
    if isinstance(every, str):
        every = (size(config, every, family) or 0) if every else 0
    first = (
        size(config, family.windows_from, family, smallest=0) if family.windows_from else 0
    ) or 0
    last = layers
    if family.windows_until:
        last = size(config, family.windows_until, family, smallest=0) or 0
    return [i < first or i >= last or (every > 0 and (i + 1) % every == 0) for i in range(layers)]


def _layer_numbers(config: Config, field: str) -> set[int]:
    given = config.get(field)
    if given is None:
        return set()
    if not isinstance(given, (list, tuple)) or not all(type(i) is int for i in given):
        raise ValueError(f"{field} is {shorten(given)}; allowed: a list of layer numbers")
    return set(given)


def _may_window(family: Family) -> bool:
    return family.windows or bool(family.every or family.windows_from)


def _has_window(config: Config, family: Family) -> bool:
    """Whether the family has windows, and one is given and switched on."""
    default = bool(family.defaults.get("use_sliding_window", _may_window(family)))
    on = boolean(config, "use_sliding_window", default)
    if not _may_window(family):
        if on:
            raise ValueError("use_sliding_window is True; allowed in this family: false")
        return False
    # An explicit null means none, whatever the family's default.
    null = "sliding_window" in config and config["sliding_window"] is None
    return on and not null and size(config, "sliding_window", family) is not None
