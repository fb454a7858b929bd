"""Cache bytes against what transformers keeps, and against what reports print."""

import json
from pathlib import Path

import pytest

from rooflm.roofline.config import load_model
from rooflm.roofline.mixers import Attention

ROWS = json.loads((Path(__file__).parent / "data" / "cache_counts.json").read_text("utf-8"))[1:]


def name(row):
    kind = row["config"]["model_type"]
    limits = [str(row["config"].get(k, "")) for k in ("sliding_window", "attention_chunk_size")]
    return f"{kind} {''.join(limits)} b{row['batch']} s{row['context']}"


def as_transformers_keeps_it(model, batch, context):
    """Our count with the two differences that make_cache_counts.py states."""
    kv = state = conv = 0
    for count, block in model.blocks:
        mixer = block.mixer
        if mixer is None:  # a layer of an MLP alone
            continue
        if isinstance(mixer, Attention) and (limit := mixer.window or mixer.chunk):
            # The next token needs window - 1 positions; a pass holds window of them.
            kept = mixer.cache_elements(batch, context).kv
            one = mixer.cache_elements(batch, 1).kv
            kv += count * (kept if context < limit else one * (limit - 1))
        else:
            found = mixer.cache_elements(batch, context)
            kv, state = kv + count * found.kv, state + count * found.state
            taps = getattr(mixer, "conv_kernel", 2)  # without a convolution there is 0 of it
            conv += count * found.conv * taps // (taps - 1)
    return {"kv": kv, "conv": conv, "state": state}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_cache_holds_what_transformers_keeps(row):
    model = load_model(row["config"])
    assert as_transformers_keeps_it(model, row["batch"], row["context"]) == row["kept"]


def test_every_kind_of_cache_is_among_the_rows():
    assert len(ROWS) >= 250
    assert sum(row["kept"]["state"] > 0 for row in ROWS) >= 30
    limits = [
        (limit, row["context"])
        for row in ROWS
        for limit in [
            row["config"].get("sliding_window") or row["config"].get("attention_chunk_size")
        ]
        if limit
    ]
    assert {w < c for w, c in limits} == {True, False}


@pytest.mark.parametrize(
    ("model", "context", "k", "printed", "digits"),
    [
        # DeepSeek-V3's and V2-Lite's reports: 512 + 64 numbers a layer, 61 and 27 layers.
        ("deepseek-ai/DeepSeek-V3", 1, 1, 576 * 61, 0),
        ("deepseek-ai/DeepSeek-V2-Lite", 1, 1, 576 * 27, 0),
        # Llama-2-70b, 80 layers of 8 KV heads of 128: 327,680 bytes a token in FP16.
        ("meta-llama/Llama-2-70b-hf", 1, 2, 327_680, 0),
    ],
)
def test_bytes_per_token_are_those_of_the_reports(model, context, k, printed, digits):
    assert round(load_model(model).cache_bytes(1, context, k), digits) == printed


def test_a_hybrid_grows_by_its_attention_layers_alone():
    model = load_model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    grown = model.cache_bytes(1, 1001, 2) - model.cache_bytes(1, 1000, 2)
    assert grown == 12 * 2 * 2 * 256 * 2
    mamba = load_model("state-spaces/mamba2-2.7b")
    assert mamba.cache_bytes(1, 10**6, 2) == mamba.cache_bytes(1, 1, 2)
    # 64 layers x 80 heads x 64 x 128 in FP32, and 3 inputs of 5120 + 2 x 128 channels in FP16.
    assert mamba.cache_bytes(1, 1, 2) == 64 * (80 * 64 * 128 * 4 + 3 * (5120 + 256) * 2)
