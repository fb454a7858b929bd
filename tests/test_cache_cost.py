"""Bytes of a token and of a sequence, against sums over layers and a walk through contexts."""

from dataclasses import replace

import numpy as np
import pytest

import rooflm
from rooflm import ForwardPass, Hardware, Precision, load_model
from rooflm.lab.kvcache.attention_speed import time_latent, time_shared_heads
from rooflm.roofline.cache_cost import LAYER_KINDS, attention_row, cache_cost, crossover


def by_steps(model, first=2**20, k=2):
    """Token and fixed bytes from three contexts beyond every window."""
    held = [model.cache_bytes(1, first + i, k) for i in range(3)]
    assert held[2] - held[1] == held[1] - held[0]
    return held[1] - held[0], held[0] - first * (held[1] - held[0])


@pytest.mark.parametrize("name", rooflm.model_names())
def test_a_line_through_long_contexts_is_the_cost(name):
    model = load_model(name)
    found = cache_cost(model)
    assert (found.token_bytes, found.fixed_bytes) == by_steps(model)
    assert tuple(found.layers) == LAYER_KINDS
    assert sum(found.layers.values()) == sum(n for n, block in model.blocks if block.mixer)


@pytest.mark.parametrize(
    ("name", "token", "fixed", "layers"),
    [  # by hand from the configs
        ("Llama-3.1-405B", 126 * 2 * 8 * 128 * 2, 0, {"full": 126}),
        ("gpt-oss-120b", 18 * 2 * 8 * 64 * 2, 18 * 128 * 2 * 8 * 64 * 2, {"full": 18, "local": 18}),
        ("DeepSeek-V3", 61 * 576 * 2, 0, {"latent": 61}),
        ("gemma-3-27b-pt", 10 * 8192, 52 * 1024 * 8192, {"full": 10, "local": 52}),
        ("mamba2-2.7b", 0, 64 * (80 * 64 * 128 * 4 + 3 * 5376 * 2), {"state": 64}),
    ],
)
def test_known_models_cost_what_their_configs_say(name, token, fixed, layers):
    found = cache_cost(name)
    assert (found.token_bytes, found.fixed_bytes) == (token, fixed)
    assert {kind: n for kind, n in found.layers.items() if n} == layers


def test_formats_scale_each_kind_by_itself():
    plain = cache_cost("Qwen3-Next-80B-A3B-Instruct")
    small = cache_cost("Qwen3-Next-80B-A3B-Instruct", Precision(kv_cache="int4", state="fp16"))
    assert small.token_bytes == plain.token_bytes / 4
    assert plain.fixed_bytes / 2 < small.fixed_bytes < plain.fixed_bytes


def test_a_layer_that_reads_anothers_cache_costs_nothing():
    model = load_model("SmolLM2-135M")
    ((_, block),) = model.blocks
    shared = replace(block, mixer=replace(block.mixer, own_cache=False))
    half = replace(model, blocks=((15, block), (15, shared)))
    assert cache_cost(half).token_bytes == cache_cost(model).token_bytes / 2
    assert cache_cost(half).layers["shared"] == 15


@pytest.mark.parametrize("weights", ["fp16", "int4-g128"])
@pytest.mark.parametrize("name", ["SmolLM2-135M", "gemma-3-1b-pt", "Llama-2-7b-hf"])
def test_the_crossover_is_where_a_walk_finds_it(name, weights):
    model, p = load_model(name), Precision(weights)
    heavy = model.parameters * p.w
    step = 500
    context = step
    while model.cache_bytes(2, context, 2) <= heavy:
        context += step
    while model.cache_bytes(2, context, 2) > heavy:
        context -= 1
    assert crossover(model, p, batch=2) == context


def test_no_crossover_for_states_and_none_at_once_for_a_crowd():
    assert crossover("mamba2-2.7b") is None
    assert crossover("SmolLM2-135M", batch=2**30) == 0


def test_the_attention_row_is_that_of_the_layers_that_see_everything():
    step = ForwardPass.decode(1, 131_072)
    row = attention_row(rooflm.analyze("gpt-oss-120b", "nvidia-h200", step))
    assert row.kv_bytes == 131_072 * 2 * 8 * 64 * 2
    sweep = ForwardPass.decode(np.array([1, 2]), 1000)
    assert attention_row(rooflm.analyze("gpt-oss-120b", "nvidia-h200", sweep)).kv_bytes[1] > 0
    with pytest.raises(ValueError, match="has no fused attention"):
        attention_row(rooflm.analyze("mamba2-2.7b", "nvidia-h200", step))


def test_a_batch_never_moves_the_intensity_of_attention():
    for name in ("Llama-3.1-8B", "DeepSeek-V3"):
        found = [
            attention_row(rooflm.analyze(name, "nvidia-h200", ForwardPass.decode(b, 4096)))
            for b in (1, 7, 1024)
        ]
        assert len({round(row.intensity, 9) for row in found}) == 1


def test_timed_attention_counts_its_bytes_and_flops():
    mha, mqa = (time_shared_heads(8, g, 16, 100, runs=1) for g in (8, 1))
    assert mha.bytes == 8 * mqa.bytes == 2 * 100 * 8 * 16 * 4
    assert mha.flops == mqa.flops == 100 * 8 * (4 * 16 + 5)
    latent, expanded = (time_latent(8, 32, 4, 16, 100, absorbed=x, runs=1) for x in (True, False))
    assert latent.bytes == expanded.bytes == 100 * 36 * 4
    products = 2 * (36 + 32) * 100 * 8 + 2 * 2 * 8 * 16 * 32
    assert latent.flops == products + 5 * 100 * 8
    made = 2 * 100 * 32 * 2 * 8 * 16
    assert expanded.flops == made + 2 * (20 + 16) * 100 * 8 + 5 * 100 * 8
    assert min(x.seconds for x in (mha, mqa, latent, expanded)) > 0
    chip = Hardware("chip", 1e9, {"fp32": 1e15})
    assert mha.predicted(chip) == mha.bytes / 1e9
    assert mha.predicted(Hardware("chip", 1e15, {"fp32": 1e9})) == mha.flops / 1e9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: time_shared_heads(8, 3, 16, 10), "kv_heads is 3; allowed: a divisor"),
        (lambda: time_shared_heads(8, 8, 16, 0), "context is 0"),
        (lambda: time_latent(8, 0, 4, 16, 10), "kv_rank is 0"),
    ],
)
def test_timings_refuse_in_one_line(call, words):
    with pytest.raises(ValueError, match=words):
        call()
