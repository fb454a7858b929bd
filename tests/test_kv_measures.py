"""Where attention goes, and what rival rules keep, counted by hand."""

import pytest
import torch
from torch.nn import functional

from rooflm.lab.kvcache import attention, measures
from rooflm.lab.kvcache.evicting import SnapKVCache
from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.model import Config

VOCAB = 60


@pytest.fixture(scope="module")
def model(sharp):
    return sharp(Config(VOCAB, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps(model, tokens):
    return attention.attention_maps(model, tokens)


def test_maps_are_causal_and_of_the_model(model, tokens, maps):
    x = model.embedding(tokens)
    for layer, weights in zip(model.layers, maps, strict=True):
        assert weights.shape == (2, 2, 2, 40, 40)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 2, 40))
        assert weights.triu(1).abs().max() == 0
        values = layer.v_proj(layer.attn_norm(x)).view(2, 40, 2, 8).transpose(1, 2)
        heads = (weights @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2).flatten(2)
        x = x + layer.o_proj(heads)
        x = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(model.logits(x), model(tokens), atol=1e-4, rtol=1e-4)


def test_shares_are_sums_over_chosen_positions(maps):
    w = maps[1]
    for head in range(4):
        expected = w[:, head // 2, head % 2, 20:, :3].sum(-1).mean()
        torch.testing.assert_close(attention.first_share(w, 3)[head], expected)
    paid = w[..., 30:, :].sum((2, 3))[1, 0]
    best = sum(sorted(paid.tolist())[-4:]) / sum(paid.tolist())
    assert attention.best_share(w[..., 30:, :], 0.1)[1, 0].item() == pytest.approx(best, rel=1e-5)
    held = torch.tensor([0, 5, 7]).expand(2, 2, 3)
    part = (paid[0] + paid[5] + paid[7]) / paid.sum()
    torch.testing.assert_close(attention.mass_kept(w[..., 30:, :], held)[1, 0], part)


def test_overlap_counts_what_both_kept():
    a = torch.tensor([[[0, 2, 4, 6]]])
    assert attention.overlap(a, torch.tensor([[[2, 3, 4, 5]]])).item() == 0.5
    assert attention.overlap(a, a).item() == 1


def test_rivals_hold_the_budget_the_recent_and_their_own(model, tokens, maps):
    kept = measures.rival_choices(maps, 32, 12, 8)
    assert set(kept) == {"SnapKV", "sinks and window", "lottery", "lottery and 4 sinks",
                         "another lottery", "best for the future"}  # fmt: skip
    for of in kept.values():
        for layer in of:
            assert layer.shape == (2, 2, 12) and (layer.diff(dim=-1) > 0).all()
            assert (layer[..., -8:] == torch.arange(24, 32)).all()
    assert kept["sinks and window"][0][0, 0].tolist() == [0, 1, 2, 3, *range(24, 32)]
    assert kept["lottery and 4 sinks"][2][1, 1].tolist() == [0, 1, 2, 3, *range(24, 32)]
    snap = SnapKVCache(12, prompt=32)
    model(tokens[:, :32], snap)
    assert all(torch.equal(snap.held(i), kept["SnapKV"][i]) for i in range(3))
    mass = {name: measures.future_mass(maps, of, 32) for name, of in kept.items()}
    assert max(mass, key=mass.get) == "best for the future" and min(mass.values()) > 0


def test_shared_leaves_the_recent_out():
    a = [torch.tensor([[[0, 1, 8, 9]]]), torch.tensor([[[0, 1, 8, 9]]])]
    b = [torch.tensor([[[0, 5, 8, 9]]]), torch.tensor([[[4, 5, 8, 9]]])]
    assert measures.shared(a, b, recent=2) == 0.25


def test_loss_along_is_the_mean_of_pieces(model, tokens):
    found = measures.loss_along(model, tokens[:, :33], WindowedCache(64, 4), piece=8, chunk=5)
    logits = model(tokens[:, :32])
    for i in range(4):
        part = slice(8 * i, 8 * i + 8)
        flat = logits[:, part].flatten(0, 1)
        expected = functional.cross_entropy(flat, tokens[:, 1:33][:, part].flatten())
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_a_step_is_timed_with_the_cache_it_is_given(model):
    cache = measures.noise_cache(model, 10)
    assert cache.length == 10 and cache.nbytes == 3 * 2 * 2 * 10 * 8 * 4
    assert measures.step_ms(model, cache, runs=3) > 0
    assert cache.length == 10 + 4  # one to warm up
