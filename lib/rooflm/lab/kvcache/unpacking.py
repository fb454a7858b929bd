"""Scores from a cache of codes, timed: unpacked into memory first, or multiplied as they are.

A head's keys are a matrix with a row for each token; a few queries are multiplied by it. Codes may
become FP32 numbers in memory before that, by operations of the library, each a pass of its own.
Or a kernel multiplies the codes: torch has some for weights with a scale for each row
(`packed.PackedLinear`), and a key is a row.

Chapter: KV cache quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rooflm.lab.kvcache.kivi import Uniform, from_groups
from rooflm.lab.kvcache.packing import unpack
from rooflm.lab.kvcache.scaled import Integers
from rooflm.lab.machine import thread_count, time_call
from rooflm.lab.packed import PackedLinear

HEAD_DIM = 64


class Pass(NamedTuple):
    """A way to come by the scores, or a part of it.

    Parameters
    ----------
    name : what is done.
    bytes : moved for each number of the keys, at least.
    seconds : the fastest of some runs.
    """

    name: str
    bytes: float
    seconds: float


def time_scores(tokens: int, queries: int = 3, runs: int = 3) -> list[Pass]:
    """The scores of some queries over a head's keys, from FP32 and from codes, on one thread.

    Parameters
    ----------
    tokens : a multiple of 32.
    queries : heads that share these keys, as in GQA.
    runs : of each way, after one to warm up.
    """
    keys, q = torch.randn(tokens, HEAD_DIM), torch.randn(queries, HEAD_DIM)
    ways: dict[str, tuple[float, Callable[[], Tensor]]] = {"FP32": (32, lambda: keys @ q.T)}
    for name, codec, bits in (
        ("INT8, unpacked first", Integers(8), 8 + 16 / HEAD_DIM),
        ("KIVI 2 bits, unpacked first", Uniform(2, "channel", 32), 3.0),
    ):
        ways[name] = bits, _unpacked(q, codec, codec.encode(keys[None, None]))
    for kind, bits in (("int8", 8 + 16 / HEAD_DIM), ("int4-g64", 4 + 32 / HEAD_DIM)):
        name = f"{kind.partition('-')[0].upper()}, codes multiplied"
        ways[name] = bits, _multiplied(q, PackedLinear(keys, kind))
    with thread_count(1), torch.inference_mode():
        return [Pass(x, b / 8, time_call(run, runs=runs).best_s) for x, (b, run) in ways.items()]


def time_unpacking(tokens: int, queries: int = 3, runs: int = 3) -> list[Pass]:
    """The passes of "KIVI 2 bits, unpacked first", each for itself; arguments as there."""
    q = torch.randn(queries, HEAD_DIM)
    with thread_count(1), torch.inference_mode():
        codes = Uniform(2, "channel", 32).encode(torch.randn(1, 1, tokens, HEAD_DIM))[0]
        in_bytes = unpack(codes, 2)
        numbers = in_bytes.float()
        keys = from_groups(numbers, "channel")[0, 0]
        passes: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "a byte for each code": (2 / 8 + 1, lambda: unpack(codes, 2)),
            "FP32 numbers": (1 + 4, lambda: in_bytes.float()),
            "times scale, in place": (4 + 4, lambda: numbers.mul_(1.01)),
            "plus minimum, in place": (4 + 4, lambda: numbers.add_(0.01)),
            "groups turned round": (4 + 4, lambda: from_groups(numbers, "channel")),
            "multiplied": (4, lambda: keys @ q.T),
        }
        return [Pass(x, b, time_call(run, runs=runs).best_s) for x, (b, run) in passes.items()]


def _unpacked(
    q: Tensor, codec: Integers | Uniform, stored: tuple[Tensor, ...]
) -> Callable[[], Tensor]:
    return lambda: codec.decode(stored)[0, 0] @ q.T


def _multiplied(q: Tensor, packed: PackedLinear) -> Callable[[], Tensor]:
    return lambda: packed(q)
