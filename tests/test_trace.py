"""Placing requests in memory: against a drawn map of it, and against the block manager."""

import math
import random

import numpy as np
import pytest

from rooflm.lab.kvcache.allocators import RESERVATIONS, Contiguous, Paged
from rooflm.lab.kvcache.blocks import BlockManager, OutOfBlocks
from rooflm.lab.kvcache.trace import (
    WORKLOADS,
    Request,
    make_trace,
    mean_held,
    sampling_saving,
    simulate,
)


class Managed:
    """The real block manager as an allocator, to count beside the one that only counts."""

    def __init__(self, capacity, block_tokens, shared=0):
        self.capacity, self.size, self.shared = capacity, block_tokens, shared
        self.manager = BlockManager(capacity // block_tokens, block_tokens)
        self.kept = math.ceil(0.01 * len(self.manager.blocks))
        self.numbers = {}

    @property
    def saved(self):
        tables = self.manager.tables.values()
        return sum(len(t.blocks) for t in tables) * self.size - self.manager.used_blocks * self.size

    def admit(self, key, tokens, final):
        m = self.manager
        text = [-1] * min(self.shared, tokens) + [key] * (tokens - self.shared)
        common = self.shared // self.size if self.numbers else 0
        if self.numbers and -(-tokens // self.size) - common + self.kept > m.free_blocks:
            return False
        try:
            self.numbers[key], found = m.admit(text, self.shared)
        except OutOfBlocks:
            return False
        assert found == (common * self.size if tokens > common * self.size else 0)
        m.commit(self.numbers[key])
        return True

    def grow(self, key, tokens):
        try:
            assert self.manager.append(self.numbers[key], [key]) == []
        except OutOfBlocks:
            return False
        return True

    def release(self, key):
        self.manager.free(self.numbers.pop(key))
        self.manager.evict(len(self.manager.blocks))

    def waste(self, key, tokens, final):
        table = self.manager.tables[self.numbers[key]]
        return 0, len(table.blocks) * self.size - len(table.tokens)


@pytest.mark.parametrize(
    ("block_tokens", "shared"), [(1, 0), (16, 0), (16, 40), (64, 0), (64, 128)]
)
def test_counted_blocks_are_those_of_the_manager(block_tokens, shared):
    trace = make_trace(60, 90, 60, rate=1.0, longest=400, seed=block_tokens)
    trace = [request._replace(prompt=request.prompt + shared) for request in trace]
    counted = simulate(trace, Paged(2000, block_tokens, shared))
    assert counted == simulate(trace, Managed(2000, block_tokens, shared))
    assert counted.preemptions > 0
    shares = counted.used + counted.reserved + counted.internal + counted.external
    assert shares == pytest.approx(1)


@pytest.mark.parametrize("buddy", [True, False], ids=["buddy", "first fit"])
@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_pieces_never_overlap_and_all_come_back(reserve, buddy):
    rng = random.Random(5)
    allocator = Contiguous(1000, reserve, buddy, longest=100)
    whole, owner, keys = list(allocator.gaps), [None] * 1000, []
    for key in range(3000):
        if keys and rng.random() < 0.48:
            gone = keys.pop(rng.randrange(len(keys)))
            owner = [None if o == gone else o for o in owner]
            allocator.release(gone)
        else:
            tokens, final = 10, rng.randint(11, 100)
            asked = {"max": 100, "oracle": final}.get(reserve)
            if asked is None:
                asked = min(100, 10 + 2 ** math.ceil(math.log2(final - 10)))
            if allocator.admit(key, tokens, final):
                start, slots, wanted = allocator.chunks[key]
                assert wanted == asked <= slots and owner[start : start + slots] == [None] * slots
                assert slots == (2 ** math.ceil(math.log2(asked)) if buddy else asked)
                owner[start : start + slots] = [key] * slots
                keys.append(key)
            else:  # the longest run of free slots was too short, by the drawn map
                runs = "".join("." if o is None else "x" for o in owner).split("x")
                assert buddy or max(map(len, runs)) < asked
                assert not buddy or all(gap[1] < asked for gap in allocator.gaps)
        free = {i for start, slots in allocator.gaps for i in range(start, start + slots)}
        assert free == {i for i, o in enumerate(owner) if o is None}
        assert sum(slots for _, slots in allocator.gaps) == len(free) == allocator.free
    for key in keys:
        allocator.release(key)
    assert allocator.gaps == whole


def test_shares_add_up_and_each_way_wastes_what_it_must():
    trace = make_trace(*WORKLOADS["sharegpt"], requests=120)
    for reserve in RESERVATIONS:
        for buddy in (True, False):
            found = simulate(trace, Contiguous(15000, reserve, buddy))
            total = found.used + found.reserved + found.internal + found.external
            assert total == pytest.approx(1) and found.preemptions == 0
            assert (found.internal == 0) == (reserve == "oracle")
            if reserve == "max":
                assert found.largest_batch == 15000 // 2048 == found.batch
    paged = simulate(trace, Paged(15000, 16))
    assert paged.reserved == 0 and paged.used > 0.9
    assert paged.used + paged.internal + paged.external == pytest.approx(1)


@pytest.mark.parametrize("block_tokens", [4, 16, 64])
def test_a_sequence_wastes_half_a_block_less_half_a_token(block_tokens):
    trace = make_trace(160, 340, 300, seed=2)
    found = simulate(trace, Paged(15000, block_tokens))
    each = found.internal * 15000 / found.batch
    assert each == pytest.approx((block_tokens - 1) / 2, rel=0.03)


def test_larger_blocks_never_hold_more_requests_at_once():
    trace = make_trace(160, 340, 200, seed=3)
    batches = [simulate(trace, Paged(16384, 2**i)).batch for i in range(4, 9)]
    assert batches == sorted(batches, reverse=True)


def test_a_running_request_holds_more_than_the_mean_one():
    """Against sampling: pick a moment of a request's life in proportion to its length."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400_000)
    outputs = 300 * np.exp(0.7 * noise - 0.7**2 / 2)
    weights = outputs / outputs.sum()
    now, final = mean_held(100, 300, 0.7)
    assert now == pytest.approx(100 + (weights * outputs).sum() / 2, rel=0.01)
    assert final == pytest.approx(100 + (weights * outputs).sum(), rel=0.01)
    assert mean_held(100, 300, 0) == (250, 400)


def test_a_trace_has_the_lengths_and_arrivals_that_were_asked_for():
    trace = make_trace(161, 338, 20_000, rate=0.1, spread=0.5)
    arrivals, prompts, outputs = (np.array(column) for column in zip(*trace, strict=True))
    assert prompts.mean() == pytest.approx(161, rel=0.02)
    assert outputs.mean() == pytest.approx(338, rel=0.02)
    assert np.log(outputs).std() == pytest.approx(0.5, rel=0.02)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(10, rel=0.03) == gaps.std()
    cut = make_trace(161, 338, 5000, spread=1.5, longest=400)
    assert max(p + o for _, p, o in cut) == 400 and min(min(p, o) for _, p, o in cut) >= 1
    assert cut == make_trace(161, 338, 5000, spread=1.5, longest=400)
    assert cut != make_trace(161, 338, 5000, spread=1.5, longest=400, seed=1)


def test_sampling_saves_what_the_manager_says():
    trace = [Request(0, 37, 20), Request(0, 5, 9), Request(0, 16, 40)]
    for samples, size in ((2, 8), (4, 16), (3, 1)):
        saved = whole = 0
        for _, prompt, output in trace:
            manager = BlockManager(900, size)
            first, _ = manager.admit(range(prompt))
            all_of_them = [first, *(manager.fork(first) for _ in range(samples - 1))]
            for step in range(output):
                for s in all_of_them:
                    manager.append(s, [1000 * s + step])
                whole += sum(len(manager.tables[s].blocks) for s in all_of_them)
                saved += sum(len(t.blocks) for t in manager.tables.values()) - manager.used_blocks
        assert sampling_saving(trace, samples, size) == pytest.approx(saved / whole)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Contiguous(10, "maxi"), "nearest: max"),
        (lambda: Contiguous(0, "max"), "capacity is 0"),
        (lambda: Paged(10, 0), "block_tokens is 0"),
        (lambda: make_trace(1, 1, 1, rate=0), "rate is 0"),
        (lambda: simulate([Request(0, 5, 50)], Paged(30, 4)), "55 tokens does not fit"),
        (lambda: simulate([Request(0, 5, 50)], Contiguous(30, "oracle")), "55 tokens does not"),
    ],
)
def test_what_cannot_be_had_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
