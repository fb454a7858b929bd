"""What fits, and what it takes: the largest batch and context, paging, sharing, offloading.

All of it follows from two questions to a model: how many bytes a layer keeps for a sequence of so
many tokens (`Block.cache_elements`), and what must fit beside them (`memory`). A layer of full
attention keeps every token, one with a window the last few, a state nothing for each token.

Sources: survey (arXiv 2402.16363), sections 2.3, 5.2 and 7.5, Figures 11, 18 and 19; blocks and
shared prefixes, PagedAttention, arXiv 2309.06180, sections 4.1 and 4.4; a cache in host memory,
FlexGen, arXiv 2303.06865, section 4.

Chapter: the cache and what it costs; paged attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rooflm.roofline.analysis import analyze
from rooflm.roofline.config import load_model
from rooflm.roofline.factorized import LowRankAttention, attention_of
from rooflm.roofline.formats import Precision, precision_of
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import Block, ForwardPass, Model
from rooflm.roofline.numeric import LARGEST_SIZE, is_array, shorten, size


def largest_batch(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    precision: Precision | None = None,
    context: int = 2048,
) -> int | None:
    """How many sequences of `context` tokens a decode step can hold.

    Returns
    -------
    int or None
        0 where not even one fits, 2^40 where that many do, None where the device's capacity is
        not published.

    >>> largest_batch("meta-llama/Llama-3.1-8B", "nvidia-rtx-4090", context=4096)
    18
    """
    model, device = load_model(model), load_hardware(device)
    context = _one("context", context)
    return largest(lambda batch: memory(model, precision, batch, context).fits(device))


def largest_context(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    precision: Precision | None = None,
    batch: int = 1,
) -> int | None:
    """How many tokens each of `batch` sequences can hold in a decode step.

    Returns
    -------
    int or None
        0 where not even one token fits; 2^40, the largest size, where no context fills the
        device, as with states alone; None where the device's capacity is not published.

    >>> largest_context("meta-llama/Llama-2-13b-hf", "nvidia-a6000")
    31137
    """
    model, device = load_model(model), load_hardware(device)
    batch = _one("batch", batch)
    return largest(lambda context: memory(model, precision, batch, context).fits(device))


class Paged(NamedTuple):
    """Bytes of caches that are kept in whole blocks.

    held : of all blocks, and of the states.
    wasted : of the places in them where no token stands.
    """

    held: float
    wasted: float


def paged_bytes(
    model: Model | str | dict[str, Any],
    precision: Precision | None,
    contexts: Iterable[int],
    block_tokens: int,
) -> Paged:
    """What the caches of sequences take when each is kept in whole blocks of tokens.

    Parameters
    ----------
    contexts : tokens of each sequence.
    block_tokens : tokens that a block holds, in one layer.

    A layer with a window keeps the blocks of its window, as a ring; a state has no blocks. With
    blocks that are cut at multiples of `block_tokens` from the start, as some servers do, a window
    can touch one block more.

    >>> paged_bytes("meta-llama/Llama-2-7b-hf", None, [1, 17], 16)
    Paged(held=25165824.0, wasted=15728640.0)
    """
    model, p = load_model(model), precision_of(precision)
    block_tokens = _one("block_tokens", block_tokens)
    lengths = [_one("context", context) for context in contexts]
    held = used = 0.0
    for count, layer in model.blocks:
        state = _state_bytes(layer, p)
        for context in lengths:
            kept, token = _positions(layer, context, p)
            blocks = -(-kept // block_tokens)
            held += count * (state + blocks * block_tokens * token)
            used += count * (state + kept * token)
    return Paged(held, held - used)


def shared_prefix_bytes(
    model: Model | str | dict[str, Any],
    precision: Precision | None,
    batch: int,
    prefix: int,
    own: int,
) -> float:
    """Cache bytes of sequences that begin alike, when what they share is held once.

    Parameters
    ----------
    batch : sequences.
    prefix : tokens that all begin with, 0 for none.
    own : tokens that each has after them, 0 for none.

    A layer with a window shares of the prefix what its window still sees. A state is a sum over
    all tokens before, and a budget (`keep`) keeps other positions in every sequence: neither is
    shared. What a later sequence would need to start from the prefix is not counted.

    >>> model = "meta-llama/Llama-2-7b-hf"
    >>> shared_prefix_bytes(model, None, 8, 1000, 0) == memory(model, context=1000).kv_cache
    True
    """
    model, p = load_model(model), precision_of(precision)
    batch = _one("batch", batch)
    prefix, own = _one("prefix", prefix, 0), _one("own", own, 0)
    if not prefix + own:
        raise ValueError("prefix and own are 0; allowed: at least one token in all")
    total = 0.0
    for count, layer in model.blocks:
        kept, token = _positions(layer, prefix + own, p)
        attention = attention_of(layer.mixer)
        evicts = attention is not None and attention.keep
        new = kept if evicts else min(own, kept)
        each = _state_bytes(layer, p) + new * token
        total += count * (batch * each + (kept - new) * token)
    return total


def with_budget(model: Model | str | dict[str, Any], tokens: int) -> Model:
    """The model whose layers of full attention keep at most that many positions.

    Which ones is the business of an eviction method; what it saves is not. Layers with a window,
    with latents or with a state stay as they are.

    Raises
    ------
    ValueError
        for a model without a layer of full attention.

    >>> small = with_budget("meta-llama/Llama-2-7b-hf", 512)
    >>> memory(small, context=4096).kv_cache == memory(small, context=512).kv_cache
    True
    """
    model, tokens = load_model(model), _one("tokens", tokens)
    blocks = tuple((count, _budgeted(layer, tokens)) for count, layer in model.blocks)
    if blocks == model.blocks:
        raise ValueError(f"{model.name} has no layer of full attention that a budget could limit")
    return replace(model, blocks=blocks)


@dataclass(frozen=True)
class Offload:
    """A decode step with a share of its cache in host memory.

    link_bytes : what crosses the link in a step.
    rate : bytes per second of the way there, the slower of link and host memory.
    seconds : transfer after transfer, nothing at the same time.
    overlapped : the transfer hidden behind the step as far as it goes.
    memory : what the device holds.
    fits : whether device and host hold it; None where a capacity is not published.
    largest_context : tokens of each sequence up to which they do; None likewise.
    """

    link_bytes: float
    rate: float
    seconds: float
    overlapped: float
    memory: Memory
    fits: bool | None
    largest_context: int | None


def offload(
    model: Model | str | dict[str, Any],
    device: Hardware | str,
    precision: Precision | None = None,
    batch: int = 1,
    context: int = 2048,
    share: float = 1.0,
    host: Hardware | str | None = None,
) -> Offload:
    """Keep a share of the cache in host memory, from where every decode step fetches it.

    Parameters
    ----------
    share : of the cache's bytes, from 0 to 1.
    host : whose memory it is. It limits what is kept there and, where it is slower than the
        link, how fast it comes; None for a host that is never the limit.

    The fetched part is read from device memory once more by the attention itself; the buffer
    through which it streams is neglected, and so are the new tokens that go the other way. The
    survey's Figure 18 puts the roof at the speed of host memory (89.6 GB/s, ridge 1728 FLOP/B);
    the link is slower, and it is the link that sets the time.

    Raises
    ------
    ValueError
        for a device without a published link to the host, or a share that is not from 0 to 1.

    >>> there = offload("meta-llama/Llama-2-7b-hf", "nvidia-a6000", context=4096)
    >>> round(there.link_bytes / there.rate * 1e3, 1)  # ms for 2.15 GB
    67.1
    """
    model, device, p = load_model(model), load_hardware(device), precision_of(precision)
    batch, context = _one("batch", batch), _one("context", context)
    plain = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not plain or not 0 <= share <= 1:
        raise ValueError(f"share is {shorten(share)}; allowed: a number from 0 to 1")
    if device.link_bandwidth is None:
        raise ValueError(f"{device.name} has no published link to a host; it can't offload")
    away = load_hardware(host) if host is not None else None
    rate = device.link_bandwidth if away is None else min(device.link_bandwidth, away.bandwidth)

    def held(tokens: int) -> Memory:
        whole = memory(model, p, batch, tokens)
        return replace(whole, kv_cache=(1 - share) * whole.kv_cache)

    def both_fit(tokens: int) -> bool | None:
        here = held(tokens).fits(device)
        if away is None or here is None:
            return None if here is None else bool(here)
        if away.memory_capacity is None:
            return None
        there = share * memory(model, p, batch, tokens).kv_cache
        return bool(here) and bool(there <= away.memory_capacity)

    crossing = share * memory(model, p, batch, context).kv_cache
    step = analyze(model, device, ForwardPass.decode(batch, context), p).seconds
    transfer = crossing / rate
    return Offload(
        crossing, rate, step + transfer, max(step, transfer),
        held(context), both_fit(context), largest(both_fit),
    )  # fmt: skip


def largest(fits: Callable[[int], bool | None]) -> int | None:
    """The largest size that fits, by bisection: what fits does so with less, too."""
    first = fits(1)
    if first is None:
        return None
    if not first:
        return 0
    if fits(LARGEST_SIZE):
        return LARGEST_SIZE
    low, high = 1, LARGEST_SIZE  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _one(name: str, value: Any, smallest: int = 1) -> int:
    found = size(name, value, smallest)
    if is_array(found) or not isinstance(found, int):
        raise ValueError(f"{name} is {shorten(value)}; allowed: one whole number")
    return found


def _state_bytes(layer: Block, p: Precision) -> float:
    """Bytes that a layer keeps for a sequence whatever its length."""
    kept = layer.cache_elements(1, 1)._replace(kv=0)
    return float(kept.nbytes(0, p.state.bytes, p.activations.bytes))


def _positions(layer: Block, context: int, p: Precision) -> tuple[int, float]:
    """Tokens of a sequence that a layer keeps, and the bytes of one."""
    one = layer.cache_elements(1, 1).kv
    kept = layer.cache_elements(1, context).kv // one if one else 0
    return int(kept), float(one * p.kv_cache.bytes)


def _budgeted(layer: Block, tokens: int) -> Block:
    mixer, attention = layer.mixer, attention_of(layer.mixer)
    if attention is None or attention.window or attention.chunk or not attention.own_cache:
        return layer
    kept = replace(attention, keep=tokens)
    if isinstance(mixer, LowRankAttention):
        return replace(layer, mixer=replace(mixer, base=kept))
    return replace(layer, mixer=kept)
