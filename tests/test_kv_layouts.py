"""Errors by layout, and the timing of unpacking."""

import pytest
import torch

from rooflm.lab.kvcache import distributions, kivi, layouts, unpacking
from rooflm.lab.kvcache.scaled import Integers
from rooflm.lab.model import Config, Transformer


@pytest.fixture(scope="module")
def held():
    torch.manual_seed(2)
    config = Config(vocab=53, hidden=64, layers=3, heads=4, kv_heads=2, intermediate=64, window=64)
    model = Transformer(config).eval().requires_grad_(False)
    for block in model.layers:
        block.q_proj.weight.mul_(20)
        block.k_proj.weight.mul_(20)
    return distributions.capture(model, torch.arange(64)[None] % 53)


@pytest.mark.parametrize("along", ["channel", "token"])
def test_layout_errors_are_means_over_layers(held, along):
    found = layouts.layout_errors(held, [0, 2], along, bits=3, group=16)
    codec, keys, values = kivi.Uniform(3, along, 16), [], []
    for i in (0, 2):
        k, v = held.rotated[i], held.values[i]
        keys.append(((codec.decode(codec.encode(k)) - k).square().sum() / k.square().sum()).item())
        kept = codec.decode(codec.encode(v)).repeat_interleave(2, 1)
        weights = distributions.attention_weights(held.queries[i], k)
        exact = weights @ v.repeat_interleave(2, 1)
        values.append(((weights @ kept - exact).square().sum() / exact.square().sum()).item())
    assert found.keys == pytest.approx(sum(keys) / 2, rel=1e-4)
    assert found.output == pytest.approx(sum(values) / 2, rel=1e-3)
    assert found.score == pytest.approx(found.score_predicted, rel=0.2)


def test_sparing_all_tokens_leaves_no_error(held):
    found = layouts.spared_errors(held, [0, 1, 2], group=16, spared=64)
    whole = layouts.layout_errors(held, [0, 1, 2], "channel", group=16)
    assert found["nothing"] == pytest.approx(whole.output, rel=1e-6)
    assert found["the 64 most looked at"] == found["64 by lot"] == 0
    assert 0 < found["the first token"] < found["nothing"]


def test_tokens_that_are_looked_at_carry_the_error():
    """Planted: one token gets all attention, so its error is the output's."""
    q, k = torch.zeros(1, 1, 32, 8), torch.zeros(1, 1, 32, 8)
    q[..., 0], k[..., 5, 0] = 30.0, 30.0
    v = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0))
    held = distributions.Captured(keys=[k], rotated=[k], values=[v], queries=[q])
    found = layouts.spared_errors(held, [0], bits=1, spared=1, seed=3)
    assert found["the 1 most looked at"] < found["nothing"] / 3
    assert found["1 by lot"] > found["nothing"] / 2
    assert layouts.sink_weights(held, start=8) == [0.0]


def test_codec_costs_count_what_is_stored():
    x = torch.randn(1, 2, 8, 32)
    ((name, bits, error),) = layouts.codec_costs(x, {"eight": Integers(8)})
    assert (name, bits) == ("eight", 8.5) and 0 < error < 1e-3


def test_each_way_to_the_scores_is_timed():
    found = unpacking.time_scores(64, runs=1)
    assert [x.bytes for x in found] == [4, 8.25 / 8, 3 / 8, 8.25 / 8, 4.5 / 8]
    passes = unpacking.time_unpacking(64, runs=1)
    assert sum(x.bytes for x in passes) == 34.25
    assert all(x.seconds > 0 for x in (*found, *passes))
