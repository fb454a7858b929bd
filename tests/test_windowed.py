"""A window with sinks, against full attention under a mask that is written out by hand."""

import copy
import math
import random

import pytest
import torch

from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.model import Config

VOCAB = 60


@pytest.fixture(scope="module")
def model(sharp):
    return sharp(Config(VOCAB, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))


def read(model, tokens, cache, cuts):
    """Logits of a text that is read in pieces."""
    parts = tokens.split(cuts, dim=1)
    return torch.cat([model(part, cache) for part in parts], dim=1)


def cut(draw, total):
    """Random piece lengths."""
    cuts = []
    while sum(cuts) < total:
        cuts.append(min(draw.choice([1, 1, 2, 5, 9, 17]), total - sum(cuts)))
    return cuts


def turned(x, place, base):
    """RoPE of one vector (head_dim,) at a place, pair by pair."""
    out = x.clone()
    for i in range(len(x) // 2):
        angle = place * base ** (-2 * i / len(x))
        a, b = x[2 * i].item(), x[2 * i + 1].item()
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def by_hand(model, tokens, window, sinks, original):
    """Logits of one text, each query's own keys collected in a list and placed in a row."""
    c = model.config
    x = model.embedding(tokens)  # (tokens, hidden)
    for layer in model.layers:
        y = layer.attn_norm(x)
        q = layer.q_proj(y).view(-1, c.heads, c.head_dim)
        k = layer.k_proj(y).view(-1, c.kv_heads, c.head_dim)
        v = layer.v_proj(y).view(-1, c.kv_heads, c.head_dim)
        rows = []
        for p in range(len(tokens)):
            seen = [j for j in range(p + 1) if j < sinks or p - j < window]
            places = seen if original else list(range(len(seen)))
            heads = []
            for h in range(c.heads):
                g = h // (c.heads // c.kv_heads)
                query = turned(q[p, h], places[-1], c.rope_base)
                pairs = zip(seen, places, strict=True)
                scores = [query @ turned(k[j, g], place, c.rope_base) for j, place in pairs]
                shares = (torch.stack(scores) / math.sqrt(c.head_dim)).softmax(0)
                heads.append(sum(s * v[j, g] for s, j in zip(shares, seen, strict=True)))
            rows.append(torch.cat(heads))
        x = x + layer.o_proj(torch.stack(rows))
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.logits(x)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_a_query_sees_the_sinks_and_its_window(model, tokens, sinks, original):
    expected = by_hand(model, tokens[0, :24], 6, sinks, original)
    for cuts in ([1] * 24, [24], [2, 1, 9, 12], [3, 21]):
        found = read(model, tokens[:1, :24], WindowedCache(6, sinks, original), cuts)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [lambda: WindowedCache(40, 0), lambda: WindowedCache(36, 4),
                                   lambda: WindowedCache(100, 4, original=True)])  # fmt: skip
def test_a_window_of_the_whole_text_changes_nothing(model, tokens, cache):
    draw, expected = random.Random(0), model(tokens)
    for _ in range(5):
        found = read(model, tokens, cache(), cut(draw, 40))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_how_the_text_is_cut_makes_no_difference(model, tokens):
    draw = random.Random(1)
    expected = read(model, tokens, WindowedCache(5, 2), [1] * 40)
    for _ in range(10):
        found = read(model, tokens, WindowedCache(5, 2), cut(draw, 40))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_left_the_window_cannot_be_seen(model, tokens):
    changed = tokens.clone()
    changed[:, 4:20] = (changed[:, 4:20] + 7) % VOCAB
    # With 3 layers the past reaches 3 windows back, and no further.
    a, b = (read(model, x, WindowedCache(6, 4), [7, 20, 13]) for x in (tokens, changed))
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a[:, 4:35] - b[:, 4:35]).abs().amax((0, 2)).min() > 0
    torch.testing.assert_close(a[:, 20 + 3 * 5 :], b[:, 20 + 3 * 5 :], atol=1e-5, rtol=1e-5)


def test_sinks_are_never_forgotten(model, tokens):
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 7) % VOCAB
    for sinks, moves in ((1, True), (0, False)):
        a, b = (read(model, x, WindowedCache(6, sinks), [40])[:, -1] for x in (tokens, changed))
        assert ((a - b).abs().max() > 1e-3) == moves


def test_it_holds_what_it_says(model, tokens):
    draw = random.Random(2)
    c, cache, seen = model.config, WindowedCache(7, 3), 0
    for n in cut(draw, 40):
        model(tokens[:, seen : seen + n], cache)
        seen += n
        expected = [j for j in range(seen) if j < 3 or j >= max(3, seen - 7)]
        assert cache.length == seen
        for layer in range(c.layers):
            assert cache.held(layer).tolist() == expected
        numbers = c.layers * 2 * 3 * c.kv_heads * len(expected) * c.head_dim
        assert cache.nbytes == 4 * numbers


def test_a_fork_goes_its_own_way(model, tokens):
    cache = WindowedCache(6, 2)
    model(tokens[:, :20], cache)
    fork = copy.deepcopy(cache)
    model(tokens[:, 30:40], fork)
    rest = model(tokens[:, 20:25], cache)
    expected = read(model, tokens[:, :25], WindowedCache(6, 2), [25])[:, 20:]
    torch.testing.assert_close(rest, expected, atol=1e-4, rtol=1e-4)
    assert (cache.length, fork.length) == (25, 30)


def test_slots_stay_small_in_a_long_text(model):
    """Scores at positions that only a long text has, from the distances alone."""
    tokens = torch.randint(0, VOCAB, (1, 700), generator=torch.Generator().manual_seed(3))
    far = read(model, tokens, WindowedCache(6, 0), [100] * 7)[:, -1]
    near = read(model, tokens[:, -60:], WindowedCache(6, 0), [60])[:, -1]
    torch.testing.assert_close(far, near, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (1.5, 4), (8, -1)])
def test_it_refuses(window, sinks):
    with pytest.raises(ValueError, match="allowed"):
        WindowedCache(window, sinks)
