"""Exact accounting against a layer that is walked through element by element.

The oracle below runs no formula: it visits every multiply-add, every query-key pair and every
element that a kernel loads or stores, one at a time, in a tiny model, and counts.
"""

import copy
import pickle
import re
from collections import Counter

import numpy as np
import pytest

import rooflm
from rooflm import MLP, Attention, Block, ForwardPass, Model, Precision

# Distinct widths per kind of byte, so that a byte of the wrong kind shows.
P = Precision("int8", "fp16", "fp32")
W, A, K = 1, 2, 4


def walk_linear(rows, d_in, d_out, bias=False, out=A, kind="activation"):
    n = Counter()
    for _row in range(rows):
        for _o in range(d_out):
            for _i in range(d_in):
                n["flops"] += 2
            n["flops"] += bias
            n[kind] += out
        n["activation"] += d_in * A
    for _o in range(d_out):
        for _i in range(d_in + bias):
            n["weight"] += W
    return n


def walk_attention(b, n, c, h, g, d, fused):
    rows = {"qk_matmul": Counter(), "softmax": Counter(), "sv_matmul": Counter()}
    for _sequence in range(b):
        for _head in range(h):
            for token in range(n):
                rows["qk_matmul"]["activation"] += d * A  # this query
                rows["sv_matmul"]["activation"] += d * A  # this output
                for _position in range(c + token + 1):  # it sees the cache, and up to itself
                    rows["qk_matmul"]["flops"] += 2 * d
                    rows["sv_matmul"]["flops"] += 2 * d
                    rows["softmax"]["flops"] += 5
                    rows["qk_matmul"]["score"] += A
                    rows["softmax"]["score"] += 2 * A
                    rows["sv_matmul"]["score"] += A
        for _kv_head in range(g):
            for _position in range(c + n):
                rows["qk_matmul"]["kv"] += d * K
                rows["sv_matmul"]["kv"] += d * K
    if fused:
        total = sum(rows.values(), Counter())
        del total["score"]
        return {"fused_attention": total}
    for row in rows.values():
        row["activation"] += row.pop("score", 0)
    return rows


def walk_elementwise(rows, width, flops, loads, stores, weights=0, out="activation", size=A):
    n = Counter()
    for _element in range(rows * width):
        n["flops"] += flops
        n["activation"] += loads * A
        n[out] += stores * size
    n["weight"] += weights * W
    return n


DIMENSIONS = {"hidden": 6, "heads": 4, "kv_heads": 2, "head_dim": 3, "intermediate": 7, "vocab": 11}


def walk(b, n, c, logits, fused, *, gated=True, bias=False, qk_norm=False, four_norms=False):
    H, h, g, d, inner, V = DIMENSIONS.values()
    t = b * n
    rows = {"embedding": Counter(weight=t * H * W, activation=t * H * A)}
    norm = walk_elementwise(t, H, 7, 1, 1, weights=H)
    rows["attn_norm"] = rows["mlp_norm"] = rows["final_norm"] = norm
    if four_norms:
        rows["attn_post_norm"] = rows["mlp_post_norm"] = norm
    rows["q_proj"] = walk_linear(t, H, h * d, bias)
    rows["v_proj"] = rows["k_proj"] = walk_linear(t, H, g * d, bias, K, "kv")
    if qk_norm:
        rows["k_proj"] = walk_linear(t, H, g * d, bias)
        rows["q_norm"] = walk_elementwise(t, h * d, 7, 1, 1, weights=d)
        rows["k_norm"] = walk_elementwise(t, g * d, 7, 1, 1, weights=d, out="kv", size=K)
    rows |= walk_attention(b, n, c, h, g, d, fused)
    rows["o_proj"] = walk_linear(t, h * d, H)
    rows["attn_add"] = rows["mlp_add"] = walk_elementwise(t, H, 1, 2, 1)
    rows["up_proj"] = walk_linear(t, H, inner, bias)
    if gated:
        rows["gate_proj"] = rows["up_proj"]
    rows["mlp_act"] = walk_elementwise(t, inner, 1 + gated, 1 + gated, 1)
    rows["down_proj"] = walk_linear(t, inner, H, bias)
    if logits:
        rows["lm_head"] = walk_linear(b * logits, H, V)
    return rows


def tiny(**variant):
    H, h, g, d, inner, V = DIMENSIONS.values()
    gated, bias = variant.get("gated", True), variant.get("bias", False)
    norms = ("attn_norm", "mlp_norm")
    if variant.get("four_norms"):
        norms += ("attn_post_norm", "mlp_post_norm")
    qk_norm = "head" if variant.get("qk_norm") else ""
    mixer = Attention(H, h, g, d, qkv_bias=bias, qk_norm=qk_norm)
    return Model("tiny", H, V, ((3, Block(mixer, MLP(H, inner, gated, bias), norms)),))


CHIP = rooflm.Hardware("chip", 1e9, {"fp32": 1e11, "fp16": 2e11})
PASSES = [
    ForwardPass.prefill(2, 5),
    ForwardPass.decode(3, 6),
    ForwardPass(2, 3, 4, 0),
    ForwardPass.verify(2, 3, 9),
]
VARIANTS = [{}, {"gated": False, "bias": True}, {"qk_norm": True}, {"four_norms": True}]


@pytest.mark.parametrize("step", PASSES, ids=["prefill", "decode", "chunk", "verify"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_row_equals_a_walk_over_every_element(step, attention, variant):
    report = rooflm.analyze(tiny(**variant), CHIP, step, P, attention)
    b, n, c = step.batch, step.new_tokens, step.cached_tokens
    expected = walk(b, n, c, step.logits, attention == "flash", **variant)
    assert [row.name for row in report.operators if row.name not in expected] == []
    assert {row.name for row in report.operators} == set(expected)
    for row in report.operators:
        count = expected[row.name]
        assert row.flops == count["flops"], row.name
        assert row.weight_bytes == count["weight"], row.name
        assert row.activation_bytes == count["activation"], row.name
        assert row.kv_bytes == count["kv"], row.name
        assert row.bytes == count["weight"] + count["activation"] + count["kv"], row.name


def test_rows_are_per_layer_and_totals_over_all_layers():
    report = rooflm.analyze(tiny(), CHIP, ForwardPass.decode(1, 4), P)
    outer = {"embedding", "final_norm", "lm_head"}
    for row in report.operators:
        assert row.count == (1 if row.name in outer else 3)
        assert row.block == {"embedding": "embedding", "final_norm": "head", "lm_head": "head"}.get(
            row.name, "block 0"
        )
    assert report.flops == sum(row.count * row.flops for row in report.operators)
    assert report.bytes == sum(row.count * row.bytes for row in report.operators)
    assert report.seconds == pytest.approx(sum(r.count * r.seconds for r in report.operators))


def test_a_chunk_without_logits_leaves_the_head_out_for_arrays_too(llama_7b, a6000):
    one = rooflm.analyze(llama_7b, a6000, ForwardPass(2, 16, 0, 0))
    sweep = rooflm.analyze(llama_7b, a6000, ForwardPass(np.array([2]), 16, 0, 0))
    assert one.operators[-1].name == sweep.operators[-1].name == "final_norm"
    assert sweep.bytes[0] == one.bytes


def test_a_parallel_block_has_one_norm_and_the_same_cost_otherwise():
    one = Block(Attention(6, 2, 2, 3), MLP(6, 8), ("attn_norm",), 2, parallel=True)
    two = Block(Attention(6, 2, 2, 3), MLP(6, 8), ("attn_norm", "mlp_norm"), 2)
    step = ForwardPass.prefill(1, 4)
    names_one = [o.name for o in one.operators(step, P, "flash")]
    names_two = [o.name for o in two.operators(step, P, "flash")]
    assert [name for name in names_two if name != "mlp_norm"] == names_one
    assert two.parameters - one.parameters == 2 * 6


def test_learned_positions_are_gathered_and_added_for_every_token():
    model = Model("opt-like", 6, 11, ((1, Block(Attention(6, 2, 2, 3), MLP(6, 8))),), positions=34)
    rows = {r.name: r for r in rooflm.analyze(model, CHIP, ForwardPass.prefill(2, 5), P).operators}
    row = rows["position_embedding"]
    assert (row.flops, row.weight_bytes, row.activation_bytes) == (60, 60 * W, 2 * 60 * A)


def test_a_tied_head_is_counted_once_in_parameters_and_still_read_by_the_pass():
    blocks = ((1, Block(Attention(6, 2, 2, 3), MLP(6, 8))),)
    tied, untied = Model("t", 6, 11, blocks, tied=True), Model("u", 6, 11, blocks)
    assert untied.parameters - tied.parameters == 6 * 11
    step = ForwardPass.decode(1, 1)
    assert rooflm.analyze(tied, CHIP, step).bytes == rooflm.analyze(untied, CHIP, step).bytes


def test_lower_bound_is_peak_time_or_weights_and_cache_moved_once(llama_7b, a6000):
    # Decode of batch 1: what any schedule must read is the weights that it uses (all but the
    # embedding table, of which one row) and the cache of 2048 tokens: 2 x 32 x 4096 x 2 bytes.
    report = rooflm.analyze(llama_7b, a6000, ForwardPass.decode(1, 2048))
    weights = (6_738_415_616 - 32000 * 4096 + 4096) * 2
    assert report.lower_bound == pytest.approx((weights + 2048 * 2 * 32 * 4096 * 2) / 768e9)
    # A long prefill computes all the time: 2 FLOPs a weight and token, and causal attention.
    report = rooflm.analyze(llama_7b, a6000, ForwardPass.prefill(1, 2048))
    body = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    flops = 2 * 2048 * body + 2 * 32000 * 4096
    flops += 32 * 32 * (2048 * 2049 / 2) * (4 * 128 + 5)
    vectors = 2048 * (65 * 7 * 4096 + 64 * 4096 + 32 * 2 * 11008)
    assert report.lower_bound == pytest.approx((flops + vectors) / 154.8385e12, rel=1e-12)


def test_lower_bound_reads_no_table_row_twice(a6000):
    # A million sequences decode: every row of both tables is read, none of them twice.
    model = rooflm.load_model("facebook/opt-125m")
    step = ForwardPass.decode(10**6, 1024)
    report = rooflm.analyze(model, a6000, step)
    read = model.parameters - (2048 + 2 - 1) * 768  # all weights; one position of the table
    tied_head = 50272 * 768  # read as the embedding and again as the head
    cache = 10**6 * 1024 * 2 * 12 * 768
    floor = 2 * (read + tied_head + cache) / 768e9
    assert report.lower_bound == pytest.approx(floor, rel=1e-6)


def test_bound_is_the_kind_that_holds_more_of_the_time(llama_7b, a6000):
    for step in (ForwardPass.prefill(1, 2048), ForwardPass.decode(1, 2048), ForwardPass(1, 200)):
        report = rooflm.analyze(llama_7b, a6000, step)
        held = Counter()
        for row in report.operators:
            held[row.bound] += row.count * row.seconds
        assert report.bound == held.most_common(1)[0][0]


def test_calibration_scales_each_roof_and_charges_each_launch(llama_7b, a6000):
    step = ForwardPass.prefill(1, 2048)
    ideal = rooflm.analyze(llama_7b, a6000, step)
    real = rooflm.analyze(llama_7b, a6000, step, calibration=rooflm.Calibration(0.5, 0.25, 3e-6))
    for x, y in zip(ideal.operators, real.operators, strict=True):
        peak = a6000.peaks[x.rate]
        assert y.seconds == pytest.approx(
            max(x.flops / (0.5 * peak), x.bytes / (0.25 * 768e9)) + 3e-6
        )
        assert (x.intensity, x.attainable) == (y.intensity, y.attainable)
    assert real.lower_bound == pytest.approx(ideal.lower_bound)
    with pytest.raises(ValueError, match=r"calibration compute is 1\.5"):
        rooflm.Calibration(1.5)


def test_a_row_names_the_format_it_computes_at():
    h100 = rooflm.load_hardware("nvidia-h100-sxm")
    model = rooflm.load_model("meta-llama/Llama-3.1-8B")
    rows = rooflm.analyze(
        model, h100, ForwardPass.decode(1, 64), Precision("int4", "int4", "int8")
    ).operators
    at = {row.name: row.rate for row in rows}
    assert at["q_proj"] == "int8"  # no INT4 on Hopper
    assert at["fused_attention"] == "int8"


def test_to_frame_has_a_row_for_each_operator_and_a_column_for_each_field(llama_7b, a6000):
    report = rooflm.analyze(llama_7b, a6000, ForwardPass.decode(1, 64))
    frame = report.to_frame()
    assert list(frame.columns) == list(rooflm.Row._fields)
    assert (frame["count"] * frame["flops"]).sum() == report.flops


def test_a_report_says_when_the_plan_does_not_fit(llama_70b, a6000):
    report = rooflm.analyze(llama_70b, a6000, ForwardPass.decode(1, 64))
    assert report.fits is False
    assert "DOES NOT FIT" in str(report)
    sweep = rooflm.analyze(llama_70b, a6000, ForwardPass.decode(np.array([1, 2]), 64))
    assert "DOES NOT FIT" in str(sweep)
    one = rooflm.analyze(llama_70b, a6000, ForwardPass.decode(np.int64(1), 64))
    assert "DOES NOT FIT" in str(one)
    assert one.bound == "memory"
    p = Precision("int4")
    some = rooflm.analyze(llama_70b, a6000, ForwardPass.decode(np.array([1, 5000]), 64), p)
    assert "fits for some" in str(some)
    chip = rooflm.Hardware("chip", 1e12, {"fp16": 1e12})
    assert rooflm.analyze(llama_70b, chip, ForwardPass.decode(1, 64)).fits is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step": 5}, "step is 5; allowed: a ForwardPass"),
        ({"precision": "int4"}, "precision is 'int4'; allowed: a Precision"),
        ({"calibration": {}}, "calibration is {}; allowed: a Calibration"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(arguments, named, llama_7b, a6000):
    given = {"step": ForwardPass.decode(1, 1)} | arguments
    with pytest.raises(ValueError, match=re.escape(named)):
        rooflm.analyze(llama_7b, a6000, **given)


def test_a_report_survives_a_pickle(llama_7b, a6000):
    report = rooflm.analyze(llama_7b, a6000, ForwardPass.decode(1, 64))
    assert pickle.loads(pickle.dumps(report)) == report
    assert copy.deepcopy(a6000) == a6000
