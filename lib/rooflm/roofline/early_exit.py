"""Early exit on the roofline: what a step costs if some tokens leave before the last layer.

A token that leaves after layer l skips the layers above, but later tokens will look for its keys
and values there. Copied states (CALM) give them: what left goes through the key and value
projections of every layer that it skipped. In a batch the tokens leave at different layers. A layer
reads its weights if any of them needs it, so that the saving of weights falls with the batch; the
cache of those that left isn't read, whatever the batch. Where all leave together, the last one
decides, and nothing is saved but where it leaves early too.

To know when to leave has a price, too. The gap between the two likeliest tokens needs the whole
head after each layer; the likeness of states, or a classifier of one row, need hardly anything and
are left out.

Sources: survey (arXiv 2402.16363), sections 4.1.1 and 4.1.4; CALM, arXiv 2207.07061 (copied
states, the measures); leaving together, SkipDecode, arXiv 2307.02628.

Chapter: early exit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rooflm.roofline.analysis import AT_THE_ROOFS, Calibration, Row, analyze
from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import shorten, size, unknown

HEAD = ("embedding", "final_norm", "lm_head")
FILLED = ("k_proj", "v_proj")  # what fills the cache of a layer that is skipped
WAYS, MEASURES = ("alone", "together"), ("softmax", "cheap")


@dataclass(frozen=True)
class ExitStep:
    """A decode step with exits, s, expected; and the whole step that it stands for.

    layers, filling, testing, rest : layers that are run; keys and values of skipped ones; heads
        for the measure; embedding, final norm and head.
    full : the step without exits.
    """

    layers: float
    filling: float
    testing: float
    rest: float
    full: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.layers + self.filling + self.testing + self.rest

    @property
    def speedup(self) -> float:
        """Times as fast as the step without exits."""
        return self.full / self.seconds


def early_exit(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    needed: Sequence[float],
    batch: int = 1,
    context: int = 2048,
    leave: str = "alone",
    measure: str = "cheap",
    precision: Precision | None = None,
    attention: str = "flash",
    calibration: Calibration = AT_THE_ROOFS,
) -> ExitStep:
    """Predict a decode step in which tokens leave early, independently of each other.

    Parameters
    ----------
    needed : for each layer, the chance that a token needs it; the first 1, none above the one
        before.
    batch, context : whole numbers.
    leave : "alone", each token where it is confident; "together", all where the last one is.
    measure : "softmax", a head after each layer but the last; "cheap" for the others.
    model, device, precision, attention, calibration : as in `analyze`. All layers of the model
        must be of one kind.

    Raises
    ------
    ValueError
        as `analyze` does; for chances that are not as above; for layers of several kinds.

    >>> half = [1.0] * 16 + [0.0] * 16
    >>> f"{early_exit('meta-llama/Llama-2-7b-hf', 'nvidia-a6000', half).speedup:.2f}"
    '1.71'
    """
    model, device = load_model(model), load_hardware(device)
    b, context = int(size("batch", batch)), int(size("context", context))
    if leave not in WAYS:
        raise unknown("leave", leave, WAYS)
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    kinds = {row.block for row in _rows(model, device, 1, context, precision, attention)}
    if len(kinds) != 1:
        raise ValueError(f"the model has {len(kinds)} kinds of layers; allowed: one")
    chances = _checked(needed, model)

    def cost(count: int) -> tuple[float, float, float, float]:
        """A layer, its filling, a head, and the rest, for so many sequences."""
        if not count:
            return 0.0, 0.0, 0.0, 0.0
        step = ForwardPass.decode(count, context)
        rows = analyze(model, device, step, precision, attention, calibration=calibration).operators
        outside = {row.name: row.seconds * row.count for row in rows if row.name in HEAD}
        layer = [row for row in rows if row.name not in HEAD]
        filling = sum(row.seconds for row in layer if row.name in FILLED)
        return sum(row.seconds for row in layer), filling, outside["lm_head"], sum(outside.values())

    costs = [cost(count) for count in range(b + 1)]
    layers = filling = testing = 0.0
    for i, chance in enumerate(chances):
        for count, weight in enumerate(_shares(chance, b, leave)):
            layers += weight * costs[count][0]
            # Those that left go through the projections together with those that stay.
            filling += weight * (costs[b][1] - costs[count][1])
            if measure == "softmax" and i < len(chances) - 1:
                testing += weight * costs[count][2]
    full = costs[b][0] * len(chances) + costs[b][3]
    return ExitStep(layers, filling, testing, costs[b][3], full)


def _shares(chance: float, b: int, leave: str) -> list[float]:
    """The chance that 0 to b of the sequences run a layer."""
    if leave == "together":
        none = (1 - chance) ** b
        return [none, *[0.0] * (b - 1), 1 - none]
    return [math.comb(b, k) * chance**k * (1 - chance) ** (b - k) for k in range(b + 1)]


def _rows(
    model: Model,
    device: Hardware,
    batch: int,
    context: int,
    precision: Precision | None,
    attention: str,
) -> list[Row]:
    report = analyze(model, device, ForwardPass.decode(batch, context), precision, attention)
    return [row for row in report.operators if row.name not in HEAD]


def _checked(needed: Sequence[float], model: Model) -> list[float]:
    layers = sum(count for count, _ in model.blocks)
    chances = [float(x) for x in needed]
    if len(chances) != layers:
        raise ValueError(
            f"needed has {len(chances)} chances; allowed: {layers}, one for each layer"
        )
    rising = any(x < y for x, y in pairwise(chances))
    if chances[0] != 1 or rising or min(chances) < 0:
        raise ValueError(
            f"needed is {shorten(chances)}; allowed: 1 first, then falling, none below 0"
        )
    return chances
