"""SmoothQuant: move the activations' outliers into the weights, where they are easier to hold.

A channel of a layer's input is divided by s_j and the column of the weight that reads it is
multiplied by s_j; the product is the same. Nothing is computed at run time: the division is
folded into whatever makes the channel. Four places of a block make channels that can be divided
without changing what the model computes, and each has its readers (`READERS`):

- `attn_norm`: its weight, read by q, k and v, which therefore share one s;
- `mlp_norm`: its weight, read by gate and up, which share one s;
- `v_proj`: a row, read by the columns of o_proj of the same position in every query head that
  reads this KV head (GQA), which share one s; rotary positions do not touch values;
- `up_proj`: a row, read by a column of down_proj: silu(gate) * up is linear in up.

The paper folds into the norms only; v_proj and up_proj are the same identity one step further.
The residual stream, the keys, the queries and the attention weights stay what they were; values
(and so a cache of them) are divided where v_proj is a place.

`plant_outliers` runs the identity backwards to give outliers to a model that has none. It is an
experiment's preparation and not a finding about models: say so wherever it is used. In a rotated
model (`rotation.py`) folding the norms already undoes what was planted in them.

Source: SmoothQuant, arXiv 2211.10438, section 4, eq. 3 (identity) and eq. 4 (scales).

Chapter: quantization methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from rooflm.lab.calibrate import plain_linear, visit_blocks
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.roofline.numeric import shorten, unknown

# What makes the channels, and which layers read them.
READERS = {
    "attn_norm": ("q_proj", "k_proj", "v_proj"),
    "mlp_norm": ("gate_proj", "up_proj"),
    "v_proj": ("o_proj",),
    "up_proj": ("down_proj",),
}
NORMS = ("attn_norm", "mlp_norm")


def smoothing_scales(input_peak: Tensor, weight_peak: Tensor, strength: float = 0.5) -> Tensor:
    """The factors by which a layer's input channels are divided.

    Parameters
    ----------
    input_peak : (d_in,), max|X_j| of each channel over the calibration tokens.
    weight_peak : (d_in,), max|W_j| of each column, over all layers that read the channel.
    strength : alpha, from 0 (all difficulty stays with the activations) to 1 (all of it goes to
        the weights).

    Returns
    -------
    Tensor
        (d_in,), s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 where either is 0, which leaves
        an unused channel alone. At alpha = 1/2 both peaks become sqrt(max|X_j| max|W_j|).

    Raises
    ------
    ValueError
        for a strength outside [0, 1], or peaks that differ in shape, are negative or not finite.

    Source: arXiv 2211.10438, eq. 4.

    >>> smoothing_scales(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]))
    tensor([4.0000, 0.5000, 1.0000])
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {shorten(strength)}; allowed: from 0 to 1")
    if input_peak.shape != weight_peak.shape:
        raise ValueError(
            f"peaks are {tuple(input_peak.shape)} and {tuple(weight_peak.shape)}; "
            "allowed: two of (d_in,)"
        )
    for name, peak in (("input", input_peak), ("weight", weight_peak)):
        if not ((peak >= 0) & torch.isfinite(peak)).all():
            raise ValueError(f"the {name} peak holds a value that is not finite and at least 0")
    used = (input_peak > 0) & (weight_peak > 0)
    scales = input_peak.pow(strength) / weight_peak.pow(1 - strength)
    return torch.where(used, scales, torch.ones_like(scales))


def input_peaks(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """max|X_j| of every linear layer's input over calibration text.

    Parameters
    ----------
    rows : (rows, window), tokens.

    Returns
    -------
    dict
        (d_in,) by the layer's name, such as "layers.0.q_proj".
    """
    return {
        f"layers.{index}.{name}": found.max_abs
        for index, (_, inputs) in enumerate(visit_blocks(model, rows))
        for name, found in inputs.items()
    }


def smooth_model(
    model: Transformer,
    peaks: Mapping[str, Tensor],
    strength: float = 0.5,
    places: Iterable[str] = tuple(READERS),
) -> Transformer:
    """A copy of the model that computes the same from smoother activations.

    Parameters
    ----------
    model : unquantized; it is not changed.
    peaks : (d_in,) by layer name, as `input_peaks` returns; one of those that share an input is
        enough.
    strength : alpha of eq. 4.
    places : which of `READERS` to fold into; `NORMS` for the paper's own.

    Returns
    -------
    Transformer
        with the same logits up to rounding.

    Raises
    ------
    ValueError
        for an unknown place, a missing peak, or a layer that is no plain `nn.Linear`.

    Source: arXiv 2211.10438, eq. 3 and 4.
    """
    chosen = _check_places(places)
    model = deepcopy(model)
    for index, block in enumerate(model.layers):
        for place in chosen:
            weights = [plain_linear(block, name).weight for name in READERS[place]]
            weight_peak = torch.cat(weights).detach().abs().amax(0)
            input_peak = _find_peak(peaks, index, READERS[place]).to(weight_peak)
            if place == "v_proj":  # what query heads of one KV head read takes one scale
                input_peak = _per_kv_head(block, input_peak)
                weight_peak = _per_kv_head(block, weight_peak)
            _divide(block, place, smoothing_scales(input_peak, weight_peak, strength))
    return model


def plant_outliers(
    model: Transformer,
    channels: Sequence[int],
    factor: float,
    places: Iterable[str] = NORMS,
) -> Transformer:
    """A copy of the model that computes the same through activations with outliers.

    In every block the chosen channels are made `factor` times larger and the columns that read
    them as many times smaller. With the default places the outliers are in the inputs of q, k, v,
    gate and up, and nowhere else. With `("v_proj", "up_proj")` they are in the values, which are
    cached, and in the inputs of o and down. The residual stream never moves: scaling a channel of
    it would change the norms' mean square, so that no exact planting there exists (a rotation of
    it does, see `rotation.rotate_model`).

    Parameters
    ----------
    model : unquantized; it is not changed.
    channels : indices below the width of every chosen place: `hidden` for the norms,
        kv_heads * head_dim for v_proj, `intermediate` for up_proj.
    factor : positive. A power of two leaves every float's significand as it was, so that the
        logits are the same bit for bit.
    places : which of `READERS` to plant in.

    Raises
    ------
    ValueError
        for a channel or factor out of range, an unknown place, or a layer that is no `nn.Linear`.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor is {shorten(factor)}; allowed: a positive number")
    chosen = _check_places(places)
    model = deepcopy(model)
    for block in model.layers:
        for place in chosen:
            made = getattr(block, place).weight
            for channel in channels:
                if not 0 <= channel < len(made):
                    raise ValueError(
                        f"channel is {shorten(channel)}; allowed in {place}: 0 to {len(made) - 1}"
                    )
            scales = torch.ones(len(made), dtype=made.dtype, device=made.device)
            scales[list(channels)] = 1 / factor
            _divide(block, place, scales)
    return model


@torch.no_grad()
def _divide(block: TransformerBlock, place: str, scales: Tensor) -> None:
    """Divide the channels that `place` makes, multiply the columns that read them; in place."""
    if place in NORMS:
        getattr(block, place).weight.div_(scales)
    else:
        plain_linear(block, place).weight.div_(scales[:, None])
    if place == "v_proj":
        scales = _per_query_head(block, scales)
    for name in READERS[place]:
        plain_linear(block, name).weight.mul_(scales)


def _per_kv_head(block: TransformerBlock, peak: Tensor) -> Tensor:
    """(heads * head_dim,) to the largest of each KV head's readers, (kv_heads * head_dim,)."""
    h, g, d = block.config.heads, block.config.kv_heads, block.config.head_dim
    return peak.view(g, h // g, d).amax(1).flatten()  # query head j reads KV head j // (h/g)


def _per_query_head(block: TransformerBlock, scales: Tensor) -> Tensor:
    """(kv_heads * head_dim,) to every query head's copy, (heads * head_dim,)."""
    h, g, d = block.config.heads, block.config.kv_heads, block.config.head_dim
    return scales.view(g, 1, d).expand(g, h // g, d).flatten()


def _find_peak(peaks: Mapping[str, Tensor], index: int, readers: Sequence[str]) -> Tensor:
    for name in readers:
        if (found := peaks.get(f"layers.{index}.{name}")) is not None:
            return found
    raise ValueError(f"no peak of layers.{index}.{readers[0]} is given; allowed: one of each input")


def _check_places(places: Iterable[str]) -> tuple[str, ...]:
    chosen = tuple(places)
    for place in chosen:
        if place not in READERS:
            raise unknown("place", place, READERS)
    return tuple(place for place in READERS if place in chosen)  # each once, in this order
