"""Speculative decoding on the roofline: what a pass yields, and what it and its drafts cost.

If each draft passes with chance a, independently, then n drafts yield 1 + a + ... + a^n tokens a
pass: those that are kept, and one of the target's own. The pass reads n + 1 tokens, which the
roofline prices as a `ForwardPass.verify`; the drafts cost n decode steps of the draft model, or
nothing where they are looked up. Under the memory roof the pass costs hardly more than a decode
step. Where the batch is so large that work binds, it costs n + 1 times as much, and nothing is won
that the rejected drafts do not take.

Acceptance is not independent in truth: hard places come in a row. `expected_of_lengths` takes the
measured chance of each length in place of one rate.

Sources: arXiv 2211.17192, eq. 1 (tokens), theorem 3.8 (speedup, at a verification that costs one
decode step).

Chapter: speculative decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rooflm.roofline.analysis import AT_THE_ROOFS, Calibration, analyze
from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import ForwardPass, Model
from rooflm.roofline.numeric import Number, choose, is_array, maximum, shorten, size


def expected_tokens(acceptance: Number, draft_tokens: Number) -> Number:
    """Tokens that a pass yields, (1 - a^(n + 1)) / (1 - a), if drafts pass independently.

    Parameters
    ----------
    acceptance : a, the chance that a draft is kept, 0 to 1.
    draft_tokens : n, drafts for a pass.

    Source: arXiv 2211.17192, eq. 1.

    >>> expected_tokens(0.5, 2)
    1.75
    >>> expected_tokens(1, 3)
    4
    """
    certain = acceptance == 1
    a = choose(certain, 0, acceptance)
    return choose(certain, draft_tokens + 1, (1 - a ** (draft_tokens + 1)) / (1 - a))


def expected_of_lengths(kept: Sequence[Number]) -> Number:
    """Tokens that a pass yields, from the share of passes that keep at least 1, 2, ... drafts.

    >>> expected_of_lengths([0.5, 0.25])
    1.75
    """
    return 1 + sum(kept)


def speedup_bound(acceptance: Number, draft_tokens: Number, cost: Number) -> Number:
    """Times as fast as decoding, if a verification costs one decode step.

    Parameters
    ----------
    cost : of a draft, in decode steps of the target.

    Source: arXiv 2211.17192, theorem 3.8.

    >>> speedup_bound(0.5, 2, 0.25)
    1.1666666666666667
    """
    return expected_tokens(acceptance, draft_tokens) / (1 + draft_tokens * cost)


@dataclass(frozen=True)
class Speculation:
    """A pass of speculative decoding, and the decode step that it stands for.

    tokens : that a pass yields for each sequence, expected.
    draft_seconds, verify_seconds : of a pass: all its drafts, and the target.
    decode_seconds : of a decode step of the target alone.
    memory : of target and draft together.
    """

    tokens: Number
    draft_seconds: Number
    verify_seconds: Number
    decode_seconds: Number
    memory: Memory
    device: Hardware

    @property
    def seconds_per_token(self) -> Number:
        """For each sequence, s."""
        return (self.draft_seconds + self.verify_seconds) / self.tokens

    @property
    def speedup(self) -> Number:
        """Times as fast as decoding token by token."""
        return self.decode_seconds / self.seconds_per_token

    @property
    def even_tokens(self) -> Number:
        """Tokens that a pass must yield for it to be as fast as decoding them."""
        return (self.draft_seconds + self.verify_seconds) / self.decode_seconds

    @property
    def fits(self) -> Any:
        """Whether the device holds both models; None where its capacity is not published."""
        return self.memory.fits(self.device)


def speculation(
    target: Model | str | dict[str, Any],
    draft: Model | str | dict[str, Any] | None,
    device: Hardware | str,
    acceptance: Number,
    draft_tokens: Number = 4,
    batch: Number = 1,
    context: Number = 2048,
    precision: Precision | None = None,
    attention: str = "flash",
    calibration: Calibration = AT_THE_ROOFS,
) -> Speculation:
    """Predict a pass of speculative decoding.

    Parameters
    ----------
    target, draft : models; a draft of None costs nothing (n-grams of the text).
    acceptance : the chance that a draft is kept, 0 to 1.
    draft_tokens : drafts for a pass; 0 for plain decoding.
    batch, context : sequences, and tokens that each holds before the pass, the last of them not
        yet read: what a decode step of this context would read.
    device, precision, attention, calibration : as in `analyze`, for both models.

    Raises
    ------
    ValueError
        as `analyze` does, and for an acceptance outside 0 to 1.

    >>> large, small = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
    >>> s = speculation(large, small, "nvidia-h100-sxm", acceptance=0.8)
    >>> f"{s.tokens:.2f} tokens a pass, {s.speedup:.2f} times as fast"
    '3.36 tokens a pass, 2.02 times as fast'
    """
    outside = (acceptance < 0) | (acceptance > 1) if is_array(acceptance) else None
    if outside.any() if outside is not None else not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {shorten(acceptance)}; allowed: 0 to 1")
    target, device, p = load_model(target), load_hardware(device), precision_of(precision)
    n, context = size("draft_tokens", draft_tokens, smallest=0), size("context", context)

    def seconds(model: Model, step: ForwardPass) -> Number:
        return analyze(model, device, step, p, attention, calibration=calibration).seconds

    decode = seconds(target, ForwardPass.decode(batch, context))
    verify = seconds(target, ForwardPass.verify(batch, n, context + n))
    drafting: Number = 0
    needed = memory(target, p, batch, context + n, n + 1, attention=attention)
    if draft is not None:
        draft = load_model(draft)
        # Time is straight in the context between the edges of windows: n steps, each at its own.
        low, high = (seconds(draft, ForwardPass.decode(batch, x)) for x in (context, context + n))
        drafting = n * low + (high - low) * (n - 1) / 2
        own = memory(draft, p, batch, context + n, 1, attention=attention)
        needed = Memory(
            needed.weights + own.weights,
            needed.kv_cache + own.kv_cache,
            maximum(needed.activations, own.activations),
        )
    return Speculation(expected_tokens(acceptance, n), drafting, verify, decode, needed, device)
