"""What a server's KV memory holds over time: requests that come and go, and ways to place them.

Memory is a number of slots, one for the keys and values of one token in all layers. Time goes in
iterations: in each, finished requests leave, waiting ones enter in the order of their arrival while
there is room, and every running one gains a token. Four things can become of a slot:

- used: a token's keys and values are in it;
- reserved: a token of this request will need it later, nothing can use it until then;
- internal: it was given to a request that will never fill it;
- external: it is free, or lost to the allocator's rounding, and the next request does not fit.

Shares are means over the iterations in which a request waits: only then is an empty slot a loss.

Sources: PagedAttention, arXiv 2309.06180, section 3.1 (the kinds of waste), 6.1 (Orca's three ways
to reserve and the buddy allocator) and Figure 11 (mean lengths); one iteration at a time, Orca,
OSDI 2022, section 3 (S1).

Chapter: paged attention.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rooflm.lab.kvcache.allocators import Allocator
from rooflm.roofline.numeric import size

# Mean tokens of prompt and answer: PagedAttention, Figure 11.
WORKLOADS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}


class Request(NamedTuple):
    """Its arrival in iterations, and the tokens of its prompt and of its answer."""

    arrival: float
    prompt: int
    output: int


def make_trace(
    prompt: float,
    output: float,
    requests: int,
    rate: float = math.inf,
    spread: float = 0.8,
    longest: int = 2048,
    seed: int = 0,
) -> list[Request]:
    """Requests of Poisson arrivals and log-normal lengths.

    Parameters
    ----------
    prompt, output : mean tokens, before lengths are cut.
    requests, rate : how many, and how many arrive in an iteration; infinite for all at once.
    spread : the standard deviation of the logarithm of a length.
    longest : prompt and answer together are cut to it, a prompt to half of it.
    """
    rng = np.random.default_rng(seed)
    count = size("requests", requests)
    if not rate > 0 or not spread >= 0:
        raise ValueError(f"rate is {rate}, spread is {spread}; allowed: positive, and not negative")
    gaps = np.zeros(count) if rate == math.inf else rng.exponential(1 / rate, count)

    def lengths(mean: float) -> np.ndarray:
        noise = rng.standard_normal(count)
        return np.maximum(1, np.rint(mean * np.exp(spread * noise - spread**2 / 2)))

    prompts = np.minimum(lengths(prompt), longest // 2)
    outputs = np.minimum(lengths(output), longest - prompts)
    rows = zip(np.cumsum(gaps).tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Request(a, int(p), int(o)) for a, p, o in rows]


def mean_held(prompt: float, output: float, spread: float) -> tuple[float, float]:
    """Tokens that a running request holds, and will hold at its end, on average over time.

    A request runs as long as its answer, so long answers are met more often: the mean of the
    answer that runs is E[o^2]/E[o] = E[o] exp(spread^2), and half of it is there on average.
    """
    longer = output * math.exp(spread**2)
    return prompt + longer / 2, prompt + longer


@dataclass(frozen=True)
class Usage:
    """What a simulation found.

    Attributes
    ----------
    used, reserved, internal, external : mean shares of the memory, 1 in all, or 0 where no
        request ever waited; a token that several requests share is used once.
    batch, largest_batch : requests that run, on average and at most.
    preemptions, recomputed : requests that were put back for want of a block, and their tokens.
    iterations : until the last request was done.
    """

    used: float
    reserved: float
    internal: float
    external: float
    batch: float
    largest_batch: int
    preemptions: int
    recomputed: int
    iterations: int


def simulate(trace: list[Request], allocator: Allocator) -> Usage:
    """Run a trace to its end.

    Parameters
    ----------
    trace : by arrival.
    allocator : an empty one.

    Raises
    ------
    ValueError
        for a request that does not fit into the empty memory.
    """
    waiting = deque((i, request.prompt) for i, request in enumerate(trace))
    running: dict[int, int] = {}  # tokens of each, in the order of admission
    final = [request.prompt + request.output for request in trace]
    sums, samples = [0.0] * 5, 0
    now = largest = preemptions = recomputed = 0
    while waiting or running:
        for key in [key for key, tokens in running.items() if tokens == final[key]]:
            allocator.release(key)
            del running[key]
        while waiting and trace[waiting[0][0]].arrival <= now:
            key, tokens = waiting[0]
            if not allocator.admit(key, tokens, final[key]):
                if not running:
                    raise _too_long(final[key], allocator)
                break
            running[key] = tokens
            waiting.popleft()
        for key in list(running):
            while key in running and not allocator.grow(key, running[key]):
                last = next(reversed(running))  # the latest makes room
                allocator.release(last)
                waiting.appendleft((last, running.pop(last)))
                preemptions += 1
                recomputed += waiting[0][1]
                if not running:
                    raise _too_long(final[last], allocator)
            if key in running:
                running[key] += 1
        largest = max(largest, len(running))
        if waiting and trace[waiting[0][0]].arrival <= now:
            used = sum(running.values()) - allocator.saved
            pairs = [allocator.waste(key, tokens, final[key]) for key, tokens in running.items()]
            reserved, internal = (sum(part) for part in zip(*pairs, strict=True))
            rest = allocator.capacity - used - reserved - internal
            parts = used, reserved, internal, rest, len(running)
            sums = [x + part for x, part in zip(sums, parts, strict=True)]
            samples += 1
        now += 1
        if not running and waiting:
            now = max(now, math.ceil(trace[waiting[0][0]].arrival))
    slots = allocator.capacity * max(samples, 1)
    shares = [part / slots for part in sums[:4]]
    batch = sums[4] / max(samples, 1)
    return Usage(
        shares[0], shares[1], shares[2], shares[3], batch, largest, preemptions, recomputed, now
    )  # fmt: skip


def sampling_saving(trace: list[Request], samples: int, block_tokens: int) -> float:
    """Share of the blocks that parallel samples of one prompt save by sharing it.

    The full blocks of the prompt are held once; a last one that is not full is copied when a
    sample writes to it. The mean is over blocks and iterations: saved over held without sharing.
    """
    saved = whole = 0
    for _, prompt, output in trace:
        blocks = -(-np.arange(prompt + 1, prompt + output + 1) // block_tokens)
        whole += samples * int(blocks.sum())
        saved += (samples - 1) * (prompt // block_tokens) * output
    return saved / whole


def _too_long(tokens: int, allocator: Allocator) -> ValueError:
    return ValueError(
        f"a request of {tokens} tokens does not fit; allowed: what {allocator.capacity} slots hold"
    )
