"""The paged cache against the uncached model: no fork, hit or eviction changes a logit."""

import random

import pytest
import torch

from rooflm.lab.kvcache.beams import beam_search
from rooflm.lab.kvcache.blocks import OutOfBlocks
from rooflm.lab.kvcache.paged import PagedCache, PagePool, gather, paged_attention
from rooflm.lab.kvcache.paged_speed import time_reads
from rooflm.lab.model import Config, FullCache, attend

CONFIG = Config(vocab=31, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48, window=64)


@pytest.fixture(scope="module")
def model(sharp):
    return sharp(CONFIG, seed=3)


def random_tokens(seed, *shape):
    return torch.randint(0, CONFIG.vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("blockwise", [False, True], ids=["gathered", "block by block"])
@pytest.mark.parametrize("block_tokens", [1, 3, 16, 64])
@pytest.mark.parametrize("announced", [True, False])
def test_any_chunking_gives_the_uncached_logits(model, block_tokens, announced, blockwise):
    rng, tokens = random.Random(block_tokens), random_tokens(1, 3, 40)
    expected = model(tokens)
    cache = PagedCache(PagePool(CONFIG, 200, block_tokens), blockwise)
    found, at = [], 0
    while at < 40:
        part = tokens[:, at : at + rng.choice([1, 1, 2, 7])]
        found.append(model(cache.note(part) if announced else part, cache))
        at += part.shape[1]
        assert cache.length == at
    close(torch.cat(found, 1), expected)


def test_a_prompt_may_be_read_in_chunks_after_it_was_admitted(model):
    tokens = random_tokens(2, 1, 30)
    pool = PagePool(CONFIG, 40, 4)
    cache, other = PagedCache(pool), PagedCache(pool)
    rest = cache.admit(tokens)
    parts = [model(part, cache) for part in rest[:, :13].split(5, dim=1)]
    assert other.admit(tokens).shape[1] == 30  # half of it is written: none is found
    parts.append(model(rest[:, 13:], cache))
    close(torch.cat(parts, 1), model(tokens))


def test_a_prefix_hit_skips_what_is_there_and_changes_no_logit(model):
    shared, pool = random_tokens(4, 21), PagePool(CONFIG, 60, 4)
    first = PagedCache(pool)
    model(first.admit(torch.cat([shared, random_tokens(5, 9)])), first)
    first.free()
    prompts = torch.stack([torch.cat([shared, random_tokens(s, 7)]) for s in (6, 7)])
    second = PagedCache(pool)
    rest = second.admit(prompts)
    assert second.length == 20 and rest.shape == (2, 8)
    close(model(rest, second), model(prompts)[:, 20:])
    assert second.nbytes == (5 + 2 * 2) * pool.block_bytes  # five shared, two more each


def will_write_alone(cache):
    """Whether no block that the next pass writes is another's, or can be found."""
    manager = cache.pool.manager
    first = cache.length // manager.block_tokens
    tables = [manager.tables[sequence].blocks[first:] for sequence in cache.sequences]
    written = [manager.blocks[block] for table in tables for block in table]
    return all(block.references == 1 and block.hash is None for block in written)


def test_a_batch_skips_what_all_its_prompts_have(model):
    pool, one = PagePool(CONFIG, 60, 4), random_tokens(8, 20)
    first = PagedCache(pool)
    model(first.admit(one), first)
    prompts = torch.stack([one, torch.cat([one[:9], random_tokens(9, 11)])])
    second = PagedCache(pool)
    rest = second.admit(prompts)
    assert second.length == 8 and will_write_alone(second)
    close(model(rest, second), model(prompts)[:, 8:])
    pool.manager.check()


def test_a_hit_that_is_evicted_for_its_neighbour_is_no_hit(model):
    """Room for the first row takes the idle blocks that the second row would have found."""
    pool = PagePool(CONFIG, 12, 4)
    second_row, first_row, garbage = (
        random_tokens(10, 17),
        random_tokens(11, 9),
        random_tokens(12, 24),
    )
    for text in (second_row, first_row, garbage):
        cache = PagedCache(pool)
        model(cache.admit(text), cache)
        cache.free()
    assert (pool.manager.free_blocks, pool.manager.idle_blocks) == (0, 12)
    prompts = torch.stack([torch.cat([first_row, random_tokens(13, 8)]), second_row])
    assert [len(pool.manager.find(row.tolist())) for row in prompts] == [2, 4]
    cache = PagedCache(pool)
    rest = cache.admit(prompts)
    assert cache.length == 4 and will_write_alone(cache)
    close(model(rest, cache), model(prompts)[:, 4:])
    pool.manager.check()


def test_forks_go_their_own_ways(model):
    prompt, pool = random_tokens(12, 1, 10), PagePool(CONFIG, 60, 4)
    trunk = PagedCache(pool)
    model(trunk.admit(prompt), trunk)
    held = pool.used_bytes
    samples = trunk.fork(4)
    assert pool.used_bytes == held
    tails = random_tokens(13, 4, 9)
    found = torch.cat([model(samples.note(tails[:, i : i + 1]), samples) for i in range(9)], 1)
    whole = torch.cat([prompt.expand(4, -1), tails], 1)
    close(found, model(whole)[:, 10:])
    assert pool.manager.copies == 4  # the trunk still has the half block
    own = random_tokens(14, 1, 5)
    close(model(trunk.note(own), trunk), model(torch.cat([prompt, own], 1))[:, 10:])
    pool.manager.check()


def test_beams_that_are_kept_and_dropped_read_their_own_past(model):
    rng, pool = random.Random(1), PagePool(CONFIG, 60, 4)
    prompt = random_tokens(15, 1, 6)
    trunk = PagedCache(pool)
    model(trunk.admit(prompt), trunk)
    beams, texts = trunk.fork(3), prompt.expand(3, -1)
    for step in range(14):
        parents = [rng.randrange(3) for _ in range(3)]
        beams.keep(parents)
        following = random_tokens(100 + step, 3, 1)
        texts = torch.cat([texts[parents], following], 1)
        close(model(beams.note(following), beams)[:, -1], model(texts)[:, -1])
        pool.manager.check()
    assert pool.manager.copies > 5


def test_a_pool_under_pressure_gives_right_logits_or_refuses(model):
    """Many caches in a small pool: hits, evictions, forks and refusals, every logit compared."""
    rng, pool = random.Random(7), PagePool(CONFIG, 14, 4)
    live, refusals, hits = [], 0, 0
    for step in range(160):
        if live and rng.random() < 0.3:
            live.pop(rng.randrange(len(live)))[0].free()
        try:
            if not live or rng.random() < 0.4:
                text = random_tokens(rng.randrange(3), 1, 24)[:, : rng.randint(2, 24)]
                text = torch.cat([text, random_tokens(step, 1, 3)], 1)
                cache = PagedCache(pool)
                logits = model(rest := cache.admit(text), cache)
                hits += cache.length - rest.shape[1] > 0
                live.append((cache, text))
            elif rng.random() < 0.2:
                cache, text = rng.choice(live)
                live.append((cache.fork(), text))
                continue
            else:
                i = rng.randrange(len(live))
                cache, text = live[i]
                more = random_tokens(step, 1, rng.randint(1, 5))
                logits = model(cache.note(more), cache)
                live[i] = cache, (text := torch.cat([text, more], 1))
            close(logits[:, -1], model(text)[:, -1])
        except OutOfBlocks:
            refusals += 1
        pool.manager.check()
    assert refusals > 5 and hits > 5 and pool.manager.evictions > 20


def test_a_refused_batch_leaves_every_row_as_it_was(model):
    pool, tokens = PagePool(CONFIG, 5, 4), random_tokens(16, 2, 8)
    cache = PagedCache(pool)
    model(cache.admit(tokens), cache)
    with pytest.raises(OutOfBlocks, match="append needs 1 blocks; there are 0 free and 0 idle"):
        cache.note(random_tokens(17, 2, 1))  # one row would fit, two do not
    assert cache.length == 8 and pool.manager.free_blocks == 1
    with pytest.raises(OutOfBlocks):
        PagedCache(pool).admit(random_tokens(18, 2, 3))
    assert pool.manager.free_blocks == 1
    pool.manager.check()
    cache.free()
    again = PagedCache(pool)
    close(model(again.admit(tokens[:1, :7]), again)[:, -1], model(tokens[:1, :7])[:, -1])


def test_held_bytes_are_whole_blocks_of_every_layer(model):
    pool, full = PagePool(CONFIG, 20, 4, torch.float16), FullCache()
    cache = PagedCache(pool)
    tokens = random_tokens(19, 2, 9)
    model(cache.note(tokens), cache)
    model(tokens, full)
    by_hand = 2 * 3 * 4 * 2 * CONFIG.kv_heads * CONFIG.head_dim * CONFIG.layers * 2
    assert cache.nbytes == by_hand == full.nbytes // 2 * 12 // 9  # FP16; 12 places for 9 tokens
    assert pool.nbytes == 20 * pool.block_bytes
    cache.free()
    assert cache.nbytes == 0 and cache.length == 0


@pytest.mark.parametrize("context", [1, 4, 5, 23])
def test_block_by_block_is_attention(context):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 30, 4, 2, 8).unbind(0)
    table = random.Random(context).sample(range(30), -(-context // 4))
    q = 3 * torch.randn(6, 8)
    k, v = (torch.cat([x[block] for block in table])[:context] for x in (keys, values))
    scores = torch.stack([k[:, j // 3] @ q[j] for j in range(6)]) / 8**0.5
    weights = scores.softmax(-1)
    by_hand = torch.stack([weights[j] @ v[:, j // 3] for j in range(6)])
    found = paged_attention(q, keys, values, table, context)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)
    tables = torch.tensor([table])
    gathered = attend(q[None, :, None], *(gather(x, tables, context) for x in (keys, values)))
    torch.testing.assert_close(gathered[0, :, 0], by_hand, rtol=1e-5, atol=1e-5)


def test_wrong_use_is_refused(model):
    cache = PagedCache(PagePool(CONFIG, 8, 4))
    model(cache.admit(torch.tensor([1, 2, 3])), cache)
    with pytest.raises(ValueError, match="holds 3 tokens"):
        cache.admit(torch.tensor([1]))
    with pytest.raises(ValueError, match="2 rows are given; allowed: 1"):
        cache.note(torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="batch is 2"):
        model(torch.tensor([[1], [2]]), cache)


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_beam_search_is_that_without_a_cache(model, beams):
    prompt, steps = random_tokens(20, 11), 9
    kept = [(0.0, [])]  # by hand: every continuation of every beam, read anew
    for _ in range(steps):
        ends = []
        for score, tail in kept:
            whole = torch.cat([prompt, torch.tensor(tail, dtype=torch.int64)])
            logs = model(whole[None])[0, -1].log_softmax(-1).tolist()
            ends += [(score + x, [*tail, token]) for token, x in enumerate(logs)]
        kept = sorted(ends, reverse=True)[:beams]
    pool = PagePool(CONFIG, 60, 4)
    found = beam_search(model, pool, prompt, beams, steps)
    assert found.tokens.tolist() == [tail for _, tail in kept]
    close(found.scores, torch.tensor([score for score, _ in kept]))
    assert pool.manager.used_blocks == 0
    # At least the two full blocks of the prompt are shared by all.
    assert found.saved >= (beams - 1) * 2 / (beams * 5) and (found.saved == 0) == (beams == 1)
    pool.manager.check()


def test_reads_are_timed_three_ways():
    found = time_reads(16, batch=2, context=64, runs=3)
    assert min(found) > 0 and found.block_by_block > found.one_piece
    with pytest.raises(ValueError, match="block_tokens is 48"):
        time_reads(48, context=64)
