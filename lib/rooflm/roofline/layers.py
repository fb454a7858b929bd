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
from rooflm.roofline.patterns import layer_kinds, layer_letters, one_per_layer, sparse_layers
from rooflm.roofline.states import GatedDeltaNet, LinearAttention, Mamba2


def layer_mixers(config: Config, family: Family, hidden: int, layers: int) -> list[Mixer | None]:
    """The mixer of every layer, in order; None where the layer has an MLP alone."""
    if family.mixer == "latent":
        return [_latent(config, family, hidden)] * layers
    if family.mixer == "mamba2":
        return [_mamba2(config, family, hidden)] * layers
    if family.mixer == "pattern":
        made: dict[str, Mixer | None] = {"-": None, "E": None}
        return [
            _patterned(kind, made, config, family, hidden) for kind in layer_letters(config, layers)
        ]
    full = _attention(config, family, hidden)
    kinds = layer_kinds(config, family, layers)
    other: Mixer = full
    if "chunked_attention" in kinds:
        other = replace(full, chunk=required(config, "attention_chunk_size", family))
    elif family.mixer == "delta":
        other = _gated_delta_net(config, family, hidden)
    elif family.mixer == "lightning":
        other = LinearAttention(hidden, full.heads, full.head_dim)
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
        kinds = layer_letters(config, layers)
        dense = _dense(config, family, hidden) if "-" in kinds else None
        sparse = _experts(config, family, hidden) if "E" in kinds else None
        return [{"-": dense, "E": sparse}.get(kind) for kind in kinds]
    which = sparse_layers(config, family, layers)
    experts = _experts(config, family, hidden) if any(which) else None
    mlp = None if all(which) else _dense(config, family, hidden)
    return [experts if sparse else mlp for sparse in which]


# ---- mixers


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
    counts = one_per_layer("num_key_value_heads_per_layer", given, len(mixers))
    found: list[Mixer | None] = []
    for mixer, heads in zip(mixers, counts, strict=True):
        if not isinstance(mixer, Attention):
            raise ValueError("num_key_value_heads_per_layer is given; allowed: softmax attention")
        one = {**config, "num_key_value_heads": heads}
        found.append(replace(mixer, kv_heads=_kv_heads(one, family, mixer.heads)))
    return found


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
