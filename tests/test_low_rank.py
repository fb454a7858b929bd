"""Low rank on the roofline: counts by hand and by torch, extra traffic, three break-even ranks."""

from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch

import rooflm
from rooflm import Attention, ForwardPass, Precision, load_model
from rooflm.lab.model import Config, Transformer
from rooflm.roofline.cache_cost import cache_cost
from rooflm.roofline.capacity import with_budget
from rooflm.roofline.factorized import (
    PROJECTIONS,
    LowRankAttention,
    LowRankMLP,
    attention_of,
    attention_shapes,
    factorize,
    mlp_shapes,
)
from rooflm.roofline.low_rank import (
    Shape,
    break_even_rank,
    break_even_rank_of_bytes,
    break_even_rank_of_time,
    linear_pair,
    rank_of_share,
)
from rooflm.roofline.training import linear_shapes

LLAMA = "meta-llama/Llama-2-7b-hf"
SMALL = Config(vocab=64, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48)
ROW = ForwardPass.decode(3, 20)


def projections_of(model, name="q_proj"):
    return [x for _, _, x in model.operators(ROW, Precision()) if x.name.startswith(name)]


# ---- parameters


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_parameters_are_those_of_factors_in_torch(rank):
    model = Transformer(SMALL)
    for block in model.layers:
        for name in PROJECTIONS:
            old = getattr(block, f"{name}_proj")
            pair = torch.nn.Sequential(
                torch.nn.Linear(old.in_features, rank, bias=False),
                torch.nn.Linear(rank, old.out_features, bias=False),
            )
            setattr(block, f"{name}_proj", pair)
    counted = sum(p.numel() for p in model.parameters())
    assert factorize(SMALL.to_dict(), rank=rank).parameters == counted


def test_a_bias_stays_with_the_second_factor():
    biased = load_model("Qwen/Qwen2.5-7B")
    ((_, block),) = biased.blocks
    attention = block.mixer
    assert attention.qkv_bias and not attention.out_bias
    h, q, kv = attention.hidden, attention.q_width, attention.kv_width
    by_hand = 8 * (h + q) + q + 2 * (8 * (h + kv) + kv) + 8 * (q + h)
    assert LowRankAttention(attention, 8, 8, 8, 8).parameters == by_hand
    (first, second) = projections_of(factorize(biased, rank=8))
    assert first.flops == 3 * 2 * h * 8 and second.flops == 3 * (2 * 8 + 1) * q
    assert second.weight_bytes == (8 + 1) * q * 2


@pytest.mark.parametrize(
    "name", [n for n in rooflm.model_names() if load_model(n).is_dense], ids=lambda n: n[-12:]
)
def test_factors_take_the_place_of_every_projection(name):
    model = load_model(name)
    small = factorize(model, rank=3)
    for (n, block), (m, made) in zip(model.blocks, small.blocks, strict=True):
        shapes = linear_shapes(block)  # another list of the same widths
        ours = [*attention_shapes(block.mixer).values(), *mlp_shapes(block.mlp).values()]
        if not block.mixer.output_gate and block.mixer.own_cache:
            assert sorted((x.d_in, x.d_out) for x in ours) == sorted(shapes)
        more = sum(3 * (x.d_in + x.d_out) - x.d_in * x.d_out for x in ours)
        assert n == m and made.parameters - block.parameters == more


def test_what_is_not_factorized_stays():
    model = load_model(LLAMA)
    mlps = factorize(model, rank=100, projections=("gate", "up", "down"))
    ((_, block),), ((_, old),) = mlps.blocks, model.blocks
    assert block.mixer.parameters == old.mixer.parameters
    gone = {"gate_proj", "up_proj", "down_proj"}
    whole, left = (m.operators(ROW, Precision()) for m in (model, mlps))
    kept = [x for x in whole if x[2].name not in gone]
    assert kept == [x for x in left if "_proj_" not in x[2].name]
    assert LowRankMLP(old.mlp).operators(ROW, Precision()) == old.mlp.operators(ROW, Precision())


# ---- work and traffic


def test_a_pair_costs_what_two_products_do_by_hand():
    t, d_in, d_out, r, w, a = 5, 12, 20, 3, 0.5, 2
    first, second = linear_pair("q_proj", t, Shape(d_in, d_out), r, w, a)
    assert (first.flops, second.flops) == (2 * t * d_in * r, 2 * t * r * d_out)
    assert (first.weight_bytes, second.weight_bytes) == (d_in * r * w, r * d_out * w)
    assert (first.activations_read, first.activations_written) == (t * d_in * a, t * r * a)
    assert (second.activations_read, second.activations_written) == (t * r * a, t * d_out * a)


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("name", [LLAMA, "Qwen/Qwen3-8B", "google/gemma-2-9b", "facebook/opt-125m"])
def test_at_the_break_even_rank_only_the_traffic_between_factors_is_added(name, attention):
    model = load_model(name)
    p = Precision(weights="int8")
    blocks = tuple((n, at_break_even(block)) for n, block in model.blocks)
    factors = replace(model, blocks=blocks)
    assert factors.parameters == pytest.approx(model.parameters, rel=1e-12)
    before, after = (
        rooflm.analyze(m, "nvidia-a100-80gb", ROW, p, attention) for m in (model, factors)
    )
    assert after.flops == pytest.approx(before.flops, rel=1e-12)
    between = sum(
        n * 2 * ROW.tokens * rank * p.a
        for n, block in blocks
        for part in (block.mixer, block.mlp)
        for field, rank in vars(part).items()
        if field != "base" and rank
    )
    assert after.bytes - before.bytes == pytest.approx(between, rel=1e-6)
    assert after.memory.kv_cache == before.memory.kv_cache
    assert sum(r.count * r.kv_bytes for r in after.operators) == sum(
        r.count * r.kv_bytes for r in before.operators
    )


def at_break_even(block):
    def ranks(shapes):
        return {name: break_even_rank(x.d_in, x.d_out) for name, x in shapes.items()}

    mixer = LowRankAttention(block.mixer, **ranks(attention_shapes(block.mixer)))
    return replace(block, mixer=mixer, mlp=LowRankMLP(block.mlp, **ranks(mlp_shapes(block.mlp))))


@pytest.mark.parametrize("kind", [{"output_gate": True}, {"own_cache": False}, {"qk_norm": "head"}])
def test_attention_of_every_kind_is_itself_at_the_break_even_rank(kind):
    base = Attention(32, 4, 2, 8, **kind)
    ranks = {n: break_even_rank(x.d_in, x.d_out) for n, x in attention_shapes(base).items()}
    made = LowRankAttention(base, **ranks)
    assert made.parameters == pytest.approx(base.parameters)
    work = [sum(x.flops for x in m.operators(ROW, Precision(), "flash")) for m in (base, made)]
    assert work[1] == pytest.approx(work[0])


def test_keys_still_go_into_the_cache_once():
    rows = {x.name: x for x in projections_of(factorize(LLAMA, rank=64), "k_proj")}
    assert rows["k_proj_a"].kv_written == 0
    assert rows["k_proj_a"].activations_written == 3 * 64 * 2
    assert rows["k_proj_b"].kv_written == 3 * 4096 * 2
    assert rows["k_proj_b"].activations_written == 0


# ---- the cache of a factorized model


def test_a_factorized_model_keeps_the_same_cache():
    model = factorize("google/gemma-2-9b", rank=8)
    whole = load_model("google/gemma-2-9b")
    assert cache_cost(model) == cache_cost(whole)
    for context in (100, 10_000):
        assert model.cache_bytes(2, context, 2) == whole.cache_bytes(2, context, 2)
    assert with_budget(model, 7).cache_bytes(1, 9, 2) == with_budget(whole, 7).cache_bytes(1, 9, 2)
    assert attention_of(model.blocks[0][1].mixer) == whole.blocks[0][1].mixer
    assert attention_of(None) is None
    mamba = load_model("mamba2-2.7b")
    assert attention_of(mamba.blocks[0][1].mixer) is None


def test_generation_of_a_factorized_model_bends_where_its_windows_do():
    """A generation is summed in closed form; here step by step."""
    model = factorize("google/gemma-2-9b", rank=256)
    found = rooflm.generation(model, "nvidia-a6000", None, 1, 4094, 6)
    steps = [
        rooflm.analyze(model, "nvidia-a6000", ForwardPass.decode(1, 4094 + i)).seconds
        for i in range(1, 6)
    ]
    assert found.tpot == pytest.approx(np.mean(steps), rel=1e-9)


def test_the_surveys_accounting_refuses_factors():
    with pytest.raises(ValueError, match="given a layer with LowRankAttention"):
        rooflm.analyze(factorize(LLAMA, rank=8), "nvidia-a6000", ROW, accounting="survey")


# ---- break-even ranks

CASES = [(4096, 4096), (4096, 11008), (11008, 4096), (256, 768), (5120, 640)]


@pytest.mark.parametrize(("d_in", "d_out"), CASES)
def test_below_the_break_even_rank_there_are_fewer_numbers(d_in, d_out):
    r = break_even_rank(d_in, d_out)
    assert int(r - 1e-9) * (d_in + d_out) < d_in * d_out < (int(r) + 1) * (d_in + d_out)


@pytest.mark.parametrize("t", [1, 16, 4096])
@pytest.mark.parametrize(("d_in", "d_out"), CASES)
def test_at_the_break_even_rank_of_bytes_both_move_as_many(d_in, d_out, t):
    r = break_even_rank_of_bytes(t, d_in, d_out, 0.5, 2)
    pair = linear_pair("x", t, Shape(d_in, d_out), r, 0.5, 2)
    moved = sum(x.weight_bytes + x.activations_read + x.activations_written for x in pair)
    assert moved == pytest.approx(d_in * d_out * 0.5 + t * (d_in + d_out) * 2)
    assert r < break_even_rank(d_in, d_out)


def seconds(rows, peak, bandwidth, overhead):
    def one(x):
        moved = x.weight_bytes + x.activations_read + x.activations_written
        return max(x.flops / peak, moved / bandwidth) + overhead

    return sum(map(one, rows))


@pytest.mark.parametrize("overhead", [0, 2e-6])
@pytest.mark.parametrize("t", [1, 64, 150, 300, 1000, 100_000])
@pytest.mark.parametrize(("d_in", "d_out"), CASES[:3])
def test_the_break_even_rank_of_time_is_found_by_bisection(d_in, d_out, t, overhead):
    peak, bandwidth, w, a = 155e12, 768e9, 2, 2
    dense = seconds([rooflm.roofline.operators.linear("x", t, d_in, d_out, 0, w, a)],
                    peak, bandwidth, overhead)  # fmt: skip
    low, high = 0.0, float(d_in + d_out)
    for _ in range(100):
        middle = (low + high) / 2
        pair = linear_pair("x", t, Shape(d_in, d_out), middle, w, a)
        low, high = (
            (middle, high) if seconds(pair, peak, bandwidth, overhead) < dense else (low, middle)
        )
    found = break_even_rank_of_time(t, d_in, d_out, w, a, peak, bandwidth, overhead)
    assert found == pytest.approx(low, rel=1e-9)


def test_a_kernel_that_costs_more_than_the_matrix_is_worth_no_rank():
    assert break_even_rank_of_time(1, 64, 64, 2, 2, 155e12, 768e9, overhead=1e-5) < 0


def test_formulas_take_arrays_and_symbols():
    t = np.array([1.0, 64.0, 4096.0])
    swept = break_even_rank_of_time(t, 4096, 4096, 2, 2, 155e12, 768e9, 1e-6)
    one = [break_even_rank_of_time(x, 4096, 4096, 2, 2, 155e12, 768e9, 1e-6) for x in t]
    assert swept.tolist() == pytest.approx(one)
    n, m, w, a, r, tokens = sympy.symbols("n m w a r t", positive=True)
    pair = linear_pair("x", tokens, Shape(n, m), r, w, a)
    dense = rooflm.roofline.operators.linear("x", tokens, n, m, 0, w, a)
    (work,) = sympy.solve(sum(x.flops for x in pair) - dense.flops, r)
    assert sympy.simplify(work - break_even_rank(n, m)) == 0
    moved = [sum(x.weight_bytes + x.activations_read + x.activations_written for x in rows)
             for rows in (pair, [dense])]  # fmt: skip
    (traffic,) = sympy.solve(moved[0] - moved[1], r)
    assert sympy.simplify(traffic - break_even_rank_of_bytes(tokens, n, m, w, a)) == 0
    peak, bandwidth = sympy.symbols("P W", positive=True)
    timed = break_even_rank_of_time(tokens, n, m, w, a, peak, bandwidth)
    numbers = {n: 4096, m: 11008, w: 2, a: 2, tokens: 200, peak: 155e12, bandwidth: 768e9}
    expected = break_even_rank_of_time(200, 4096, 11008, 2, 2, 155e12, 768e9)
    assert float(timed.subs(numbers)) == pytest.approx(expected)


def test_a_models_rank_may_be_a_symbol_or_a_sweep():
    r = sympy.Symbol("r", positive=True)
    symbolic = factorize(LLAMA, rank=r).parameters
    assert symbolic.subs(r, 512) == factorize(LLAMA, rank=512).parameters
    ranks = np.array([64.0, 512.0])
    swept = rooflm.analyze(factorize(LLAMA, rank=ranks), "nvidia-a6000", ROW).seconds
    single = [
        rooflm.analyze(factorize(LLAMA, rank=int(x)), "nvidia-a6000", ROW).seconds for x in ranks
    ]
    assert swept.tolist() == pytest.approx(single)


# ---- a rank or a share


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_is_of_the_numbers_of_every_projection(share):
    for d_in, d_out in CASES:
        rank = rank_of_share(d_in, d_out, share)
        assert rank * (d_in + d_out) <= share * d_in * d_out + 1e-6
        assert (rank + 1) * (d_in + d_out) > share * d_in * d_out
    assert rank_of_share(2, 2, 0.001) == 1
    ((count, block),) = factorize(LLAMA, share=share).blocks
    assert count == 32
    assert block.mixer == LowRankAttention(attention_of(block.mixer), *[int(2048 * share)] * 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "rank is None and share None"),
        ({"rank": 8, "share": 0.5}, "allowed: one of them"),
        ({"rank": 0}, "rank is 0; allowed: 1 to 4096"),
        ({"rank": 4097}, "rank is 4097; allowed: 1 to 4096"),
        ({"share": 0}, "share is 0; allowed: above 0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"rank": 8, "projections": ["qkv"]}, "unknown projection 'qkv'"),
    ],
)
def test_what_cannot_be_factorized_is_one_line(given, words):
    with pytest.raises(ValueError, match=words):
        factorize(LLAMA, **given)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "mamba2-2.7b", "Mixtral-8x7B-v0.1"])
def test_only_dense_models_are_factorized(name):
    with pytest.raises(ValueError, match="factorization covers layers of softmax attention"):
        factorize(name, rank=8)
