"""The explorer of low rank: a projection as two factors, its time and its break-even ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rooflm.roofline import operators as op
from rooflm.roofline.analysis import Calibration, analyze
from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.factorized import PROJECTIONS, attention_shapes, factorize, mlp_shapes
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import hardware_names, load_hardware
from rooflm.roofline.low_rank import (
    Shape,
    break_even_rank,
    break_even_rank_of_bytes,
    break_even_rank_of_time,
    linear_pair,
    rank_of_share,
)
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import Number, maximum, unknown
from rooflm.roofline.operators import Operator
from rooflm.show.canvas import Figure
from rooflm.show.explorer import (
    Control,
    Explorer,
    doubling,
    figure_html,
    on_a_device,
    whole_setting,
)
from rooflm.show.figures import lines
from rooflm.show.tables import Table, table
from rooflm.show.words import number, si

CONTEXT = 1024  # tokens of each sequence of the whole pass
_DENSE = tuple(name for name in model_names() if load_model(name).is_dense)
LOW_RANK_CONTROLS = (
    Control("model", "Model", "choice", _DENSE, "meta-llama/Llama-2-7b-hf"),
    Control("device", "Device", "choice", tuple(hardware_names()), "nvidia-a6000"),
    Control("projection", "Projection", "choice", PROJECTIONS, "q"),
    Control("weights", "Weights", "choice", ("fp16", "int8", "int4-g128"), "fp16"),
    Control("share", "Numbers, %", "steps", (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100), 50),
    Control("tokens", "Tokens", "steps", doubling(1, 8192), 1),
    Control("overhead", "Start, µs", "steps", (0, 1, 2, 5, 10), 0),
)


class Cost(NamedTuple):
    """What a projection takes: numbers, FLOP, B and s; of two factors in all."""

    numbers: Number
    flops: Number
    bytes: Number
    seconds: Number


class LowRank(NamedTuple):
    """What a setting comes to.

    Parameters
    ----------
    shape, rank : of the projection, and of its factors.
    dense, factors : what one matrix and two factors cost.
    even : break-even ranks of numbers, of bytes and of time.
    passes : seconds of a decode step with dense and with factorized projections.
    """

    shape: Shape
    rank: int
    dense: Cost
    factors: Cost
    even: dict[str, float]
    passes: tuple[float, float]


def low_rank_costs(**settings: Any) -> LowRank:
    """What the explorer shows for a setting of its controls; those left out are at the start.

    Raises
    ------
    ValueError
        for an unknown control or value, or a projection that the model does not have.
    """
    s = whole_setting(LOW_RANK_CONTROLS, settings)
    model, t, t0 = load_model(s["model"]), s["tokens"], s["overhead"] * 1e-6
    shape, share = _shape(model, s["projection"]), s["share"] / 100
    p = Precision(s["weights"], "int8" if s["weights"] == "int8" else "fp16")
    step = ForwardPass.decode(t, CONTEXT)  # checks the tokens
    start = Calibration(overhead=t0)  # checks the overhead
    whole, small = (
        float(analyze(m, s["device"], step, p, calibration=start).seconds)
        for m in (model, factorize(model, share=share))
    )
    rank = int(rank_of_share(shape.d_in, shape.d_out, share))
    costs = _costs(s, shape, p)
    d_in, d_out, _ = shape
    _, peak = load_hardware(s["device"]).rate(p.weights, p.activations)
    roofs = peak, load_hardware(s["device"]).bandwidth
    even = {
        "numbers": float(break_even_rank(d_in, d_out)),
        "bytes": float(break_even_rank_of_bytes(t, d_in, d_out, p.w, p.a)),
        "time": float(break_even_rank_of_time(t, d_in, d_out, p.w, p.a, *roofs, t0)),
    }
    return LowRank(shape, rank, costs(None), costs(rank), even, (whole, small))


def low_rank_explorer(
    model: str = "meta-llama/Llama-2-7b-hf", device: str = "nvidia-a6000", **settings: Any
) -> Explorer:
    """The explorer; in a live notebook its controls move.

    Parameters
    ----------
    model, device : where it starts.
    settings : where the other controls start: projection, weights, share, tokens, overhead.
    """
    return on_a_device(LOW_RANK_CONTROLS, _verdict, _view, model, device, settings)


def _verdict(**s: Any) -> str:
    """The setting's answer in one sentence."""
    found = low_rank_costs(**s)
    name = s["model"].rsplit("/", 1)[-1]
    ratio = float(found.factors.seconds / found.dense.seconds)
    d_in, d_out, _ = found.shape
    even = found.even["time"]
    pays = f"time is saved below rank {number(even, 4)}" if even >= 1 else "no rank saves time"
    tokens = f"{number(s['tokens'])} token{'s' * (s['tokens'] != 1)}"
    return (
        f"{name}, {s['projection']}_proj of {d_in} × {d_out} on {s['device']}, {tokens}: rank "
        f"{found.rank} takes {number(ratio, 3)} of the time; {pays}."
    )


def _view(**s: Any) -> str:
    found = low_rank_costs(**s)
    caption = "What two factors take over what one matrix does, by their rank."
    return figure_html(_figure(s, found), caption) + _table(s, found).html


def _figure(s: dict[str, Any], found: LowRank) -> Figure:
    p = Precision(s["weights"], "int8" if s["weights"] == "int8" else "fp16")
    full = min(found.shape.d_in, found.shape.d_out)
    ranks = np.unique(np.linspace(1, full, 120).round())
    costs = _costs(s, found.shape, p)
    factors, dense = costs(ranks), found.dense
    series = {
        "time": factors.seconds / dense.seconds,
        "bytes": factors.bytes / dense.bytes,
        "numbers": factors.numbers / dense.numbers,
    }
    marks = {f"rank {found.rank}": float(found.rank)}
    if found.even["time"] >= 1:
        marks["break-even"] = min(found.even["time"], full)
    return lines(ranks.tolist(), series, "rank", "two factors over one matrix", marks=marks)


def _table(s: dict[str, Any], found: LowRank) -> Table:
    dense, factors = found.dense, found.factors
    even = {name: number(x, 5) if x >= 1 else "none" for name, x in found.even.items()}
    rows = [
        ("numbers", number(dense.numbers), number(factors.numbers), even["numbers"]),
        ("work", si(dense.flops, "FLOP"), si(factors.flops, "FLOP"), even["numbers"]),
        ("bytes moved", si(dense.bytes, "B"), si(factors.bytes, "B"), even["bytes"]),
        ("time", si(dense.seconds, "s"), si(factors.seconds, "s"), even["time"]),
        ("time of a decode step", *(si(x, "s") for x in found.passes), ""),
    ]
    columns = ["quantity", "one matrix", f"rank {found.rank}", "break-even rank"]
    caption = (
        f"{s['projection']}_proj; the last row has {s['share']} % of the numbers of every "
        f"projection, batch {number(s['tokens'])}, context {number(CONTEXT)}"
    )
    return table(rows, columns, caption=caption)


def _shape(model: Model, projection: str) -> Shape:
    block = model.blocks[0][1]
    attention, mlp = block.dense("low rank")
    shapes = attention_shapes(attention) | mlp_shapes(mlp)
    if projection not in shapes:
        raise unknown(f"projection of {model.name}", projection, shapes)
    return shapes[projection]


def _costs(s: dict[str, Any], shape: Shape, p: Precision) -> Callable[[Number | None], Cost]:
    """From a rank, or None for the matrix, to its cost."""
    device, t, t0 = load_hardware(s["device"]), s["tokens"], s["overhead"] * 1e-6
    _, peak = device.rate(p.weights, p.activations)
    d_in, d_out, bias = shape

    def seconds(row: Operator) -> Number:
        return maximum(row.flops / peak, _moved(row) / device.bandwidth) + t0

    def cost(rank: Number | None) -> Cost:
        rows = [op.linear("", t, d_in, d_out, bias, p.w, p.a)]
        held = (d_in + bias) * d_out
        if rank is not None:
            rows = linear_pair("", t, shape, rank, p.w, p.a)
            held = rank * (d_in + d_out) + bias * d_out
        return Cost(
            held,
            sum(row.flops for row in rows),
            sum(map(_moved, rows)),
            sum(map(seconds, rows)),
        )

    return cost


def _moved(row: Operator) -> Number:
    return row.weight_bytes + row.activations_read + row.activations_written
