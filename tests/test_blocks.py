"""The block manager against plain lists: every sequence keeps its own tokens beside it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooflm.lab.kvcache.blocks import BlockManager, OutOfBlocks, chain_hash


class Mirror:
    """A manager beside plain lists, and a memory that is really written.

    What is written for a token is a mark of the whole text up to it, so that a block that is
    shared, copied or handed out wrongly shows in what a sequence reads.
    """

    def __init__(self, blocks, block_tokens, hasher=chain_hash):
        self.manager = BlockManager(blocks, block_tokens, hasher)
        self.size, self.blocks = block_tokens, blocks
        self.memory = [[None] * block_tokens for _ in range(blocks)]
        self.texts, self.marks = {}, {}

    def write(self, sequence, start):
        text, marks = self.texts[sequence], self.marks[sequence]
        table = self.manager.tables[sequence].blocks
        for i in range(len(marks), len(text)):
            marks.append(hash((marks[-1] if marks else 0, text[i])))
            if i >= start:
                self.memory[table[i // self.size]][i % self.size] = marks[i]
        self.manager.commit(sequence)

    def agrees(self, sequence):
        read = []
        for block in self.manager.tables[sequence].blocks:
            read += self.memory[block]
        marks = self.marks[sequence]
        return len(marks) == len(self.texts[sequence]) and read[: len(marks)] == marks

    def room(self):
        return self.blocks - len({b for t in self.manager.tables.values() for b in t.blocks})

    def refused(self, what, needed):
        """Whether a call must be refused; then it is, and nothing has changed."""
        if needed <= self.room():
            return False
        before = self.state()
        with pytest.raises(OutOfBlocks):
            what()
        assert self.state() == before
        return True

    def admit(self, tokens):
        found = self.manager.find(tokens)
        idle = sum(self.manager.blocks[block].references == 0 for block in found)
        needed = -(-len(tokens) // self.size) - len(found) + idle
        if self.refused(lambda: self.manager.admit(tokens), needed):
            return None
        sequence, hit = self.manager.admit(tokens)
        assert hit == len(found) * self.size < len(tokens)
        self.texts[sequence], self.marks[sequence] = list(tokens), []
        self.write(sequence, hit)
        return sequence

    def append(self, sequence, tokens):
        text, table = self.texts[sequence], self.manager.tables[sequence].blocks
        needed = -(-(len(text) + len(tokens)) // self.size) - len(table)
        if tokens and len(text) % self.size:  # the last block has room: is it this one's alone?
            others = sum(table[-1] in t.blocks for t in self.manager.tables.values()) > 1
            findable = self.manager.blocks[table[-1]].hash is not None
            needed += others or findable
        if self.refused(lambda: self.manager.append(sequence, tokens), needed):
            return
        for source, target in self.manager.append(sequence, tokens):
            self.memory[target] = list(self.memory[source])
        text += tokens
        self.write(sequence, len(text) - len(tokens))

    def fork(self, sequence):
        fork = self.manager.fork(sequence)
        self.texts[fork] = list(self.texts[sequence])
        self.marks[fork] = list(self.marks[sequence])

    def truncate(self, sequence, length):
        self.manager.truncate(sequence, length)
        del self.texts[sequence][length:], self.marks[sequence][length:]

    def free(self, sequence):
        self.manager.free(sequence)
        del self.texts[sequence], self.marks[sequence]

    def state(self):
        m = self.manager
        tables = {k: (tuple(t.tokens), tuple(t.blocks), t.findable) for k, t in m.tables.items()}
        return tables, tuple(m._free), tuple(m._idle), tuple(map(repr, m.blocks))


def drive(mirror, rng, steps, every, vocab=2):
    """Random steps, each sequence that was touched compared at once, all of them now and then."""
    for step in range(steps):
        known = list(mirror.texts)
        action, touched = rng.random(), None
        if not known or action < 0.12:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 5 * mirror.size))]
            if known and rng.random() < 0.5:  # begin as another does
                other = mirror.texts[rng.choice(known)]
                prompt = other[: rng.randint(0, len(other))] + prompt[: mirror.size]
            touched = mirror.admit(prompt)
        elif action < 0.72:
            touched = rng.choice(known)
            mirror.append(touched, [rng.randrange(vocab) for _ in range(rng.randint(0, 3))])
        elif action < 0.82:
            mirror.fork(touched := rng.choice(known))
        elif action < 0.85:
            touched = rng.choice(known)
            mirror.truncate(touched, rng.randint(0, len(mirror.texts[touched])))
        elif action < 0.97:
            mirror.free(rng.choice(known))
        else:
            mirror.manager.evict(rng.randint(0, 3))
        if touched is not None:
            assert mirror.agrees(touched)
        if step % every == 0:
            mirror.manager.check()
            assert all(mirror.agrees(sequence) for sequence in mirror.texts)
    for sequence in list(mirror.texts):
        mirror.free(sequence)
    mirror.manager.check()
    mirror.manager.evict(mirror.blocks)
    assert mirror.manager.free_blocks == mirror.blocks


def two_values(before, tokens):
    return chain_hash(before, tokens) % 2


@pytest.mark.parametrize(
    ("blocks", "size", "hasher", "steps"),
    [(30, 4, chain_hash, 40_000), (12, 1, chain_hash, 25_000), (20, 3, two_values, 25_000),
     (60, 8, chain_hash, 10_000)],
    ids=["blocks of 4", "blocks of 1", "hashes collide", "blocks of 8"],
)  # fmt: skip
def test_a_hundred_thousand_steps_lose_and_mix_nothing(blocks, size, hasher, steps):
    mirror = Mirror(blocks, size, hasher)
    drive(mirror, random.Random(blocks), steps, every=max(20, blocks))
    manager = mirror.manager
    assert manager.hits > 50 and manager.evictions > 50
    assert size == 1 or manager.copies > 50


@given(st.randoms(use_true_random=False), st.integers(2, 12), st.integers(1, 5))
def test_any_short_run_is_right_at_every_step(rng, blocks, size):
    drive(Mirror(blocks, size), rng, steps=40, every=1)


def test_a_prompt_that_is_there_leaves_its_last_token_to_compute():
    manager = BlockManager(20, 2)
    first, found = manager.admit([1, 2, 3, 4])
    assert found == 0
    manager.commit(first)
    assert manager.admit([1, 2, 3, 4])[1] == 2
    assert manager.admit([1, 2, 3, 4, 5])[1] == 4
    assert manager.admit([1, 2, 3, 4, 5], most=3)[1] == 2
    assert manager.admit([2, 2, 3, 4, 5])[1] == 0


def test_what_is_not_written_is_not_found():
    manager = BlockManager(8, 2)
    first, _ = manager.admit([1, 2, 3])
    assert manager.admit([1, 2, 3])[1] == 0
    manager.commit(first)
    assert manager.admit([1, 2, 3])[1] == 2


def test_equal_tokens_after_another_start_are_another_block():
    """nano-vllm compares a block's own tokens only, so that a collision could hand this one out."""
    manager = BlockManager(20, 2, hasher=lambda before, tokens: tokens[0])
    first, _ = manager.admit([1, 1, 5, 6, 9])
    manager.commit(first)
    assert manager.admit([1, 1, 5, 6, 9])[1] == 4
    second, _ = manager.admit([2, 2, 5, 6, 9])
    manager.commit(second)
    assert manager.admit([2, 2, 5, 6, 9])[1] == 2
    manager.check()


def test_a_text_that_two_computed_is_kept_once():
    manager = BlockManager(8, 2)
    one, two = manager.admit([1, 2, 3])[0], manager.admit([1, 2, 3])[0]
    assert manager.used_blocks == 4
    manager.commit(one)
    manager.commit(two)
    assert manager.used_blocks == 3 and manager.free_blocks == 5
    manager.check()


def test_a_fork_copies_only_a_block_with_room():
    manager = BlockManager(8, 2)
    one, _ = manager.admit([1, 2, 3])
    two = manager.fork(one)
    source = manager.tables[one].blocks[1]
    ((copied, target),) = manager.append(two, [4])
    assert copied == source and target == manager.tables[two].blocks[1] != source
    assert manager.append(one, [5]) == []  # it is alone now
    three = manager.fork(two)
    assert manager.append(three, [6]) == []  # the last block is full: a new one, no copy
    manager.check()


def test_the_longest_idle_goes_first_and_no_chain_is_cut():
    manager = BlockManager(4, 2)
    old = manager.admit([1, 2, 3, 4])[0]
    manager.commit(old)
    manager.free(old)
    new = manager.admit([5, 6, 7])[0]
    manager.commit(new)
    manager.free(new)
    assert (manager.free_blocks, manager.idle_blocks) == (1, 3)
    assert manager.evict(1) == 1
    assert len(manager.find([1, 2, 3, 4, 0])) == 1  # the end of the older chain went
    assert manager.evict(9) == 2 and manager.free_blocks == 4


def test_a_refusal_names_what_was_asked_and_changes_nothing():
    mirror = Mirror(4, 2)
    held = mirror.admit([1, 2, 3])
    idle = mirror.admit([8, 8])
    mirror.free(idle)
    before = mirror.state()
    words = "admit needs 3 blocks; there are 1 free and 1 idle of 4"
    with pytest.raises(OutOfBlocks, match=words):
        mirror.manager.admit([9] * 5)
    with pytest.raises(OutOfBlocks, match="append needs 3 blocks; there are 1 free and 1 idle"):
        mirror.manager.append(held, [0] * 7)
    assert mirror.state() == before
    assert mirror.manager.append(held, [0] * 5) == []  # both are taken: the idle one is evicted
    assert mirror.manager.evictions == 1


def test_an_idle_block_that_is_found_is_not_evicted_for_the_rest_of_its_prompt():
    manager = BlockManager(3, 2)
    first = manager.admit([1, 2, 3, 4])[0]
    manager.commit(first)
    manager.free(first)
    sequence, found = manager.admit([1, 2, 9, 9, 9])
    assert found == 2 and len(manager.tables[sequence].blocks) == 3
    manager.check()


def test_unknown_tokens_are_held_and_never_found():
    manager = BlockManager(4, 2)
    sequence, _ = manager.admit([None, None, 3, 4, 5])
    manager.commit(sequence)
    assert manager.find([None, None, 3, 4, 5]) == []
    manager.free(sequence)
    assert manager.free_blocks == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.append(3, [1]), "there is no sequence 3"),
        (lambda m: m.free("x"), "there is no sequence 'x'"),
        (lambda m: BlockManager(0, 2), "blocks is 0"),
        (lambda m: BlockManager(2, -1), "block_tokens is -1"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(BlockManager(2, 2))
