"""Speculative decoding emits what plain decoding does, token for token, and counts what it did."""

import pytest
import torch

from rooflm.lab.decode.chances import GREEDY, Sampling, chances
from rooflm.lab.decode.lookup import LookupDrafter, following
from rooflm.lab.decode.speculative import (
    Draft,
    ModelDrafter,
    common_start,
    decode,
    speculate,
)
from rooflm.lab.model import Config, FullCache

CONFIG = Config(16, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24)
PROMPTS, NEW = 1_000, 10


@pytest.fixture
def models(drafting):
    return drafting


@pytest.fixture
def written(greedy_texts):
    return greedy_texts


def test_plain_greedy_decoding_is_the_likeliest_token_of_the_whole_text(models, written):
    for prompt, text in written[:20]:
        for end in range(len(prompt), len(text)):
            assert models[0](text[None, :end])[0, -1].argmax() == text[end]


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_speculation_emits_what_plain_decoding_does(models, written, draft_tokens):
    target, draft = models
    drafter, kept, drafted = ModelDrafter(draft), 0, 0
    for prompt, text in written:
        found = speculate(target, drafter, prompt, NEW, draft_tokens)
        assert torch.equal(found.tokens, text)
        assert sum(n + 1 for n in found.kept) == NEW
        kept, drafted = kept + sum(found.kept), drafted + sum(found.drafted)
    assert 0.2 < kept / drafted < 0.95  # both outcomes occur


def test_looked_up_drafts_emit_what_plain_decoding_does(models, written):
    target, kept = models[0], 0
    store = torch.cat([text for _, text in written[:300]])
    drafter = LookupDrafter(CONFIG.vocab, longest=3, store=store)
    for prompt, text in written:
        found = speculate(target, drafter, prompt, NEW, 5)
        assert torch.equal(found.tokens, text)
        kept += sum(found.kept)
    assert kept > PROMPTS  # it does find something


def test_the_target_drafting_for_itself_keeps_everything(models):
    target, prompt = models[0], torch.tensor([3, 1, 4])
    found = speculate(target, ModelDrafter(target), prompt, 12, 3)
    assert found.kept == found.drafted == [3, 3, 3] and found.per_pass == 4
    plain = decode(target, prompt, 12)
    assert torch.equal(plain.tokens, found.tokens) and plain.per_pass == 1


def test_sampled_speculation_has_the_targets_distribution(models, chi_square):
    """The first two tokens, against the target's chances of every pair, by chi-square."""
    target, draft = models
    prompt, sampling = torch.tensor([7, 2]), Sampling(temperature=1.3, top_k=5)
    generator, drafter = torch.Generator().manual_seed(0), ModelDrafter(draft)
    counts = torch.zeros(16, 16)
    for _ in range(6_000):
        first, second = speculate(target, drafter, prompt, 3, 2, sampling, generator).tokens[2:4]
        counts[first, second] += 1
    start = chances(target(prompt[None])[0, -1], sampling)
    texts = torch.cat([prompt.expand(16, 2), torch.arange(16)[:, None]], 1)
    p = start[:, None] * chances(target(texts)[:, -1], sampling)
    statistic, limit = chi_square(counts.flatten().int().tolist(), p.flatten().tolist())
    assert statistic < limit


def test_a_drafter_may_fall_silent_or_stop_short(models, written):
    class Moody:
        def propose(self, text, most, sampling, generator):
            tokens = text[:1].repeat(len(text) % (most + 1))
            return Draft(tokens, torch.eye(16, dtype=torch.float64)[tokens])

    for prompt, text in written[:50]:
        assert torch.equal(speculate(models[0], Moody(), prompt, NEW, 3).tokens, text)


def test_a_rewound_cache_computes_as_if_the_rest_had_never_been_read(models):
    target, cache = models[0], FullCache()
    text = torch.tensor([[1, 2, 3, 4, 5, 6]])
    target(text, cache)
    cache.rewind(3)
    assert cache.length == 3
    torch.testing.assert_close(target(text[:, 3:5], cache), target(text[:, :5])[:, 3:])
    with pytest.raises(ValueError, match="length is 9; allowed: 0 to 5"):
        cache.rewind(9)


def test_what_followed_last_is_found():
    text = torch.tensor([1, 2, 3, 1, 2, 4, 5, 1, 2])
    assert following(text, torch.tensor([1, 2]), 2).tolist() == [4, 5]
    assert following(text, torch.tensor([1, 2, 3]), 9).tolist() == [1, 2, 4, 5, 1, 2]
    assert following(text, torch.tensor([9]), 2).tolist() == []
    assert following(text[:2], torch.tensor([1, 2]), 2).tolist() == []


def test_a_lookup_prefers_long_matches_and_the_text_itself():
    drafter = LookupDrafter(16, longest=2, store=torch.tensor([5, 6, 9, 9]))
    propose = lambda text: drafter.propose(torch.tensor(text), 2, GREEDY, None).tokens.tolist()  # noqa: E731
    assert propose([1, 6, 7, 5, 6]) == [9, 9]  # two tokens of the store beat one of the text
    assert propose([5, 6, 7, 5, 6]) == [7, 5]
    assert propose([1, 2, 3]) == []
    found = drafter.propose(torch.tensor([5, 6, 7, 5, 6]), 2, GREEDY, None)
    assert found.chances.argmax(-1).tolist() == [7, 5] and found.chances.sum() == 2


def test_texts_are_alike_up_to_the_first_difference():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5])
    assert common_start(a, b) == 2 and common_start(a, a) == 3 and common_start(a[:0], b) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: decode(m, torch.empty(0, dtype=torch.int64), 3), "prompt is of shape"),
        (lambda m: decode(m, torch.tensor([1]), 0), "new_tokens is 0"),
        (lambda m: speculate(m, ModelDrafter(m), torch.tensor([1]), 3, 0), "draft_tokens is 0"),
        (lambda m: LookupDrafter(16, longest=1, shortest=2), "shortest is 2"),
    ],
)
def test_bad_input_is_named(models, call, words):
    with pytest.raises(ValueError, match=words):
        call(models[0])
