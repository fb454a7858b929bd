"""The transformer: against loops in float64, and properties that a wrong one breaks."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import rooflm
from rooflm.lab.model import Config, FullCache, Transformer, attend, rope_table, rotate

CONFIG = Config(vocab=40, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, window=16)
TOKENS = 80  # more than the 64 positions with which a cache's buffer starts


def make_model(config=CONFIG, seed=0):
    """Weights far from their small start, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG.vocab, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def attention_by_loops(q, k, v):
    """Each query by itself, in float64; the last one sees all."""
    b, h, n, d = q.shape
    g, context = k.shape[1:3]
    out = torch.zeros(b, h, n, d, dtype=torch.float64)
    for s in range(b):
        for head in range(h):
            for i in range(n):
                seen = context - n + i + 1
                keys, values = (t[s, head // (h // g), :seen].double() for t in (k, v))
                scores = [math.fsum(q[s, head, i].double() * key) / d**0.5 for key in keys]
                weights = [math.exp(x - max(scores)) for x in scores]
                total = math.fsum(weights)
                out[s, head, i] = sum(w / total * x for w, x in zip(weights, values, strict=True))
    return out


def logits_by_formula(model, tokens):
    """The whole model for one sequence, written from the papers, in float64."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    n, h, g = len(tokens), config.heads, config.kv_heads
    d = config.head_width or config.hidden // h

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turned(x):  # (tokens, d) as d/2 complex numbers, turned by m theta_i
        theta = config.rope_base ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        angles = torch.arange(n, dtype=torch.float64)[:, None] * theta
        pairs = torch.view_as_complex(x.reshape(n, d // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    x = weights["embedding.weight"][tokens]
    for layer in range(config.layers):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{layer}.")}
        y = norm(x, w["attn_norm.weight"])
        heads = []
        for j in range(h):
            own = slice(j * d, (j + 1) * d)
            shared = slice(j // (h // g) * d, (j // (h // g) + 1) * d)
            q = turned(y @ w["q_proj.weight"][own].T)
            k = turned(y @ w["k_proj.weight"][shared].T)
            scores = q @ k.T / d**0.5
            scores[torch.ones(n, n).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ (y @ w["v_proj.weight"][shared].T))
        x = x + torch.cat(heads, -1) @ w["o_proj.weight"].T
        y = norm(x, w["mlp_norm.weight"])
        gate = y @ w["gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    return norm(x, weights["final_norm.weight"]) @ weights["embedding.weight"].T


# ---- the forward pass


def test_logits_are_those_of_the_papers_formulas(model, tokens):
    found = model(tokens)
    for row in range(2):
        expected = logits_by_formula(model, tokens[row])
        assert expected.abs().max() > 1  # something is being compared
        assert torch.allclose(found[row].double(), expected, atol=1e-4)


def test_a_model_whose_heads_were_removed_keeps_their_width(tokens):
    config = replace(CONFIG, heads=2, kv_heads=1, head_width=8)  # half of CONFIG's
    smaller = make_model(config)
    expected = logits_by_formula(smaller, tokens[0])
    assert torch.allclose(smaller(tokens[:1])[0].double(), expected, atol=1e-4)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "head_dim" not in CONFIG.to_dict()
    assert sum(p.numel() for p in smaller.parameters()) == smaller.to_roofline().parameters


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 6), (5, 5), (3, 7)])
def test_attention_is_the_softmax_of_scaled_products(kv_heads, new, context):
    q = random(2, 4, new, 8)
    k, v = (random(2, kv_heads, context, 8, seed=seed) for seed in (1, 2))
    before = [t.clone() for t in (q, k, v)]
    found = attend(q, k, v)
    assert found.shape == q.shape
    assert torch.allclose(found.double(), attention_by_loops(q, k, v), atol=1e-5)
    assert all(torch.equal(t, old) for t, old in zip((q, k, v), before, strict=True))


def test_a_later_token_never_changes_an_earlier_logit(model, tokens):
    before = model(tokens)
    for place in (1, 7, 40, TOKENS - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % CONFIG.vocab
        after = model(changed)
        assert torch.allclose(after[:, :place], before[:, :place], atol=1e-5)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-2)


def test_sequences_of_a_batch_do_not_meet(model, tokens):
    together = model(tokens)
    for row in range(2):
        assert torch.allclose(model(tokens[row : row + 1])[0], together[row], atol=1e-5)


def test_grouped_queries_equal_full_attention_with_repeated_heads(model, tokens):
    full = Transformer(replace(CONFIG, kv_heads=4))
    weights = model.state_dict()
    d, shared = CONFIG.head_dim, CONFIG.heads // CONFIG.kv_heads
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.view(CONFIG.kv_heads, d, CONFIG.hidden)
            weights[name] = torch.cat([head for head in heads for _ in range(shared)])
    full.load_state_dict(weights)
    assert torch.allclose(full(tokens), model(tokens), atol=1e-5)


# ---- rotary positions


def test_a_rotation_is_a_multiplication_by_a_complex_number():
    x, base = random(3, 5, 16), 10_000.0
    found = rotate(x, rope_table(torch.arange(5), 16, base))
    pairs = torch.view_as_complex(x.double().reshape(3, 5, 8, 2))
    angles = torch.arange(5.0)[:, None].double() * base ** (-torch.arange(8).double() / 8)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
    assert torch.allclose(found.double(), expected.flatten(2), atol=1e-5)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 4000), st.integers(0, 9))
@settings(max_examples=40)
def test_a_score_depends_on_the_distance_alone(m, n, shift, seed):
    q, k = random(2, 1, 16, seed=seed).unbind()

    def score(place_of_query, place_of_key):
        tables = (rope_table(torch.tensor([p]), 16, 1e4) for p in (place_of_query, place_of_key))
        turned = (rotate(x, table) for x, table in zip((q, k), tables, strict=True))
        return torch.mul(*turned).sum().item()

    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=1e-4)


def test_far_positions_keep_their_precision():
    # With frequencies in FP32 the angles of position 10^6 would be off by 0.03 rad.
    cos, sin = rope_table(torch.tensor([1_000_003]), 64, 10_000.0)
    angles = [1_000_003 * 10_000 ** (-2 * i / 64) for i in range(32)]
    assert cos[0].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
    assert sin[0].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)


# ---- the cache


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
@settings(max_examples=25)
def test_cached_equals_uncached_however_a_text_is_cut(sizes):
    model = make_model()
    text = torch.randint(CONFIG.vocab, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    cuts = [0]
    while cuts[-1] < TOKENS:  # the sizes again and again, until the text is used up
        cuts.append(min(TOKENS, cuts[-1] + sizes[(len(cuts) - 1) % len(sizes)]))
    cache, parts = FullCache(), []
    for start, stop in itertools.pairwise(cuts):
        assert cache.length == start
        parts.append(model(text[:, start:stop], cache))
    assert cache.length == TOKENS
    assert torch.allclose(torch.cat(parts, dim=1), model(text), atol=1e-5)


def test_a_cache_gives_back_what_it_was_given_beyond_its_first_buffer():
    cache, given_keys, given_values = FullCache(), [], []
    for step, new in enumerate((60, 1, 5, 100, 1)):
        keys, values = random(2, 3, new, 4, seed=step), random(2, 3, new, 4, seed=100 + step)
        given_keys.append(keys), given_values.append(values)
        k, v = cache.extend(0, keys, values)
        assert torch.equal(k, torch.cat(given_keys, 2))
        assert torch.equal(v, torch.cat(given_values, 2))


# ---- agreement with the theory


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_parameters_are_those_of_the_roofline_model(kv_heads):
    model = Transformer(replace(CONFIG, kv_heads=kv_heads))
    assert sum(p.numel() for p in model.parameters()) == model.to_roofline().parameters


def test_every_row_of_a_linear_layer_has_the_flops_that_torch_counts(model, tokens, a6000):
    step = rooflm.ForwardPass(batch=2, new_tokens=TOKENS, cached_tokens=0, logits=TOKENS)
    rows = {row.name: row for row in rooflm.analyze(model.to_roofline(), a6000, step).operators}
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    counted = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    linears = [name for name, _ in model.layers[0].named_children() if "proj" in name]
    assert len(linears) == 7
    for name in linears:
        assert rows[name].count == CONFIG.layers
        for layer in range(CONFIG.layers):
            assert rows[name].flops == counted[f"Transformer.layers.{layer}.{name}"]
    blocks = [counted[f"Transformer.layers.{layer}"] for layer in range(CONFIG.layers)]
    assert rows["lm_head"].flops == counted["Transformer"] - sum(blocks)


def test_the_submodules_carry_the_operator_names_of_the_rows(model, a6000):
    step = rooflm.ForwardPass.prefill(1, 8)
    report = rooflm.analyze(model.to_roofline(), a6000, step)
    names = {row.name for row in report.operators if row.weight_bytes}
    parts = {name for name, _ in model.layers[0].named_children()}
    assert names - {"embedding", "final_norm", "lm_head"} == parts


# ---- the config


def test_a_config_survives_json():
    config = replace(CONFIG, rope_base=100_000.0, norm_eps=1e-6)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads is 3; allowed: a divisor of 4"),
        ({"kv_heads": 8}, "kv_heads is 8"),
        ({"hidden": 36}, "hidden is 36; allowed: a multiple of 8"),
        ({"layers": 0}, "layers is 0"),
        ({"vocab": -5}, "vocab is -5"),
        ({"vocab": 40.0}, "vocab is 40.0"),
        ({"heads": True}, "heads is True"),
        ({"intermediate": "48"}, "intermediate is '48'"),
        ({"rope_base": 0}, "rope_base is 0; allowed: a positive number"),
        ({"rope_base": "1e4"}, "rope_base is '1e4'"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
    ],
)
def test_impossible_dimensions_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(CONFIG, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; allowed for a lab model: 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling is .*; allowed for a lab model: None"),
        ({"head_dim": 7}, "head_width is 7; allowed: an even int"),
        ({"head_dim": "8"}, "head_width is '8'"),
        ({"hidden_size": None}, "hidden is None"),
    ],
)
def test_another_architecture_is_refused_not_read_as_ours(change, message):
    fields = {**CONFIG.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Config.from_dict(fields)


def test_a_missing_field_is_named():
    fields = CONFIG.to_dict()
    del fields["rope_theta"], fields["vocab_size"]
    with pytest.raises(ValueError, match="the config lacks vocab_size, rope_theta"):
        Config.from_dict(fields)


def test_what_hugging_face_adds_is_no_obstacle():
    fields = {**CONFIG.to_dict(), "rope_scaling": None, "head_dim": 8, "torch_dtype": "float16"}
    assert Config.from_dict(fields) == CONFIG
