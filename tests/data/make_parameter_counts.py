"""Writes parameter_counts.json: parameter counts that owe nothing to this project's formulas.

Every count is the sum of the shapes of the tensors that Hugging Face transformers builds from
a config, on PyTorch's meta device (shapes without storage): `model.parameters()` yields tied
tensors once and leaves buffers out. Run by hand when a family is added; it needs torch and
transformers, and transformers is not among the project's requirements:

    python tests/data/make_parameter_counts.py

The configs: all of data/models, models that are in wide use, and per family a row of mutants
(class defaults, odd sizes, each switch turned over, other numbers of KV heads).
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "data" / "models"
Config = dict[str, Any]


def count(config: Config) -> int:
    """The number of distinct parameters of the model that transformers builds."""
    # Here and not above, so that the file imports where only the project's packages are.
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = {key: value for key, value in config.items() if key != "architectures"}
    built_as = CONFIG_MAPPING[given.pop("model_type")](**given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built_as)
    model.tie_weights()
    # A router's correction is a buffer in the code and a tensor of the released weights.
    corrections = (b for name, b in model.named_buffers() if name.endswith("correction_bias"))
    return sum(tensor.numel() for tensor in (*model.parameters(), *corrections))


def sizes(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, vocab: int, **more: Any
) -> Config:
    """A config in the most common spelling."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    } | {
        {"kv": "num_key_value_heads", "d": "head_dim", "tied": "tie_word_embeddings"}.get(k, k): v
        for k, v in more.items()
    }


def gpt(kind: str, hidden: int, layers: int, heads: int, vocab: int, **more: Any) -> Config:
    """A config in GPT-2's spelling."""
    return {
        "model_type": kind,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": vocab,
    } | more


def opt(hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> Config:
    """A config in OPT's spelling."""
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
        "do_layer_norm_before": True,
    } | more


REAL: dict[str, Config] = {
    "TinyLlama/TinyLlama-1.1B": sizes("llama", 2048, 5632, 22, 32, 32000, kv=4, tied=False),
    "01-ai/Yi-6B": sizes("llama", 4096, 11008, 32, 32, 64000, kv=4, tied=False),
    "01-ai/Yi-34B": sizes("llama", 7168, 20480, 60, 56, 64000, kv=8, tied=False),
    "meta-llama/Llama-3.2-3B": sizes("llama", 3072, 8192, 28, 24, 128256, kv=8, d=128, tied=True),
    "HuggingFaceTB/SmolLM2-360M": sizes("llama", 960, 2560, 32, 15, 49152, kv=5, tied=True),
    "mistralai/Mistral-Nemo-Base-2407": sizes(
        "mistral", 5120, 14336, 40, 32, 131072, kv=8, d=128, tied=False
    ),
    "mistralai/Mistral-Small-24B": sizes(
        "mistral", 5120, 32768, 40, 32, 131072, kv=8, d=128, tied=False
    ),
    "mistralai/Ministral-8B": sizes("ministral", 4096, 12288, 36, 32, 131072, kv=8, d=128),
    "mistralai/Ministral-3-8B": sizes("ministral3", 4096, 14336, 34, 32, 131072, kv=8, d=128),
    "Qwen/Qwen2.5-0.5B": sizes("qwen2", 896, 4864, 24, 14, 151936, kv=2, tied=True),
    "Qwen/Qwen2.5-32B": sizes("qwen2", 5120, 27648, 64, 40, 152064, kv=8, tied=False),
    "Qwen/Qwen3-0.6B": sizes("qwen3", 1024, 3072, 28, 16, 151936, kv=8, d=128, tied=True),
    "Qwen/Qwen3-1.7B": sizes("qwen3", 2048, 6144, 28, 16, 151936, kv=8, d=128, tied=True),
    "Qwen/Qwen3-4B": sizes("qwen3", 2560, 9728, 36, 32, 151936, kv=8, d=128, tied=True),
    "Qwen/Qwen3-14B": sizes("qwen3", 5120, 17408, 40, 40, 151936, kv=8, d=128, tied=False),
    "google/gemma-2b": sizes("gemma", 2048, 16384, 18, 8, 256000, kv=1, d=256),
    "google/gemma-7b": sizes("gemma", 3072, 24576, 28, 16, 256000, kv=16, d=256),
    "google/gemma-2-2b": sizes("gemma2", 2304, 9216, 26, 8, 256000, kv=4, d=256),
    "google/gemma-2-27b": sizes("gemma2", 4608, 36864, 46, 32, 256000, kv=16, d=128),
    "google/gemma-3-1b-pt": sizes(
        "gemma3_text", 1152, 6912, 26, 4, 262144, kv=1, d=256, sliding_window=512
    ),
    "google/gemma-3-4b-pt, text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "microsoft/phi-1_5": sizes("phi", 2048, 8192, 24, 32, 51200, kv=None, tied=False),
    "microsoft/phi-2": sizes("phi", 2560, 10240, 32, 32, 51200, kv=32, tied=False),
    "microsoft/phi-4": sizes("phi3", 5120, 17920, 40, 40, 100352, kv=10, pad_token_id=0),
    "microsoft/Phi-4-mini-instruct": sizes(
        "phi3", 3072, 8192, 32, 24, 200064, kv=8, tied=True, pad_token_id=0
    ),
    "gpt2": gpt("gpt2", 768, 12, 12, 50257, n_positions=1024, n_ctx=1024),
    "gpt2-xl": gpt("gpt2", 1600, 48, 25, 50257, n_positions=1024, n_ctx=1024),
    "EleutherAI/gpt-neo-125m": {
        "model_type": "gpt_neo",
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "intermediate_size": None,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "attention_types": [[["global", "local"], 6]],
    },
    "EleutherAI/gpt-neo-1.3B": {
        "model_type": "gpt_neo",
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "attention_types": [[["global", "local"], 12]],
    },
    "EleutherAI/gpt-neo-2.7B": {
        "model_type": "gpt_neo",
        "hidden_size": 2560,
        "num_layers": 32,
        "num_heads": 20,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "attention_types": [[["global", "local"], 16]],
    },
    "EleutherAI/pythia-160m": sizes("gpt_neox", 768, 3072, 12, 12, 50304, tied=False),
    "EleutherAI/pythia-1.4b": sizes("gpt_neox", 2048, 8192, 24, 16, 50304, tied=False),
    "EleutherAI/pythia-6.9b": sizes("gpt_neox", 4096, 16384, 32, 32, 50432, tied=False),
    "EleutherAI/gpt-neox-20b": sizes("gpt_neox", 6144, 24576, 44, 64, 50432, tied=False),
    "bigcode/starcoder": gpt(
        "gpt_bigcode", 6144, 40, 48, 49152, n_inner=24576, n_positions=8192, multi_query=True
    ),
    "bigcode/santacoder": gpt(
        "gpt_bigcode", 2048, 24, 16, 49280, n_inner=8192, n_positions=2048, multi_query=True
    ),
    "facebook/opt-350m": opt(
        1024, 4096, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False
    ),
    "facebook/opt-1.3b": opt(2048, 8192, 24, 32),
    "facebook/opt-13b": opt(5120, 20480, 40, 40),
    "facebook/opt-30b": opt(7168, 28672, 48, 56),
    "bigscience/bloom-560m": {
        "model_type": "bloom",
        "hidden_size": 1024,
        "n_layer": 24,
        "num_attention_heads": 16,
        "vocab_size": 250880,
    },
    "bigscience/bloom-7b1": {
        "model_type": "bloom",
        "hidden_size": 4096,
        "n_layer": 30,
        "num_attention_heads": 32,
        "vocab_size": 250880,
    },
    "tiiuae/falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": 71,
        "vocab_size": 65024,
        "bias": False,
        "alibi": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
    },
    "tiiuae/falcon-40b": {
        "model_type": "falcon",
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "vocab_size": 65024,
        "bias": False,
        "alibi": False,
        "multi_query": True,
        "new_decoder_architecture": True,
        "parallel_attn": True,
    },
    "tiiuae/falcon-rw-1b": {
        "model_type": "falcon",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50304,
        "bias": True,
        "alibi": True,
        "multi_query": False,
        "new_decoder_architecture": False,
        "parallel_attn": False,
    },
    "tiiuae/falcon-11B": {
        "model_type": "falcon",
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "ffn_hidden_size": 16384,
        "vocab_size": 65024,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "mosaicml/mpt-7b": {
        "model_type": "mpt",
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "vocab_size": 50432,
        "expansion_ratio": 4,
        "no_bias": True,
        "max_seq_len": 2048,
        "attn_config": {"alibi": True, "attn_type": "multihead_attention", "qk_ln": False},
    },
    "mosaicml/mpt-30b": {
        "model_type": "mpt",
        "d_model": 7168,
        "n_layers": 48,
        "n_heads": 64,
        "vocab_size": 50432,
        "expansion_ratio": 4,
        "no_bias": True,
    },
    "stabilityai/stablelm-3b-4e1t": sizes("stablelm", 2560, 6912, 32, 32, 50304, kv=32, tied=False),
    "stabilityai/stablelm-2-1_6b": sizes(
        "stablelm", 2048, 5632, 24, 32, 100352, kv=32, tied=False, use_qkv_bias=True
    ),
    "stabilityai/stablelm-2-12b": sizes(
        "stablelm",
        5120,
        13824,
        40,
        32,
        100352,
        kv=8,
        tied=False,
        use_qkv_bias=False,
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "bigcode/starcoder2-3b": sizes("starcoder2", 3072, 12288, 30, 24, 49152, kv=2, use_bias=True),
    "bigcode/starcoder2-7b": sizes("starcoder2", 4608, 18432, 32, 36, 49152, kv=4, use_bias=True),
    "bigcode/starcoder2-15b": sizes(
        "starcoder2", 6144, 24576, 40, 48, 49152, kv=4, use_bias=True, tied=False
    ),
    "allenai/OLMo-1B-hf": sizes("olmo", 2048, 8192, 16, 16, 50304, kv=16, tied=True),
    "allenai/OLMo-7B-hf": sizes("olmo", 4096, 11008, 32, 32, 50304, kv=32, tied=False),
    "allenai/OLMo-2-0425-1B": sizes("olmo2", 2048, 8192, 16, 16, 100352, kv=16, tied=False),
    "allenai/OLMo-2-1124-7B": sizes("olmo2", 4096, 11008, 32, 32, 100352, kv=32, tied=False),
    "allenai/OLMo-2-0325-32B": sizes("olmo2", 5120, 27648, 64, 40, 100352, kv=8, tied=False),
    "allenai/Olmo-3-7B": sizes("olmo3", 4096, 11008, 32, 32, 100278, kv=32, tied=False),
    "CohereForAI/c4ai-command-r-v01": sizes("cohere", 8192, 22528, 40, 64, 256000, kv=64),
    "CohereForAI/c4ai-command-r-plus": sizes(
        "cohere", 12288, 33792, 64, 96, 256000, kv=8, use_qk_norm=True
    ),
    "CohereForAI/c4ai-command-r7b-12-2024": sizes("cohere2", 4096, 14336, 32, 32, 256000, kv=8),
    "ibm-granite/granite-3.0-2b": sizes("granite", 2048, 8192, 40, 32, 49155, kv=8, tied=True),
    "ibm-granite/granite-3.0-8b": sizes("granite", 4096, 12800, 40, 32, 49155, kv=8, tied=True),
    "nvidia/Minitron-4B-Base": sizes(
        "nemotron", 3072, 9216, 32, 24, 256000, kv=8, d=128, tied=False
    ),
    "nvidia/Nemotron-4-15B": sizes(
        "nemotron", 6144, 24576, 32, 48, 256000, kv=8, d=128, tied=False
    ),
    "HuggingFaceTB/SmolLM3-3B": sizes("smollm3", 2048, 11008, 36, 16, 128256, kv=4, pad_token_id=0),
    "zai-org/glm-4-9b-hf": sizes(
        "glm", 4096, 13696, 40, 32, 151552, kv=2, d=128, attention_bias=True, tied=False
    ),
    "zai-org/GLM-4-9B-0414": sizes(
        "glm4", 4096, 13696, 40, 32, 151552, kv=2, d=128, attention_bias=True, tied=False
    ),
    "zai-org/GLM-4-32B-0414": sizes(
        "glm4", 6144, 23040, 61, 48, 151552, kv=2, d=128, attention_bias=False, tied=False
    ),
    "kyutai/helium-1-preview-2b": sizes("helium", 2560, 7040, 24, 20, 48000, kv=20, d=128),
    "kyutai/helium-1-2b": sizes("helium", 2048, 8192, 28, 16, 64000, kv=8, d=128),
    "ByteDance-Seed/Seed-OSS-36B": sizes(
        "seed_oss", 5120, 27648, 64, 80, 155136, kv=8, d=128, attention_bias=True, tied=False
    ),
    "arcee-ai/AFM-4.5B": sizes("arcee", 2560, 18432, 36, 20, 128004, kv=4, d=128, tied=False),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": sizes("exaone4", 2048, 4096, 30, 32, 102400, kv=8, tied=True),
    "allenai/OLMoE-1B-7B-0924": sizes("olmoe", 2048, 1024, 16, 16, 50304, kv=16, tied=False),
    "Qwen/Qwen1.5-MoE-A2.7B": sizes("qwen2_moe", 2048, 5632, 24, 16, 151936, kv=16, tied=False),
    "Qwen/Qwen3-235B-A22B": sizes(
        "qwen3_moe",
        4096,
        12288,
        94,
        64,
        151936,
        kv=4,
        d=128,
        tied=False,
        moe_intermediate_size=1536,
    ),
    "mistralai/Mixtral-8x22B-v0.1": sizes("mixtral", 6144, 16384, 56, 48, 32768, kv=8, tied=False),
    "meta-llama/Llama-4-Maverick-17B-128E, text_config": sizes(
        "llama4_text",
        5120,
        8192,
        48,
        40,
        202048,
        kv=8,
        d=128,
        tied=False,
        intermediate_size_mlp=16384,
        num_local_experts=128,
        interleave_moe_layer_step=2,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": sizes("exaone4", 5120, 27392, 64, 40, 102400, kv=8, tied=False),
}

# Families whose code lies beside their weights: the same shapes, spelled as llama.
AS_LLAMA: dict[str, tuple[Config, Config]] = {
    "internlm/internlm2-7b": (
        sizes("internlm2", 4096, 14336, 32, 32, 92544, kv=8, bias=False, tied=False),
        sizes("llama", 4096, 14336, 32, 32, 92544, kv=8),
    ),
    "internlm/internlm2-20b": (
        sizes("internlm2", 6144, 16384, 48, 48, 92544, kv=8, bias=False, tied=False),
        sizes("llama", 6144, 16384, 48, 48, 92544, kv=8),
    ),
    "internlm/internlm-7b": (
        sizes("internlm", 4096, 11008, 32, 32, 103168, bias=True, tied=False),
        sizes("llama", 4096, 11008, 32, 32, 103168, attention_bias=True),
    ),
    "baichuan-inc/Baichuan-7B": (
        sizes("baichuan", 4096, 11008, 32, 32, 64000, tied=False),
        sizes("llama", 4096, 11008, 32, 32, 64000),
    ),
    "baichuan-inc/Baichuan2-13B-Base": (
        sizes("baichuan", 5120, 13696, 40, 40, 125696, tied=False),
        sizes("llama", 5120, 13696, 40, 40, 125696),
    ),
}

# Released under a name of its own, with the shapes of deepseek_v3.
AS_DEEPSEEK: dict[str, Config] = {
    "moonshotai/Kimi-K2-Instruct": sizes(
        "kimi_k2",
        7168,
        18432,
        61,
        64,
        163840,
        kv=64,
        tied=False,
        moe_intermediate_size=2048,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=384,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
    ),
}

SMALL = {
    "hidden_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "intermediate_size": 1001,
    "vocab_size": 517,
    "pad_token_id": 0,  # some classes' own default lies outside so small a vocabulary
}
GPT_SMALL = {"n_embd": 96, "n_layer": 4, "n_head": 6, "vocab_size": 517}
NEO = {
    "hidden_size": 96,
    "num_layers": 4,
    "num_heads": 6,
    "vocab_size": 517,
    "attention_types": [[["global", "local"], 2]],
}
BLOOM = {"hidden_size": 96, "n_layer": 4, "n_head": 6, "vocab_size": 517}
FALCON = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "vocab_size": 517,
}
OPT = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "ffn_dim": 101,
    "vocab_size": 517,
    "word_embed_proj_dim": 96,
}
MPT = {"d_model": 96, "n_layers": 4, "n_heads": 6, "vocab_size": 517}
HELIUM = SMALL | {"num_attention_heads": 40, "head_dim": 16}

MLA = SMALL | {
    "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 33, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENTS: list[Config] = [
    {}, {"q_lora_rank": None}, {"n_shared_experts": 1}, {"first_k_dense_replace": 3},
    {"kv_lora_rank": 40, "v_head_dim": 6}, {"tie_word_embeddings": True},
]  # fmt: skip
NEXT = SMALL | {
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 10,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 33,
    "shared_expert_intermediate_size": 21,
}  # fmt: skip
MAMBA = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_heads": 12, "head_dim": 16, "state_size": 8,
    "n_groups": 2, "vocab_size": 517, "pad_token_id": 0,
}  # fmt: skip
NEMOTRON = {
    "hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 101, "vocab_size": 517, "mamba_num_heads": 6,
    "mamba_head_dim": 8, "ssm_state_size": 5, "n_groups": 2, "n_routed_experts": 7,
    "num_experts_per_tok": 2, "moe_intermediate_size": 33,
    "moe_shared_expert_intermediate_size": 41, "hybrid_override_pattern": "M-M*ME*-",
}  # fmt: skip
LISTED = {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2}
LIGHTNING = SMALL | {
    "num_key_value_heads": 8, "head_dim": 12, "num_local_experts": 3,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip

# What varies in each family, one change at a time; {} is the class's own defaults.
TIE: list[Config] = [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
GQA: list[Config] = [*TIE, {"num_key_value_heads": 8}, {"num_key_value_heads": 1}]
WIDE: list[Config] = [*GQA, {"head_dim": 24, "num_key_value_heads": 4}]
BIAS: list[Config] = [{"attention_bias": True}, {"attention_bias": False}]
MLP_BIAS: list[Config] = [{"mlp_bias": True}]
EXPERTS: list[Config] = [{"num_experts": 12}, {"num_experts_per_tok": 1}]
MUTANTS: dict[str, tuple[Config, list[Config]]] = {
    "mixtral": (SMALL, [*GQA, {"num_local_experts": 3}]),
    "olmoe": (SMALL, [*TIE, {"num_key_value_heads": 8}, *EXPERTS]),
    "qwen2_moe": (SMALL, [*TIE, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, *EXPERTS]),
    "qwen3_moe": (SMALL, [*WIDE, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, *EXPERTS]),
    "gpt_oss": (SMALL, [*WIDE, *BIAS, {"num_local_experts": 5}]),
    "deepseek_v2": (MLA, LATENTS),
    "deepseek_v3": (MLA, LATENTS),
    "qwen3_next": (
        NEXT,
        [
            {},
            {"linear_conv_kernel_dim": 3},
            {"mlp_only_layers": [1]},
            {"linear_num_value_heads": 2},
            {"head_dim": 16},
        ],
    ),
    "mamba2": (
        MAMBA,
        [
            {},
            {"use_bias": True},
            {"use_conv_bias": False},
            {"conv_kernel": 3},
            {"n_groups": 1},
            {"tie_word_embeddings": True},
        ],
    ),
    "llama4_text": (
        SMALL | {"num_key_value_heads": 8, "head_dim": 20},
        [
            {},
            {"interleave_moe_layer_step": 2, "num_local_experts": 3},
            {"interleave_moe_layer_step": 3},
            {"moe_layers": [0, 3]},
            {"moe_layers": []},
            {"no_rope_layers": [1, 0, 0, 0]},
            *BIAS,
        ],
    ),
    "nemotron_h": (
        NEMOTRON,
        [
            {},
            {"use_bias": True},
            {"mamba_proj_bias": True},
            {"use_conv_bias": False},
            {"conv_kernel": 3, "n_groups": 1},
            {"expand": 3},
            {"n_shared_experts": 2},
            {"num_key_value_heads": 6, "head_dim": 20},
            {"mamba_num_heads": 10, "mamba_head_dim": 7},
            {"hybrid_override_pattern": "MMMM*MMM"},
            LISTED,
        ],
    ),
    "minimax": (
        LIGHTNING,
        [
            *TIE,
            {"num_key_value_heads": 1},
            {"head_dim": 24},
            {"num_local_experts": 5, "num_experts_per_tok": 3},
            {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        ],
    ),
    "llama": (SMALL, [*WIDE, *BIAS, *MLP_BIAS, {"num_key_value_heads": None}]),
    "mistral": (SMALL, WIDE),
    "ministral": (SMALL | {"head_dim": 20}, WIDE),
    "ministral3": (SMALL, WIDE),
    "qwen2": (SMALL, [*WIDE, {"num_key_value_heads": None}]),
    "qwen3": (SMALL, [*WIDE, *BIAS]),
    "gemma": (SMALL, [*WIDE, *BIAS]),
    "gemma2": (SMALL, [*WIDE, *BIAS]),
    "gemma3_text": (SMALL, [*WIDE, *BIAS]),
    "phi": (
        SMALL,
        [*GQA, {"qk_layernorm": True}, {"qk_layernorm": True, "num_key_value_heads": 2}],
    ),
    "phi3": (SMALL, GQA),
    "gptj": (GPT_SMALL | {"rotary_dim": 8}, [*TIE, {"n_inner": 101}]),
    "gpt2": (GPT_SMALL, [*TIE, {"n_inner": 101}, {"n_positions": 77}]),
    "gpt_neo": (NEO, [*TIE, {"intermediate_size": 101}, {"max_position_embeddings": 77}]),
    "gpt_neox": (SMALL, [*TIE, *BIAS, {"use_parallel_residual": False}]),
    "gpt_bigcode": (
        GPT_SMALL,
        [*TIE, {"multi_query": False}, {"multi_query": True}, {"n_inner": 101}],
    ),
    "opt": (
        OPT,
        [
            *TIE,
            {"enable_bias": False},
            {"layer_norm_elementwise_affine": False},
            {"do_layer_norm_before": False},
            {"_remove_final_layer_norm": True},
            {"word_embed_proj_dim": 33},
            {"word_embed_proj_dim": 33, "tie_word_embeddings": False},
            {"max_position_embeddings": 77},
        ],
    ),
    "bloom": (BLOOM, [*TIE, {"n_embed": 120, "hidden_size": 120}]),
    "falcon": (
        FALCON,
        [
            *TIE,
            {"bias": True},
            {"multi_query": False},
            {"multi_query": False, "parallel_attn": False},
            {"parallel_attn": False},
            {"new_decoder_architecture": True},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            {"new_decoder_architecture": True, "num_kv_heads": 3, "multi_query": False},
            {"new_decoder_architecture": True, "parallel_attn": False},
            {"ffn_hidden_size": 101},
        ],
    ),
    "mpt": (MPT, [*TIE, {"attn_config": {"attn_type": "multihead_attention"}}]),
    "stablelm": (
        SMALL,
        [
            *GQA,
            {"use_qkv_bias": True},
            {"use_parallel_residual": True},
            {"qk_layernorm": True, "num_key_value_heads": 8},
        ],
    ),
    "starcoder2": (SMALL, [*GQA, {"use_bias": False}]),
    "olmo": (SMALL, [*GQA, *BIAS]),
    "olmo2": (SMALL, [*GQA, *BIAS]),
    "olmo3": (SMALL, [*GQA, *BIAS]),
    "cohere": (SMALL, [*GQA, *BIAS, {"use_qk_norm": True, "num_key_value_heads": 8}]),
    "cohere2": (SMALL, [*GQA, *BIAS]),
    "granite": (SMALL, [*GQA, *BIAS, *MLP_BIAS]),
    "nemotron": (SMALL | {"num_key_value_heads": 16}, [*WIDE, *BIAS, *MLP_BIAS]),
    "smollm3": (SMALL, [*GQA, *BIAS, *MLP_BIAS]),
    "glm": (SMALL, [*WIDE, *BIAS]),
    "glm4": (SMALL, [*WIDE, *BIAS]),
    "helium": (HELIUM, [*TIE, {"num_key_value_heads": 8}, *BIAS, *MLP_BIAS]),
    "seed_oss": (SMALL, [*WIDE, *BIAS, *MLP_BIAS, {"attention_out_bias": True}]),
    "arcee": (SMALL, [*WIDE, *BIAS, *MLP_BIAS]),
    "exaone4": (SMALL, GQA),
}


def entries() -> list[Config]:
    """All rows, in the order of the tables above."""
    built = f"transformers {version('transformers')}, meta device"
    oracle = f"sum of shapes of the state dict of {built}"
    rows = []

    def add(name: str, config: Config, how: str, built_from: Config | None = None) -> None:
        parameters = count(built_from or config)
        rows.append({"name": name, "config": config, "parameters": parameters, "oracle": how})

    for path in sorted(MODELS.rglob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        add(path.relative_to(MODELS).as_posix().removesuffix(".json"), kept, oracle)
    for name, config in REAL.items():
        add(name, config, oracle)
    for name, (config, as_llama) in AS_LLAMA.items():
        add(name, config, f"sum of shapes of LlamaForCausalLM of those sizes, {built}", as_llama)
    for name, config in AS_DEEPSEEK.items():
        add(name, config, f"{oracle}, as deepseek_v3", config | {"model_type": "deepseek_v3"})
    for kind, (base, changes) in MUTANTS.items():
        for change in changes:
            label = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
            add(f"{kind}: {label}", {"model_type": kind} | base | change, oracle)
    return rows


def main() -> None:
    """Write the file, one row a line."""
    lines = ",\n".join(json.dumps(row) for row in entries())
    (HERE / "parameter_counts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
