"""What mixes tokens: the protocol, and attention of every kind.

A mixer is a frozen dataclass with `hidden`, `parameters`, `cache_elements(batch, context)`,
`operators(step, precision, attention)` and `edges()`; `Mixer` is the protocol. Softmax attention
keeps keys and values that grow with the context, up to a window; latent attention keeps one
narrow vector a token; the recurrences of `states` keep a state of fixed size. Nothing is checked
here.

Sources: GQA, arXiv 2305.13245; MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1; the released
modelling code of each family for shapes.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rooflm.roofline import operators as op
from rooflm.roofline.formats import Precision
from rooflm.roofline.forward_pass import ForwardPass
from rooflm.roofline.numeric import Number, floor, is_array, minimum
from rooflm.roofline.operators import Operator


class CacheElements(NamedTuple):
    """Numbers that a layer keeps between two passes, by what they are.

    Parameters
    ----------
    kv : keys, values and latents, in the format of the KV cache.
    state : recurrent states, in the format of the state.
    conv : the last inputs of short convolutions, kernel - 1 of each channel, as activations.
    """

    kv: Number = 0
    state: Number = 0
    conv: Number = 0

    def nbytes(self, k: Number, state: Number, conv: Number) -> Number:
        """Bytes, from the bytes per element of each kind."""
        return self.kv * k + self.state * state + self.conv * conv


class Edges(NamedTuple):
    """Contexts at which the cost of a decode step stops being one straight line.

    Parameters
    ----------
    bends : the last contexts before the slope changes.
    chunk : the cost starts anew after every multiple of it; 0 for never.
    """

    bends: tuple[Number, ...] = ()
    chunk: Number = 0


class Mixer(Protocol):
    """What a `Block` asks of its mixer."""

    @property
    def hidden(self) -> Number:
        """Width of the residual stream."""

    @property
    def parameters(self) -> Number:
        """Weights, biases, norms and whatever else is learned."""

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """What the layer keeps for sequences of `context` tokens."""

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows of one pass; `attention` is "flash" or "unfused"."""

    def edges(self) -> Edges:
        """Where the cost of a decode step bends as the context grows."""


@dataclass(frozen=True)
class Attention:
    """Softmax attention with h query heads on g key-value heads (MHA, GQA, MQA).

    At most one of `window`, `chunk` and `keep` is set.

    Parameters
    ----------
    hidden, heads, kv_heads, head_dim : widths and counts.
    qkv_bias, out_bias : whether the projections have a bias.
    qk_norm : "" for none, "head" for one weight of head_dim (Qwen3), "width" for a weight of
        all heads together (OLMo-2, Cohere).
    qk_norm_vectors : learned vectors of that norm.
    window : a token sees itself and the window - 1 tokens before it; 0 for all.
    chunk : a token sees those before it in its own chunk of that many (Llama 4); 0 for all.
    keep : eviction keeps that many cached positions between two passes; 0 for all. The tokens
        of one pass all see what was kept and each other.
    sinks : whether each query head has a learned logit that takes attention (gpt-oss).
    output_gate : whether q_proj also makes a gate for the output (Qwen3-Next).
    own_cache : False where the layer has no k_proj and v_proj and reads the keys and values of
        another (cross-layer attention, arXiv 2405.12981).
    """

    hidden: Number
    heads: Number
    kv_heads: Number
    head_dim: Number
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = ""
    qk_norm_vectors: int = 1
    window: Number = 0
    chunk: Number = 0
    keep: Number = 0
    sinks: bool = False
    output_gate: bool = False
    own_cache: bool = True

    @property
    def q_width(self) -> Number:
        """Features of the queries, over all heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> Number:
        """Features of the keys, over all KV heads."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> Number:
        """Weights and biases of the projections and of the q/k norms, and the sinks."""
        kv = 2 * self.kv_width if self.own_cache else 0
        qkv = (self.hidden + int(self.qkv_bias)) * (self._q_out + kv)
        out = (self.q_width + int(self.out_bias)) * self.hidden
        norms = self._norm_parameters(self.q_width)
        if self.own_cache:
            norms = norms + self._norm_parameters(self.kv_width)
        return qkv + out + norms + int(self.sinks) * self.heads

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """Keys and values of one layer for `context` tokens a sequence."""
        if not self.own_cache:
            return CacheElements()
        return CacheElements(kv=2 * batch * self._kept(context) * self.kv_width)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from q_proj to o_proj; `attention` is "flash" or "unfused"."""
        t = step.batch * step.new_tokens
        w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
        h, g, d, bias = self.heads, self.kv_heads, self.head_dim, int(self.qkv_bias)
        q_width, kv_width = h * d, g * d
        rows = [op.linear("q_proj", t, self.hidden, self._q_out, bias, w, a)]
        if self.own_cache and self.qk_norm:  # the norm, not the projection, makes the kept keys
            rows.append(op.linear("k_proj", t, self.hidden, kv_width, bias, w, a))
        elif self.own_cache:
            rows.append(op.linear_into_cache("k_proj", t, self.hidden, kv_width, bias, w, a, k))
        if self.own_cache:
            rows.append(op.linear_into_cache("v_proj", t, self.hidden, kv_width, bias, w, a, k))
        if self.qk_norm:
            of_q = self._norm_parameters(q_width)
            rows.append(op.norm_heads("q_norm", t, h, d, of_q, w, a))
        if self.own_cache and self.qk_norm:
            of_k = self._norm_parameters(kv_width)
            rows.append(op.norm_into_cache("k_norm", t, g, d, of_k, w, a, k))
        pairs, positions = self._reach(step)
        if attention == "flash":
            rows.append(op.fused_attention(t, pairs, positions, h, g, d, a, k))
        else:
            rows.append(op.qk_matmul(t, pairs, positions, h, g, d, a, k))
            rows.append(op.softmax(pairs, h, a))
            rows.append(op.sv_matmul(t, pairs, positions, h, g, d, a, k))
        if self.output_gate:
            rows.append(op.gate("attn_gate", t, q_width, a))
        rows.append(op.linear("o_proj", t, q_width, self.hidden, int(self.out_bias), w, a))
        return rows

    def edges(self) -> Edges:
        """Where the cost of a decode step bends as the context grows."""
        bends = tuple(x for x in (self.window, self.keep and self.keep + 1) if x)
        return Edges(bends, self.chunk)

    @property
    def _q_out(self) -> Number:
        return self.q_width * (2 if self.output_gate else 1)

    def _kept(self, context: Number) -> Number:
        limit = self.window or self.chunk or self.keep
        return minimum(context, limit) if limit else context

    def _reach(self, step: ForwardPass) -> tuple[Number, Number]:
        """Query-key pairs, and cached and new positions that are read, of all sequences."""
        b, n, c = step.batch, step.new_tokens, step.cached_tokens
        if self.window:
            return op.windowed_pairs(b, n, c, self.window), b * minimum(c + n, self.window + n - 1)
        if self.chunk:
            before = self.chunk * floor(c / self.chunk)
            return op.chunked_pairs(b, n, c, self.chunk), b * (c + n - before)
        if self.keep:
            c = minimum(c, self.keep)
        return op.causal_pairs(b, n, c), b * (c + n)

    def _norm_parameters(self, width: Number) -> Number:
        if not self.qk_norm:
            return 0
        return self.qk_norm_vectors * (self.head_dim if self.qk_norm == "head" else width)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA): one latent and one rotary key a token are kept.

    Unabsorbed, keys and values of every head are made from the latents of all positions. Absorbed,
    the up-projections act on queries and outputs instead, and all heads attend to the latent
    itself: one KV head of width kv_rank + rope_dim that serves as key and value.

    Parameters
    ----------
    hidden, heads : width and count.
    q_rank : width of the queries' latent; 0 where q_proj is one matrix.
    kv_rank, rope_dim : widths of the kept latent and of the kept rotary key.
    nope_dim, value_dim : a head's widths of the key without position and of the value.
    form : "absorbed", "unabsorbed", or "auto": unabsorbed where nothing is cached (a prefill),
        absorbed elsewhere (engines do so).

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, eqs. 9-19, and appendix C.
    """

    hidden: Number
    heads: Number
    q_rank: Number
    kv_rank: Number
    nope_dim: Number
    rope_dim: Number
    value_dim: Number
    form: str = "auto"

    @property
    def parameters(self) -> Number:
        """Weights of the projections, and the norms of the latents."""
        q_out = self.heads * (self.nope_dim + self.rope_dim)
        q = self.hidden * q_out
        if self.q_rank:
            q = self.q_rank * (self.hidden + 1 + q_out)
        kv_a = self.hidden * (self.kv_rank + self.rope_dim) + self.kv_rank
        kv_b = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return q + kv_a + kv_b + self.heads * self.value_dim * self.hidden

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """The latents and the rotary keys, shared by all heads."""
        return CacheElements(kv=batch * context * (self.kv_rank + self.rope_dim))

    def is_absorbed(self, step: ForwardPass) -> bool:
        """Which form a pass computes."""
        if self.form != "auto":
            return self.form == "absorbed"
        c = step.cached_tokens
        return bool(c.any()) if is_array(c) else bool(c != 0)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from the queries' projection to o_proj."""
        t = step.batch * step.new_tokens
        w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
        h, r, rope = self.heads, self.kv_rank, self.rope_dim
        q_out = h * (self.nope_dim + rope)
        rows = []
        if self.q_rank:
            rows.append(op.linear("q_a_proj", t, self.hidden, self.q_rank, 0, w, a))
            rows.append(op.norm("q_a_norm", t, self.q_rank, 1, w, a))
            rows.append(op.linear("q_b_proj", t, self.q_rank, q_out, 0, w, a))
        else:
            rows.append(op.linear("q_proj", t, self.hidden, q_out, 0, w, a))
        rows.append(op.linear("kv_a_proj", t, self.hidden, r + rope, 0, w, a))
        rows.append(op.norm_latent(t, r, rope, w, a, k))
        absorbed = self.is_absorbed(step)
        rows += (self._absorbed if absorbed else self._unabsorbed)(step, p, attention)
        rows.append(op.linear("o_proj", t, h * self.value_dim, self.hidden, 0, w, a))
        return rows

    def edges(self) -> Edges:
        """None: every position is kept and read."""
        return Edges()

    def _absorbed(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        b, n, c = step.batch, step.new_tokens, step.cached_tokens
        w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
        t, h, r, wide = b * n, self.heads, self.kv_rank, self.kv_rank + self.rope_dim
        pairs, read = op.causal_pairs(b, n, c), b * (c + n) * (wide * k)
        into = op.linear_heads("q_absorb", t, h, self.nope_dim, r, w, a)
        out = op.linear_heads("v_absorb", t, h, r, self.value_dim, w, a)
        q_read, written = t * (h * wide * a), t * (h * r * a)
        if attention == "flash":  # the latent is read once: it is key and value
            inner = [op.attention_core(pairs, h, wide, r, q_read, written, read)]
        else:
            again = b * (c + n) * (r * k)
            inner = op.unfused_core(pairs, h, wide, r, a, (q_read, written, read, again))
        return [into, *inner, out]

    def _unabsorbed(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        b, n, c = step.batch, step.new_tokens, step.cached_tokens
        w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
        t, h, positions = b * n, self.heads, b * (c + n)
        nope, rope, value = self.nope_dim, self.rope_dim, self.value_dim
        pairs = op.causal_pairs(b, n, c)
        expand = op.expand_latent(positions, self.kv_rank, h * (nope + value), w, a, k)
        # Expanded keys and values are activations; the rotary key is the cache's.
        q_read, written = t * (h * (nope + rope) * a), t * (h * value * a)
        keys, values, kept = positions * (h * nope * a), positions * (h * value * a), rope * k
        if attention == "flash":
            read = q_read + keys + values
            core = op.attention_core(pairs, h, nope + rope, value, read, written, positions * kept)
            return [expand, core]
        moved = (q_read + keys, written, positions * kept, 0)
        scores, softmax, weighted = op.unfused_core(pairs, h, nope + rope, value, a, moved)
        more = weighted.activations_read + values
        return [expand, scores, softmax, weighted._replace(activations_read=more)]
