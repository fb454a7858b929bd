"""The memory of fine-tuning, counted by hand and by torch, and its explorer."""

import copy
import html
import re
from dataclasses import replace

import pytest
import torch

import rooflm
from rooflm import show
from rooflm.lab.model import Config, Transformer
from rooflm.lab.quantize import peft
from rooflm.roofline.training import adapter_parameters, linear_shapes, training_memory
from rooflm.show.finetuning_explorer import FINETUNING_CONTROLS, finetuning_plans

LLAMA_7B = "meta-llama/Llama-2-7b-hf"
LLAMA_65B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "intermediate_size": 22016, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    config = Config(vocab=29, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, window=16)
    return Transformer(config).requires_grad_(False)


def test_adapters_of_the_theory_are_those_of_the_laboratory(small):
    adapted = peft.qlora(small, 4, torch.Generator().manual_seed(0))
    counted = peft.footprint(adapted)
    assert adapter_parameters(small.to_roofline(), 4) == counted.trainable
    linear = sum(n * i * o for n, b in small.to_roofline().blocks for i, o in linear_shapes(b))
    assert linear == counted.weights


def test_bytes_of_llama_7b_by_hand():
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    adapters = 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    held = training_memory(LLAMA_7B, "nf4", 64, batch=2, tokens=100)
    assert held.frozen == linear * 4.5 / 8 + rest * 2
    assert (held.trainable, held.trained) == (adapters, 16 * adapters)
    layer = 2 * 4096 + 2 * 4096 + 4096 + 11008 + 3 * 4096 + 2 * 11008
    assert held.activations == 2 * 100 * 2 * (32 * 4096 + layer)
    assert held.logits == 200 * 32000 * 8
    every = training_memory(LLAMA_7B, "nf4", 64, batch=2, tokens=100, checkpointing=False)
    assert every.activations == 2 * 100 * 2 * 32 * layer
    assert every.total == every.frozen + every.trained + every.activations + every.logits


def test_full_fine_tuning_takes_16_bytes_a_parameter_and_freezes_nothing():
    held = training_memory(LLAMA_7B)
    assert held.frozen == 0 and held.trained == 16 * 6738415616
    assert held.trainable == rooflm.load_model(LLAMA_7B).parameters


def test_what_backward_keeps_is_what_torch_saves(small):
    """Every tensor that autograd holds, once each, against the formula."""
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = copy.deepcopy(small).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.states(tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(size for at, size in saved.items() if at not in weights)
    counted = training_memory(
        small.to_roofline(), rank=1, batch=2, tokens=8, checkpointing=False
    ).activations
    # FP32 here, so twice the bytes. Autograd keeps more: norms and activations on both sides.
    assert 1.2 < kept / (2 * counted) < 1.6


@pytest.mark.parametrize("tokens", [128, 512, 4096])
def test_checkpointing_and_narrow_bases_never_take_more(tokens):
    for base, wide in (("nf4-dq", "nf4"), ("nf4", "int8"), ("int8", "fp16")):
        narrow = training_memory(LLAMA_7B, base, 64, tokens=tokens)
        assert narrow.total < training_memory(LLAMA_7B, wide, 64, tokens=tokens).total
        assert narrow.total < training_memory(LLAMA_7B, base, 64, 1, tokens, False).total


def test_qloras_claim_a_65b_model_on_a_card_of_48_gib():
    model = rooflm.load_model(LLAMA_65B)
    assert model.parameters == pytest.approx(65.2e9, rel=2e-3)  # LLaMA, arXiv 2302.13971, table 2
    assert training_memory(model, "nf4-dq", 64).fits("nvidia-a6000")
    assert not training_memory(model, "fp16", 64).fits("nvidia-a6000")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": "nf5"}, "nf5"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 5000}, "allowed: 1 to 4096"),
        ({"rank": 8, "batch": 0}, "batch is 0"),
    ],
)
def test_bad_arguments_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        training_memory(LLAMA_7B, **given)


# ---- the explorer


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("ipywidgets")
    return show.finetuning_explorer()


@pytest.mark.parametrize("control", FINETUNING_CONTROLS, ids=lambda control: control.name)
def test_every_control_changes_what_is_shown(explorer, control):
    other = next(x for x in reversed(control.options) if x != control.default)
    before, after = explorer.show(**explorer.start), explorer.show(
        **(explorer.start | {control.name: other})
    )  # fmt: skip
    assert 'role="alert"' not in after

    def parts(page):
        return re.search(r"<table.*</table>", page, re.S).group()

    assert parts(before) != parts(after)
    if control.name != "device":
        assert (
            re.search(r"base64,[^\"]+", before).group()
            != re.search(r"base64,[^\"]+", after).group()
        )


def test_the_page_says_what_the_library_counts(explorer):
    held = training_memory("meta-llama/Llama-2-70b-hf", "nf4-dq", 64)
    assert show.si(held.total, "B") in explorer.html and "fits nvidia-a6000" in explorer.html
    alt = html.unescape(re.search(r'<img alt="([^"]+)"', explorer.html).group(1))
    assert "adapter on nf4-dq" in alt
    assert list(finetuning_plans().values())[-1] == held
    other = {"base": "int8", "rank": 4, "batch": 2, "tokens": 128, "activations": "all kept"}
    expected = training_memory("meta-llama/Llama-2-70b-hf", "int8", 4, 2, 128, False)
    assert list(finetuning_plans(**other).values())[-1] == expected


def test_a_setting_that_cannot_be_had_is_one_line(explorer):
    tiny = {"model": "HuggingFaceTB/SmolLM2-135M", "rank": 256}
    shown = explorer.show(**(explorer.start | tiny))
    assert shown.startswith('<p role="alert">rank is 256') and shown.count("<p") == 1


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: rank"):
        show.finetuning_explorer(ranks=2)
    with pytest.raises(ValueError, match="nvidia-a6000"):
        show.finetuning_explorer(device="nvidia-a600")
    with pytest.raises(ValueError, match="unknown control"):
        finetuning_plans(ranks=2)
    with pytest.raises(ValueError, match="all kept"):
        finetuning_plans(activations="kept")
    assert show.finetuning_explorer(rank=3).start["rank"] == 3


def test_the_default_is_said_in_words():
    pytest.importorskip("ipywidgets")
    shown = show.finetuning_explorer(device="nvidia-rtx-4090")
    assert "does not fit nvidia-rtx-4090" in repr(shown)
    assert replace(shown.controls[0], label="x").name == "model"
