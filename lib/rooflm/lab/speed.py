"""Prefill and decode of the laboratory's models, timed beside the roofline's prediction.

Four numbers belong to one pass. The prediction at the roofs (`predict`), which nothing beats.
The linear layers alone, each shape timed for itself with its weights cold (`time_linears`): what
the kernels make of the roofs. What is left when every width is tiny (`time_calls`): Python and a
thousand small operators. And the whole pass (`time_prefill`, `time_decode`). `calibrate` turns
the second and the third into a `Calibration`, with which the prediction is no longer a bound
but an estimate of the fourth; `account` sets all four side by side for each kind of weights.

What is counted, and what is not:

- Weights are cold. Decoding SmolLM2 reads 540 MB, which no cache holds; a teacher of 20 MB may
  stay in a large cache from one step to the next, and would then beat a roof that was measured
  in DRAM. With `cold=True` copies of the model take turns, as many as `machine.cold_copies`
  asks for. With `cold=False` one model is used again and again, as generating does.
- A prefill computes the logits of its last position only, as `ForwardPass.prefill` counts.
- No tokenizer, no sampling. The tokens and the cache are noise: the time does not depend on
  what they say.
- The roofs must have been measured with as many threads as the model is timed with.

Sources: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009; the survey, arXiv
2402.16363, section 2.2.

Chapter: decode time; quantization roofline.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

import torch
from torch import nn

from rooflm.lab.machine import Timing, cold_copies, matmul_timing, thread_count, time_call
from rooflm.lab.model import Cache, FullCache, Transformer
from rooflm.lab.packed import pack_model
from rooflm.lab.packed import precision as packed_precision
from rooflm.roofline.analysis import AT_THE_ROOFS, Calibration, Report, analyze
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import Hardware
from rooflm.roofline.model import ForwardPass
from rooflm.roofline.numeric import size

_FILLED_AT_ONCE = 64

FP32 = Precision("fp32", "fp32", "fp32")


def predict(
    model: Transformer,
    machine: Hardware,
    step: ForwardPass,
    precision: Precision = FP32,
    calibration: Calibration = AT_THE_ROOFS,
) -> Report:
    """What the roofline says of a pass of this model on this machine.

    Parameters
    ----------
    machine : what `machine.measure_machine` returns.
    step : `ForwardPass.decode(batch, context)`, `ForwardPass.prefill(batch, prompt_tokens)`, ….
    precision : FP32 throughout, as `Transformer` computes; for packed weights,
        `packed.precision(kind)`.
    calibration : at the roofs, or what `calibrate` returns.
    """
    return analyze(model.to_roofline(), machine, step, precision, calibration=calibration)


def time_decode(
    model: Transformer,
    batch: int,
    context: int,
    steps: int = 8,
    cold: bool = True,
    threads: int | None = None,
    new_cache: Callable[[], Cache] = FullCache,
) -> Timing:
    """Time decode steps, one new token for each sequence.

    Parameters
    ----------
    batch, context : sequences; tokens of each once the step is done, at least 2, as in
        `ForwardPass.decode`. The steps follow one another: the i-th has i tokens more.
    steps : timed steps, after one to warm up that has a token less.
    cold : copies of the model take turns, each with a cache of its own; see above.
    threads : torch threads; None for as many as torch uses already.
    new_cache : makes an empty KV cache.

    Returns
    -------
    Timing
        of a step, seconds.
    """
    size("batch", batch), size("context", context, smallest=2), size("steps", steps)
    with thread_count(threads), torch.inference_mode():
        models = _turns(model, cold)
        turns = cycle([(m, _filled(new_cache(), m, batch, context - 2)) for m in models])
        token = torch.zeros(batch, 1, dtype=torch.int64)

        def step() -> None:
            current, cache = next(turns)
            current(token, cache)

        return time_call(step, runs=steps, warmup=len(models))


def time_prefill(
    model: Transformer,
    batch: int,
    prompt_tokens: int,
    runs: int = 3,
    cold: bool = True,
    threads: int | None = None,
    new_cache: Callable[[], Cache] = FullCache,
) -> Timing:
    """Time the prefill of prompts, up to the logits of their last tokens.

    Parameters
    ----------
    batch, prompt_tokens : sequences, and tokens of each.
    runs : timed runs, after one to warm up.
    cold, threads, new_cache : as in `time_decode`.

    Returns
    -------
    Timing
        of a prefill, seconds.
    """
    size("batch", batch), size("prompt_tokens", prompt_tokens)
    vocab = model.config.vocab
    tokens = torch.arange(batch * prompt_tokens).remainder(vocab).view(batch, prompt_tokens)
    with thread_count(threads), torch.inference_mode():
        models = _turns(model, cold)
        turns = cycle(models)

        def prefill() -> None:
            current = next(turns)
            current.logits(current.states(tokens, new_cache())[:, -1:])

        return time_call(prefill, runs=runs, warmup=len(models))


def time_calls(model: Transformer, steps: int = 16, threads: int | None = None) -> Timing:
    """Time a decode step of the same model with every width tiny: what the calls alone cost.

    Its weights are a few kilobytes and stay in the nearest cache, so that neither roof shows.
    """
    tiny = replace(model.config, vocab=2, hidden=2 * model.config.heads, intermediate=2)
    return time_decode(Transformer(tiny).eval(), 1, 2, steps, cold=False, threads=threads)


def linear_shapes(model: Transformer, head: bool = True) -> dict[tuple[int, int], int]:
    """How often a pass multiplies by a weight of (d_in, d_out), with or without the head."""
    c = model.config
    kv_width = c.kv_heads * c.head_dim
    block = Counter({(c.hidden, c.intermediate): 2, (c.intermediate, c.hidden): 1}) + Counter(
        [(c.hidden, c.hidden), (c.hidden, c.hidden), *[(c.hidden, kv_width)] * 2]
    )
    shapes = Counter({shape: c.layers * count for shape, count in block.items()})
    if head:
        shapes[c.hidden, c.vocab] += 1
    return dict(shapes)


def time_linears(
    model: Transformer,
    rows: int = 1,
    head: bool = True,
    runs: int = 8,
    cold: bool = True,
    threads: int | None = None,
) -> dict[tuple[int, int], Timing]:
    """Time the linear layers of a model one after another, with nothing between them.

    Parameters
    ----------
    model : its layers may be packed.
    rows : tokens of all sequences together.
    head : whether the head is one of them; a prefill gives it fewer rows than the others.
    runs : passes over all layers, after one to warm up.
    cold, threads : as in `time_decode`.

    Returns
    -------
    {(d_in, d_out): Timing}
        seconds of one layer of that shape, from all layers that have it; `linear_shapes` says
        how many these are.
    """
    size("rows", rows), size("runs", runs)
    times: dict[tuple[int, int], list[float]] = {}
    with thread_count(threads), torch.inference_mode():
        layers = [layer for m in _turns(model, cold) for layer in _linears(m, head)]
        inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}
        for _ in range(1 + runs):
            for layer in layers:
                x = inputs[layer.in_features]
                start = time.perf_counter()
                layer(x)
                seconds = time.perf_counter() - start
                shape = (layer.in_features, layer.out_features)
                times.setdefault(shape, []).append(seconds)
    return {shape: Timing.of(of[len(of) // (1 + runs) :]) for shape, of in times.items()}


def calibrate(model: Transformer, machine: Hardware, threads: int | None = None) -> Calibration:
    """Shares of the roofs that this model's matmuls reach, and the overhead of an operator.

    The overhead t0 is the time of `time_calls` over the operators of the prediction. The memory
    share is fitted to the linear layers of one row, the compute share to those of 256 rows, less
    a tiny layer's time for each, which t0 holds already. Neither is fitted to a whole pass.
    """
    rows = predict(model, machine, ForwardPass.decode(1, 2)).operators
    overhead = time_calls(model, threads=threads).best_s / sum(row.count for row in rows)
    call, many = _tiny_linear(threads), 256

    def share(at_the_roof: float, timings: dict[tuple[int, int], Timing]) -> float:
        own = sum(counts[shape] * (timing.best_s - call) for shape, timing in timings.items())
        return min(1.0, at_the_roof / max(own, 1e-9))

    counts = linear_shapes(model)
    weights = sum(d_in * d_out * count for (d_in, d_out), count in counts.items())
    memory = share(4 * weights / machine.bandwidth, time_linears(model, threads=threads))
    head = model.config.hidden * model.config.vocab
    # FLOPs, not MACs: hence the 2.
    compute = share(
        2 * many * (weights - head) / machine.peak("fp32"),
        time_linears(model, many, head=False, runs=2, threads=threads),
    )
    return Calibration(compute, memory, overhead)


class Account(NamedTuple):
    """Where the time of a decode step goes, in seconds; times are the fastest of several runs.

    Parameters
    ----------
    kind : "fp32" or one of `packed.KINDS`.
    weight_bytes : bytes of weights that a step reads.
    predicted_s : at the roofs.
    linears_s : the linear layers alone, as of `time_linears`.
    calls_s : everything else with tiny widths, which is what its calls cost.
    measured_s : the step.
    """

    kind: str
    weight_bytes: int
    predicted_s: float
    linears_s: float
    calls_s: float
    measured_s: float

    @property
    def remainder_s(self) -> float:
        """What neither explains: attention over the cache, and what the caches had to fetch."""
        return self.measured_s - self.linears_s - self.calls_s


def account(
    model: Transformer,
    machine: Hardware,
    kinds: Iterable[str] = ("fp32", "int8"),
    context: int = 128,
    steps: int = 16,
    threads: int | None = None,
) -> list[Account]:
    """Decode one sequence with each kind of weights: predicted, explained and measured.

    Parameters
    ----------
    model : in FP32; it is packed here, head included.
    machine : what `machine.measure_machine` returns with as many threads.
    kinds : "fp32", or of `packed.KINDS`.
    context, steps, threads : as in `time_decode`.
    """
    # Less the tiny linear layers: what their calls cost is in `linears_s` already.
    linears = _tiny_linear(threads) * sum(linear_shapes(model).values())
    calls = time_calls(model, threads=threads).best_s - linears
    step = ForwardPass.decode(1, context)
    found = []
    for kind in kinds:
        packed = model if kind == "fp32" else pack_model(model, kind)
        formats = FP32 if kind == "fp32" else packed_precision(kind)
        found.append(
            Account(
                kind,
                weight_bytes(packed),
                predict(model, machine, step, formats).seconds,
                _total(packed, time_linears(packed, threads=threads)),
                calls,
                time_decode(packed, 1, context, steps, threads=threads).best_s,
            )
        )
    return found


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that one decode step reads: all of them, the embedding as the head."""
    total = 0
    for module in model.modules():
        if module is not model.embedding or model.head is None:
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += getattr(module, "packed_bytes", sum(tensor.nbytes for tensor in own))
    return total


def _tiny_linear(threads: int | None) -> float:
    """Seconds of a linear layer without work: its call."""
    with thread_count(threads), torch.inference_mode():
        return matmul_timing(1, 2, 2, cold=False, runs=200).best_s


def _total(model: Transformer, timings: dict[tuple[int, int], Timing]) -> float:
    """The fastest time of each shape, times how often it occurs."""
    counts = linear_shapes(model)
    return sum(counts[shape] * timing.best_s for shape, timing in timings.items())


def _linears(model: Transformer, head: bool) -> list[nn.Module]:
    """The linear layers in the order of a pass."""
    layers = [m for block in model.layers for m in block.children() if hasattr(m, "in_features")]
    if head and model.head is not None:
        layers.append(model.head)
    elif head:
        tied = nn.Linear(1, 1, bias=False)
        tied.in_features, tied.out_features = model.config.hidden, model.config.vocab
        tied.weight = model.embedding.weight
        layers.append(tied)
    return layers


def _turns(model: Transformer, cold: bool) -> list[Transformer]:
    copies = cold_copies(weight_bytes(model)) if cold else 1
    return [model, *(copy.deepcopy(model) for _ in range(copies - 1))]


def _filled(cache: Cache, model: Transformer, batch: int, positions: int) -> Cache:
    """The cache with noise at that many positions."""
    c = model.config
    for start in range(0, positions, _FILLED_AT_ONCE):
        new = min(_FILLED_AT_ONCE, positions - start)
        noise = torch.randn(batch, c.kv_heads, new, c.head_dim)
        queries = torch.zeros(batch, c.heads, new, c.head_dim)
        for layer in range(c.layers):
            if isinstance(cache, FullCache):
                cache.extend(layer, noise, noise)  # what the queries find is of no interest
            else:
                cache.attend(layer, queries, noise, noise, model.rope)
    return cache
