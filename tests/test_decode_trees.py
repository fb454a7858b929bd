"""Trees of drafts: each branch is read as if it were alone, and what comes out is the target's."""

import pytest
import torch

from rooflm.lab.decode.chances import GREEDY, Sampling, chances
from rooflm.lab.decode.trees import (
    TreeCache,
    TreeDrafter,
    ancestors,
    children,
    speculate_tree,
)
from rooflm.lab.model import Config

CONFIG = Config(16, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24)
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, 5])
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2])
PROMPTS, NEW = 1_000, 10


@pytest.fixture
def models(drafting):
    return drafting


@pytest.fixture
def written(greedy_texts):
    return greedy_texts


def path_to(node):
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, int(PARENTS[path[0]]))
    return path


def test_every_node_of_a_tree_reads_its_own_branch_alone(models):
    target, cache, start = models[0], TreeCache(), torch.tensor([7, 8, 2])
    target(start[None], cache)
    cache.plant(PARENTS)
    found = target(TOKENS[None], cache)[0]
    for node in range(len(TOKENS)):
        branch = torch.cat([start, TOKENS[path_to(node)]])
        torch.testing.assert_close(found[node], target(branch[None])[0, -1])


def test_the_path_that_is_kept_is_what_the_cache_holds(models):
    target, cache, start = models[0], TreeCache(), torch.tensor([7, 8, 2])
    target(start[None], cache)
    cache.plant(PARENTS)
    target(TOKENS[None], cache)
    path = path_to(6)
    cache.keep(3, path)
    assert cache.length == 3 + len(path)
    text = torch.cat([start, TOKENS[path], torch.tensor([6])])
    torch.testing.assert_close(target(text[None, -1:], cache)[0, 0], target(text[None])[0, -1])


def test_ancestors_are_those_above_and_the_node_itself():
    seen = ancestors(PARENTS)
    for node in range(len(PARENTS)):
        assert seen[node].nonzero()[:, 0].tolist() == path_to(node)
    with pytest.raises(ValueError, match="node 1 has parent 1"):
        ancestors(torch.tensor([-1, 1]))


def test_a_drafted_tree_has_the_drafts_chances_at_every_node(models):
    draft, text = models[1], torch.tensor([3, 1, 4])
    drafter, generator = TreeDrafter(draft, (3, 2)), torch.Generator().manual_seed(0)
    for _ in range(2):  # the second time its cache holds the text
        tree = drafter.grow(text, 5, Sampling(), generator)
        assert tree.parents.tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
        for node in range(4):
            branch = torch.cat([text, tree.tokens[[node] if node else []]])
            expected = chances(draft(branch[None])[0, -1])
            torch.testing.assert_close(tree.chances[node], expected)
        for node in range(4):
            below = tree.tokens[tree.parents == node]
            assert len(below.unique()) == len(below)
    assert len(drafter.grow(text, 1, Sampling(), generator).tokens) == 4  # the text ends before


def test_greedy_children_are_the_likeliest_and_others_are_drawn():
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    greedy = children(logits, chances(logits, GREEDY), 2, GREEDY, generator)
    assert greedy.tolist() == [[1, 2]]
    few = Sampling(top_k=2)  # no more than two have a chance
    assert sorted(children(logits, chances(logits, few), 3, few, generator)[0].tolist()) == [1, 2]


@pytest.mark.parametrize(("widths", "texts"), [((1, 1, 1), 100), ((3, 2), PROMPTS)])
def test_greedy_trees_emit_what_plain_decoding_does(models, written, widths, texts):
    target, draft = models
    drafter, kept, passes = TreeDrafter(draft, widths), 0, 0
    for prompt, text in written[:texts]:
        found = speculate_tree(target, drafter, prompt, NEW)
        assert torch.equal(found.tokens, text)
        kept, passes = kept + sum(found.kept), passes + len(found.kept)
    assert 0.3 < kept / passes < len(widths)


def test_sampled_trees_have_the_targets_distribution(models, chi_square):
    target, draft = models
    prompt, sampling = torch.tensor([7, 2]), Sampling(temperature=1.3, top_k=5)
    generator, drafter = torch.Generator().manual_seed(0), TreeDrafter(draft, (2, 2))
    counts = torch.zeros(16, 16)
    for _ in range(4_000):
        found = speculate_tree(target, drafter, prompt, 3, sampling, generator)
        counts[tuple(found.tokens[2:4])] += 1
    start = chances(target(prompt[None])[0, -1], sampling)
    texts = torch.cat([prompt.expand(16, 2), torch.arange(16)[:, None]], 1)
    p = start[:, None] * chances(target(texts)[:, -1], sampling)
    statistic, limit = chi_square(counts.flatten().int().tolist(), p.flatten().tolist())
    assert statistic < limit


def test_bad_widths_are_named(models):
    with pytest.raises(ValueError, match="widths is 0"):
        TreeDrafter(models[1], (2, 0))
    with pytest.raises(ValueError, match="widths is empty"):
        TreeDrafter(models[1], ())
