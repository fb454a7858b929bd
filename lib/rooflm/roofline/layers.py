"""What each layer of a config is: its mixer, and its MLP.

A family says how its layers come about (`families`); the config gives the sizes and, where
layers differ, a list, a pattern or an interval. Everything is checked as it is read.

Source: the configuration and modelling modules of Hugging Face transformers 5.23 for each
`model_type`.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rooflm.roofline.families import ALIASES, Family
from rooflm.roofline.fields import Config, boolean, flag, required, size
from rooflm.roofline.mixers import Attention, LatentAttention, Mixer
from rooflm.roofline.mlp import MLP, Experts, FeedForward
from rooflm.roofline.numeric import shorten
from rooflm.roofline.states import GatedDeltaNet, Mamba2

_KINDS = {
    "attention": ("full_attention", "sliding_attention"),
    "chunked": ("full_attention", "chunked_attention"),
    "delta": ("full_attention", "linear_attention"),
}


def layer_mixers(config: Config, family: Family, hidden: int, layers: int) -> list[Mixer | None]:
    """The mixer of every layer, in order; None where the layer has an MLP alone."""
    if family.mixer == "latent":
        return [_latent(config, family, hidden)] * layers
    if family.mixer == "mamba2":
        return [_mamba2(config, family, hidden)] * layers
    if family.mixer == "pattern":
        made: dict[str, Mixer | None] = {"-": None, "E": None}
        return [_patterned(kind, made, config, family, hidden) for kind in _pattern(config, layers)]
    full = _attention(config, family, hidden)
    kinds = _layer_kinds(config, family, layers)
    other: Mixer = full
    if family.mixer == "chunked":
        other = replace(full, chunk=required(config, "attention_chunk_size", family))
    elif family.mixer == "delta":
        other = _gated_delta_net(config, family, hidden)
    elif "sliding_attention" in kinds:
        other = replace(full, window=required(config, "sliding_window", family))
    mixers: list[Mixer | None] = [full if kind == "full_attention" else other for kind in kinds]
    return _own_kv_heads(config, family, mixers)


def layer_mlps(
    config: Config, family: Family, hidden: int, layers: int
) -> list[FeedForward | None]:
    """The MLP of every layer, in order; None where the layer has a mixer alone."""
    if family.mixer == "mamba2":
        return [None] * layers
    if family.mixer == "pattern":
        kinds = _pattern(config, layers)
        dense = _dense(config, family, hidden) if "-" in kinds else None
        sparse = _experts(config, family, hidden) if "E" in kinds else None
        return [{"-": dense, "E": sparse}.get(kind) for kind in kinds]
    sparse_layers = _sparse_layers(config, family, layers)
    experts = _experts(config, family, hidden) if any(sparse_layers) else None
    mlp = None if all(sparse_layers) else _dense(config, family, hidden)
    return [experts if sparse else mlp for sparse in sparse_layers]


# ---- which kind each layer is


def _layer_kinds(config: Config, family: Family, layers: int) -> list[str]:
    """A name of `_KINDS` for every layer: the config's list, or the family's rule."""
    allowed = _KINDS[family.mixer]
    given = config.get("layer_types")
    windowed = family.mixer != "attention" or _has_window(config, family)
    if given is not None:
        if not isinstance(given, (list, tuple)) or len(given) != layers:
            raise ValueError(
                f"layer_types is {shorten(given)}; allowed: a list of {layers}, one for each layer"
            )
        for kind in given:
            if kind not in allowed:
                raise ValueError(
                    f"layer_types holds {shorten(kind)}; allowed: {', '.join(allowed)}"
                )
        return list(given) if windowed else ["full_attention"] * layers
    if not windowed:
        return ["full_attention"] * layers
    other = allowed[1]
    if family.every:  # every n-th layer is full
        interval = size(config, family.every, family, layers * 1000) or 0
        full = [bool(interval) and (i + 1) % interval == 0 for i in range(layers)]
    elif family.windows_from:
        first = size(config, family.windows_from, family, smallest=0) or 0
        full = [i < first for i in range(layers)]
    else:
        full = [False] * layers
    return ["full_attention" if is_full else other for is_full in full]


def _has_window(config: Config, family: Family) -> bool:
    """Whether the family has windows, and one is given and switched on."""
    if not (family.windows or family.every or family.windows_from):
        return False
    on = boolean(
        config, "use_sliding_window", bool(family.defaults.get("use_sliding_window", True))
    )
    # An explicit null means none, whatever the family's default.
    null = "sliding_window" in config and config["sliding_window"] is None
    return on and not null and size(config, "sliding_window", family) is not None


def _pattern(config: Config, layers: int) -> str:
    """A letter a layer: M Mamba-2, * attention, - MLP, E experts (Nemotron-H)."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != layers or set(pattern) - set("M*-E"):
        raise ValueError(
            f"hybrid_override_pattern is {shorten(pattern)}; "
            f"allowed: {layers} of the letters M, *, - and E, one for each layer"
        )
    return pattern


def _patterned(
    kind: str, made: dict[str, Mixer | None], config: Config, family: Family, hidden: int
) -> Mixer | None:
    if kind not in made:
        make: Callable[[Config, Family, int], Mixer] = _mamba2 if kind == "M" else _attention
        made[kind] = make(config, family, hidden)
    return made[kind]


def _own_kv_heads(config: Config, family: Family, mixers: list[Mixer | None]) -> list[Mixer | None]:
    """Numbers of KV heads that differ from layer to layer (DeciLM)."""
    given = config.get("num_key_value_heads_per_layer")
    if given is None:
        return mixers
    if not isinstance(given, (list, tuple)) or len(given) != len(mixers):
        raise ValueError(
            f"num_key_value_heads_per_layer is {shorten(given)}; "
            f"allowed: a list of {len(mixers)}, one for each layer"
        )
    found: list[Mixer | None] = []
    for mixer, heads in zip(mixers, given, strict=True):
        assert isinstance(mixer, Attention)
        one = {**config, "num_key_value_heads": heads}
        found.append(replace(mixer, kv_heads=_kv_heads(one, family, mixer.heads)))
    return found


def _sparse_layers(config: Config, family: Family, layers: int) -> list[bool]:
    """Which layers have experts."""
    if not family.experts or not size(config, family.experts, family, smallest=0):
        return [False] * layers
    first = size(config, "first_k_dense_replace", family, smallest=0) or 0
    step = size(config, family.expert_step, family) or 1 if family.expert_step else 1
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)) or not all(type(i) is int for i in dense):
        raise ValueError(f"mlp_only_layers is {shorten(dense)}; allowed: a list of layer numbers")
    return [i >= first and (i + 1) % step == 0 and i not in dense for i in range(layers)]


# ---- mixers


def _attention(config: Config, family: Family, hidden: int) -> Attention:
    heads = required(config, "num_attention_heads", family)
    return Attention(
        hidden,
        heads,
        _kv_heads(config, family, heads),
        _head_dim(config, family, hidden, heads),
        qkv_bias=flag(config, family, family.qkv_bias),
        out_bias=flag(config, family, family.out_bias),
        qk_norm=family.qk_norm if flag(config, family, family.qk_norm_if) else "",
        qk_norm_vectors=family.qk_norm_vectors,
        sinks=family.sinks,
        output_gate=family.output_gate,
    )


def _latent(config: Config, family: Family, hidden: int) -> LatentAttention:
    if boolean(config, "attention_bias", False):
        raise ValueError("attention_bias is True; allowed with latent attention: false")
    return LatentAttention(
        hidden,
        required(config, "num_attention_heads", family),
        size(config, "q_lora_rank", family, smallest=0) or 0,
        required(config, "kv_lora_rank", family),
        required(config, "qk_nope_head_dim", family),
        required(config, "qk_rope_head_dim", family),
        required(config, "v_head_dim", family),
    )


def _gated_delta_net(config: Config, family: Family, hidden: int) -> GatedDeltaNet:
    key_heads = required(config, "linear_num_key_heads", family)
    value_heads = required(config, "linear_num_value_heads", family)
    if value_heads % key_heads:
        raise ValueError(
            f"linear_num_value_heads is {value_heads}; allowed: a multiple of "
            f"linear_num_key_heads ({key_heads})"
        )
    return GatedDeltaNet(
        hidden,
        key_heads,
        value_heads,
        required(config, "linear_key_head_dim", family),
        required(config, "linear_value_head_dim", family),
        required(config, "linear_conv_kernel_dim", family),
    )


def _mamba2(config: Config, family: Family, hidden: int) -> Mamba2:
    heads, groups = (
        required(config, family.state_heads, family),
        required(config, "n_groups", family),
    )
    if heads % groups:
        raise ValueError(f"n_groups is {groups}; allowed: a divisor of the heads ({heads})")
    width, expand = required(config, family.state_head_dim, family), size(config, "expand", family)
    if family.mixer == "mamba2" and heads * width != (expand or 2) * hidden:
        raise ValueError(
            f"num_heads x head_dim is {heads * width}; allowed: expand x hidden_size "
            f"({(expand or 2) * hidden})"
        )
    return Mamba2(
        hidden,
        heads,
        width,
        required(config, "ssm_state_size", family),
        groups,
        required(config, "conv_kernel", family),
        conv_bias=boolean(config, "use_conv_bias", True),
        bias=boolean(config, family.state_bias, False),
    )


def _kv_heads(config: Config, family: Family, heads: int) -> int:
    if flag(config, family, family.multi_query):
        return 1
    # An explicit null means as many as query heads, whatever the family's default.
    given = [config[name] for name in ALIASES["num_key_value_heads"] if name in config]
    null = bool(given) and all(value is None for value in given)
    kv_heads = (None if null else size(config, "num_key_value_heads", family)) or heads
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
    head_dim = size(config, "head_dim", family)
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


# ---- MLPs


def _dense(config: Config, family: Family, hidden: int) -> MLP:
    bias = flag(config, family, family.mlp_bias)
    return MLP(hidden, _intermediate(config, family, hidden), family.gated, bias)


def _experts(config: Config, family: Family, hidden: int) -> Experts:
    width = required(config, family.expert_width, family)
    count = required(config, family.experts, family)
    top_k = required(config, "num_experts_per_tok", family)
    if top_k > count:
        raise ValueError(f"num_experts_per_tok is {top_k}; allowed: at most the experts ({count})")
    shared = 0
    if family.shared == "n_shared_experts":
        shared = (size(config, family.shared, family, smallest=0) or 0) * width
    elif family.shared:
        shared = size(config, family.shared, family, smallest=0) or 0
    bias = flag(config, family, family.expert_bias)
    return Experts(
        hidden, width, count, top_k, shared, bool(shared) and family.shared_gate,
        family.router_bias, bias, family.gated,
    )  # fmt: skip


def _intermediate(config: Config, family: Family, hidden: int) -> int:
    if family.dense_width:
        return required(config, family.dense_width, family)
    if not family.mlp_ratio:
        return required(config, "intermediate_size", family)
    ratio = family.mlp_ratio
    if isinstance(ratio, str):
        ratio = required(config, ratio, family)
    given = size(config, "intermediate_size", family)
    if family.fixed_mlp and given not in (None, ratio * hidden):
        raise ValueError(f"intermediate_size is {given}; allowed: {ratio} x hidden_size")
    return given or ratio * hidden
