"""What must hold for every model, device, format and size."""

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

import rooflm
from rooflm import MLP, Attention, Block, ForwardPass, Hardware, Model, Precision, analyze

FORMATS = ["fp32", "fp16", "bf16", "fp8", "int8", "int4-g128", "int3", "nf4", "mxfp4", "binary"]
KINDS = ["fp32", "fp16", "bf16", "fp8", "int8", "int4"]


@st.composite
def models(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    kv_heads = draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0]))
    head_dim = draw(st.integers(1, 64))
    hidden = draw(st.integers(1, 300))
    mixer = Attention(
        hidden,
        heads,
        kv_heads,
        head_dim,
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["", "head", "width"])),
    )
    mlp = MLP(hidden, draw(st.integers(1, 900)), draw(st.booleans()), draw(st.booleans()))
    norms = draw(
        st.sampled_from(
            [
                ("attn_norm",),
                ("attn_norm", "mlp_norm"),
                ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
            ]
        )
    )
    block = Block(mixer, mlp, norms, draw(st.integers(0, 2)))
    return Model(
        "drawn",
        hidden,
        draw(st.integers(1, 5000)),
        ((draw(st.integers(1, 50)), block),),
        tied=draw(st.booleans()),
        positions=draw(st.sampled_from([0, 128])),
        embedding_dim=draw(st.sampled_from([0, 17])),
    )


@st.composite
def devices(draw):
    peaks = {"fp32": draw(st.floats(1e9, 1e15))}
    for kind in draw(st.sets(st.sampled_from(KINDS[1:]))):
        peaks[kind] = draw(st.floats(1e9, 1e16))
    return Hardware("drawn", draw(st.floats(1e8, 1e13)), peaks)


@st.composite
def passes(draw):
    n = draw(st.integers(1, 5000))
    logits = draw(st.sampled_from([0, 1, n]))
    return ForwardPass(draw(st.integers(1, 300)), n, draw(st.integers(0, 100_000)), logits)


precisions = st.builds(Precision, *[st.sampled_from(FORMATS)] * 3)
attentions = st.sampled_from(["flash", "unfused"])
EVERYTHING = (models(), devices(), passes(), precisions, attentions)


@given(*EVERYTHING, st.floats(1.01, 1e3))
def test_time_never_falls_when_a_roof_falls(model, device, step, p, attention, factor):
    before = analyze(model, device, step, p, attention)
    slower_memory = Hardware("slow", device.bandwidth / factor, dict(device.peaks))
    slower_compute = Hardware(
        "slow", device.bandwidth, {k: v / factor for k, v in device.peaks.items()}
    )
    for slower in (slower_memory, slower_compute):
        after = analyze(model, slower, step, p, attention)
        assert after.seconds >= before.seconds
        assert after.lower_bound >= before.lower_bound
        for x, y in zip(before.operators, after.operators, strict=True):
            assert y.seconds >= x.seconds
            assert y.attainable <= x.attainable


@given(*EVERYTHING, st.floats(1.01, 1e3))
def test_time_never_rises_when_a_roof_rises(model, device, step, p, attention, factor):
    before = analyze(model, device, step, p, attention)
    faster = Hardware(
        "fast", device.bandwidth * factor, {k: v * factor for k, v in device.peaks.items()}
    )
    after = analyze(model, faster, step, p, attention)
    assert after.seconds <= before.seconds
    assert after.seconds == pytest.approx(before.seconds / factor, rel=1e-9)


@given(*EVERYTHING)
def test_lower_bound_never_exceeds_the_sum_of_operators(model, device, step, p, attention):
    report = analyze(model, device, step, p, attention)
    assert report.lower_bound <= report.seconds * (1 + 1e-12)


@given(*EVERYTHING)
def test_totals_are_sums_over_operators_and_layers(model, device, step, p, attention):
    report = analyze(model, device, step, p, attention)
    for name in ("flops", "bytes", "seconds"):
        total = sum(row.count * getattr(row, name) for row in report.operators)
        assert getattr(report, name) == pytest.approx(total, rel=1e-12)
    for row in report.operators:
        parts = row.weight_bytes + row.activation_bytes + row.kv_bytes
        assert row.bytes == pytest.approx(parts, rel=1e-12)
        roof = min(device.peaks[row.rate], row.intensity * device.bandwidth)
        assert row.attainable == pytest.approx(roof, rel=1e-12)
        if row.flops:
            assert row.seconds == pytest.approx(row.flops / row.attainable, rel=1e-9)


@given(models(), passes(), precisions)
def test_fusing_attention_never_moves_more_bytes_and_never_changes_flops(model, step, p):
    chip = Hardware("chip", 1e12, {"fp32": 1e14})
    fused, unfused = (analyze(model, chip, step, p, a) for a in ("flash", "unfused"))
    assert fused.bytes <= unfused.bytes
    assert fused.flops == pytest.approx(unfused.flops, rel=1e-12)


@given(models(), st.integers(1, 20), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_prefill_equals_the_sum_of_its_chunks_in_flops(model, batch, chunks):
    chip = Hardware("chip", 1e12, {"fp32": 1e14})
    whole = analyze(model, chip, ForwardPass.prefill(batch, sum(chunks)))
    flops, cached = 0, 0
    for i, n in enumerate(chunks):
        last = i == len(chunks) - 1
        flops += analyze(model, chip, ForwardPass(batch, n, cached, int(last))).flops
        cached += n
    assert flops == pytest.approx(whole.flops, rel=1e-12)


@given(models(), devices(), precisions, attentions, st.data())
def test_arrays_agree_with_numbers(model, device, p, attention, data):
    sizes = st.lists(st.integers(1, 4000), min_size=3, max_size=3)
    b, n, c = (np.array(data.draw(sizes)) for _ in range(3))
    sweep = analyze(model, device, ForwardPass(b, n, c), p, attention)
    for i in range(3):
        one = analyze(model, device, ForwardPass(int(b[i]), int(n[i]), int(c[i])), p, attention)
        assert sweep.bound[i] == one.bound
        for x, y in zip(sweep.operators, one.operators, strict=True):
            for name in ("flops", "bytes", "intensity", "attainable", "seconds"):
                whole = np.broadcast_to(getattr(x, name), 3)
                assert whole[i] == pytest.approx(getattr(y, name), rel=1e-12), (x.name, name)
        for name in ("seconds", "lower_bound", "flops", "bytes"):
            assert getattr(sweep, name)[i] == pytest.approx(getattr(one, name), rel=1e-12)


SYMBOLS = sympy.symbols("b n c", positive=True, integer=True)


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-8B", "facebook/opt-125m"])
def test_symbols_agree_with_numbers(name, attention):
    model, p = rooflm.load_model(name), Precision("int4-g128", "fp16", "int8")
    b, n, c = SYMBOLS
    formula = list(model.operators(ForwardPass(b, n, c), p, attention))
    for values in ((1, 1, 2047), (16, 512, 0), (3, 7, 11)):
        numbers = list(model.operators(ForwardPass(*values), p, attention))
        at = dict(zip(SYMBOLS, values, strict=True))
        for (_, _, x), (_, _, y) in zip(formula, numbers, strict=True):
            for field in x._fields[2:]:
                value = sympy.sympify(getattr(x, field)).subs(at)
                assert float(value) == pytest.approx(float(getattr(y, field)), rel=1e-12)


def test_a_whole_report_evaluates_on_symbols(a6000):
    model = rooflm.load_model("HuggingFaceTB/SmolLM2-135M")
    b, n, c = SYMBOLS
    formula = analyze(model, a6000, ForwardPass(b, n, c))
    number = analyze(model, a6000, ForwardPass(2, 9, 5))
    at = {b: 2, n: 9, c: 5}
    for name in ("seconds", "lower_bound", "flops", "bytes"):
        assert float(getattr(formula, name).subs(at)) == pytest.approx(
            float(getattr(number, name)), rel=1e-9
        )
    assert str(formula.operators[3].bound.subs(at)) == number.operators[3].bound


def test_dimensions_may_be_symbols_too():
    H, h, g, d, inner, V, t = sympy.symbols("H h g d I V L", positive=True)
    block = Block(Attention(H, h, g, d), MLP(H, inner))
    model = Model("symbolic", H, V, ((32, block),))
    llama = {H: 4096, h: 32, g: 32, d: 128, inner: 11008, V: 32000}
    assert model.parameters.subs(llama) == 6_738_415_616
    assert (
        sympy.simplify(model.cache_bytes(1, t, 2).subs({g: 8, d: 128}) - 2 * 32 * t * 8 * 128 * 2)
        == 0
    )


def test_symbolic_sizes_that_are_numbers_are_checked_as_numbers():
    s = sympy.Symbol("s", positive=True)
    model = rooflm.load_model("HuggingFaceTB/SmolLM2-135M")
    assert (
        rooflm.memory(model, None, 1, s, s).kv_cache.subs(s, 7)
        == rooflm.memory(model, None, 1, 7, 7).kv_cache
    )
    assert ForwardPass(sympy.Integer(3), 1) == ForwardPass(3, 1)
    for bad in (sympy.Rational(3, 2), sympy.Integer(0), sympy.oo, sympy.I):
        with pytest.raises(ValueError, match="batch is"):
            ForwardPass(bad, 1)


BAD_SIZES = [
    0,
    -1,
    1.5,
    2**40 + 1,
    True,
    "8",
    None,
    float("nan"),
    float("inf"),
    10**400,
    [0],
    [1.5],
]


@pytest.mark.parametrize("value", BAD_SIZES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", ["batch", "new_tokens"])
def test_a_size_outside_1_to_2_40_is_refused_in_one_line(name, value):
    with pytest.raises(ValueError, match=name) as error:
        ForwardPass(**({"batch": 1, "new_tokens": 1} | {name: value}))
    assert "from 1 to 2^40" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_largest_sizes_are_finite(llama_7b, a6000):
    report = analyze(llama_7b, a6000, ForwardPass(2**40, 2**40, 2**40))
    array = analyze(llama_7b, a6000, ForwardPass(np.array([2**40]), 2**40, 2**40))
    assert np.isfinite(report.seconds)
    assert array.seconds[0] == pytest.approx(report.seconds)


def test_logits_are_0_for_all_passes_or_positive_for_each():
    for zero in (0, np.int64(0), np.array(0)):
        assert ForwardPass(1, 4, 0, zero).logits == 0
    with pytest.raises(ValueError, match="logits holds a 0"):
        ForwardPass(1, 4, 0, [0, 1])


def test_an_answer_with_symbols_agrees_with_numbers(llama_7b, a6000):
    b = sympy.Symbol("b", positive=True, integer=True)
    formula = rooflm.generation(llama_7b, a6000, None, b, 8, 4)
    number = rooflm.generation(llama_7b, a6000, None, 5, 8, 4)
    assert float(formula.seconds.subs(b, 5)) == pytest.approx(number.seconds, rel=1e-9)


def test_more_logits_than_new_tokens_are_refused():
    with pytest.raises(ValueError, match="logits is 3; allowed: at most new_tokens"):
        ForwardPass(1, 2, 0, 3)
    with pytest.raises(ValueError, match="context is 4; allowed: at least"):
        ForwardPass.verify(1, 4, 4)


def test_verification_with_no_draft_is_a_decode_step():
    assert ForwardPass.verify(3, 0, 77) == ForwardPass.decode(3, 77)
    assert ForwardPass.verify(3, 4, 77) == ForwardPass(3, 5, 72, 5)


@pytest.mark.parametrize(("keyword", "value"), [("attention", "flsh"), ("accounting", "exakt")])
def test_an_unknown_choice_is_named(keyword, value, llama_7b, a6000):
    with pytest.raises(ValueError, match=f"unknown {keyword} '{value}'; nearest"):
        analyze(llama_7b, a6000, ForwardPass(1, 1), **{keyword: value})
