"""Caches that throw away, against the papers' algorithms on plain lists."""

import copy
import math
import random

import pytest
import torch

from rooflm.lab.kvcache.evicting import (
    H2OCache,
    PriorityCache,
    SnapKVCache,
    TOVACache,
    choose_kept,
    draw_lots,
    lots_after,
    observed_scores,
)
from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.model import Config, FullCache, Rope

VOCAB, HEADS, GROUPS, WIDTH = 60, 4, 2, 8


@pytest.fixture(scope="module")
def model(sharp):
    return sharp(Config(VOCAB, hidden=32, layers=3, heads=HEADS, kv_heads=GROUPS, intermediate=48))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stream():
    """Queries, keys and values of 30 positions of one sequence, before rotation."""
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, 30, WIDTH, generator=draw) for n in (HEADS, GROUPS, GROUPS))
    return 2 * q, 2 * k, v


def read(model, tokens, cache, cuts):
    return torch.cat([model(part, cache) for part in tokens.split(cuts, dim=1)], dim=1)


def cut(draw, total):
    cuts = []
    while sum(cuts) < total:
        cuts.append(min(draw.choice([1, 1, 2, 5, 9, 17]), total - sum(cuts)))
    return cuts


class PlainList:
    """One KV head's cache as Python lists; a `rule` says which position goes next."""

    def __init__(self, budget, recent, rule):
        self.budget, self.recent, self.rule = budget, recent, rule
        self.kept, self.paid, self.last = [], {}, {}

    def step(self, position, queries, key, value):
        """Attention of one token's query heads; then positions leave one by one."""
        self.kept.append((position, key, value))
        self.paid[position] = 0.0
        self.last = dict.fromkeys((p for p, _, _ in self.kept), 0.0)
        out = []
        for query in queries:
            scores = [math.exp(sum(a * b for a, b in zip(query, k, strict=True)) / WIDTH**0.5)
                      for _, k, _ in self.kept]  # fmt: skip
            shares = [s / sum(scores) for s in scores]
            for share, (p, _, _) in zip(shares, self.kept, strict=True):
                self.paid[p] += share
                self.last[p] += share
            pairs = list(zip(shares, (v for _, _, v in self.kept), strict=True))
            out.append([sum(s * v[i] for s, v in pairs) for i in range(WIDTH)])
        return out

    def evict(self):
        while len(self.kept) > self.budget:
            older = [p for p, _, _ in self.kept[: len(self.kept) - self.recent]]
            worst = min(older, key=self.rule(self))
            self.kept = [entry for entry in self.kept if entry[0] != worst]
            del self.paid[worst]


def run_lists(stream, lists, evict=None):
    """All positions one at a time; outputs (heads, positions, width) as nested lists."""
    q, k, v = stream
    rope = Rope(WIDTH, 10_000.0)
    q, k = rope(q)[0].tolist(), rope(k)[0].tolist()
    v = v[0].tolist()
    out = []
    for t in range(30):
        heads = []
        for g, one in enumerate(lists):
            group = [q[h][t] for h in range(HEADS) if h // (HEADS // GROUPS) == g]
            heads += one.step(t, group, k[g][t], v[g][t])
        if evict is None:
            for one in lists:
                one.evict()
        else:
            evict(lists)
        out.append(heads)
    return torch.tensor(out).transpose(0, 1)


def run_cache(stream, cache, cuts):
    rope = Rope(WIDTH, 10_000.0)
    parts = zip(*(x.split(cuts, dim=2) for x in stream), strict=True)
    return torch.cat([cache.attend(0, *part, rope) for part in parts], dim=2)[0]


@pytest.mark.parametrize(("budget", "recent"), [(6, 3), (8, 2), (5, 0), (4, 4)])
def test_h2o_is_the_papers_greedy_algorithm(stream, budget, recent):
    lists = [PlainList(budget, recent, lambda me: me.paid.get) for _ in range(GROUPS)]
    cache = H2OCache(budget, recent)
    torch.testing.assert_close(
        run_cache(stream, cache, [1] * 30), run_lists(stream, lists), atol=1e-4, rtol=1e-4
    )
    assert cache.held()[0].tolist() == [[p for p, _, _ in one.kept] for one in lists]


def test_tova_drops_what_the_last_query_looks_at_least(stream):
    def evict(lists):  # one choice for all heads of the layer
        while len(lists[0].kept) > 6:
            total = {p: sum(one.last[p] for one in lists) for p, _, _ in lists[0].kept}
            worst = min(total, key=total.get)
            for one in lists:
                one.kept = [entry for entry in one.kept if entry[0] != worst]

    lists = [PlainList(6, 0, None) for _ in range(GROUPS)]
    cache = TOVACache(6)
    found = run_cache(stream, cache, [1] * 30)
    torch.testing.assert_close(found, run_lists(stream, lists, evict), atol=1e-4, rtol=1e-4)
    assert cache.held()[0].tolist() == [[p for p, _, _ in one.kept] for one in lists]


def test_snapkv_keeps_what_the_last_queries_look_at(stream):
    q, k, v = stream
    cache = SnapKVCache(budget=9, window=4, pool=3, prompt=28)
    out = run_cache(stream, cache, [10, 15, 3, 1, 1])
    rope = Rope(WIDTH, 10_000.0)
    turned_q, turned_k = rope(q)[0], rope(k)[0]
    for g in range(GROUPS):
        paid = [0.0] * 28
        for h in (2 * g, 2 * g + 1):
            for t in range(24, 28):
                shares = (turned_k[g, : t + 1] @ turned_q[h, t] / WIDTH**0.5).softmax(0).tolist()
                for j, share in enumerate(shares):
                    paid[j] += share
        near = [sum(paid[max(0, j - 1) : j + 2]) / 3 for j in range(28)]
        best = sorted(range(24), key=lambda j: -near[j])[:5]
        kept = [*sorted(best), *range(24, 28)]
        assert cache.held()[0, g].tolist() == [*kept, 28, 29]  # what is generated stays
        for h in (2 * g, 2 * g + 1):
            for t in (28, 29):
                seen = [*kept, *range(28, t + 1)]
                shares = (turned_k[g, seen] @ turned_q[h, t] / WIDTH**0.5).softmax(0)
                torch.testing.assert_close(out[h, t], shares @ v[0, g, seen])
    full = run_cache(stream, FullCache(), [30])
    torch.testing.assert_close(out[:, :28], full[:, :28])  # the prompt itself sees everything


def test_snapkv_begins_to_compress_when_generation_begins(model, tokens):
    cache = SnapKVCache(8, window=4)
    model(tokens[:, :30], cache)
    assert cache.held(1).shape == (3, GROUPS, 30)
    model(tokens[:, 30:31], cache)
    assert cache.held(1).shape == (3, GROUPS, 9)
    model(tokens[:, 31:36], cache)
    assert cache.held(1).shape == (3, GROUPS, 14)
    again = SnapKVCache(8, window=4, again=True)
    read(model, tokens, again, [17, 1, 1, 16, 5])
    assert again.held(2).shape == (3, GROUPS, 8)


WHOLE = [lambda: H2OCache(40), lambda: TOVACache(40), lambda: PriorityCache(64),
         lambda: SnapKVCache(40), lambda: SnapKVCache(40, again=True)]  # fmt: skip


@pytest.mark.parametrize("make", WHOLE)
def test_a_budget_for_all_changes_nothing(model, tokens, make):
    draw, expected = random.Random(0), model(tokens)
    for _ in range(4):
        found = read(model, tokens, make(), cut(draw, 40))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


SMALL = [lambda: H2OCache(9), lambda: TOVACache(9), lambda: PriorityCache(9, 4),
         lambda: SnapKVCache(9, window=4, again=True)]  # fmt: skip


@pytest.mark.parametrize("make", SMALL)
def test_what_was_evicted_can_have_no_influence(model, tokens, make):
    """Perturb the keys and values of one layer's evicted positions, before they are evicted."""
    seen = []
    for wrong in (False, True):
        draw = torch.Generator().manual_seed(4)
        q, k, v = (torch.randn(2, n, 30, WIDTH, generator=draw) for n in (HEADS, GROUPS, GROUPS))
        rope, cache = Rope(WIDTH, 10_000.0), make()
        cache.attend(0, q[:, :, :20], k[:, :, :20], v[:, :, :20], rope)
        gone = torch.ones(2, GROUPS, 20).scatter(2, cache.held(), 0).bool()
        if wrong:  # the same choice, made by the same scores, of other values
            cache = make()
            spoiled = v[:, :, :20].masked_fill(gone[..., None], 1e6)
            cache.attend(0, q[:, :, :20], k[:, :, :20], spoiled, rope)
        seen.append(cache.attend(0, q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], rope))
        assert gone.sum() == 2 * GROUPS * 11
        stored = cache._layers[0]
        assert stored.values.abs().max() < 1e3
        assert stored.keys.untyped_storage().nbytes() == stored.keys.nbytes  # no view of more
    assert torch.equal(*seen)


@pytest.mark.parametrize("make", SMALL)
def test_random_steps_forks_and_evictions_against_plain_counts(model, tokens, make):
    draw = random.Random(5)
    live = [(make(), [])]
    for _ in range(60):
        i = draw.randrange(len(live))
        cache, text = live[i]
        if draw.random() < 0.2 and len(live) < 4:
            live.append((copy.deepcopy(cache), list(text)))
        elif len(text) > 60:
            live[i] = (make(), [])
        else:
            n = draw.choice([1, 1, 2, 7])
            new = [draw.randrange(VOCAB) for _ in range(n)]
            model(torch.tensor([new]), cache)
            text += new
        cache, text = live[i]
        assert cache.length == len(text)
        for layer in range(3 if text else 0):
            held = cache.held(layer)
            assert held.shape[2] == min(9, len(text))
            assert (held.diff(dim=2) > 0).all()
            assert held.min() >= 0 and held.max() < len(text)
            recent = cache.recent
            last = list(range(max(0, len(text) - recent), len(text)))
            for g in range(GROUPS):
                assert not recent or held[0, g].tolist()[-len(last) :] == last
    for cache, text in live:  # each fork is what its own text makes of a fresh cache
        assert cache.length == len(text)


@pytest.mark.parametrize("make", SMALL)
def test_a_fork_is_as_good_as_its_original(model, tokens, make):
    cache = make()
    model(tokens[:, :20], cache)
    fork = copy.deepcopy(cache)
    model((tokens[:, 20:33] + 1) % VOCAB, fork)
    found = model(tokens[:, 20:28], cache)
    expected = read(model, tokens[:, :28], make(), [20, 8])[:, 20:]
    assert torch.equal(found, expected)


def test_rows_of_a_batch_choose_for_themselves(model, tokens):
    together = read(model, tokens, H2OCache(9), [20, 5, 15])
    alone = torch.cat([read(model, row[None], H2OCache(9), [20, 5, 15]) for row in tokens])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_the_first_and_the_last_by_priority_are_a_window_with_sinks(model, tokens):
    first = PriorityCache(11, 7, lambda layer, places: -places)
    found = read(model, tokens, first, [1] * 40)
    # A window counts the query itself, a budget what it finds there.
    expected = read(model, tokens, WindowedCache(8, 4, original=True), [1] * 40)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_nbytes_counts_every_number(model, tokens):
    cache = H2OCache(9)
    model(tokens, cache)
    rows = 3 * 3 * GROUPS * 9  # layers, sequences, heads, positions
    assert cache.nbytes == rows * (2 * 8 * 4 + 4 + 4)  # keys, values; score and place
    snap = SnapKVCache(9, window=4, again=True)
    model(tokens, snap)
    assert snap.nbytes == cache.nbytes + 3 * 3 * HEADS * 4 * 8 * 4  # the observing queries
    once = SnapKVCache(9, window=4, prompt=40)
    model(tokens, once)
    assert once.nbytes == cache.nbytes


def test_choose_kept_takes_the_best_and_the_last():
    scores = torch.tensor([[5.0, 1, 4, 2, 3, 0, 0]])
    assert choose_kept(scores, 4, 2).tolist() == [[0, 2, 5, 6]]
    assert choose_kept(scores, 3, 0).tolist() == [[0, 2, 4]]
    assert choose_kept(scores, 3, 3).tolist() == [[4, 5, 6]]
    assert choose_kept(scores, 7, 2).tolist() == [list(range(7))]
    assert choose_kept(scores, 99, 2).tolist() == [list(range(7))]


def test_observed_scores_sum_the_group_and_average_the_neighbours():
    weights = torch.rand(1, 2, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    found, paid = observed_scores(weights, 3), weights.sum((2, 3))
    for j in range(9):
        expected = paid[..., max(0, j - 1) : j + 2].sum(-1) / 3
        torch.testing.assert_close(found[..., j], expected)


def test_the_lottery_is_uniform_and_of_no_memory():
    """Kept positions of a stream: every one as likely, whatever the passes were."""
    places = torch.arange(400).expand(1, 200, 400)
    lots = draw_lots(0, 0, places)
    assert (lots >= 0).all() and (lots <= 1).all()
    kept = choose_kept(lots, 40, 0)
    counts = torch.zeros(400).scatter_add(0, kept.flatten(), torch.ones(kept.numel()))
    expected = kept.numel() / 400  # 20 each; 399 degrees of freedom, sd sqrt(2 * 399)
    statistic = ((counts - expected) ** 2 / (expected * 0.9)).sum().item()
    assert abs(statistic - 399) < 5 * (2 * 399) ** 0.5
    shares = torch.tensor([len(set(a.tolist()) & set(b.tolist())) / 40
                           for a, b in zip(kept[0, :-1], kept[0, 1:], strict=True)])  # fmt: skip
    assert shares.mean().item() == pytest.approx(0.1, abs=0.02)  # heads draw independently
    assert not torch.equal(draw_lots(1, 0, places), lots)
    assert not torch.equal(draw_lots(0, 1, places), lots)


def test_a_lottery_after_the_sinks_keeps_them_and_samples_the_rest():
    places = torch.arange(200).expand(1, 50, 200)
    kept = choose_kept(lots_after(4)(0, places), 30, 10)
    for head in kept[0].tolist():
        assert head[:4] == [0, 1, 2, 3] and head[-10:] == list(range(190, 200))
    middle = kept[0, :, 4:-10].double()
    assert middle.mean().item() == pytest.approx((4 + 189) / 2, abs=5)
    assert torch.equal(lots_after(0)(3, places), draw_lots(0, 3, places))


def test_how_the_text_is_cut_does_not_change_what_the_lottery_keeps(model, tokens):
    held = []
    for cuts in ([40], [1] * 40, [3, 20, 17]):
        cache = PriorityCache(9, 4)
        read(model, tokens, cache, cuts)
        held.append(cache.held(2))
    assert torch.equal(held[0], held[1]) and torch.equal(held[0], held[2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: H2OCache(0), "budget is 0"),
        (lambda: H2OCache(8, 9), "recent is 9; allowed: 0 to the budget, 8"),
        (lambda: PriorityCache(8, -1), "recent is -1"),
        (lambda: SnapKVCache(8, pool=4), "pool is 4; allowed: an odd number"),
        (lambda: SnapKVCache(8, prompt=0), "prompt is 0"),
    ],
)
def test_it_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()
