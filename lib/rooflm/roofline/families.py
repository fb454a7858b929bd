"""What each family of decoders has, as data: one row a `model_type`.

The rows state what the released modelling code builds: which projections have a bias, which
norms stand where, how wide the MLP is when the config doesn't say. They are plain data, so
that a page can read them too. A trait that a config decides is written as the name of the
config's field, with "!" before it where the field turns the trait off.

Source: the configuration and modelling modules of Hugging Face transformers 5.23 for each
`model_type`; for internlm, internlm2 and baichuan, the code released beside their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

# A trait: fixed, or decided by the config's field of that name ("!" negates).
Flag = bool | str

# Canonical fields and the names under which configs give them. "hidden_dim" is left out: it
# is the hidden width in some files and the MLP's in others.
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "word_embed_proj_dim": ("word_embed_proj_dim",),
    "sliding_window": ("sliding_window",),
    "expansion_ratio": ("expansion_ratio",),
    "num_ln_in_parallel_attn": ("num_ln_in_parallel_attn",),
    "ssm_state_size": ("ssm_state_size", "state_size"),
    "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token"),
}

# Fields that ask for what no `Model` can say, with the values that ask for nothing.
FOREIGN: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("text_config", (None, {}), "pass its text_config"),
    ("llm_config", (None, {}), "pass its llm_config"),
    ("vision_config", (None, {}), "a text-only decoder"),
    ("audio_config", (None, {}), "a text-only decoder"),
    ("is_encoder_decoder", (None, False), "a decoder-only model"),
    ("add_cross_attention", (None, False), "self-attention only"),
    ("cross_attention_layers", (None, []), "self-attention only"),
    ("ssm_cfg", (None, {}), "a config in the form of transformers"),
    ("block_types", (None, []), "attention in every layer"),
)
# The same of what only some families have: `Family.reads` names theirs.
UNSUPPORTED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("num_local_experts", (None, 0, 1), "a dense MLP"),
    ("num_experts", (None, 0, 1), "a dense MLP"),
    ("n_routed_experts", (None, 0), "a dense MLP"),
    ("moe_num_experts", (None, 0, 1), "a dense MLP"),
    ("moe_layer_freq", (None, 1), "1: experts in every layer after the first dense ones"),
    ("kv_lora_rank", (None, 0), "attention with separate keys and values"),
    ("state_size", (None, 0), "attention in every layer"),
    ("ssm_state_size", (None, 0), "attention in every layer"),
    ("mamba_d_state", (None, 0), "attention in every layer"),
    ("hybrid_override_pattern", (None, ""), "attention in every layer"),
    ("linear_num_value_heads", (None, 0), "attention in every layer"),
)


@dataclass(frozen=True)
class Family:
    """The traits of one `model_type`.

    Parameters
    ----------
    gated : whether the MLP has three matrices (SwiGLU, GeGLU) or two.
    qkv_bias, out_bias, mlp_bias, head_bias : which projections have a bias.
    norms, parallel_norms : the norms of a layer, and those it has where both branches read the
        same input (None: the same).
    norm_vectors : learned vectors a norm (RMSNorm 1, LayerNorm with bias 2, without either 0).
    norm_affine : whether the norms learn anything at all.
    qk_norm, qk_norm_vectors, qk_norm_if : as in `model.Attention`, and whether it is there.
    parallel : whether both branches read the same input.
    final_norm : there is one when all of these hold.
    embedding_norm : whether the embedding is followed by a norm.
    positions, position_offset : whether positions are learned, and the rows beyond the
        config's count.
    kv_heads : whether the config gives the number of KV heads; otherwise it is that of heads.
    multi_query : where it holds there is one KV head.
    fixed_head_dim : whether head_dim must be hidden_size / num_attention_heads.
    mlp_ratio : intermediate_size over hidden_size where the config gives none; 0 if it must;
        or the field that gives the ratio.
    fixed_mlp : whether intermediate_size must be that ratio.
    tied : whether the head is the embedding's matrix when tie_word_embeddings is absent.
    mixer : what the layers are made of: "attention" (full and windowed), "chunked" (full and
        chunked), "delta" (full and Gated DeltaNet), "lightning" (full and linear attention),
        "latent", "mamba2", "pattern" (a letter each).
    windows : whether every layer has the config's window, if it gives one.
    every : every n-th layer is a full one: n, or the field that says it; "" for no such rule.
    windows_from, windows_until : the fields that say how many layers stay full before the windowed
        ones, and after how many layers all are full again.
    full_list : the field that lists 0 for a full layer and 1 for another, where `every` isn't it.
    sinks, output_gate : as in `mixers.Attention`.
    experts, expert_width, expert_step, expert_list : the fields of their number, their width, of
        the interval of layers that have them, and of a list of these; "" for none.
    shared : the field of the shared expert's width, or n_shared_experts, a multiple of
        expert_width; shared_gate, router_bias, expert_bias : as in `mlp.Experts`.
    dense_width : the field of the dense layers' width where it is not intermediate_size.
    state_heads, state_head_dim, state_bias : the fields of a state layer's heads, their width, and
        of whether its projections have a bias.
    reads : fields of `UNSUPPORTED` that this family has a place for.
    forbids : fields that must be off or absent, though other families read them.
    defaults : what an absent field means; a switch that is not named here is off, and
        num_key_value_heads is num_attention_heads.
    """

    gated: bool = True
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: Flag = False
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    parallel_norms: tuple[str, ...] | None = None
    norm_vectors: int = 1
    norm_affine: Flag = True
    qk_norm: str = ""
    qk_norm_vectors: int = 1
    qk_norm_if: Flag = True
    parallel: Flag = False
    final_norm: tuple[Flag, ...] = (True,)
    embedding_norm: bool = False
    positions: bool = False
    position_offset: int = 0
    kv_heads: bool = True
    multi_query: Flag = False
    fixed_head_dim: bool = False
    mlp_ratio: int | str = 0
    fixed_mlp: bool = False
    tied: bool = False
    mixer: str = "attention"
    windows: bool = False
    every: str | int = ""
    windows_from: str = ""
    windows_until: str = ""
    full_list: str = ""
    sinks: bool = False
    output_gate: bool = False
    experts: str = ""
    expert_width: str = "moe_intermediate_size"
    expert_step: str = ""
    expert_list: str = ""
    shared: str = ""
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: Flag = False
    dense_width: str = ""
    state_heads: str = ""
    state_head_dim: str = ""
    state_bias: str = ""
    reads: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    defaults: dict[str, int | bool] = field(default_factory=dict)


_ONE_NORM = ("attn_norm",)
_POST_NORMS = ("attn_post_norm", "mlp_post_norm")
_PATTERN = "sliding_window_pattern"
_FOUR_NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")

_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_ATTENTION_BIAS = Family(qkv_bias="attention_bias", out_bias="attention_bias")
_GPT2 = Family(
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    norm_vectors=2,
    positions=True,
    kv_heads=False,
    fixed_head_dim=True,
    mlp_ratio=4,
    tied=True,
    defaults={"max_position_embeddings": 1024},
)
_COHERE = replace(_ATTENTION_BIAS, norms=_ONE_NORM, parallel=True, tied=True)
_DEEPSEEK = Family(
    mixer="latent",
    experts="n_routed_experts",
    shared="n_shared_experts",
    reads=("n_routed_experts", "kv_lora_rank"),
)
_GLM = Family(qkv_bias="attention_bias", defaults={"num_key_value_heads": 2, "head_dim": 128})

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(windows=True, defaults={"num_key_value_heads": 8}),
    "ministral": Family(windows=True, defaults={"num_key_value_heads": 8}),
    "ministral3": Family(windows=True, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "qwen2": Family(
        qkv_bias=True,
        windows_from="max_window_layers",
        defaults={
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": replace(
        _ATTENTION_BIAS,
        qk_norm="head",
        windows_from="max_window_layers",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "gemma": replace(
        _ATTENTION_BIAS, tied=True, defaults={"num_key_value_heads": 16, "head_dim": 256}
    ),
    "gemma2": replace(
        _ATTENTION_BIAS,
        norms=_FOUR_NORMS,
        tied=True,
        every=2,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    ),
    # The text part of a multimodal Gemma-3 leaves out what equals these.
    "gemma3_text": replace(
        _ATTENTION_BIAS,
        norms=_FOUR_NORMS,
        qk_norm="head",
        tied=True,
        every=_PATTERN,
        defaults={
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
        },
    ),
    "phi": Family(
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        norms=_ONE_NORM,
        norm_vectors=2,
        qk_norm="head",
        qk_norm_vectors=2,
        qk_norm_if="qk_layernorm",
        parallel=True,
    ),
    "phi3": Family(windows=True),
    "gptj": Family(
        gated=False,
        mlp_bias=True,
        head_bias=True,
        norms=_ONE_NORM,
        norm_vectors=2,
        parallel=True,
        kv_heads=False,
        fixed_head_dim=True,
        mlp_ratio=4,
    ),
    "gpt2": _GPT2,
    "gpt_neo": replace(_GPT2, qkv_bias=False, defaults={"max_position_embeddings": 2048}),
    "gpt_neox": Family(
        gated=False,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        norm_vectors=2,
        parallel="use_parallel_residual",
        kv_heads=False,
        fixed_head_dim=True,
        defaults={"attention_bias": True, "use_parallel_residual": True},
    ),
    "gpt_bigcode": replace(
        _GPT2,
        multi_query="multi_query",
        defaults={"max_position_embeddings": 1024, "multi_query": True},
    ),
    "opt": Family(
        gated=False,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        norm_vectors=2,
        norm_affine="layer_norm_elementwise_affine",
        final_norm=("do_layer_norm_before", "!_remove_final_layer_norm"),
        positions=True,
        position_offset=2,
        kv_heads=False,
        fixed_head_dim=True,
        tied=True,
        defaults={
            "max_position_embeddings": 2048,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "do_layer_norm_before": True,
        },
    ),
    "bloom": Family(
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_vectors=2,
        embedding_norm=True,
        kv_heads=False,
        fixed_head_dim=True,
        mlp_ratio=4,
        fixed_mlp=True,
        tied=True,
    ),
    # Its norms and KV heads depend on several fields: `config` has a function for them.
    "falcon": Family(
        gated=False,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        norm_vectors=2,
        parallel="parallel_attn",
        fixed_head_dim=True,
        mlp_ratio=4,
        tied=True,
        defaults={"parallel_attn": True, "multi_query": True},
    ),
    "mpt": Family(
        gated=False,
        qkv_bias="!no_bias",
        out_bias="!no_bias",
        mlp_bias="!no_bias",
        kv_heads=False,
        fixed_head_dim=True,
        mlp_ratio="expansion_ratio",
        fixed_mlp=True,
        tied=True,
        defaults={"no_bias": True, "expansion_ratio": 4},
    ),
    "stablelm": Family(
        qkv_bias="use_qkv_bias",
        norm_vectors=2,
        parallel_norms=_ONE_NORM,
        qk_norm="width",
        qk_norm_if="qk_layernorm",
        parallel="use_parallel_residual",
        fixed_head_dim=True,
        defaults={"num_key_value_heads": 32},
    ),
    "starcoder2": Family(
        gated=False,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        windows=True,
        norm_vectors=2,
        tied=True,
        defaults={"num_key_value_heads": 2, "use_bias": True},
    ),
    "olmo": replace(_ATTENTION_BIAS, norm_vectors=0),
    "olmo2": replace(_ATTENTION_BIAS, norms=_POST_NORMS, qk_norm="width"),
    "olmo3": replace(
        _ATTENTION_BIAS,
        norms=_POST_NORMS,
        qk_norm="width",
        every=4,
        defaults={"sliding_window": 4096},
    ),
    "cohere": replace(_COHERE, qk_norm="width", qk_norm_if="use_qk_norm"),
    "cohere2": replace(
        _COHERE, every=_PATTERN, defaults={"sliding_window": 4096, "sliding_window_pattern": 4}
    ),
    "granite": _LLAMA,
    "nemotron": replace(_LLAMA, gated=False, norm_vectors=2),
    "smollm3": replace(_LLAMA, tied=True, defaults={"num_key_value_heads": 4}),
    "glm": replace(_GLM, defaults=_GLM.defaults | {"attention_bias": True}),
    "glm4": replace(_GLM, norms=_FOUR_NORMS, defaults=_GLM.defaults | {"attention_bias": True}),
    "helium": Family(
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        fixed_head_dim=True,
        defaults={"num_key_value_heads": 20},
    ),
    "seed_oss": Family(
        qkv_bias="attention_bias",
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    "arcee": replace(_LLAMA, gated=False),
    "exaone4": Family(
        norms=_POST_NORMS,
        qk_norm="head",
        every=_PATTERN,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "internlm": Family(qkv_bias="bias", out_bias="bias", kv_heads=False, defaults={"bias": True}),
    "internlm2": Family(qkv_bias="bias", out_bias="bias", defaults={"bias": True}),
    "baichuan": Family(kv_heads=False),
    "mixtral": Family(
        windows=True,
        experts="num_local_experts",
        expert_width="intermediate_size",
        reads=("num_local_experts",),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": Family(
        qkv_bias=True,
        experts="num_experts",
        expert_step="decoder_sparse_step",
        shared="shared_expert_intermediate_size",
        shared_gate=True,
        every=2,
        windows_until="max_window_layers",
        reads=("num_experts",),
        defaults={
            "num_key_value_heads": 16,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": replace(
        _ATTENTION_BIAS,
        qk_norm="head",
        windows=True,
        experts="num_experts",
        expert_step="decoder_sparse_step",
        reads=("num_experts",),
        defaults={
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "olmoe": replace(
        _ATTENTION_BIAS,
        qk_norm="width",
        experts="num_experts",
        expert_width="intermediate_size",
        reads=("num_experts",),
        defaults={"num_experts": 64, "num_experts_per_tok": 8},
    ),
    "gpt_oss": replace(
        _ATTENTION_BIAS,
        sinks=True,
        every=2,
        experts="num_local_experts",
        expert_width="intermediate_size",
        router_bias=True,
        expert_bias=True,
        reads=("num_local_experts",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": replace(_DEEPSEEK, router_bias=True),
    "kimi_k2": replace(_DEEPSEEK, router_bias=True),
    "qwen3_next": replace(
        _ATTENTION_BIAS,
        mixer="delta",
        qk_norm="head",
        output_gate=True,
        every="full_attention_interval",
        experts="num_experts",
        expert_step="decoder_sparse_step",
        shared="shared_expert_intermediate_size",
        shared_gate=True,
        reads=("num_experts", "linear_num_value_heads"),
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "mamba2": Family(
        mixer="mamba2",
        norms=_ONE_NORM,
        state_heads="num_heads",
        state_head_dim="head_dim",
        state_bias="use_bias",
        reads=("state_size", "ssm_state_size"),
        defaults={
            "num_heads": 128,
            "head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "expand": 2,
        },
    ),
    "nemotron_h": Family(
        mixer="pattern",
        gated=False,
        experts="n_routed_experts",
        shared="moe_shared_expert_intermediate_size",
        router_bias=True,
        state_heads="mamba_num_heads",
        state_head_dim="mamba_head_dim",
        state_bias="use_bias",
        reads=("ssm_state_size", "hybrid_override_pattern", "n_routed_experts"),
        # Experts in a narrower space (Nemotron-3-Super) are not those of `mlp.Experts`.
        forbids=("attention_bias", "mlp_bias", "moe_latent_size"),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
        },
    ),
    "llama4_text": replace(
        _ATTENTION_BIAS,
        mixer="chunked",
        every="no_rope_layer_interval",
        full_list="no_rope_layers",
        experts="num_local_experts",
        expert_width="intermediate_size",
        expert_step="interleave_moe_layer_step",
        expert_list="moe_layers",
        shared="intermediate_size",
        dense_width="intermediate_size_mlp",
        reads=("num_local_experts",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_chunk_size": 8192,
            "intermediate_size_mlp": 16384,
            "no_rope_layer_interval": 4,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
        },
    ),
    # Its layer_types is required: the class's default alternates, the released model does not.
    "minimax": Family(
        mixer="lightning",
        experts="num_local_experts",
        expert_width="intermediate_size",
        reads=("num_local_experts",),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deci": Family(),
}
