"""Writes cache_counts.json: what Hugging Face transformers keeps between two passes.

Tiny models of random weights read a text, and the elements of every tensor of the cache that they
return are counted, kind by kind. Run by hand when a kind of layer is added; it needs torch and
transformers, and transformers is not among the project's requirements:

    python tests/data/make_cache_counts.py

Two things differ from what a pass needs, and the test says so: a sliding layer keeps window - 1
positions (what the next token will see), and a convolution keeps an input for each of its taps,
one more than the next output needs.
"""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_spec = spec_from_file_location("counts", HERE / "make_parameter_counts.py")
assert _spec is not None and _spec.loader is not None
counts = module_from_spec(_spec)
_spec.loader.exec_module(counts)
Config = dict[str, Any]

TINY = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 40, "vocab_size": 97, "pad_token_id": 0,
}  # fmt: skip
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = counts.MLA | TINY | FEW | {"num_key_value_heads": 8, "head_dim": None}
# Eleven layers tell every second, third and fourth apart.
DEEP = TINY | {"num_hidden_layers": 11, "sliding_window": 4}
SPARSE = FEW | {"num_experts": 4}
SWITCHED = {"use_sliding_window": True}
MIXED = {"layer_types": ["full_attention"] * 7 + ["sliding_attention"] * 4}
NO_HEAD_DIM = {"head_dim": None}
NEMOTRON = counts.NEMOTRON
MODELS: dict[str, list[Config]] = {
    "llama": [TINY, TINY | {"num_key_value_heads": 1}, TINY | {"num_key_value_heads": 8}],
    "mistral": [TINY | {"sliding_window": w} for w in (4, 16, 64)],
    "gemma2": [TINY | {"sliding_window": w} for w in (4, 16, 64)],
    "gemma3_text": [TINY | {"sliding_window": w} for w in (4, 16, 64)],
    "gpt_oss": [TINY | FEW | {"sliding_window": w, "num_local_experts": 4} for w in (4, 16, 64)],
    "cohere2": [TINY | {"sliding_window": w} for w in (4, 16)],
    "mixtral": [TINY | {"num_local_experts": 4}],
    "deepseek_v2": [MLA, MLA | {"kv_lora_rank": 20, "qk_rope_head_dim": 8}],
    "deepseek_v3": [MLA, MLA | {"kv_lora_rank": 20, "qk_rope_head_dim": 8}],
    "qwen3_next": [
        counts.NEXT | TINY | FEW | {"shared_expert_intermediate_size": 24} | more
        for more in ({}, {"linear_conv_kernel_dim": 3}, {"linear_num_value_heads": 2})
    ],
    "mamba2": [counts.MAMBA | more for more in ({}, {"conv_kernel": 3}, {"n_groups": 1})],
    "llama4_text": [
        TINY | {"attention_chunk_size": chunk, "num_local_experts": 4, "use_qk_norm": True}
        for chunk in (4, 16, 64)
    ]
    + [
        DEEP | {"attention_chunk_size": 4, "num_local_experts": 4} | more
        for more in (
            {},
            {"no_rope_layer_interval": 3},
            {"no_rope_layers": []},
            {"no_rope_layers": [0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]},
        )
    ],
    "nemotron_h": [
        NEMOTRON,
        NEMOTRON | {"conv_kernel": 3, "n_groups": 1},
        NEMOTRON | {"num_key_value_heads": 6, "head_dim": 20},
        NEMOTRON | {"hybrid_override_pattern": "*M-EMMM*"},
    ],
    "minimax": [
        counts.LIGHTNING | more for more in ({}, {"head_dim": 24}, {"num_key_value_heads": 1})
    ],
}
# Windows by layer: what else the families say. One text each is enough.
PATTERNS: dict[str, list[Config]] = {
    "ministral": [DEEP],
    "ministral3": [DEEP, DEEP | {"sliding_window": None}],
    "mixtral": [DEEP | {"num_local_experts": 4}],
    "phi3": [DEEP | NO_HEAD_DIM],
    "starcoder2": [DEEP | NO_HEAD_DIM],
    "qwen2": [DEEP, *(DEEP | SWITCHED | {"max_window_layers": n} for n in (0, 3, 11))],
    "qwen3": [
        DEEP,
        *(DEEP | SWITCHED | {"max_window_layers": n} for n in (0, 3, 11)),
        DEEP | SWITCHED | MIXED,
    ],
    "qwen2_moe": [
        DEEP | SPARSE | NO_HEAD_DIM,
        *(DEEP | SPARSE | SWITCHED | NO_HEAD_DIM | {"max_window_layers": n} for n in (0, 5, 11)),
    ],
    "qwen3_moe": [DEEP | SPARSE, DEEP | SPARSE | SWITCHED],
    "olmoe": [TINY | SPARSE | NO_HEAD_DIM],
    "gemma2": [DEEP, DEEP | {"sliding_window_pattern": 3}, DEEP | MIXED],
    "gemma3_text": [DEEP, DEEP | {"sliding_window_pattern": 3}, DEEP | MIXED],
    "cohere2": [DEEP, DEEP | {"sliding_window_pattern": 3}, DEEP | MIXED],
    "olmo3": [DEEP | NO_HEAD_DIM | more for more in ({}, {"sliding_window_pattern": 3}, MIXED)],
    "exaone4": [DEEP | NO_HEAD_DIM | more for more in ({}, {"sliding_window_pattern": 3}, MIXED)],
    "gpt_oss": [
        DEEP | FEW | {"num_local_experts": 4} | more
        for more in ({}, {"sliding_window_pattern": 3}, MIXED)
    ],
    "qwen3_next": [
        counts.NEXT | TINY | FEW | {"num_hidden_layers": 11} | more
        for more in (
            {},
            {"full_attention_interval": 3},
            {"layer_types": ["full_attention"] * 5 + ["linear_attention"] * 6},
        )
    ],
}
SIZES = ((1, 3), (2, 4), (3, 5), (2, 23), (1, 32))


def keep(config: Config, batch: int, context: int) -> dict[str, int]:
    """Elements by kind: "kv", "conv", "state"."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    null = ("q_lora_rank", "sliding_window")  # where it means something
    given = {k: v for k, v in config.items() if v is not None or k in null}
    built_as = CONFIG_MAPPING[given.pop("model_type")](**given)
    torch.manual_seed(0)
    # The grouped kernel asks for widths that are multiples of 4; the plain loop takes any.
    model = AutoModelForCausalLM.from_config(built_as, experts_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.randint(1, 90, (batch, context)), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        cache = out.cache_params
    found = {"kv": 0, "conv": 0, "state": 0}
    names = {"keys": "kv", "values": "kv", "conv_states": "conv", "recurrent_states": "state",
             "ssm_states": "state"}  # fmt: skip
    for state in getattr(cache, "linear_cache", []):  # MiniMax keeps states beside the layers
        found["state"] += state.numel() if isinstance(state, torch.Tensor) else 0
    for layer in cache.layers:
        for name, kind in names.items():
            held = getattr(layer, name, None)
            for tensor in held.values() if isinstance(held, dict) else [held]:
                if isinstance(tensor, torch.Tensor):
                    found[kind] += tensor.numel()
    return found


def main() -> None:
    """Write the file, one row a line."""
    import transformers

    texts = [
        (kind, config, sizes)
        for models, lengths in ((MODELS, SIZES), (PATTERNS, SIZES[3:4]))
        for kind, configs in models.items()
        for config in configs
        for sizes in lengths
    ]
    rows = []
    for kind, config, (batch, context) in texts:
        full = {"model_type": kind} | config
        kept = keep(full, batch, context)
        rows.append({"config": full, "batch": batch, "context": context, "kept": kept})
    by = f"the cache of transformers {transformers.__version__} after one pass"
    lines = ",\n".join(json.dumps(row) for row in [{"oracle": by}, *rows])
    (HERE / "cache_counts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
