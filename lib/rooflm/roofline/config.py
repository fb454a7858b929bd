"""From a config.json to a `Model`, through the tables of `families`.

A config enters here and is checked here: what is missing, contradictory, out of range or
beyond what a `Model` can say ends in a ValueError of one line. An attention window is read and
not modelled yet; quantization_config is not read, since formats are `Precision`'s business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rooflm.roofline.datafiles import data_path, read_json_object
from rooflm.roofline.families import ALIASES, ATTENTION_LAYERS, FAMILIES, UNSUPPORTED, Family, Flag
from rooflm.roofline.model import MLP, Attention, Block, Model
from rooflm.roofline.numeric import LARGEST_SIZE, shorten, unknown

LARGEST_LAYERS = 100_000

Config = Mapping[str, Any]


def load_model(source: str | os.PathLike[str] | Config | Model, name: str | None = None) -> Model:
    """The model that a config describes.

    Parameters
    ----------
    source : a name in data/models (upper and lower case alike; the part after the "/" will
        do where it is unique), the path of a config.json, the config as a dict, or a Model,
        which is returned as it is.
    name : what the model is called in reports; by default the name or path it was asked for
        by, or a dict's model_type.

    Raises
    ------
    ValueError
        in one line, naming what was given and what is allowed.

    >>> load_model("meta-llama/Llama-2-7b-hf").parameters
    6738415616
    """
    if name is not None and not isinstance(name, str):
        raise ValueError(f"name is {shorten(name)}; allowed: a string")
    if isinstance(source, Model):
        return source if name is None else replace(source, name=name)
    if isinstance(source, Mapping):
        return _build(source, name)
    if isinstance(source, str):
        if known := _known_name(source):
            return _build(_read_known(known), name or known)
        if not _looks_like_path(source):
            names = model_names()
            raise unknown("model", source, [*names, *(n.split("/")[-1] for n in names)])
    elif not isinstance(source, os.PathLike):
        raise ValueError(
            f"model is {shorten(source)}; allowed: a name, a path to a config.json, a dict"
        )
    path = os.path.expanduser(os.fspath(source))
    return _build(read_json_object(path), name or str(path))


def model_names() -> list[str]:
    """The names in data/models, as `load_model` takes them."""
    root = data_path("models")
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*.json"))
    return sorted(path.removesuffix(".json") for path in paths)


def published_parameters(name: str) -> int:
    """The published parameter count of a model in data/models: the sum of its tensors' shapes."""
    return int(_read_known(_must_know(name))["_published_parameters"])


def model_source(name: str) -> str:
    """Where the config of a model in data/models was published."""
    return str(_read_known(_must_know(name))["_source"])


def _build(config: Config, name: str | None) -> Model:
    _refuse_unsupported(config)
    family_name, family = _family(config)
    hidden = _required(config, "hidden_size", family)
    layers = _required(config, "num_hidden_layers", family, LARGEST_LAYERS)
    heads = _required(config, "num_attention_heads", family)
    vocab = _required(config, "vocab_size", family)
    if family_name == "falcon":
        family = _falcon(config, family)
    elif family_name == "mpt":
        _check_mpt(config)
    attention = Attention(
        hidden,
        heads,
        _kv_heads(config, family, heads),
        _head_dim(config, family, hidden, heads),
        qkv_bias=_flag(config, family, family.qkv_bias),
        out_bias=_flag(config, family, family.out_bias),
        qk_norm=family.qk_norm if _flag(config, family, family.qk_norm_if) else "",
        qk_norm_vectors=family.qk_norm_vectors,
        window=_window(config, family),
    )
    mlp = MLP(
        hidden,
        _intermediate(config, family, hidden),
        gated=family.gated,
        bias=_flag(config, family, family.mlp_bias),
    )
    parallel = _flag(config, family, family.parallel)
    norms = family.norms
    if parallel and family.parallel_norms is not None:
        norms = family.parallel_norms
    vectors = family.norm_vectors if _flag(config, family, family.norm_affine) else 0
    # A list, not a generator: every switch is checked, also after one that is off.
    final_norm = [_flag(config, family, flag) for flag in family.final_norm]
    embedding_dim = 0
    positions = 0
    if family.positions:
        positions = _required(config, "max_position_embeddings", family) + family.position_offset
        embedding_dim = _size(config, "word_embed_proj_dim", family) or hidden
    return Model(
        name=name or family_name,
        hidden=hidden,
        vocab=vocab,
        blocks=((layers, Block(attention, mlp, norms, vectors, parallel)),),
        tied=_bool(config, "tie_word_embeddings", family.tied),
        head_bias=_flag(config, family, family.head_bias),
        norm_vectors=vectors,
        final_norm=all(final_norm),
        embedding_norm=family.embedding_norm,
        positions=positions,
        embedding_dim=0 if embedding_dim == hidden else embedding_dim,
    )


def _refuse_unsupported(config: Config) -> None:
    for field, harmless, allowed in UNSUPPORTED:
        value = config.get(field)
        if not any(value == calm for calm in harmless):
            raise ValueError(f"{field} is {shorten(value)}; allowed: {allowed}")
    layer_types = config.get("layer_types")
    for kind in layer_types if isinstance(layer_types, (list, tuple)) else ():
        if kind not in ATTENTION_LAYERS:
            allowed = ", ".join(ATTENTION_LAYERS)
            raise ValueError(f"layer_types holds {shorten(kind)}; allowed: {allowed}")


def _family(config: Config) -> tuple[str, Family]:
    name = config.get("model_type")
    if name is None:
        raise ValueError(f"model_type is missing; allowed: {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise unknown("model_type", name, FAMILIES)
    return name, FAMILIES[name]


def _size(config: Config, field: str, family: Family, largest: int = LARGEST_SIZE) -> int | None:
    """The field under any of its names, checked; the family's default where it is absent."""
    given = {name: config[name] for name in ALIASES[field] if config.get(name) is not None}
    for name, value in given.items():
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 1 <= value <= largest:
            top = "2^40" if largest == LARGEST_SIZE else str(largest)
            raise ValueError(f"{name} is {shorten(value)}; allowed: a whole number from 1 to {top}")
    if len(set(given.values())) > 1:
        both = " but ".join(f"{name} is {value}" for name, value in given.items())
        raise ValueError(f"{both}; allowed: one value, since both name {field}")
    for value in given.values():
        return int(value)
    return family.defaults.get(field)


def _required(config: Config, field: str, family: Family, largest: int = LARGEST_SIZE) -> int:
    value = _size(config, field, family, largest)
    if value is None:
        also = ", ".join(ALIASES[field][1:])
        raise ValueError(f"{field} is missing" + (f"; allowed names: also {also}" if also else ""))
    return value


def _bool(config: Config, field: str, default: bool) -> bool:
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{field} is {shorten(value)}; allowed: true or false")
    return value


def _flag(config: Config, family: Family, flag: Flag) -> bool:
    if isinstance(flag, bool):
        return flag
    field = flag.removeprefix("!")
    value = _bool(config, field, bool(family.defaults.get(field, False)))
    return value is not flag.startswith("!")


def _window(config: Config, family: Family) -> int:
    """The attention window in tokens; 0 where there is none, or where it is switched off."""
    on = _bool(config, "use_sliding_window", bool(family.defaults.get("use_sliding_window", True)))
    window = _size(config, "sliding_window", family) if on else None
    return window or 0


def _kv_heads(config: Config, family: Family, heads: int) -> int:
    if _flag(config, family, family.multi_query):
        return 1
    # An explicit null means as many as query heads, whatever the family's default.
    given = [config[name] for name in ALIASES["num_key_value_heads"] if name in config]
    null = bool(given) and all(value is None for value in given)
    kv_heads = (None if null else _size(config, "num_key_value_heads", family)) or heads
    if not family.kv_heads and kv_heads != heads:
        raise ValueError(
            f"num_key_value_heads is {kv_heads}; allowed: num_attention_heads ({heads}), "
            f"since every head of this family has its own"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads is {kv_heads}; allowed: a divisor of num_attention_heads "
            f"({heads})"
        )
    return kv_heads


def _head_dim(config: Config, family: Family, hidden: int, heads: int) -> int:
    head_dim = _size(config, "head_dim", family)
    if head_dim is None or (family.fixed_head_dim and head_dim * heads != hidden):
        if hidden % heads:
            raise ValueError(
                f"hidden_size is {hidden}; allowed: a multiple of num_attention_heads ({heads})"
            )
        if head_dim is not None:
            raise ValueError(
                f"head_dim is {head_dim}; allowed: hidden_size / num_attention_heads "
                f"({hidden // heads})"
            )
        return hidden // heads
    return head_dim


def _intermediate(config: Config, family: Family, hidden: int) -> int:
    if not family.mlp_ratio:
        return _required(config, "intermediate_size", family)
    ratio = family.mlp_ratio
    if isinstance(ratio, str):
        ratio = _required(config, ratio, family)
    given = _size(config, "intermediate_size", family)
    if family.fixed_mlp and given not in (None, ratio * hidden):
        raise ValueError(f"intermediate_size is {given}; allowed: {ratio} x hidden_size")
    return given or ratio * hidden


def _falcon(config: Config, family: Family) -> Family:
    """Falcon's three generations: 1B with two norms, 7B multi-query, 40B with grouped heads.

    Source: FalconAttention and FalconDecoderLayer in transformers.
    """
    grouped = _bool(config, "new_decoder_architecture", False)
    multi_query = not grouped and _bool(config, "multi_query", True)
    two_by_default = 2 if grouped else 1
    branch_norms = _size(config, "num_ln_in_parallel_attn", family, 2) or two_by_default
    norms = family.norms
    if _flag(config, family, family.parallel) and branch_norms == 1:
        norms = ("attn_norm",)
    # Without either switch the fused projection has as many keys as queries.
    return replace(family, norms=norms, multi_query=multi_query, kv_heads=grouped or multi_query)


def _check_mpt(config: Config) -> None:
    """MPT nests its attention's traits; what transformers builds knows one kind."""
    attention = config.get("attn_config")
    if attention is None:
        return
    if not isinstance(attention, Mapping):
        raise ValueError(f"attn_config is {shorten(attention)}; allowed: an object")
    kind = attention.get("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        raise ValueError(f"attn_type is {shorten(kind)}; allowed: multihead_attention")
    if _bool(attention, "qk_ln", False):
        raise ValueError("qk_ln is True; allowed: false")


def _known_name(asked: str) -> str | None:
    names = model_names()
    if asked in names:
        return asked
    key = asked.strip().lower()
    whole = [name for name in names if name.lower() == key]
    last = [name for name in names if name.lower().rsplit("/", 1)[-1] == key]
    matches = whole or last
    return matches[0] if len(matches) == 1 else None


def _must_know(name: str) -> str:
    known = _known_name(name) if isinstance(name, str) else None
    if known is None:
        raise unknown("model", name, model_names())
    return known


def _read_known(name: str) -> dict[str, Any]:
    return read_json_object(data_path("models", *f"{name}.json".split("/")))


def _looks_like_path(source: str) -> bool:
    spelled = source.startswith((".", "~", os.sep)) or source.lower().endswith(".json")
    return spelled or os.path.exists(source)
