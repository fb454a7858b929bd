"""The retrieval task: what its texts hold, and its score against an uncached forward pass."""

import pytest
import torch

from rooflm.lab import text
from rooflm.lab.kvcache.evicting import PriorityCache, SnapKVCache
from rooflm.lab.kvcache.retrieval import PLACES, make_cases, retrieve
from rooflm.lab.kvcache.windowed import WindowedCache
from rooflm.lab.model import Config


@pytest.fixture(scope="module")
def filler():
    return text.encode(text.load_text("persuasion")[5_000:25_000])


@pytest.fixture(scope="module")
def model(sharp):
    return sharp(Config(2048, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48))


@pytest.fixture(scope="module")
def cases(filler):
    return make_cases(text.load_tokenizer(), filler, 5, 120, 0.4, seed=3)


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_a_case_holds_its_fact_once_and_asks_for_it(filler, depth):
    cases = make_cases(text.load_tokenizer(), filler, 6, 150, depth, seed=1)
    assert cases.tokens.shape == (6, 150) and cases.prompt == 145
    for row in cases.tokens:
        answer = text.decode(row[cases.prompt :])
        assert answer.isdigit() and len(answer) == 5
        assert text.decode(row[cases.number]) == answer
        fact = text.decode(row[cases.fact])
        question = text.decode(row[cases.prompt - cases.question : cases.prompt])
        assert fact == f"{question}{answer}.\n\n"
        place = question.removeprefix("\n\nThe secret number of ").removesuffix(" is ")
        assert place in PLACES
        before = torch.cat([row[: cases.fact.start], row[cases.fact.stop : cases.prompt]])
        assert answer not in text.decode(before)
    room = 150 - 5 - cases.question - (cases.fact.stop - cases.fact.start)
    assert cases.fact.start == round(depth * room)
    assert cases.distance == 145 - cases.number.start
    assert len({text.decode(row[cases.number]) for row in cases.tokens}) == 6


def test_the_filler_is_the_text(cases, filler):
    words = text.decode(filler)
    for row in cases.tokens:
        assert text.decode(row[: cases.fact.start]) in words
        assert text.decode(row[cases.fact.stop : cases.prompt - cases.question]) in words


def test_a_seed_makes_the_same_cases(filler, cases):
    again = make_cases(text.load_tokenizer(), filler, 5, 120, 0.4, seed=3)
    other = make_cases(text.load_tokenizer(), filler, 5, 120, 0.4, seed=4)
    assert torch.equal(again.tokens, cases.tokens) and not torch.equal(other.tokens, cases.tokens)


@pytest.mark.parametrize(("make", "chunk", "batch"), [
    (None, 64, 8), (None, 7, 2), (lambda: WindowedCache(200, 4), 16, 3),
    (lambda: SnapKVCache(200), 50, 8), (lambda: PriorityCache(200), 1, 5)])  # fmt: skip
def test_the_score_is_that_of_one_uncached_pass(model, cases, make, chunk, batch):
    logs = model(cases.tokens[:, :-1])[:, -5:].log_softmax(-1)
    truth = cases.tokens[:, -5:]
    found = retrieve(model, cases, make, chunk, batch)
    expected = logs.gather(-1, truth[..., None])[..., 0].double().sum(1)
    torch.testing.assert_close(found.log_probabilities, expected, atol=1e-3, rtol=1e-4)
    right = (logs.argmax(-1) == truth).all(1).double()
    assert torch.equal(found.answered, right) and found.exact.value == right.mean()
    assert found.log_probability.value == pytest.approx(expected.mean().item(), abs=1e-3)
    assert found.exact.low <= found.exact.value <= found.exact.high


class Oracle:
    """A model that knows some of the answers, and how many tokens each pass had."""

    def __init__(self, cases, known):
        self.cases, self.known, self.passes = cases, known, []

    def states(self, tokens, cache):
        self.passes.append(tokens.shape[1])
        return tokens

    def logits(self, tokens):
        self.place = sum(self.passes)
        logits = torch.zeros(len(tokens), 1, 2048)
        for i, right in enumerate(self.known):
            logits[i, 0, self.cases.tokens[i, self.place]] = 5.0 if right[self.place - 115] else -5
        return logits


class Nothing:
    length = nbytes = 0


def test_all_five_tokens_must_be_right_and_are_asked_one_by_one(cases):
    known = [[1] * 5, [1, 1, 1, 1, 0], [0] * 5, [1] * 5, [0, 1, 1, 1, 1]]
    oracle = Oracle(cases, known)
    found = retrieve(oracle, cases, Nothing, chunk=50)
    assert oracle.passes == [50, 50, 14, 1, 1, 1, 1, 1]  # the question's last token stands alone
    assert found.answered.tolist() == [1, 0, 0, 1, 0] and found.exact.value == 0.4
    assert found.log_probabilities.argmax().item() in (0, 3)


def test_what_the_cache_kept_is_measured_when_the_answer_begins(model, cases):
    found = retrieve(model, cases, lambda: SnapKVCache(20, window=8), 32, batch=2)
    # 20 chosen and the question's last token; keys, values, place and score, 2 layers, 2 heads
    assert found.nbytes == 2 * 2 * 21 * (2 * 8 * 4 + 8)
    full = retrieve(model, cases, None, 32, batch=2)
    assert full.nbytes == 2 * 2 * 115 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 1.5}, "depth is 1.5"),
        ({"context": 30}, "context is 30"),
        ({"context": 100_000}, "as much filler"),
        ({"cases": 1}, "cases is 1"),
    ],
)
def test_it_refuses(filler, change, words):
    given = {"cases": 4, "context": 120, "depth": 0.5} | change
    with pytest.raises(ValueError, match=words):
        make_cases(text.load_tokenizer(), filler, **given)
