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
    ],
}  # fmt: skip
SIZES = ((1, 3), (2, 4), (3, 5), (2, 23), (1, 32))


def keep(config: Config, batch: int, context: int) -> dict[str, int]:
    """Elements by kind: "kv", "conv", "state"."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = {k: v for k, v in config.items() if v is not None or k in ("q_lora_rank",)}
    built_as = CONFIG_MAPPING[given.pop("model_type")](**given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(built_as).eval()
    with torch.no_grad():
        out = model(torch.randint(1, 90, (batch, context)), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        cache = out.cache_params
    found = {"kv": 0, "conv": 0, "state": 0}
    names = {"keys": "kv", "values": "kv", "conv_states": "conv", "recurrent_states": "state",
             "ssm_states": "state"}  # fmt: skip
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

    rows = []
    for kind, configs in MODELS.items():
        for config in configs:
            full = {"model_type": kind} | config
            for batch, context in SIZES:
                kept = keep(full, batch, context)
                rows.append({"config": full, "batch": batch, "context": context, "kept": kept})
    by = f"the cache of transformers {transformers.__version__} after one pass"
    lines = ",\n".join(json.dumps(row) for row in [{"oracle": by}, *rows])
    (HERE / "cache_counts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
