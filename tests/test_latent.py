"""Latent attention against loops over heads and positions, and its two forms against each other."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rooflm.lab.evaluate import evaluate
from rooflm.lab.kvcache.latent import (
    LatentCache,
    LatentConfig,
    LatentTransformer,
    absorbed_attention,
    expanded_attention,
)
from rooflm.lab.model import RMSNorm, rope_table, rotate
from rooflm.roofline.formats import Precision
from rooflm.roofline.model import ForwardPass
from rooflm.roofline.operators import SOFTMAX_FLOPS

SHAPES = [  # batch, heads, new tokens, context, head_dim, rope_dim, kv_rank
    (1, 1, 1, 1, 2, 2, 1),
    (2, 3, 1, 9, 8, 4, 5),
    (2, 4, 7, 7, 6, 2, 16),
    (3, 2, 5, 12, 4, 6, 3),
]


def config(**changes):
    sizes = {"vocab": 50, "hidden": 48, "layers": 3, "heads": 4, "kv_heads": 4, "intermediate": 40}
    return LatentConfig(**{**sizes, "kv_rank": 10, "rope_dim": 6, **changes})


@pytest.fixture(params=[0, 20], ids=["plain queries", "compressed queries"])
def model(request):
    torch.manual_seed(1)
    made = LatentTransformer(config(q_rank=request.param)).eval()
    for parameter in made.parameters():  # large weights: attention is far from uniform
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


@pytest.fixture
def tokens():
    return torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(2))


def random_inputs(shape, dtype=torch.float64):
    b, h, n, s, d, rope, rank = shape
    made = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(*size, generator=made, dtype=dtype)

    return (draw(b, h, n, d), draw(b, h, n, rope), draw(b, s, rank + rope), draw(h, d, rank),
            draw(h, d, rank))  # fmt: skip


def by_loops(q, q_rope, entries, key_up, value_up):
    """Equations 10, 11, 17 and 18, one query, one head and one position at a time."""
    b, h, n, _ = q.shape
    rank, context = key_up.shape[-1], entries.shape[1]
    out = torch.zeros_like(q)
    for row in range(b):
        for head in range(h):
            keys = [
                torch.cat((key_up[head] @ entry[:rank], entry[rank:])) for entry in entries[row]
            ]
            values = [value_up[head] @ entry[:rank] for entry in entries[row]]
            for i in range(n):
                query = torch.cat((q[row, head, i], q_rope[row, head, i]))
                seen = context - n + i + 1
                scores = [float(query @ keys[j]) / math.sqrt(len(query)) for j in range(seen)]
                exps = [math.exp(score - max(scores)) for score in scores]
                for j in range(seen):
                    out[row, head, i] += exps[j] / sum(exps) * values[j]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", [expanded_attention, absorbed_attention])
def test_both_forms_are_the_papers_sums(shape, attention):
    inputs = random_inputs(shape)
    torch.testing.assert_close(attention(*inputs), by_loops(*inputs), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_absorbed_is_expanded_in_single_precision(shape):
    inputs = random_inputs(shape, torch.float32)
    torch.testing.assert_close(
        absorbed_attention(*inputs), expanded_attention(*inputs), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_have_the_same_gradients(shape):
    found = []
    for attention in (expanded_attention, absorbed_attention):
        inputs = [x.requires_grad_() for x in random_inputs(shape)]
        attention(*inputs).square().sum().backward()
        found.append([x.grad for x in inputs])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    inputs = [x.requires_grad_() for x in random_inputs((1, 2, 2, 3, 2, 2, 3))]
    assert torch.autograd.gradcheck(absorbed_attention, inputs)


def whole_layer(block, x):
    """The layer of a whole text, written anew from the equations: no cache, one head at a time."""
    c = block.config
    d, rope, rank = c.head_dim, c.rope_dim, c.kv_rank
    n = x.shape[1]
    table = rope_table(torch.arange(n), rope, c.rope_base)
    queries = x
    if c.q_rank:
        queries = block.q_norm(x @ block.q_down_proj.weight.T)
    down = x @ block.kv_down_proj.weight.T
    latents, shared = block.kv_norm(down[..., :rank]), rotate(down[..., rank:], table)
    heads = []
    for i in range(c.heads):
        w_q = block.q_proj.weight[i * (d + rope) : (i + 1) * (d + rope)]
        w_k, w_v = block.kv_up_proj.weight[2 * i * d : 2 * (i + 1) * d].split(d)
        q = queries @ w_q.T
        q = torch.cat((q[..., :d], rotate(q[..., d:], table)), -1)
        k = torch.cat((latents @ w_k.T, shared), -1)
        scores = q @ k.mT / math.sqrt(d + rope)
        scores = scores + torch.full((n, n), -math.inf).triu(1)
        heads.append(scores.softmax(-1) @ (latents @ w_v.T))
    return torch.cat(heads, -1) @ block.o_proj.weight.T


@pytest.mark.parametrize("absorbed", [True, False])
def test_the_layer_is_the_papers_layer(model, absorbed):
    model.absorb(absorbed)
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for block in model.layers:
            torch.testing.assert_close(
                block.attention(x, None, None), whole_layer(block, x), atol=1e-4, rtol=1e-4
            )


@torch.no_grad()
def test_absorbed_and_expanded_models_agree(model, tokens):
    ours, theirs = model.absorb()(tokens), model.absorb(False)(tokens)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert not torch.equal(ours, theirs)  # they are two computations


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [True, False])
def test_any_chunks_through_the_cache_give_the_uncached_logits(model, tokens, absorbed):
    model.absorb(absorbed)
    whole = model(tokens)
    random = torch.Generator().manual_seed(4)
    for _ in range(12):
        cuts = torch.randint(1, 9, (40,), generator=random).cumsum(0)
        cuts = [0, *[int(cut) for cut in cuts if cut < 40], 40]
        cache = LatentCache()
        parts = []
        for start, stop in pairwise(cuts):
            assert cache.length == start
            parts.append(model(tokens[:, start:stop], cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_cache_holds_rank_and_rope_numbers_a_token_and_layer(model, tokens):
    cache = LatentCache()
    assert (cache.length, cache.nbytes) == (0, 0)
    for stop in (1, 2, 33, 40):
        model(tokens[:, cache.length : stop], cache)
        assert cache.nbytes == 3 * stop * (10 + 6) * 4 * 3  # batch, tokens, numbers, bytes, layers
    full = 2 * 4 * 12 * 4 * 3 * 3 * 40  # keys and values of all heads
    assert full / cache.nbytes == 6


@torch.no_grad()
def test_the_rooflines_model_counts_the_same_parameters_and_cache(model, tokens):
    cache = LatentCache()
    model(tokens, cache)
    predicted = model.to_roofline()
    assert predicted.parameters == sum(p.numel() for p in model.parameters())
    assert predicted.cache_bytes(3, 40, 4) == cache.nbytes


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [True, False])
def test_the_rooflines_flops_are_those_that_torch_counts(model, tokens, absorbed):
    """All matmuls of a decode step, but for the 5 FLOPs of a softmax's element and for norms."""
    cache = LatentCache()
    model.absorb(absorbed)(tokens[:, :39], cache)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, 39:], cache)
    step, full = ForwardPass.decode(3, 40), Precision("fp32", "fp32", "fp32")
    predicted = 0
    for _, count, row in model.to_roofline().operators(step, full):
        softmax = SOFTMAX_FLOPS * 3 * 40 * 4 if row.name == "fused_attention" else 0
        predicted += count * (row.flops - softmax) if row.rate != "vector" else 0
    assert counter.get_total_flops() == predicted


@torch.no_grad()
def test_positions_go_on_after_the_first_chunk(model, tokens):
    """A cache that started each chunk at position 0 would give the same for a repeated text."""
    repeated = tokens[:, :1].repeat(1, 12)
    cache = LatentCache()
    model(repeated[:, :6], cache)
    later = model(repeated[:, 6:], cache)
    torch.testing.assert_close(later, model(repeated)[:, 6:], atol=1e-4, rtol=1e-4)


def test_it_trains_generates_and_has_a_perplexity():
    torch.manual_seed(0)
    model = LatentTransformer(config(vocab=8, layers=2), absorbed=False)
    text = torch.arange(8).repeat(60)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = torch.stack([text[i : i + 25] for i in torch.randint(400, (8,))])
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    model.eval().absorb()
    found = evaluate(model, text[:200], torch.ones(8, dtype=torch.int64), window=24)
    assert found.perplexity.value < 1.1
    cached = evaluate(
        model, text[:200], torch.ones(8, dtype=torch.int64), window=24, cache=LatentCache, chunk=5
    )
    assert cached.perplexity.value == pytest.approx(found.perplexity.value, rel=1e-4)
    with torch.inference_mode():
        cache = LatentCache()
        token, made = torch.tensor([[3]]), []
        for _ in range(20):
            token = model(token, cache)[:, -1:].argmax(-1)
            made.append(int(token))
    assert made == [(4 + i) % 8 for i in range(20)]


def test_weights_start_as_those_of_the_transformer():
    torch.manual_seed(0)
    model = LatentTransformer(config(hidden=256, layers=8, intermediate=300, kv_rank=64, q_rank=96))
    block = model.layers[5]
    for name in ("q_proj", "q_down_proj", "kv_down_proj", "kv_up_proj", "gate_proj"):
        assert getattr(block, name).weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("o_proj", "down_proj"):
        assert getattr(block, name).weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert isinstance(block.q_norm, RMSNorm) and not hasattr(block, "k_proj")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_rank": 0}, "kv_rank is 0"),
        ({"rope_dim": 5}, "rope_dim is 5; allowed: an even int from 2"),
        ({"q_rank": -1}, "q_rank is -1"),
        ({"kv_rank": 2.0}, "kv_rank is 2.0"),
        ({"kv_heads": 2}, "kv_heads is 2; allowed: heads"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as refused:
        config(**change)
    assert "\n" not in str(refused.value)
