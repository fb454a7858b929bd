"""LLM-Viewer's known miscounts of dense models (commit 472f71f), and ours derived again.

Each test names the miscount, derives the right number from the tensors' shapes, and shows
that the survey's accounting, which reproduces the tool, has the wrong one.
"""

import pytest

import rooflm
from rooflm import ForwardPass, Precision, analyze, memory


def row(model, device, step, name, precision=None, attention="unfused", accounting="exact"):
    report = analyze(model, device, step, precision, attention, accounting)
    return next(r for r in report.operators if r.name == name)


def test_fused_attention_reads_each_kv_head_once_not_each_query_head(llama_70b, a6000):
    # Llama-2-70b, 4096 tokens: K and V of 8 heads x 128, FP16, 80 layers.
    step = ForwardPass.decode(1, 4096)
    ours = row(llama_70b, a6000, step, "fused_attention", attention="flash")
    assert 80 * ours.kv_bytes == 80 * 2 * 4096 * 8 * 128 * 2 == 1_342_177_280
    theirs = row(llama_70b, a6000, step, "fused_attention", attention="flash", accounting="survey")
    assert 80 * theirs.kv_bytes == pytest.approx(10.74e9, rel=1e-3)
    assert theirs.kv_bytes == 8 * ours.kv_bytes


def test_fused_attention_output_is_tokens_by_head_dim(llama_7b, a6000):
    # LLM-Viewer counts seqlen x seqlen, twice: 537 MB instead of 16.8 MB.
    step = ForwardPass.prefill(1, 2048)
    ours = row(llama_7b, a6000, step, "fused_attention", attention="flash")
    q = o = 2048 * 32 * 128 * 2
    assert o == 16_777_216
    assert ours.activation_bytes == q + o
    theirs = row(llama_7b, a6000, step, "fused_attention", attention="flash", accounting="survey")
    assert theirs.activation_bytes - q == 32 * o


def test_fused_prefill_reads_keys_and_values_once_not_once_per_128_rows(llama_7b, a6000):
    step = ForwardPass.prefill(1, 2048)
    ours = row(llama_7b, a6000, step, "fused_attention", attention="flash")
    assert ours.kv_bytes == 2 * 2048 * 32 * 128 * 2 == 33_554_432
    theirs = row(llama_7b, a6000, step, "fused_attention", attention="flash", accounting="survey")
    assert theirs.kv_bytes == 2048 // 128 * ours.kv_bytes
    assert ours.bytes == 67_108_864  # Q, K, V and O: compulsory traffic only
    assert theirs.bytes / ours.bytes == 16.25


def test_unfused_prefill_reads_the_queries_of_all_heads(llama_70b, a6000):
    # LLM-Viewer loads them once per KV head: 8 times too few on a 70B model.
    step = ForwardPass.prefill(1, 1000)
    ours = row(llama_70b, a6000, step, "qk_matmul")
    scores = 64 * (1000 * 1001 / 2) * 2
    assert ours.activation_bytes - scores == 1000 * 64 * 128 * 2
    theirs = row(llama_70b, a6000, step, "qk_matmul", accounting="survey")
    assert theirs.activation_bytes - 64 * 1000 * 1000 * 2 == 1000 * 8 * 128 * 2


def test_prefill_attention_is_causal(llama_7b, a6000):
    step = ForwardPass.prefill(1, 2048)
    for name, flops in (("qk_matmul", 2 * 128), ("softmax", 5), ("sv_matmul", 2 * 128)):
        ours = row(llama_7b, a6000, step, name)
        assert ours.flops == 32 * sum(range(1, 2049)) * flops
        theirs = row(llama_7b, a6000, step, name, accounting="survey")
        assert theirs.flops == 32 * 2048 * 2048 * flops


def test_lm_head_counts_two_flops_a_weight(llama_7b, a6000):
    step = ForwardPass.decode(1, 2048)
    assert row(llama_7b, a6000, step, "lm_head").flops == 2 * 4096 * 32000
    assert row(llama_7b, a6000, step, "lm_head", accounting="survey").flops == 4096 * 32000


def test_lm_head_activations_grow_with_the_batch(llama_7b, a6000):
    for batch in (1, 16):
        ours = row(llama_7b, a6000, ForwardPass.decode(batch, 64), "lm_head")
        assert ours.activation_bytes == batch * (4096 + 32000) * 2
        theirs = row(llama_7b, a6000, ForwardPass.decode(batch, 64), "lm_head", accounting="survey")
        assert theirs.activation_bytes == (4096 + 32000) * 2


def test_footprint_holds_the_embedding_and_the_lm_head(llama_7b, llama_13b):
    for model, ours_gb, theirs_gb in ((llama_7b, 13.48, 12.95), (llama_13b, 26.03, 25.38)):
        assert memory(model).weights == 2 * model.parameters
        assert round(memory(model).weights / 1e9, 2) == ours_gb
        theirs = memory(model, accounting="survey").weights
        assert round(theirs / 1e9, 2) == theirs_gb
        tables_and_norms = 2 * model.vocab * model.hidden + (2 * model.layers + 1) * model.hidden
        assert memory(model).weights - theirs == 2 * tables_and_norms
    llama_3 = rooflm.load_model("meta-llama/Llama-3.1-8B")
    share = memory(llama_3, accounting="survey").weights / memory(llama_3).weights
    assert round(100 * (share - 1), 1) == -13.1


def test_mlp_activation_is_at_the_intermediate_size(llama_7b, a6000):
    step = ForwardPass.decode(3, 64)
    ours = row(llama_7b, a6000, step, "mlp_act")
    assert ours.flops == 3 * 11008 * 2
    assert ours.activation_bytes == 3 * 11008 * (2 + 1) * 2
    theirs = row(llama_7b, a6000, step, "mlp_act", accounting="survey")
    assert ours.bytes / theirs.bytes == pytest.approx(11008 / 4096)
    assert round(ours.flops / theirs.flops, 2) == 2.69


def test_residual_add_loads_two_operands(llama_7b, a6000):
    step = ForwardPass.prefill(1, 2048)
    ours = row(llama_7b, a6000, step, "attn_add")
    assert ours.bytes == 3 * 2048 * 4096 * 2
    assert row(llama_7b, a6000, step, "attn_add", accounting="survey").bytes == 2 * 2048 * 4096 * 2


def test_the_w8a8_rate_is_not_tied_to_kv_bits(llama_7b, a6000):
    step = ForwardPass.prefill(1, 2048)
    w8a8kv16 = Precision("int8", "int8", "fp16")
    w8a8kv8 = Precision("int8", "int8", "int8")
    for name in ("q_proj", "gate_proj", "lm_head"):
        assert row(llama_7b, a6000, step, name, w8a8kv16).rate == "int8"
        assert row(llama_7b, a6000, step, name, w8a8kv16, accounting="survey").rate == "fp16"
    # Only attention multiplies by the cache.
    assert row(llama_7b, a6000, step, "qk_matmul", w8a8kv16).rate == "fp16"
    seconds = [
        analyze(llama_7b, a6000, step, p, "unfused", "survey").seconds for p in (w8a8kv16, w8a8kv8)
    ]
    assert [round(s, 4) for s in seconds] == [0.2007, 0.1134]


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "kv_heads", "head_dim"),
    [
        ("Qwen/Qwen3-32B", 5120, 64, 8, 128),
        ("google/gemma-2-9b", 3584, 16, 8, 256),
    ],
)
def test_head_dim_is_the_configs_not_hidden_over_heads(
    name, hidden, heads, kv_heads, head_dim, a6000
):
    assert head_dim != hidden // heads
    model, step = rooflm.load_model(name), ForwardPass.decode(1, 100)
    q = row(model, a6000, step, "q_proj")
    assert q.flops == 2 * hidden * heads * head_dim
    kv = row(model, a6000, step, "fused_attention", attention="flash").kv_bytes
    assert kv == 2 * 100 * kv_heads * head_dim * 2
    theirs = row(model, a6000, step, "q_proj", accounting="survey")
    assert theirs.flops == 2 * hidden * hidden


def test_an_8_bit_run_on_the_surveys_cpu_does_not_fail(llama_7b):
    # LLM-Viewer raises KeyError('INT8') on its i9-13900K.
    cpu = rooflm.load_hardware("intel-i9-13900k")
    p = Precision("int8", "int8", "int8")
    report = analyze(llama_7b, cpu, ForwardPass.decode(1, 64), p, accounting="survey")
    assert {r.rate for r in report.operators} <= {"fp16", "fp32"}
