"""How well a model predicts a text, with the error of the estimate.

A text is cut into blocks of `window` predictions, each read from an empty cache. Perplexity is
exp(nats per token); bits per byte can be compared across tokenizers; agreement with a reference
(same most likely token) and the divergence KL(reference || model), in nats per token, say how much
compression changed, where the loss says only whether it hurt.

Every number is an `Estimate` with a 95 % confidence interval for more text of the same kind; the
blocks are the sample (`rooflm.lab.estimates` says why). Two models are compared on the same
blocks, where the ups and downs of the text itself cancel.

Sources: agreement and divergence as measures of compression, arXiv 2407.09141; that among nearly
lossless variants the divergence does not order them by quality, arXiv 2606.19558.

Chapter: number formats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.lab.estimates import Estimate, ratio_estimate, share_estimate
from rooflm.lab.model import Cache, Transformer
from rooflm.roofline.numeric import size, unknown

MEASURES = ("bits_per_byte", "perplexity", "agreement", "divergence")
_LOGITS_AT_ONCE = 2**21  # 8 MB: what is read again and again stays near the core


@dataclass(frozen=True, eq=False, repr=False)
class BlockSums:
    """What was counted in each block, every tensor (blocks,) in float64.

    Parameters
    ----------
    tokens, bytes : predictions, and the bytes of text that they stand for.
    losses : nats.
    agreed, divergences : predictions in agreement with the reference; nats; or None without one.
    """

    tokens: Tensor
    bytes: Tensor
    losses: Tensor
    agreed: Tensor | None = None
    divergences: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; `agreement` and `divergence` are None without a reference."""

    perplexity: Estimate
    bits_per_byte: Estimate
    agreement: Estimate | None
    divergence: Estimate | None
    blocks: BlockSums

    def __str__(self) -> str:
        found = {name: getattr(self, name) for name in MEASURES}
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in found.items() if v is not None)


@dataclass(frozen=True)
class Comparison:
    """Candidate minus baseline; `verdict` is "better", "worse" or "within noise"."""

    measure: str
    difference: Estimate
    verdict: str


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """A model's answers to a text, kept so that many others can be compared with it.

    Kept are the states that enter its head, not the logits: (blocks, window, hidden) in place of
    (blocks, window, vocab) is an eighth of the memory or less, and the head is quick.
    """

    rows: Tensor
    states: Tensor
    head: Callable[[Tensor], Tensor]


@torch.no_grad()
def token_losses(model: Transformer, tokens: Tensor, window: int, batch: int = 8) -> Tensor:
    """Negative log-likelihood of each token after the first, in blocks of `window`.

    Parameters
    ----------
    tokens : (tokens,), a text. A block's first prediction sees one token, its last `window`; what
        is left over after the last whole block is dropped.

    Returns
    -------
    Tensor
        (blocks, window), nats, float32.
    """
    rows = _rows(model, tokens, window, batch, smallest=1)
    found = [
        functional.cross_entropy(model.logits(states), following, reduction="none")
        for _, states, following in _pieces(model, rows, batch)
    ]
    return torch.cat(found).view(len(rows), window)


@torch.no_grad()
def prepare_reference(model: Transformer, tokens: Tensor, window: int, batch: int = 8) -> Reference:
    """Run a model once over a text, for any number of `evaluate(..., reference=this)`.

    The model may be changed afterwards: its head is copied.
    """
    rows = _rows(model, tokens, window, batch)
    parts = [model.final_norm(model.states(part[:, :-1])) for part in rows.split(batch)]
    head: Callable[[Tensor], Tensor]
    if model.head is None:
        head = partial(functional.linear, weight=model.embedding.weight.detach().clone())
    else:
        head = copy.deepcopy(model.head)
    return Reference(rows, torch.cat(parts), head)


@torch.no_grad()
def evaluate(
    model: Transformer,
    tokens: Tensor,
    token_bytes: Tensor,
    window: int,
    reference: Transformer | Reference | None = None,
    batch: int = 8,
    cache: Callable[[], Cache] | None = None,
    chunk: int = 64,
) -> Evaluation:
    """Perplexity, bits per byte, agreement with a reference and divergence from it.

    Logits are made and dropped a few positions at a time, the reference's too.

    Parameters
    ----------
    tokens : (tokens,), a text; cut as by `token_losses`, into two blocks at least.
    token_bytes : (vocab,), the bytes that each token stands for, as of `text.token_bytes`.
    reference : the full-precision model, or what `prepare_reference` kept of it.
    batch : blocks at once.
    cache : makes an empty KV cache; every block is then read through one, `chunk` tokens at a
        time, so that a cache that rounds or drops does so between the chunks of a block.

    Raises
    ------
    ValueError
        for a text too short, tokens that the model doesn't have, a reference for another text,
        or a model whose logits are not finite.
    """
    rows = _rows(model, tokens, window, batch)
    if token_bytes.shape != (model.config.vocab,):
        raise ValueError(
            f"token_bytes is of shape {tuple(token_bytes.shape)}; "
            f"allowed: ({model.config.vocab},), one for each token of the model"
        )
    known: Reference | None = (
        prepare_reference(reference, tokens, window, batch)
        if isinstance(reference, Transformer)
        else reference
    )
    if known is not None and not torch.equal(known.rows, rows):
        raise ValueError("the reference was prepared on another text or with another window")

    losses, agreed, divergences = [], [], []
    for place, states, following in _pieces(model, rows, batch, cache, chunk):
        logs = model.logits(states).log_softmax(-1)
        losses.append(-logs.gather(-1, following[:, None])[:, 0])
        if known is not None:
            theirs = known.head(known.states.flatten(0, 1)[place]).log_softmax(-1)
            agreed.append(logs.argmax(-1) == theirs.argmax(-1))
            divergences.append(((theirs - logs) * theirs.exp()).sum(-1))

    def sums(pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces).double().view(len(rows), window).sum(1).cpu()

    if not (total := sums(losses)).isfinite().all():
        raise ValueError("the model's logits are not finite on this text")
    blocks = BlockSums(
        torch.full((len(rows),), float(window), dtype=torch.float64),
        token_bytes.to(rows.device)[rows[:, 1:]].sum(1).double().cpu(),
        total,
        sums(agreed) if known is not None else None,
        sums(divergences).clamp(min=0) if known is not None else None,  # -1e-6 is rounding
    )
    return summarize(blocks)


def summarize(blocks: BlockSums) -> Evaluation:
    """The estimates that follow from the sums of the blocks."""
    nats = ratio_estimate(blocks.losses, blocks.tokens)
    agreement = divergence = None
    if blocks.agreed is not None:
        agreement = share_estimate(blocks.agreed, blocks.tokens)
    if blocks.divergences is not None:
        found = ratio_estimate(blocks.divergences, blocks.tokens)
        divergence = Estimate(found.value, max(0.0, found.low), found.high)
    return Evaluation(
        Estimate(_exp(nats.value), _exp(nats.low), _exp(nats.high)),
        ratio_estimate(blocks.losses / math.log(2), blocks.bytes),
        agreement,
        divergence,
        blocks,
    )


def compare(
    candidate: Evaluation, baseline: Evaluation, measure: str = "bits_per_byte"
) -> Comparison:
    """The difference of two models on the same blocks of the same text.

    Of many comparisons at 95 %, one in twenty leaves zero outside its interval by chance.

    Parameters
    ----------
    measure : one of `MEASURES`. Less is better, but for agreement.

    Raises
    ------
    ValueError
        for an unknown measure, other blocks, or a measure that needs a reference without one.
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    ours, theirs = candidate.blocks, baseline.blocks
    if not (torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.bytes, theirs.bytes)):
        raise ValueError("the two evaluations are of different blocks; allowed: the same text")
    if measure == "bits_per_byte":
        found = ratio_estimate((ours.losses - theirs.losses) / math.log(2), ours.bytes)
    elif measure == "perplexity":
        found = _perplexity_difference(ours, theirs)
    else:
        name = "agreed" if measure == "agreement" else "divergences"
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is None or b is None:
            raise ValueError(f"{measure} needs a reference; evaluate both models with one")
        found = ratio_estimate(a - b, ours.tokens)
    if found.low <= 0 <= found.high:
        return Comparison(measure, found, "within noise")
    better = (found.value > 0) == (measure == "agreement")
    return Comparison(measure, found, "better" if better else "worse")


def _perplexity_difference(ours: BlockSums, theirs: BlockSums) -> Estimate:
    # First order: a block moves a perplexity P by P times what it moves the mean loss.
    means = [(b.losses.sum() / b.tokens.sum()).exp() for b in (ours, theirs)]
    moved = means[0] * ours.losses - means[1] * theirs.losses
    spread = ratio_estimate(moved, ours.tokens)
    half, value = (spread.high - spread.low) / 2, (means[0] - means[1]).item()
    return Estimate(value, value - half, value + half)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _rows(model: Transformer, tokens: Tensor, window: int, batch: int, smallest: int = 2) -> Tensor:
    """The blocks of a text with the token before each, (blocks, window + 1)."""
    size("window", window), size("batch", batch)
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; allowed: int64, (tokens,)"
        )
    if len(tokens) < smallest * window + 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens; allowed: {smallest * window + 1} or more, "
            f"{smallest} blocks of {window} predictions"
        )
    least, most = tokens.min().item(), tokens.max().item()
    if least < 0 or most >= model.config.vocab:
        wrong = least if least < 0 else most
        raise ValueError(
            f"token {wrong} stands in the text; allowed: 0 to {model.config.vocab - 1}"
        )
    return tokens.unfold(0, window + 1, window)


def read_through(model: Transformer, tokens: Tensor, cache: Cache, chunk: int) -> Tensor:
    """The states of a text that enters through a cache, `chunk` tokens a pass.

    Parameters
    ----------
    tokens : (batch, tokens).

    Returns
    -------
    Tensor
        (batch, tokens, hidden), the residual stream after the last block.
    """
    parts = tokens.split(size("chunk", chunk), dim=1)
    return torch.cat([model.states(part, cache) for part in parts], dim=1)


def _pieces(
    model: Transformer,
    rows: Tensor,
    batch: int,
    cache: Callable[[], Cache] | None = None,
    chunk: int = 64,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few positions at a time: where they stand, (positions, hidden) and the next tokens."""
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab)
    start = 0
    for part in rows.split(batch):
        text = part[:, :-1]
        read = model.states(text) if cache is None else read_through(model, text, cache(), chunk)
        states = read.flatten(0, 1)
        following = part[:, 1:].flatten()
        for i in range(0, len(states), at_once):
            length = len(states[i : i + at_once])
            yield slice(start, start + length), states[i : i + at_once], following[i : i + length]
            start += length
