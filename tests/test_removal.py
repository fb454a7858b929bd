"""Structured removal: counts against the laboratory's models, and costs that fall."""

from dataclasses import replace

import pytest
import sympy

import rooflm
from rooflm import ForwardPass, load_model
from rooflm.lab.model import Config, Transformer
from rooflm.roofline.removal import shrink

LLAMA = "meta-llama/Llama-2-7b-hf"
WHOLE = Config(vocab=64, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48)


def counted(config):
    return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    ("left", "smaller"),
    [
        ({"layers": 2}, {"layers": 2}),
        ({"kv_heads": 1}, {"heads": 2, "kv_heads": 1, "head_width": 8}),
        ({"intermediate": 20}, {"intermediate": 20}),
        ({"hidden": 16}, {"hidden": 16, "head_width": 8}),
        (
            {"layers": 1, "kv_heads": 1, "intermediate": 5, "hidden": 8},
            {"layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 5, "hidden": 8,
             "head_width": 8},
        ),
    ],
)  # fmt: skip
def test_what_is_left_has_the_parameters_of_that_transformer(left, smaller):
    assert shrink(WHOLE.to_dict(), **left).parameters == counted(replace(WHOLE, **smaller))


def test_nothing_removed_is_the_model_itself():
    model = load_model(LLAMA)
    assert shrink(model) is model
    assert shrink(model, layers=32, kv_heads=32, intermediate=11008, hidden=4096) == model


def test_layers_take_their_time_and_their_cache_along():
    whole, half = (
        rooflm.analyze(m, "nvidia-a6000", ForwardPass.decode(1, 2048))
        for m in (LLAMA, shrink(LLAMA, layers=16))
    )
    outer = sum(r.seconds for r in whole.operators if r.count == 1)
    assert half.seconds - outer == pytest.approx((whole.seconds - outer) / 2)
    assert half.memory.kv_cache == whole.memory.kv_cache / 2


def test_a_kv_head_takes_its_query_heads_and_its_cache_along():
    model = shrink("Llama-3.1-8B", kv_heads=6)
    ((_, block),) = model.blocks
    assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim) == (24, 6, 128)
    whole = load_model("Llama-3.1-8B")
    assert model.cache_bytes(1, 100, 2) == whole.cache_bytes(1, 100, 2) * 6 / 8


@pytest.mark.parametrize("batch", [1, 4096])
@pytest.mark.parametrize("left", [{"layers": 24}, {"kv_heads": 24}, {"intermediate": 8256}])
def test_what_is_removed_whole_saves_under_either_roof(left, batch):
    step = ForwardPass.decode(batch, 128)
    whole, small = (rooflm.analyze(m, "nvidia-a6000", step) for m in (LLAMA, shrink(LLAMA, **left)))
    assert small.seconds < whole.seconds and small.flops < whole.flops
    assert small.bytes < whole.bytes


def test_a_hybrid_names_each_kind_of_layer():
    model = load_model("google/gemma-2-9b")
    counts = [n for n, _ in model.blocks]
    left = shrink(model, layers=[counts[0] - 1, counts[1]])
    assert [n for n, _ in left.blocks] == [counts[0] - 1, counts[1]]
    assert len(shrink(model, layers=[0, 3]).blocks) == 1
    with pytest.raises(ValueError, match="2 numbers, one for each of 21 Attention and MLP"):
        shrink(model, layers=30)


def test_sizes_may_be_symbols():
    g, f = sympy.symbols("g f", positive=True, integer=True)
    count = shrink(LLAMA, kv_heads=g, intermediate=f).parameters
    assert count.subs({g: 32, f: 11008}) == load_model(LLAMA).parameters
    assert count.subs({g: 8, f: 64}) == shrink(LLAMA, kv_heads=8, intermediate=64).parameters


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"layers": 33}, "layers is 33; allowed: 0 to 32"),
        ({"layers": 0}, "layers is 0; allowed: at least one in all"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"kv_heads": 64}, "kv_heads is 64; allowed: 1 to 32"),
        ({"intermediate": 1.5}, "intermediate is 1.5"),
        ({"hidden": 5000}, "hidden is 5000; allowed: 1 to 4096"),
    ],
)
def test_more_than_there_is_cannot_be_left(left, words):
    with pytest.raises(ValueError, match=words):
        shrink(LLAMA, **left)


def test_only_layers_are_removed_from_other_models():
    assert shrink("mamba2-2.7b", layers=3).layers == 3
    with pytest.raises(ValueError, match="structured removal covers layers of softmax attention"):
        shrink("DeepSeek-V3", kv_heads=1)
