"""Attention of every kind, states and experts: costs against loops over tokens and shapes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import rooflm
from rooflm import ForwardPass, Precision
from rooflm.roofline.mixers import Attention, LatentAttention
from rooflm.roofline.mlp import MLP, Experts
from rooflm.roofline.model import Block, Model
from rooflm.roofline.states import GatedDeltaNet, LinearAttention, Mamba2

P = Precision("fp16", "fp16", "int8", "fp32")
PLAIN = Attention(64, 8, 2, 16)
MLA = LatentAttention(64, 4, 24, 16, 12, 6, 10)
DELTA = GatedDeltaNet(64, 2, 4, 8, 6)
MAMBA = Mamba2(64, 4, 16, 8, 2, bias=True)
LINEAR = LinearAttention(64, 4, 16)
EXPERTS = Experts(64, 24, 8, 2, shared=40, shared_gate=True, router_bias=True)
GPT_OSS = Experts(64, 24, 8, 2, router_bias=True, bias=True)

sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 60), st.integers(1, 50))


def seen_by_hand(mixer, n, c):
    """For each new token of a sequence, the positions that it sees."""
    rows = []
    for token in range(c, c + n):
        first = 0
        if mixer.window:
            first = max(0, token - mixer.window + 1)
        if mixer.chunk:
            first = token - token % mixer.chunk
        rows.append(set(range(first, token + 1)))
    return rows


def row(rows, name):
    return next(r for r in rows if r.name == name)


@given(sizes, st.sampled_from(["window", "chunk"]))
@settings(max_examples=200, deadline=None)
def test_a_window_and_a_chunk_count_the_pairs_and_positions_that_a_loop_finds(size, kind):
    b, n, c, limit = size
    mixer = replace(PLAIN, **{kind: limit})
    seen = seen_by_hand(mixer, n, c)
    fused = row(mixer.operators(ForwardPass(b, n, c), P, "flash"), "fused_attention")
    pairs = b * sum(len(x) for x in seen)
    assert fused.flops == pairs * 8 * (4 * 16 + 5)
    # What lies behind the window of the first new token is never read.
    positions = b * len(set().union(*seen))
    assert fused.kv_read == positions * 2 * 2 * 16 * 1
    unfused = mixer.operators(ForwardPass(b, n, c), P, "unfused")
    assert row(unfused, "softmax").flops == 5 * pairs * 8


@given(sizes)
@settings(max_examples=100, deadline=None)
def test_eviction_leaves_at_most_its_budget_before_a_pass(size):
    b, n, c, keep = size
    mixer = replace(PLAIN, keep=keep)
    fused = row(mixer.operators(ForwardPass(b, n, c), P, "flash"), "fused_attention")
    held = min(c, keep)
    assert fused.flops == b * sum(held + i + 1 for i in range(n)) * 8 * (4 * 16 + 5)
    assert fused.kv_read == b * (held + n) * 2 * 2 * 16
    assert mixer.cache_elements(b, c + n).kv == b * min(c + n, keep) * 2 * 2 * 16


def test_window_and_chunk_evaluate_on_arrays_and_symbols():
    contexts = np.array([1.0, 3.0, 4.0, 5.0, 9.0])
    c, w = sympy.symbols("c w", positive=True)
    for kind in ("window", "chunk"):
        mixer = replace(PLAIN, **{kind: 4})
        sweep = mixer.operators(ForwardPass(2, 3, contexts), P, "flash")
        formula = replace(PLAIN, **{kind: w}).operators(ForwardPass(2, 3, c), P, "flash")
        for i, one in enumerate(contexts.tolist()):
            alone = mixer.operators(ForwardPass(2, 3, int(one)), P, "flash")
            for many, single, symbolic in zip(sweep, alone, formula, strict=True):
                flops = np.broadcast_to(many.flops, contexts.shape)
                assert flops[i] == single.flops
                if kind == "window":
                    found = sympy.sympify(symbolic.flops).subs({c: int(one), w: 4})
                    assert float(found) == single.flops


def test_a_layer_that_reads_anothers_cache_keeps_nothing_and_projects_no_keys():
    shared = replace(PLAIN, own_cache=False, qk_norm="head")
    names = [r.name for r in shared.operators(ForwardPass(1, 1, 9), P, "flash")]
    assert names == ["q_proj", "q_norm", "fused_attention", "o_proj"]
    assert shared.cache_elements(3, 100) == (0, 0, 0)
    assert shared.parameters == 2 * 64 * 128 + 16
    own = row(PLAIN.operators(ForwardPass(1, 1, 9), P, "flash"), "fused_attention")
    assert row(shared.operators(ForwardPass(1, 1, 9), P, "flash"), "fused_attention") == own


# ---- latent attention


def mla_by_hand(mixer, b, n, c, absorbed):
    """Multiply-adds of each product, from the shapes of its operands, token by token."""
    h, r, rope, nope, value = (
        mixer.heads, mixer.kv_rank, mixer.rope_dim, mixer.nope_dim, mixer.value_dim
    )  # fmt: skip
    macs = dict.fromkeys(("into", "scores", "weighted", "out"), 0)
    for _ in range(b):
        for i in range(n):
            context = c + i + 1
            for _ in range(h):
                if absorbed:
                    macs["into"] += nope * r  # the key's up-projection, on the query
                    macs["scores"] += context * (r + rope)
                    macs["weighted"] += context * r
                    macs["out"] += r * value  # the value's, on the result
                else:
                    macs["scores"] += context * (nope + rope)
                    macs["weighted"] += context * value
        if not absorbed:
            macs["into"] += (c + n) * r * h * (nope + value)
    return macs


@pytest.mark.parametrize(("b", "n", "c"), [(1, 1, 9), (2, 5, 0), (3, 4, 7)])
@pytest.mark.parametrize("form", ["absorbed", "unabsorbed"])
def test_both_forms_of_latent_attention_do_the_work_that_a_loop_counts(b, n, c, form):
    mixer = replace(MLA, form=form)
    rows = mixer.operators(ForwardPass(b, n, c), P, "unfused")
    macs = mla_by_hand(MLA, b, n, c, form == "absorbed")
    assert row(rows, "qk_matmul").flops == 2 * macs["scores"]
    assert row(rows, "sv_matmul").flops == 2 * macs["weighted"]
    if form == "absorbed":
        assert row(rows, "q_absorb").flops == 2 * macs["into"]
        assert row(rows, "v_absorb").flops == 2 * macs["out"]
    else:
        assert row(rows, "kv_b_proj").flops == 2 * macs["into"]
    fused = row(mixer.operators(ForwardPass(b, n, c), P, "flash"), "fused_attention")
    pairs = b * sum(c + i + 1 for i in range(n)) * 4
    assert fused.flops == 2 * (macs["scores"] + macs["weighted"]) + 5 * pairs


def test_absorbed_attention_reads_each_latent_once_for_all_heads():
    fused = row(MLA.operators(ForwardPass.decode(3, 50), P, "flash"), "fused_attention")
    assert fused.kv_read == 3 * 50 * (16 + 6) * 1
    assert fused.activations_read == 3 * 4 * (16 + 6) * 2
    assert fused.activations_written == 3 * 4 * 16 * 2


def test_a_prefill_is_unabsorbed_and_a_decode_step_is_absorbed():
    names = [{r.name for r in MLA.operators(s, P, "flash")} for s in
             (ForwardPass.prefill(1, 8), ForwardPass.decode(1, 9))]  # fmt: skip
    assert "kv_b_proj" in names[0] and "q_absorb" not in names[0]
    assert "kv_b_proj" not in names[1] and {"q_absorb", "v_absorb"} <= names[1]
    for n, c in itertools.product((1, 5), (0, 9)):  # what is written does not depend on the form
        written = {
            form: sum(r.kv_written for r in replace(MLA, form=form).operators(
                ForwardPass(2, n, c), P, "flash")) for form in ("absorbed", "unabsorbed")
        }  # fmt: skip
        assert set(written.values()) == {2 * n * (16 + 6)}


def test_deepseek_v3_keeps_576_numbers_a_layer_as_its_paper_says():
    # arXiv 2405.04434, section 2.1.4: (d_c + d_h^R) l elements a token, d_c = 4 d_h, d_h^R = d_h/2.
    v3 = LatentAttention(7168, 128, 1536, 512, 128, 64, 128)
    assert v3.cache_elements(1, 1).kv == (4 + 1 / 2) * 128
    assert v3.parameters == 187_107_328  # the sum of the six released tensors' shapes and norms


# ---- every mixer


@pytest.mark.parametrize("form", ["absorbed", "unabsorbed"])
@pytest.mark.parametrize(
    "mixer",
    [
        PLAIN,
        replace(PLAIN, qkv_bias=True, out_bias=True, qk_norm="head", window=4),
        replace(PLAIN, output_gate=True, qk_norm="width"),
        MLA,
        replace(MLA, q_rank=0),
        DELTA,
        MAMBA,
        LINEAR,
    ],
)
def test_a_pass_reads_every_parameter_once(mixer, form):
    if isinstance(mixer, LatentAttention):
        mixer = replace(mixer, form=form)
    rows = mixer.operators(ForwardPass(2, 3, 5), P, "flash")
    assert sum(r.weight_bytes for r in rows) == 2 * mixer.parameters


def test_parameters_are_the_sum_of_the_shapes_of_the_released_tensors():
    conv = 2 * 2 * 8 + 4 * 6
    tensors = [(conv + 4 * 6, 64), (2 * 4, 64), (conv, 4), (4,), (4,), (6,), (64, 4 * 6)]
    assert DELTA.parameters == sum(int(np.prod(shape)) for shape in tensors)
    inner, conv = 64, 64 + 2 * 2 * 8
    tensors = [
        (inner + conv + 4, 64), (inner + conv + 4,), (conv, 4), (conv,), (4,), (4,), (4,),
        (inner,), (64, inner), (64,),
    ]  # fmt: skip
    assert MAMBA.parameters == sum(int(np.prod(shape)) for shape in tensors)


def recurrence_by_hand(kind, tokens, key, value):
    """FLOPs of a state of key x value, one scalar operation at a time."""
    flops = 0
    for _, _, _ in itertools.product(range(tokens), range(key), range(value)):
        flops += 1  # decay
        if kind == "delta":
            flops += 2  # what the state predicts for this key
        flops += 2  # the outer product, added
        flops += 2  # the query's read
    return flops


def test_a_recurrence_does_the_work_that_a_loop_counts_and_moves_its_state_once():
    step = ForwardPass(3, 5, 11)
    for mixer, name, kind, states, key, value, more in (
        (DELTA, "delta_rule", "delta", 4, 8, 6, 0),
        (MAMBA, "state_space", "decay", 4, 8, 16, 3 * 5 * 64 * 2),  # D x, a multiply and an add
        (LINEAR, "linear_attention", "decay", 4, 16, 16, 0),
    ):
        found = row(mixer.operators(step, P, "flash"), name)
        assert found.flops == 3 * states * recurrence_by_hand(kind, 5, key, value) + more
        assert found.kv_read == found.kv_written == 3 * states * key * value * 4
        kept = [mixer.cache_elements(3, context).state for context in (1, 10**6)]
        assert kept == [3 * states * key * value] * 2


def test_a_convolution_keeps_the_inputs_that_its_next_output_needs():
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(9, 5)), rng.normal(size=(4, 5))
    padded = np.vstack([np.zeros((3, 5)), x])
    whole = np.array([(padded[i : i + 4] * taps).sum(0) for i in range(9)])
    kept = x[8 - 3 : 8]  # kernel - 1 inputs of each channel suffice for the last output
    assert np.allclose((np.vstack([kept, x[8:]]) * taps).sum(0), whole[8])
    assert DELTA.cache_elements(1, 50).conv == kept.size // 5 * (2 * 2 * 8 + 4 * 6)


# ---- experts


@pytest.mark.parametrize("mlp", [EXPERTS, GPT_OSS, replace(EXPERTS, gated=False)])
def test_many_tokens_read_every_expert_and_one_token_its_share(mlp):
    def weights(t):
        return sum(r.weight_bytes for r in mlp.operators(ForwardPass(t, 1), P)) / 2

    assert weights(10_000) == pytest.approx(mlp.parameters, rel=1e-12)
    assert weights(1) == pytest.approx(mlp.active_parameters, rel=1e-12)


def test_experts_hit_are_those_of_a_simulation():
    rng = np.random.default_rng(1)
    for t in (1, 3, 9):
        draws = [
            len(set().union(*(rng.choice(8, 2, replace=False) for _ in range(t))))
            for _ in range(20_000)
        ]
        rows = EXPERTS.operators(ForwardPass(t, 1), P)
        hit = row(rows, "expert_up_proj").weight_bytes / (2 * 64 * 24)
        assert hit == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / 20_000**0.5 + 1e-12)


def test_experts_compute_for_top_k_and_the_shared_one():
    rows = EXPERTS.operators(ForwardPass(5, 2), P)
    flops = sum(r.flops for r in rows if r.rate == "linear")
    per_token = 2 * 64 * 8 + 8 + 2 * (2 * 3 * 64 * 24) + 2 * 3 * 64 * 40 + 2 * 64
    assert flops == 10 * per_token


# ---- whole models


def mixed_model(*mixers, mlp=None):
    blocks = tuple((i + 1, Block(m, mlp or MLP(64, 96))) for i, m in enumerate(mixers))
    return Model("mixed", 64, 1000, blocks)


def test_layers_of_one_branch_have_one_sum_and_their_own_norm():
    alone = Block(MAMBA, None, ("attn_norm",))
    names = [r.name for r in alone.operators(ForwardPass(1, 1), P, "flash")]
    assert names[0] == "attn_norm" and names[-1] == "attn_add" and "mlp_add" not in names
    assert alone.parameters == MAMBA.parameters + 64
    only = Block(None, MLP(64, 96), ("mlp_norm",))
    names = [r.name for r in only.operators(ForwardPass(1, 1), P, "flash")]
    assert names[0] == "mlp_norm" and names[-1] == "mlp_add" and "attn_add" not in names
    assert only.cache_elements(4, 100) == (0, 0, 0)


def test_the_cache_of_a_model_is_the_sum_over_its_layers_and_formats():
    model = mixed_model(PLAIN, MLA, DELTA, MAMBA, replace(PLAIN, window=16))
    kv = 2 * 100 * (64 + 2 * 22) + 2 * 5 * min(100, 16) * 64
    state, conv = 2 * (3 * 4 * 48 + 4 * 64 * 8), 2 * (3 * 56 * 3 + 4 * 96 * 3)
    assert model.cache_elements(2, 100) == (kv, state, conv)
    m = rooflm.memory(model, P, batch=2, context=100)
    assert m.kv_cache == kv * 1 + state * 4 + conv * 2


@pytest.mark.parametrize("prompt", [1, 5, 9, 30])
def test_an_answer_across_the_edges_of_windows_and_chunks_is_the_sum_of_its_steps(prompt, a6000):
    model = mixed_model(
        replace(PLAIN, window=12), replace(PLAIN, chunk=7), replace(PLAIN, keep=20), MLA, DELTA,
        mlp=EXPERTS,
    )  # fmt: skip
    for output in (1, 2, 8, 60):
        found = rooflm.generation(model, a6000, P, 3, prompt, output)
        steps = [
            rooflm.analyze(model, a6000, ForwardPass.decode(3, prompt + j), P).seconds
            for j in range(1, output)
        ]
        assert found.seconds - found.ttft == pytest.approx(sum(steps), rel=1e-12, abs=1e-18)


def test_a_sweep_of_answers_across_edges_equals_the_single_answers(a6000):
    model = mixed_model(replace(PLAIN, window=12), replace(PLAIN, chunk=7), MLA)
    prompts, outputs = np.array([[3], [11], [40]]), np.array([1, 2, 9, 30])
    sweep = rooflm.generation(model, a6000, P, 2, prompts, outputs)
    for (i, prompt), (j, output) in itertools.product(
        enumerate(prompts[:, 0].tolist()), enumerate(outputs.tolist())
    ):
        one = rooflm.generation(model, a6000, P, 2, prompt, output)
        assert sweep.seconds[i, j] == pytest.approx(one.seconds, rel=1e-12)


def test_survey_accounting_refuses_what_the_survey_does_not_count(a6000):
    for mixer, mlp, named in ((MLA, None, "LatentAttention"), (PLAIN, EXPERTS, "Experts")):
        model = mixed_model(mixer, mlp=mlp)
        with pytest.raises(ValueError, match=named):
            rooflm.analyze(model, a6000, ForwardPass.decode(1, 9), accounting="survey")
