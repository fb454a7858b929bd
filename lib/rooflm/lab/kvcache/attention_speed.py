"""Decode attention of each kind, timed on the processor at hand: one sequence, one new token.

Only attention is timed: queries, keys, values and latents are there already. Copies of the cache
take turns, so that each call reads from memory what a step of a long model would.

Sources: GQA, arXiv 2305.13245; MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from itertools import cycle
from typing import NamedTuple

import torch

from rooflm.lab.kvcache.latent import absorbed_attention, expanded_attention
from rooflm.lab.machine import cold_copies, time_call
from rooflm.lab.model import attend
from rooflm.roofline import operators as op
from rooflm.roofline.hardware import Hardware
from rooflm.roofline.numeric import size

ELEMENT = 4  # bytes: all of it is FP32


class AttentionTime(NamedTuple):
    """Work and time of one call.

    Parameters
    ----------
    flops : FLOPs, those of the softmax included.
    bytes : of keys, values or latents, which it reads once.
    seconds : of the fastest call.
    """

    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOP/B."""
        return self.flops / self.bytes

    def predicted(self, machine: Hardware) -> float:
        """Seconds at the roofs of a machine in FP32."""
        return max(self.flops / machine.peak("fp32"), self.bytes / machine.bandwidth)


def time_shared_heads(
    heads: int, kv_heads: int, head_dim: int, context: int, runs: int = 12
) -> AttentionTime:
    """Time MHA, GQA or MQA: `heads` query heads on `kv_heads` KV heads."""
    for name, value in (("heads", heads), ("kv_heads", kv_heads), ("context", context)):
        size(name, value)
    if heads % kv_heads:
        raise ValueError(f"kv_heads is {kv_heads}; allowed: a divisor of heads ({heads})")
    x = op.fused_attention(1, context, context, heads, kv_heads, head_dim, ELEMENT, ELEMENT)
    q, shape = torch.randn(1, heads, 1, head_dim), (1, kv_heads, context, head_dim)
    pairs = [(torch.ones(shape), torch.ones(shape)) for _ in range(cold_copies(x.kv_read))]
    turns = cycle(pairs)
    with torch.inference_mode():
        timing = time_call(lambda: attend(q, *next(turns)), runs=runs, warmup=2)
    return AttentionTime(x.flops, x.kv_read, timing.best_s)


def time_latent(
    heads: int,
    kv_rank: int,
    rope_dim: int,
    head_dim: int,
    context: int,
    absorbed: bool = True,
    runs: int = 12,
) -> AttentionTime:
    """Time MLA, in its absorbed form or in the expanded one that makes all keys and values."""
    for name, value in (("heads", heads), ("kv_rank", kv_rank), ("context", context)):
        size(name, value)
    width = kv_rank + rope_dim
    moved = ELEMENT * context * width
    if absorbed:
        x = op.attention_core(context, heads, width, kv_rank, 0, 0, moved)
        flops = x.flops + 2 * (2 * heads * head_dim * kv_rank)  # into the query, out of the latent
    else:
        x = op.attention_core(context, heads, head_dim + rope_dim, head_dim, 0, 0, moved)
        flops = x.flops + 2 * context * kv_rank * 2 * heads * head_dim
    form = absorbed_attention if absorbed else expanded_attention
    q, q_rope = torch.randn(1, heads, 1, head_dim), torch.randn(1, heads, 1, rope_dim)
    ups = torch.randn(heads, head_dim, kv_rank), torch.randn(heads, head_dim, kv_rank)
    turns = cycle([torch.ones(1, context, width) for _ in range(cold_copies(moved))])
    with torch.inference_mode():
        timing = time_call(lambda: form(q, q_rope, next(turns), *ups), runs=runs, warmup=2)
    return AttentionTime(flops, moved, timing.best_s)
