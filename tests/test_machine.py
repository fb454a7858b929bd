"""Structure of what the lab measures with. Nothing here asserts how long anything took."""

import pytest

import rooflm

torch = pytest.importorskip("torch")

from rooflm.lab import layer as lab_layer  # noqa: E402
from rooflm.lab import machine  # noqa: E402
from rooflm.roofline import operators  # noqa: E402

FP32 = rooflm.Precision("fp32", "fp32", "fp32")
SMALL = rooflm.Block(rooflm.Attention(32, 6, 2, 4), rooflm.MLP(32, 48))
BLOCKS = {
    "grouped queries": SMALL,
    "biases, LayerNorm, plain MLP": rooflm.Block(
        rooflm.Attention(32, 4, 4, 8, qkv_bias=True, out_bias=True),
        rooflm.MLP(32, 48, gated=False, bias=True),
        norm_vectors=2,
    ),
    "norms without weights": rooflm.Block(SMALL.mixer, SMALL.mlp, norm_vectors=0),
    "norm of each head": rooflm.Block(rooflm.Attention(32, 4, 2, 8, qk_norm="head"), SMALL.mlp),
    "norm of all heads": rooflm.Block(rooflm.Attention(32, 4, 2, 8, qk_norm="width"), SMALL.mlp),
    "four norms": rooflm.Block(
        SMALL.mixer, SMALL.mlp, ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
    ),
    "parallel, one norm": rooflm.Block(SMALL.mixer, SMALL.mlp, ("attn_norm",), parallel=True),
    "parallel, two norms": rooflm.Block(SMALL.mixer, SMALL.mlp, parallel=True),
}


def plainly(name, f):
    return f()


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_timed_layer_has_the_rows_of_the_prediction_in_their_order(block, new_tokens):
    timings = machine.time_block(block, 2, 7, new_tokens, layers=2, seconds=1e-6)
    step = rooflm.ForwardPass(2, new_tokens, 7 - new_tokens)
    assert list(timings) == [row.name for row in block.operators(step, FP32, "flash")]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_weights_of_a_layer_are_its_parameters(block):
    layer = lab_layer.make_layer(block, 1, 1)
    weights = {name: of for name, of in layer.items() if name not in ("keys", "values")}
    assert sum(of.numel() for of in weights.values()) == block.parameters


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_tensors_hold_the_bytes_that_the_prediction_counts(block):
    layer = lab_layer.make_layer(block, 3, 5)
    rows = list(block.operators(rooflm.ForwardPass.decode(3, 5), FP32, "flash"))
    for row in rows:
        held = sum(layer[name].nbytes for name in (row.name, f"{row.name}.bias") if name in layer)
        assert held == row.weight_bytes, row.name
    cache = layer["keys"].nbytes + layer["values"].nbytes
    assert cache == next(row.kv_read for row in rows if row.name == "fused_attention")
    assert cache == block.cache_bytes(3, 5, 4)


def test_torch_counts_the_flops_of_each_operator_that_the_prediction_counts():
    from torch.utils.flop_counter import FlopCounterMode

    batch, context, found = 3, 5, {}

    def record(name, f):
        with FlopCounterMode(display=False) as counter:
            result = f()
        found[name] = counter.get_total_flops()
        return result

    layer = lab_layer.make_layer(SMALL, batch, context)
    lab_layer.run_layer(SMALL, layer, torch.randn(batch, 1, 32), record)
    for row in SMALL.operators(rooflm.ForwardPass.decode(batch, context), FP32, "flash"):
        if row.rate == "linear":
            assert found[row.name] == row.flops, row.name
        elif row.rate == "vector":  # torch counts products of matrices only
            assert found[row.name] == 0, row.name


@pytest.mark.parametrize("new_tokens", [1, 3, 8])
def test_a_layer_is_pre_norm_attention_and_swiglu(new_tokens):
    """The oracle repeats K and V for every query head and forms the scores, in float64."""
    batch, context, n = 2, 8, new_tokens
    layer = lab_layer.make_layer(SMALL, batch, context)
    before = {name: of.double().clone() for name, of in layer.items()}
    x = torch.randn(batch, n, 32)
    found = lab_layer.run_layer(SMALL, layer, x, plainly)

    def rms(y, name):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * before[name]

    def heads(y, count):
        return y.view(batch, n, count, 4).transpose(1, 2)

    x = x.double()
    y = rms(x, "attn_norm")
    keys, values = before["keys"], before["values"]
    keys[:, :, context - n :] = heads(y @ before["k_proj"].T, 2)
    values[:, :, context - n :] = heads(y @ before["v_proj"].T, 2)
    q = heads(y @ before["q_proj"].T, 6)
    scores = q @ keys.repeat_interleave(3, 1).transpose(2, 3) / 2
    for token in range(n):
        scores[:, :, token, context - n + token + 1 :] = -torch.inf
    o = scores.softmax(-1) @ values.repeat_interleave(3, 1)
    h = x + o.transpose(1, 2).reshape(batch, n, 24) @ before["o_proj"].T
    y = rms(h, "mlp_norm")
    gate, up = y @ before["gate_proj"].T, y @ before["up_proj"].T
    expected = h + (gate * gate.sigmoid() * up) @ before["down_proj"].T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer["keys"].double(), keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer["values"].double(), values, rtol=1e-4, atol=1e-5)


def test_every_copy_of_a_layer_is_timed_equally_often():
    for layers in (1, 3):
        timings = machine.time_block(SMALL, 1, 4, layers=layers, seconds=1e-6)
        runs = {timing.runs for timing in timings.values()}
        assert len(runs) == 1 and runs.pop() == 3 * layers


@pytest.mark.parametrize(("runs", "warmup"), [(1, 0), (4, 2)])
def test_time_call_calls_the_stated_number_of_times(runs, warmup):
    calls = []
    timing = machine.time_call(lambda: calls.append(1), runs, warmup)
    assert len(calls) == runs + warmup
    assert timing.runs == runs
    assert 0 <= timing.best_s <= timing.median_s
    assert timing.iqr_s >= 0


def test_a_timing_summarizes_as_numpy_does():
    numpy = pytest.importorskip("numpy")
    times = [0.5, 0.1, 0.9, 0.3, 0.25, 0.7]
    low, middle, high = numpy.percentile(times, [25, 50, 75])
    timing = machine.Timing.of(times)
    assert timing.median_s == pytest.approx(middle)
    assert timing.iqr_s == pytest.approx(high - low)
    assert machine.Timing.of([2.0]) == machine.Timing(2.0, 0.0, 1, 2.0)


def test_bandwidth_kernels_count_one_transfer_for_each_operand():
    moved = machine.stream_bytes(1000)
    assert moved["copy"] == 2 * moved["read"]  # read x, write z
    assert moved["triad"] == 3 * moved["read"]  # read x and y, write z
    # The FP32 residual add of the prediction moves what a triad moves.
    add = operators.residual_add("add", 1, 1000, 4)
    assert moved["triad"] == add.activations_read + add.activations_written


def test_every_bandwidth_kernel_runs():
    timings = machine.stream_timings(elements=8192, piece=4096, seconds=1e-6)
    assert list(timings) == list(machine.stream_bytes(8192))
    assert all(timing.best_s > 0 and timing.runs >= 3 for timing in timings.values())


def test_matmul_timings_are_named_by_their_shapes():
    shapes = [(1, 64, 32), (5, 64, 32)]
    timings = machine.matmul_timings(shapes, cold=False, runs=3)
    assert list(timings) == shapes
    assert all(timing.median_s > 0 and timing.runs == 3 for timing in timings.values())


@pytest.mark.parametrize("nbytes", [1, 1000, 2**20, 2**40])
def test_copies_exceed_the_cache_four_times(nbytes):
    cache = 2**15
    copies = machine.cold_copies(nbytes, cache)
    assert copies >= 1 and copies * nbytes >= 4 * cache
    assert copies == 1 or (copies - 1) * nbytes < 4 * cache
    assert machine.last_level_cache_bytes() > 0


def test_the_measured_machine_is_a_device_like_any_other(monkeypatch):
    monkeypatch.setattr(machine, "STREAM_ELEMENTS", 8192)
    monkeypatch.setattr(machine, "STREAM_PIECE", 4096)
    monkeypatch.setattr(machine, "SQUARES", (16, 32))
    before = torch.get_num_threads()
    device = machine.measure_machine(seconds=0.01, threads=1)
    assert torch.get_num_threads() == before
    assert device.name == "this machine"
    assert device.bandwidth > 0 and device.peaks["fp32"] > 0
    assert set(device.peaks) <= {"fp32", "bf16"}
    report = rooflm.analyze(
        "facebook/opt-125m", device, rooflm.ForwardPass.decode(1, 16), precision=FP32
    )
    assert report.seconds > 0


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), machine.thread_count(1) as threads:
        assert threads == torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: machine.matmul_timing(1, 8, 8, "fp31"), "dtype"),
        (lambda: machine.time_call(int, runs=0), "runs is 0"),
        (lambda: machine.measure_machine(seconds=0), "seconds is 0"),
        (lambda: machine.stream_timings(8192, 4097), "multiple of 4096"),
        (lambda: machine.time_block(SMALL, 1, 4, 5, layers=1), "new_tokens is 5"),
        (lambda: machine.time_block(SMALL, 0, 4, layers=1), "batch is 0"),
        (lambda: machine.time_block(rooflm.Block(SMALL.mlp, SMALL.mlp), 1, 4), "layer with MLP"),
        (lambda: machine.Timing.of([]), "no times"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
