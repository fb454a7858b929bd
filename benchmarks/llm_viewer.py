"""The survey's tool, LLM-Viewer, from a checkout of it (github.com/hahnyuan/LLM-Viewer)."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from typing import Any

import rooflm


def analyzer(checkout: str, name: str) -> Any:
    """Its `ModelAnalyzer` for a LLaMA-style model on the A6000, given our config.

    Parameters
    ----------
    checkout : path of the checkout; commit 472f71f is the one that the book speaks of.
    name : a model of `data/models`. The tool would download the config: it gets ours instead.
    """
    model = rooflm.load_model(name)
    mixer, mlp = model.blocks[0][1].mixer, model.blocks[0][1].mlp
    config = types.SimpleNamespace(
        hidden_size=model.hidden,
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads,
        num_hidden_layers=model.layers,
        intermediate_size=mlp.intermediate,
        vocab_size=model.vocab,
    )
    stub = types.ModuleType("transformers")
    loader = types.SimpleNamespace(from_pretrained=lambda *_, **__: config)
    stub.AutoConfig = stub.AutoTokenizer = stub.AutoModelForCausalLM = loader
    sys.modules["transformers"] = stub
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    import model_analyzer

    model_analyzer.AutoConfig = loader  # of this model, also where it was imported before
    with contextlib.redirect_stdout(io.StringIO()):
        return model_analyzer.ModelAnalyzer(name, "nvidia_A6000", "configs/Llama.py")
