"""The survey's accounting against its printed Table 1 and figures.

The oracle is data/survey/: the printed values, with decimals from a re-run of the survey's own
tool.
"""

import numpy as np
import pytest

import rooflm
from rooflm import ForwardPass, Precision, analyze, memory

ROW_NAMES = {"norm": ("attn_norm", "mlp_norm"), "add": ("attn_add", "mlp_add")}
WEIGHTS = {"W16": "fp16", "W8": "int8", "W4": "int4", "W2": "int2", "W1": "binary"}
CASES = {
    "FP16": Precision(),
    "W4": Precision("int4"),
    "KV4": Precision(kv_cache="int4"),
    "KV2": Precision(kv_cache="int2"),
    "W4KV4": Precision("int4", "fp16", "int4"),
    "W4A4": Precision("int4", "int4", "int4"),
}


def survey_report(model, device, step, precision=None):
    return analyze(model, device, step, precision, attention="unfused", accounting="survey")


@pytest.mark.parametrize("fact", rooflm.survey_table1(), ids=lambda f: f"{f['stage']}-{f['layer']}")
def test_table_1_row_for_row(fact, llama_7b, a6000):
    phase = ForwardPass.prefill if fact["stage"] == "prefill" else ForwardPass.decode
    rows = {row.name: row for row in survey_report(llama_7b, a6000, phase(1, 2048)).operators}
    for name in ROW_NAMES.get(fact["layer"], (fact["layer"],)):
        row = rows[name]
        assert row.flops == pytest.approx(float(fact["ops"]), rel=1e-4)
        assert row.bytes == pytest.approx(float(fact["bytes"]), rel=1e-4)
        assert row.intensity == pytest.approx(float(fact["intensity"]), rel=1e-4)
        assert row.attainable == pytest.approx(float(fact["performance"]), rel=1e-4)
        assert row.bound == fact["bound"]


def test_table_1_totals(llama_7b, a6000):
    # facts of the re-run: 226.9 ms for the prefill, 18.64 ms per decoded token
    prefill = survey_report(llama_7b, a6000, ForwardPass.prefill(1, 2048))
    decode = survey_report(llama_7b, a6000, ForwardPass.decode(1, 2048))
    assert round(prefill.seconds * 1e3, 1) == 226.9
    assert round(decode.seconds * 1e3, 2) == 18.64


def parse(case):
    words = case.split()
    return dict(zip(words[1:-1:2], map(int, words[2:-1:2]), strict=True)) | {
        "phase": words[0],
        "precision": CASES[words[-1]],
    }


@pytest.mark.parametrize("figure", [7, 11])
def test_memory_figures(figure, llama_13b):
    facts = rooflm.survey_figure(figure)
    assert len(facts) >= 20
    for fact in facts:
        case = parse(fact["case"])
        batch, context = case["batch"], case["context"]
        new = 1 if case["phase"] == "decode" else context
        sizes = (batch, context, new, "survey", "unfused")
        ours = memory(llama_13b, case["precision"], *sizes).total
        if fact["quantity"] == "memory":
            digits = len(fact["value"].split(".")[1])
            assert ours / 1e9 == pytest.approx(float(fact["value"]), abs=0.51 * 10**-digits), fact
        else:
            relative = ours / memory(llama_13b, Precision(), *sizes).total
            assert relative == pytest.approx(float(fact["value"]), abs=0.51e-4), fact


def test_figure_8_decode_time_over_batch_and_weight_bits(llama_13b, a6000):
    for fact in rooflm.survey_figure(8):
        if fact["quantity"] != "time":
            continue
        bits, _, batch = fact["case"].split()
        step = ForwardPass.decode(int(batch), 1024)
        ours = survey_report(llama_13b, a6000, step, Precision(WEIGHTS[bits])).seconds
        assert ours * 1e3 == pytest.approx(float(fact["value"]), abs=0.00051), fact


def test_figure_8_linear_layers_turn_compute_bound_at_these_batches(llama_13b, a6000):
    batches = np.arange(1, 300)
    for fact in rooflm.survey_figure(8):
        if fact["quantity"] == "time":
            continue
        _, operator, bits = fact["case"].split()
        step, p = ForwardPass.decode(batches, 1024), Precision(WEIGHTS[bits])
        rows = {r.name: r for r in survey_report(llama_13b, a6000, step, p).operators}
        first = batches[rows[operator].bound == "compute"][0]
        assert first == int(fact["value"]), fact


def test_figure_9_prefill_time_over_prompt_and_weight_bits(llama_13b, a6000):
    for fact in rooflm.survey_figure(9):
        bits, _, prompt = fact["case"].split()
        step = ForwardPass.prefill(1, int(prompt))
        ours = survey_report(llama_13b, a6000, step, Precision(WEIGHTS[bits])).seconds
        assert ours * 1e3 == pytest.approx(float(fact["value"]), abs=0.00051), fact


def test_figure_16_is_what_the_tool_prints_today(llama_13b, a6000):
    # An artefact of a bug, never shown as fact: reduction of bytes by fusing, in per cent,
    # from facts of a re-run at commit 472f71f.
    for step, bytes_percent, time_percent in (
        (ForwardPass.decode(1, 1000), 0.03, 0.03),
        (ForwardPass.decode(1, 100_000), 0.59, 0.59),
        (ForwardPass.decode(64, 1000), 0.55, 0.55),
        (ForwardPass.prefill(1, 1000), 2.05, 0.74),
        (ForwardPass.prefill(1, 100_000), 0.05, 0.04),
        (ForwardPass.prefill(64, 1000), 3.96, 0.74),
    ):
        unfused = survey_report(llama_13b, a6000, step)
        fused = analyze(llama_13b, a6000, step, attention="flash", accounting="survey")
        assert round(100 * (1 - fused.bytes / unfused.bytes), 2) == bytes_percent
        assert round(100 * (1 - fused.seconds / unfused.seconds), 2) == time_percent


def test_figure_18_ridge_points(a6000):
    cpu = rooflm.load_hardware("intel-i9-13900k")
    value = rooflm.survey_value
    assert round(a6000.ridge_point("fp16"), 1) == float(
        value(18, "GPU memory, GPU compute", "ridge point")
    )
    ddr = rooflm.Hardware("DDR with GPU compute", cpu.bandwidth, {"fp16": a6000.peaks["fp16"]})
    assert round(ddr.ridge_point()) == int(value(18, "DDR, GPU compute", "ridge point"))
    assert round(cpu.peak("fp16") / 1e12, 2) == float(value(18, "i9-13900K", "peak"))


def test_figure_19_serving(llama_13b, a6000):
    p = Precision("int8", "int8", "int8")
    for fact in rooflm.survey_figure(19):
        words = fact["case"].split()
        context = int(words[1])
        if fact["quantity"].startswith("largest batch"):
            batches = np.arange(1, 128)
            total = memory(llama_13b, p, batches, context, 1, "survey", "unfused").total
            assert batches[total < 48e9][-1] == int(fact["value"]), fact
            continue
        report = survey_report(llama_13b, a6000, ForwardPass.decode(int(words[3]), context), p)
        ours = {
            "throughput": report.tokens_per_second,
            "time": report.seconds * 1e3,
            "memory": report.memory.total / 1e9,
        }[fact["quantity"]]
        digits = len(fact["value"].split(".")[1])
        assert ours == pytest.approx(float(fact["value"]), abs=0.51 * 10**-digits), fact


def test_figure_20_decode_time_over_bandwidth(llama_13b):
    for fact in rooflm.survey_figure(20):
        chip = rooflm.Hardware("chip", float(fact["case"].split()[1]) * 1e9, {"fp16": 200e12})
        ours = survey_report(llama_13b, chip, ForwardPass.decode(1, 1024)).seconds
        assert ours * 1e3 == pytest.approx(float(fact["value"]), abs=0.00051), fact


@pytest.mark.parametrize(
    "step",
    [
        ForwardPass(1, 16, 16),  # a chunk
        ForwardPass.verify(1, 4, 100),
        ForwardPass(1, 16, 0, 0),
        ForwardPass(1, np.array([1, 2]), np.array([1, 2])),
    ],
)
def test_a_pass_that_the_survey_does_not_cover_is_refused(step, llama_7b, a6000):
    with pytest.raises(ValueError, match="survey accounting covers"):
        survey_report(llama_7b, a6000, step)
    with pytest.raises(ValueError, match="survey accounting covers"):
        memory(llama_7b, batch=1, context=32, new_tokens=16, accounting="survey")


def test_arrays_and_numbers_agree_in_the_surveys_accounting(llama_70b, a6000):
    contexts = np.array([3, 100, 5000])
    for attention in ("flash", "unfused"):
        for phase in (ForwardPass.prefill, ForwardPass.decode):
            sweep = analyze(llama_70b, a6000, phase(2, contexts), None, attention, "survey")
            for i, context in enumerate(contexts.tolist()):
                one = analyze(llama_70b, a6000, phase(2, context), None, attention, "survey")
                assert sweep.seconds[i] == pytest.approx(one.seconds, rel=1e-12)
                assert sweep.bytes[i] == pytest.approx(one.bytes, rel=1e-12)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-32B", "google/gemma-2-9b"])
def test_lower_bound_stays_below_the_sum_where_heads_are_wider_than_the_survey_takes_them(
    name, a6000
):
    report = survey_report(rooflm.load_model(name), a6000, ForwardPass.decode(64, 4_000))
    assert report.lower_bound <= report.seconds  # within Gemma's window, which the survey ignores
    assert report.memory.kv_cache < memory(name, batch=64, context=4_000).kv_cache


def test_the_surveys_48_gb_are_decimal(llama_13b, a6000):
    # Figure 19: the largest batches under 48 GB are 84 and 42, which decide at 48e9.
    p, batches = Precision("int8", "int8", "int8"), np.arange(1, 128)
    for context in (1024, 2048):
        m = memory(llama_13b, p, batches, context, 1, "survey", "unfused")
        largest = rooflm.survey_value(
            19, f"context {context}", "largest batch up to 127 under 48 GB"
        )
        assert batches[m.fits(a6000)][-1] == int(largest)
        assert m.capacity(a6000) == 48e9
    assert memory(llama_13b).capacity(a6000) == 48 * 2**30
