"""What must fit, by hand."""

import numpy as np
import pytest

import rooflm
from rooflm import ForwardPass, Precision, memory


def test_llama_13b_in_fp16_is_the_surveys_26_gb():
    weights = memory(rooflm.load_model("huggyllama/llama-13b")).weights
    assert round(weights / 1e9) == int(rooflm.survey_value("text", "LLaMA-13b FP16", "weights"))


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "head_dim"),
    [
        ("meta-llama/Llama-2-7b-hf", 32, 32, 128),
        ("meta-llama/Llama-2-70b-hf", 80, 8, 128),
        ("Qwen/Qwen3-8B", 36, 8, 128),
        ("google/gemma-2-9b", 42, 8, 256),
        ("facebook/opt-125m", 12, 12, 64),
        ("HuggingFaceTB/SmolLM2-135M", 30, 3, 64),
    ],
)
def test_cache_is_two_tensors_a_layer_of_kv_heads_by_head_dim(name, layers, kv_heads, head_dim):
    ours = memory(name, Precision(kv_cache="int8"), batch=5, context=777).kv_cache
    assert ours == sum(2 * kv_heads * head_dim for _ in range(layers)) * 5 * 777


def test_cache_passes_the_weights_near_31_thousand_tokens_not_50(llama_13b):
    contexts = np.arange(1000, 60_000, 10)
    for accounting in ("exact", "survey"):
        m = memory(llama_13b, context=contexts, accounting=accounting)
        crossing = contexts[m.kv_cache > m.weights][0]
        assert 30_500 < crossing < 32_000


def test_activations_are_the_residual_stream_beside_the_widest_operator(llama_7b):
    # Decode: the LM head reads 4096 and writes 32000 elements; beside it 4096 of the stream.
    assert memory(llama_7b, batch=3).activations == 3 * (4096 + 4096 + 32000) * 2
    # A fused prefill of 2048: the MLP's activation reads two and writes one of 11008 a token.
    prefill = memory(llama_7b, context=2048, new_tokens=2048)
    assert prefill.activations == 2048 * (4096 + 3 * 11008) * 2
    # Unfused, the softmax reads and writes every causal score.
    unfused = memory(llama_7b, context=2048, new_tokens=2048, attention="unfused")
    assert unfused.activations == 2048 * 4096 * 2 + 2 * 32 * (2048 * 2049 // 2) * 2


def test_fits_compares_with_the_capacity_in_bytes(a6000, llama_70b):
    m = memory(llama_70b, Precision("int4-g128"))
    assert a6000.memory_capacity == 48 * 2**30
    assert m.fits(a6000) is True
    assert m.fits("nvidia-rtx-4090") is False
    assert m.fits(rooflm.Hardware("chip", 1e12, {"fp16": 1e12})) is None
    sweep = memory(llama_70b, Precision("int4-g128"), batch=np.array([1, 1000]))
    assert sweep.fits(a6000).tolist() == [True, False]


def test_a_reports_memory_is_that_of_its_pass(llama_7b, a6000):
    for step, new in ((ForwardPass.decode(2, 100), 1), (ForwardPass.prefill(2, 100), 100)):
        for accounting in ("exact", "survey"):
            report = rooflm.analyze(llama_7b, a6000, step, accounting=accounting)
            assert report.memory == memory(llama_7b, None, 2, 100, new, accounting)


def test_weights_take_the_scales_into_account(llama_7b):
    weights = memory(llama_7b, Precision("int4-g128")).weights
    assert weights == llama_7b.parameters * (128 * 4 + 16 + 4) / 128 / 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"context": 0}, "context is 0"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"context": 4, "new_tokens": 5}, "new_tokens is 5; allowed: at most context"),
        ({"accounting": "surveys"}, "nearest: survey"),
        ({"attention": "fused"}, "unknown attention 'fused'"),
    ],
)
def test_bad_input_is_named(arguments, named, llama_7b):
    with pytest.raises(ValueError) as error:
        memory(llama_7b, **arguments)
    assert named in str(error.value)
