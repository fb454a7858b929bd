"""The bench that all compression is measured on, and the bytes of its abscissa."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import rooflm
from rooflm.lab import bench as benches
from rooflm.lab import text
from rooflm.lab.bench import WINDOW, Bench, decode_bytes, linear_weights
from rooflm.lab.calibrate import layer_inputs
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.model import Config, Transformer

CONFIG = Config(2048, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48)
CONFIGS = [CONFIG, replace(CONFIG, heads=2, kv_heads=1, head_width=8)]


@pytest.fixture(scope="module")
def bench():
    whole = text.load_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load_text", lambda name: whole(name)[:6_000])
        patch.setattr(benches, "ROWS", 2)
        yield Bench.load("student", 2 * WINDOW)


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_weights_are_those_of_the_modules(config):
    model = Transformer(config)
    found = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(found) == 14 and sum(found) == linear_weights(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_decode_bytes_are_the_weight_bytes_of_a_decode_step(config, a6000):
    model = Transformer(config).to_roofline()
    step = rooflm.ForwardPass.decode(batch=1, context=1)
    report = rooflm.analyze(model, a6000, step)
    looked_up = 2 * config.hidden  # the one row of the embedding
    read = sum(row.weight_bytes * row.count for row in report.operators)
    assert decode_bytes(config) == read - looked_up
    four = decode_bytes(config, 4.0 * linear_weights(config))
    assert decode_bytes(config) - four == 1.5 * linear_weights(config)


def test_a_layer_is_its_weight_with_what_it_reads(bench):
    weight, inputs = bench.layer("layers.1.down_proj")
    assert weight is bench.model.layers[1].down_proj.weight
    x = layer_inputs(bench.model, bench.rows)["layers.1.down_proj"].double()
    assert torch.allclose(inputs.hessian.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_a_change_reaches_the_named_kinds_alone_and_spares_the_model(bench):
    before = bench.model.layers[0].up_proj.weight.clone()
    changed = bench.change(lambda weight, inputs: weight * 0, kinds=("up_proj",))
    assert all(not block.up_proj.weight.any() for block in changed.layers)
    assert torch.equal(changed.layers[0].gate_proj.weight, bench.model.layers[0].gate_proj.weight)
    assert torch.equal(bench.model.layers[0].up_proj.weight, before)


def test_the_loss_is_what_the_variant_adds(bench):
    without = bench.change(lambda weight, inputs: weight * 0, kinds=("down_proj",))
    found = bench.loss(without)
    ours, full = bench.measure(without).bits_per_byte, bench.full.bits_per_byte
    assert found.verdict == "worse"
    assert found.difference.value == pytest.approx(ours.value - full.value, rel=1e-6)
    assert bench.loss(load_checkpoint("student")).difference.value == pytest.approx(0, abs=1e-9)
    assert bench.tokens == 2 * WINDOW
