"""From a config.json to a `Model`, through the tables of `families`.

A config enters here and is checked here: what is missing, contradictory, out of range or
beyond what a `Model` can say ends in a ValueError of one line. What each layer is, is the business
of `layers`; quantization_config is not read, since formats are `Precision`'s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from rooflm.roofline.datafiles import data_path, read_json_object
from rooflm.roofline.families import FAMILIES, FOREIGN, UNSUPPORTED, Family
from rooflm.roofline.fields import Config, boolean, flag, required, size
from rooflm.roofline.layers import layer_mixers, layer_mlps
from rooflm.roofline.mixers import Mixer
from rooflm.roofline.mlp import FeedForward
from rooflm.roofline.model import Block, Model
from rooflm.roofline.numeric import shorten, unknown
from rooflm.roofline.patterns import layer_count


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
    _refuse_foreign(config)
    family_name, family = _family(config)
    _refuse_unsupported(config, family)
    hidden = required(config, "hidden_size", family)
    layers = layer_count(config, family)
    vocab = required(config, "vocab_size", family)
    if family_name == "falcon":
        family = _falcon(config, family)
    elif family_name == "mpt":
        _check_mpt(config)
    mixers = layer_mixers(config, family, hidden, layers)
    mlps = layer_mlps(config, family, hidden, layers)
    parallel = flag(config, family, family.parallel)
    norms = family.norms
    if parallel and family.parallel_norms is not None:
        norms = family.parallel_norms
    vectors = family.norm_vectors if flag(config, family, family.norm_affine) else 0
    # A list, not a generator: every switch is checked, also after one that is off.
    final_norm = [flag(config, family, trait) for trait in family.final_norm]
    embedding_dim = 0
    positions = 0
    if family.positions:
        positions = required(config, "max_position_embeddings", family) + family.position_offset
        embedding_dim = size(config, "word_embed_proj_dim", family) or hidden
    return Model(
        name=name or family_name,
        hidden=hidden,
        vocab=vocab,
        blocks=_grouped(
            _block(mixer, mlp, norms, vectors, parallel)
            for mixer, mlp in zip(mixers, mlps, strict=True)
        ),
        tied=boolean(config, "tie_word_embeddings", family.tied),
        head_bias=flag(config, family, family.head_bias),
        norm_vectors=vectors,
        final_norm=all(final_norm),
        embedding_norm=family.embedding_norm,
        positions=positions,
        embedding_dim=0 if embedding_dim == hidden else embedding_dim,
    )


def _block(
    mixer: Mixer | None,
    mlp: FeedForward | None,
    norms: tuple[str, ...],
    vectors: int,
    parallel: bool,
) -> Block:
    """A layer; one of one branch has that branch's norms alone."""
    if mixer is None or mlp is None:
        norms = tuple(norm for norm in norms if norm.startswith("attn" if mixer else "mlp"))
    return Block(mixer, mlp, norms, vectors, parallel)


def _grouped(blocks: Iterable[Block]) -> tuple[tuple[int, Block], ...]:
    """Equal layers counted together, in the order of their first."""
    counts = Counter(blocks)
    return tuple((count, block) for block, count in counts.items())


def _refuse_foreign(config: Config) -> None:
    """What no family has, before a model_type that isn't known is blamed for it."""
    for field, harmless, allowed in FOREIGN:
        value = config.get(field)
        if not any(value == calm for calm in harmless):
            raise ValueError(f"{field} is {shorten(value)}; allowed: {allowed}")


def _refuse_unsupported(config: Config, family: Family) -> None:
    for field, harmless, allowed in UNSUPPORTED:
        if field in family.reads:
            continue
        value = config.get(field)
        if not any(value == calm for calm in harmless):
            raise ValueError(f"{field} is {shorten(value)}; allowed: {allowed}")
    for field in family.forbids:
        if config.get(field) not in (None, False):  # a 0 is one of these
            raise ValueError(
                f"{field} is {shorten(config[field])}; allowed in this family: none of it"
            )


def _family(config: Config) -> tuple[str, Family]:
    name = config.get("model_type")
    if name is None:
        raise ValueError(f"model_type is missing; allowed: {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise unknown("model_type", name, FAMILIES)
    return name, FAMILIES[name]


def _falcon(config: Config, family: Family) -> Family:
    """Falcon's three generations: 1B with two norms, 7B multi-query, 40B with grouped heads.

    Source: FalconAttention and FalconDecoderLayer in transformers.
    """
    grouped = boolean(config, "new_decoder_architecture", False)
    multi_query = not grouped and boolean(config, "multi_query", True)
    two_by_default = 2 if grouped else 1
    branch_norms = size(config, "num_ln_in_parallel_attn", family, 2) or two_by_default
    norms = family.norms
    if flag(config, family, family.parallel) and branch_norms == 1:
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
    if boolean(attention, "qk_ln", False):
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
