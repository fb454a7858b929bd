"""What is timed, not how long it took: passes, contexts, bytes and operators."""

import pytest

import rooflm

torch = pytest.importorskip("torch")

from rooflm.lab import machine, packed, speed  # noqa: E402
from rooflm.lab.model import Config, FullCache, Transformer  # noqa: E402

CONFIG = Config(vocab=96, hidden=128, layers=3, heads=4, kv_heads=2, intermediate=256)
MACHINE = rooflm.Hardware("a machine", bandwidth=1e10, peaks={"fp32": 1e11})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def two_copies(monkeypatch):
    monkeypatch.setattr(speed, "cold_copies", lambda nbytes: 2)


class Spy(FullCache):
    contexts: list[int]

    def extend(self, layer, keys, values):
        keys, values = super().extend(layer, keys, values)
        if layer == 0:
            self.contexts.append((keys.shape[0], keys.shape[2]))
        return keys, values


def spied():
    Spy.contexts = []
    return Spy


def test_decode_steps_have_the_stated_contexts(model):
    timing = speed.time_decode(model, 3, 7, steps=4, cold=False, new_cache=spied())
    filled, warm_up, *timed = Spy.contexts
    assert filled == (3, 5) and warm_up == (3, 6)
    assert timed == [(3, 7), (3, 8), (3, 9), (3, 10)]
    assert timing.runs == 4 and timing.best_s > 0


def test_a_decode_step_at_the_shortest_context_follows_an_empty_cache(model):
    speed.time_decode(model, 1, 2, steps=1, cold=False, new_cache=spied())
    assert Spy.contexts == [(1, 1), (1, 2)]


def test_cold_copies_take_turns_each_with_its_cache(model, two_copies):
    timing = speed.time_decode(model, 1, 5, steps=4, new_cache=spied())
    assert [context for _, context in Spy.contexts] == [3, 3, 4, 4, 5, 5, 6, 6]
    assert timing.runs == 4


def test_a_prefill_computes_one_row_of_logits_for_each_sequence(model, monkeypatch):
    rows = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: rows.append(tuple(x.shape)) or logits(x))
    timing = speed.time_prefill(model, 2, 9, runs=3, cold=False, new_cache=spied())
    assert rows == [(2, 1, CONFIG.hidden)] * 4 and timing.runs == 3
    assert Spy.contexts == [(2, 9)] * 4


def test_shapes_of_the_linear_layers_are_those_of_the_prediction(model):
    rows = speed.predict(model, MACHINE, rooflm.ForwardPass.decode(1, 2)).operators
    linears = [row for row in rows if row.name.endswith("_proj") or row.name == "lm_head"]
    shapes = speed.linear_shapes(model)
    assert sum(row.count for row in linears) == sum(shapes.values()) == 7 * CONFIG.layers + 1
    weights = sum(d_in * d_out * count for (d_in, d_out), count in shapes.items())
    assert 4 * weights == sum(row.weight_bytes * row.count for row in linears)
    assert sum(speed.linear_shapes(model, head=False).values()) == 7 * CONFIG.layers


def test_every_linear_layer_is_timed_equally_often(model, two_copies):
    timings = speed.time_linears(model, rows=3, runs=5)
    counts = speed.linear_shapes(model)
    assert {shape: timing.runs for shape, timing in timings.items()} == {
        shape: 2 * 5 * count for shape, count in counts.items()
    }


def test_a_model_and_its_packed_copy_have_the_same_linear_layers(model):
    kind = packed.kinds_here()[0]
    layers = speed.time_linears(packed.pack_model(model, kind), runs=1, cold=False)
    assert list(layers) == list(speed.time_linears(model, runs=1, cold=False))


def test_weight_bytes_are_those_that_the_prediction_counts(model):
    def counted(precision):
        step = rooflm.ForwardPass.decode(1, 2)
        rows = speed.predict(model, MACHINE, step, precision).operators
        return sum(row.weight_bytes * row.count for row in rows if row.name != "embedding")

    assert speed.weight_bytes(model) == counted(speed.FP32)
    norms = 4 * CONFIG.hidden * (2 * CONFIG.layers + 1)
    for kind in packed.kinds_here():
        bits = packed.precision(kind)
        layers = packed.pack_model(model, kind)
        scales = {"int8": 2, "int8-dynamic": 12}.get(kind, 0)  # of a row; a bare int8 has none
        rows = sum(d_out * n for (_, d_out), n in speed.linear_shapes(model).items())
        weights = counted(bits) - norms * bits.w / 4  # norms stay in FP32
        assert speed.weight_bytes(layers) == weights + norms + scales * rows


def test_a_prediction_is_that_of_the_models_config(model):
    step = rooflm.ForwardPass.decode(2, 30)
    config = CONFIG.to_dict()
    expected = rooflm.analyze(config, MACHINE, step, rooflm.Precision("fp32", "fp32", "fp32"))
    assert speed.predict(model, MACHINE, step).seconds == expected.seconds
    assert speed.predict(model, MACHINE, step).bytes > 4 * sum(
        p.numel() for name, p in model.named_parameters() if "proj" in name
    )


def test_calls_are_timed_on_the_same_number_of_layers_and_heads(model, monkeypatch):
    seen = []
    decode = speed.time_decode
    monkeypatch.setattr(
        speed, "time_decode", lambda m, *a, **k: seen.append(m) or decode(m, *a, **k)
    )
    speed.time_calls(model, steps=2)
    tiny = seen[0].config
    assert (tiny.layers, tiny.heads, tiny.kv_heads) == (3, 4, 2)
    assert sum(p.numel() for p in seen[0].parameters()) < 1000


def test_a_calibration_is_made_of_what_was_timed(model, monkeypatch):
    """All linear layers at half the roofs, an operator of 2 and a call of 1 microsecond."""
    step = rooflm.ForwardPass.decode(1, 2)
    operators = sum(row.count for row in speed.predict(model, MACHINE, step).operators)
    call = 1e-6

    def timings(m, rows=1, head=True, **_):
        return {
            (i, o): machine.Timing.of(
                [call + (8 * i * o / 1e10 if rows == 1 else 4 * rows * i * o / 1e11)]
            )
            for i, o in speed.linear_shapes(m, head)
        }

    monkeypatch.setattr(speed, "time_linears", timings)
    monkeypatch.setattr(
        speed, "time_calls", lambda m, threads: machine.Timing.of([2e-6 * operators])
    )
    monkeypatch.setattr(speed, "_tiny_linear", lambda threads: call)
    found = speed.calibrate(model, MACHINE)
    assert found.overhead == pytest.approx(2e-6)
    assert found.memory == pytest.approx(0.5) and found.compute == pytest.approx(0.5)


def test_a_calibrated_prediction_is_slower_than_the_roofs(model):
    step = rooflm.ForwardPass.decode(1, 20)
    roofs = speed.predict(model, MACHINE, step)
    half = speed.predict(model, MACHINE, step, calibration=rooflm.Calibration(0.5, 0.5, 1e-6))
    operators = sum(row.count for row in roofs.operators)
    assert half.seconds == pytest.approx(2 * roofs.seconds + 1e-6 * operators)


def test_an_account_adds_up(model, two_copies):
    kinds = ["fp32", *packed.kinds_here()]
    rows = speed.account(model, MACHINE, kinds, context=5, steps=2)
    assert [row.kind for row in rows] == kinds
    for row in rows:
        assert row.remainder_s == pytest.approx(row.measured_s - row.linears_s - row.calls_s)
        assert row.predicted_s > 0 and row.linears_s > 0 and row.measured_s > 0
    by_bytes = sorted(rows, key=lambda row: row.weight_bytes)
    assert by_bytes[-1].kind == "fp32"
    weights = rooflm.Precision("int8", "fp32", "fp32")
    step = rooflm.ForwardPass.decode(1, 5)
    int8 = [row for row in rows if row.kind == "int8"]
    for row in int8:
        assert row.predicted_s == speed.predict(model, MACHINE, step, weights).seconds


def test_threads_are_restored(model):
    before = torch.get_num_threads()
    speed.time_decode(model, 1, 2, steps=1, cold=False, threads=1)
    speed.time_prefill(model, 1, 2, runs=1, cold=False, threads=1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: speed.time_decode(m, 1, 1), "context is 1"),
        (lambda m: speed.time_decode(m, 0, 8), "batch is 0"),
        (lambda m: speed.time_decode(m, 1, 8, steps=0), "steps is 0"),
        (lambda m: speed.time_prefill(m, 1, 0), "prompt_tokens is 0"),
        (lambda m: speed.time_prefill(m, 1, 1, runs=0), "runs is 0"),
        (lambda m: speed.time_linears(m, rows=0), "rows is 0"),
        (lambda m: speed.account(m, MACHINE, ["int3"], 4, 1), "unknown kind"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
