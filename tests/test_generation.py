"""Whole answers: the closed form against one decode step after the other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rooflm
from rooflm import Calibration, ForwardPass, Precision, analyze, generation

PRECISIONS = [Precision(), Precision("int4"), Precision("int8", "int8", "int4")]


def step_by_step(model, device, p, batch, prompt, output, **options):
    seconds = [
        analyze(model, device, ForwardPass.decode(batch, prompt + j), p, **options).seconds
        for j in range(1, output)
    ]
    first = analyze(model, device, ForwardPass.prefill(batch, prompt), p, **options).seconds
    return first, seconds


@given(
    st.sampled_from(PRECISIONS),
    st.integers(1, 400),
    st.integers(1, 3000),
    st.integers(2, 60),
    st.sampled_from(["flash", "unfused"]),
    st.sampled_from(["exact", "survey"]),
    st.floats(1e9, 1e13),
)
def test_the_sum_over_steps_equals_a_loop(p, batch, prompt, output, attention, accounting, width):
    model = rooflm.load_model("HuggingFaceTB/SmolLM2-135M")
    device = rooflm.Hardware("drawn", width, {"fp16": 1e14, "int8": 2e14})
    options = {"attention": attention, "accounting": accounting}
    first, steps = step_by_step(model, device, p, batch, prompt, output, **options)
    g = generation(model, device, p, batch, prompt, output, **options)
    assert g.ttft == pytest.approx(first, rel=1e-12)
    assert g.seconds == pytest.approx(first + math.fsum(steps), rel=1e-9)
    assert g.tpot == pytest.approx(math.fsum(steps) / len(steps), rel=1e-9)
    assert g.tokens_per_second == pytest.approx(batch * output / g.seconds, rel=1e-12)


def test_an_operator_that_turns_bound_midway_is_summed_on_both_sides():
    # Attention of many query heads on one KV head, on a chip whose ridge lies at its intensity.
    block = rooflm.Block(rooflm.Attention(64, 16, 1, 8), rooflm.MLP(64, 64))
    model = rooflm.Model("mqa", 64, 100, ((2, block),))
    device = rooflm.Hardware("chip", 1e9, {"fp16": 15.5e9})
    bounds = {
        next(
            r.bound
            for r in analyze(model, device, ForwardPass.decode(1, c)).operators
            if r.name == "fused_attention"
        )
        for c in (2, 2000)
    }
    assert bounds == {"memory", "compute"}
    _, steps = step_by_step(model, device, None, 1, 1, 2000)
    g = generation(model, device, None, 1, 1, 2000)
    assert g.seconds - g.ttft == pytest.approx(math.fsum(steps), rel=1e-9)


def test_a_calibrated_answer_charges_every_launch(llama_7b, a6000):
    calibration = Calibration(0.7, 0.8, 5e-6)
    first, steps = step_by_step(llama_7b, a6000, None, 2, 50, 20, calibration=calibration)
    g = generation(llama_7b, a6000, None, 2, 50, 20, calibration=calibration)
    assert g.seconds == pytest.approx(first + math.fsum(steps), rel=1e-9)


def test_one_token_has_no_decode_step(llama_7b, a6000):
    g = generation(llama_7b, a6000, output_tokens=1)
    assert g.seconds == g.ttft
    assert math.isnan(g.tpot)
    assert g.tokens_per_second == 1 / g.ttft
    assert g.memory.kv_cache == rooflm.memory(llama_7b, context=512).kv_cache


def test_arrays_agree_with_numbers(llama_7b, a6000):
    batch = np.array([[1], [7]])
    output = np.array([1, 2, 300])
    sweep = generation(llama_7b, a6000, None, batch, 100, output)
    for i in range(2):
        for j in range(3):
            one = generation(llama_7b, a6000, None, int(batch[i, 0]), 100, int(output[j]))
            assert sweep.seconds[i, j] == pytest.approx(one.seconds, rel=1e-12)
            assert sweep.tpot[i, j] == pytest.approx(one.tpot, rel=1e-12, nan_ok=True)


def test_memory_is_that_of_the_fullest_cache(llama_7b, a6000):
    g = generation(llama_7b, a6000, None, 4, 1000, 500)
    # The last token is never fed back: 1000 + 499 positions are kept.
    assert g.memory.kv_cache == 4 * 1499 * 2 * 32 * 4096 * 2
    assert g.fits is True
    assert generation(llama_7b, a6000, None, 64, 1000, 500).fits is False


def test_a_long_answer_costs_no_more_to_predict_than_a_short_one(llama_7b, a6000):
    g = generation(llama_7b, a6000, None, 1, 1, 2**39)
    assert g.fits is False
    assert g.tpot > 1


def test_bad_sizes_are_named(llama_7b, a6000):
    for name in ("batch", "prompt_tokens", "output_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            generation(llama_7b, a6000, **{name: 0})
    with pytest.raises(ValueError, match=r"prompt_tokens \+ output_tokens"):
        generation(llama_7b, a6000, prompt_tokens=2**40, output_tokens=2**40)
