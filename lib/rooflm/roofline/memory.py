"""What must fit: weights, KV cache and live activations against a device's capacity.

Exact accounting counts every parameter (tied embeddings once), the cache of every block, and
the activations that live at the widest moment: the residual stream beside the largest
operator's reads and writes. Source of the split: survey (arXiv 2402.16363), section 2.3.

Chapter: memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rooflm.roofline import survey
from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import Number, is_array, maximum, size, unknown


@dataclass(frozen=True)
class Memory:
    """Bytes that a deployment occupies, by what they hold; `accounting` says who counted."""

    weights: Number
    kv_cache: Number
    activations: Number
    accounting: str = "exact"

    @property
    def total(self) -> Number:
        """Bytes in all."""
        return self.weights + self.kv_cache + self.activations

    def fits(self, device: Hardware | str) -> Any:
        """Whether the device's memory holds it; None where its capacity is not published."""
        capacity = self.capacity(device)
        return None if capacity is None else self.total <= capacity

    def capacity(self, device: Hardware | str) -> float | None:
        """The device's memory in bytes, by the same accounting; None where not published."""
        found = load_hardware(device)
        return survey.capacity(found) if self.accounting == "survey" else found.memory_capacity


def memory(
    model: Model | str | dict[str, Any],
    precision: Precision | None = None,
    batch: Number = 1,
    context: Number = 2048,
    new_tokens: Number = 1,
    accounting: str = "exact",
    attention: str = "flash",
) -> Memory:
    """The memory that a pass needs.

    Parameters
    ----------
    model : what `load_model` returns, or takes.
    precision : formats; FP16 by default.
    batch : sequences.
    context : tokens that each sequence holds once the pass is done.
    new_tokens : how many of them enter in this pass: 1 for decode, `context` for prefill.
    accounting : "exact" or "survey" (Figures 7, 11 and 19: without embeddings and LM head,
        and with the sum of one layer's outputs as activations).
    attention : "flash" or "unfused", which holds the scores.

    Raises
    ------
    ValueError
        for a bad size, or more new tokens than context.

    >>> m = memory("meta-llama/Llama-2-7b-hf", context=4096)
    >>> f"{m.weights / 1e9:.2f} GB, {m.kv_cache / 1e9:.2f} GB"
    '13.48 GB, 2.15 GB'
    """
    context, new = size("context", context), size("new_tokens", new_tokens)
    short = context < new
    if short is True or (is_array(short) and short.any()):
        raise ValueError(f"new_tokens is {new_tokens}; allowed: at most context ({context})")
    step = ForwardPass(batch, new, context - new)
    p = precision_of(precision)
    return memory_of(load_model(model), p, step, attention, accounting)


def memory_of(
    model: Model, p: Precision, step: ForwardPass, attention: str, accounting: str
) -> Memory:
    """`memory` for a pass that stands already."""
    if attention not in ("flash", "unfused"):
        raise unknown("attention", attention, ("flash", "unfused"))
    if accounting == "survey":
        return Memory(*survey.memory_parts(model, p, step, attention), accounting)
    if accounting != "exact":
        raise unknown("accounting", accounting, ("exact", "survey"))
    widest: Number = 0
    for _, _, operator in model.operators(step, p, attention):
        widest = maximum(widest, operator.activations_read + operator.activations_written)
    return Memory(
        weights=model.parameters * p.weights.bytes,
        kv_cache=model.cache_bytes(
            step.batch, step.context, p.kv_cache.bytes, p.state.bytes, p.activations.bytes
        ),
        activations=step.tokens * model.hidden * p.activations.bytes + widest,
    )
