"""Jacobi and lookahead decoding emit what greedy decoding does, in fewer passes."""

import pytest
import torch

from rooflm.lab.decode.jacobi import Pool, _grow, jacobi, lookahead
from rooflm.lab.decode.speculative import decode
from rooflm.lab.decode.trees import ancestors
from rooflm.lab.model import Config

CONFIG = Config(16, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24)
PROMPTS, NEW = 1_000, 10


@pytest.fixture
def target(drafting):
    return drafting[0]


@pytest.fixture
def written(greedy_texts):
    return greedy_texts


def test_jacobi_emits_what_greedy_decoding_does(target, written):
    passes = 0
    for prompt, text in written:
        found = jacobi(target, prompt, NEW, block=5)
        assert torch.equal(found.tokens, text)
        assert sum(n + 1 for n in found.kept) == NEW
        passes += len(found.kept)
    assert passes < NEW * PROMPTS  # some guesses are right


def test_lookahead_emits_what_greedy_decoding_does(target, written):
    passes = 0
    for prompt, text in written:
        found = lookahead(target, prompt, NEW, window=3, words=3, candidates=2)
        assert torch.equal(found.tokens, text)
        assert sum(n + 1 for n in found.kept) == NEW
        passes += len(found.kept)
    assert passes < NEW * PROMPTS


def test_a_text_that_repeats_itself_is_written_many_tokens_a_pass(target, written):
    """Random models fall into loops: what they say next they have said before."""
    prompt = written[0][0]
    long = decode(target, prompt, 120).tokens
    for found in (jacobi(target, prompt, 120), lookahead(target, prompt, 120)):
        assert torch.equal(found.tokens, long)
        assert found.per_pass > 1.2


def test_the_first_pass_fixes_one_token_at_least_and_a_right_guess_is_kept(target):
    prompt = torch.tensor([3, 1, 4])
    found = jacobi(target, prompt, 6, block=3)
    assert all(kept >= 0 for kept in found.kept) and len(found.kept) <= 6
    assert found.drafted[0] == 3 and found.drafted[-1] <= 3


def test_a_window_of_rows_is_a_tree_whose_branches_are_diagonals():
    rows = [torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22])]
    tokens, parents, ends = _grow(torch.tensor([1]), rows, [(5, 6)])
    assert tokens.tolist() == [1, 5, 6, 10, 11, 12, 20, 21, 22]
    assert [tokens[e].item() for e in ends] == [20, 21, 22]
    seen = ancestors(parents)
    branches = {int(tokens[n]): tokens[seen[n]].tolist() for n in range(9)}
    assert branches[6] == [1, 5, 6]
    assert branches[12] == [1, 10, 11, 12]
    assert branches[20] == [1, 10, 20] and branches[22] == [1, 10, 11, 12, 22]
    assert seen.sum(1).tolist() == [1, 2, 3, 2, 3, 4, 3, 4, 5]  # depth, from 1


def test_a_pool_keeps_the_latest_of_each_first_token():
    pool = Pool(most=2)
    for words in ((1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7), (9, 9, 9)):
        pool.add(words)
    assert pool.after(1) == [(2, 3), (6, 7)] and pool.after(9) == [(9, 9)] and pool.after(5) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, p: jacobi(m, p, 4, block=0), "block is 0"),
        (lambda m, p: lookahead(m, p, 4, window=0), "window is 0"),
        (lambda m, p: lookahead(m, p, 4, words=1), "words is 1"),
        (lambda m, p: lookahead(m, p[:0], 4), "prompt is of shape"),
    ],
)
def test_bad_input_is_named(target, call, words):
    with pytest.raises(ValueError, match=words):
        call(target, torch.tensor([1, 2]))
