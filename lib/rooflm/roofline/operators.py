"""The cost of each operator of a forward pass: FLOPs, and bytes by kind.

Every function is plain arithmetic on its arguments, so that the same lines give an answer
(numbers), a sweep (arrays), a formula (symbols) and, printed from those symbols, JavaScript.
Nothing is checked here; sizes are checked where they enter, in `ForwardPass` and `config`.

Symbols, as in the book: b batch, n new tokens, c cached tokens, t = b n rows; w, a, k bytes
per weight, activation and cache element. FLOPs, not MACs: hence the 2. Softmax counts 5 FLOPs
an element and a norm 7 (survey, section 2.3); rotary embeddings count as fused, at no cost.

Chapter: one forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from rooflm.roofline.numeric import Number, floor, maximum, minimum

SOFTMAX_FLOPS = 5  # maximum, subtract, exponential, sum, divide
NORM_FLOPS = 7  # sum, subtract, square, sum, divide, multiply, add
# A token's work on each element of a recurrent state; an outer product is a multiply and an add.
STATE_SPACE_FLOPS = 5  # decay; B x^T; C h
LINEAR_ATTENTION_FLOPS = 5  # decay; k v^T; q S
DELTA_RULE_FLOPS = 7  # decay; what the state predicts, S k; the correction; S q


class Operator(NamedTuple):
    """One kernel's work, for one layer.

    `flops` in FLOPs; the others in bytes. `rate` says whose roof limits it: "linear" (weights
    by activations), "attention" (activations by KV cache) or "vector" (activations alone).
    """

    name: str
    rate: str
    flops: Number
    weight_bytes: Number = 0
    activations_read: Number = 0
    activations_written: Number = 0
    kv_read: Number = 0
    kv_written: Number = 0


def causal_pairs(b: Number, n: Number, c: Number) -> Number:
    """Query-key pairs of a causal pass: token i of a sequence sees c + i positions.

    >>> causal_pairs(1, 4, 0), causal_pairs(2, 1, 9)
    (10.0, 20.0)
    """
    return b * (n * c + n * (n + 1) / 2)


def windowed_pairs(b: Number, n: Number, c: Number, window: Number) -> Number:
    """Query-key pairs where a token sees itself and the window - 1 tokens before it.

    >>> windowed_pairs(1, 4, 0, 2), windowed_pairs(1, 1, 9, 2)
    (7.0, 2.0)
    """
    growing = minimum(maximum(window - c, 0), n)  # the tokens that still see all before them
    return b * (growing * c + growing * (growing + 1) / 2 + (n - growing) * window)


def chunked_pairs(b: Number, n: Number, c: Number, chunk: Number) -> Number:
    """Query-key pairs where a token sees those before it in its own chunk.

    >>> chunked_pairs(1, 4, 0, 2), chunked_pairs(1, 1, 8, 4)
    (6.0, 1.0)
    """

    def seen(tokens: Number) -> Number:  # by the first tokens of a sequence
        whole = floor(tokens / chunk)
        rest = tokens - whole * chunk
        return whole * (chunk * (chunk + 1) / 2) + rest * (rest + 1) / 2

    return b * (seen(c + n) - seen(c))


def experts_hit(t: Number, experts: Number, top_k: Number) -> Number:
    """Distinct experts that t tokens hit on average, under uniform and independent routing.

    >>> experts_hit(1, 8, 2), experts_hit(2, 8, 2)
    (2.0, 3.5)
    """
    return experts * (1 - (1 - top_k / experts) ** t)


def linear(
    name: str, t: Number, d_in: Number, d_out: Number, bias: Number, w: Number, a: Number
) -> Operator:
    """A projection of t rows from d_in to d_out features; bias is 1 or 0.

    A multiplication and an addition for each weight and row, an addition for each bias. (What
    does not depend on the pass stands in brackets: in a sweep it is one number.)

    >>> linear("q_proj", 2048, 4096, 4096, 0, 2, 2).flops
    68719476736
    """
    return Operator(
        name,
        "linear",
        t * ((2 * d_in + bias) * d_out),
        (d_in + bias) * d_out * w,
        t * (d_in * a),
        t * (d_out * a),
    )


def linear_into_cache(
    name: str, t: Number, d_in: Number, d_out: Number, bias: Number, w: Number, a: Number, k: Number
) -> Operator:
    """A projection whose output is a key or a value, written in the cache's format."""
    return Operator(
        name,
        "linear",
        t * ((2 * d_in + bias) * d_out),
        (d_in + bias) * d_out * w,
        t * (d_in * a),
        0,
        0,
        t * (d_out * k),
    )


def qk_matmul(
    t: Number,
    pairs: Number,
    positions: Number,
    h: Number,
    g: Number,
    d: Number,
    a: Number,
    k: Number,
) -> Operator:
    """Scores of h query heads of width d against `positions` keys of g KV heads.

    positions = b (c + n): each key is read once per KV head, never once per query head.
    """
    return Operator(
        "qk_matmul",
        "attention",
        pairs * (2 * h * d),
        0,
        t * (h * d * a),
        pairs * (h * a),
        positions * (g * d * k),
    )


def softmax(pairs: Number, h: Number, a: Number) -> Operator:
    """The softmax over each row of scores, of every head."""
    scores = pairs * h
    return Operator("softmax", "vector", SOFTMAX_FLOPS * scores, 0, scores * a, scores * a)


def sv_matmul(
    t: Number,
    pairs: Number,
    positions: Number,
    h: Number,
    g: Number,
    d: Number,
    a: Number,
    k: Number,
) -> Operator:
    """Scores times values."""
    return Operator(
        "sv_matmul",
        "attention",
        pairs * (2 * h * d),
        0,
        pairs * (h * a),
        t * (h * d * a),
        positions * (g * d * k),
    )


def fused_attention(
    t: Number,
    pairs: Number,
    positions: Number,
    h: Number,
    g: Number,
    d: Number,
    a: Number,
    k: Number,
) -> Operator:
    """Attention whose scores never leave the chip (FlashAttention, arXiv 2205.14135).

    It moves Q, K, V and O only; O is tokens x heads x head_dim.
    """
    return Operator(
        "fused_attention",
        "attention",
        pairs * (h * (4 * d + SOFTMAX_FLOPS)),
        0,
        t * (h * d * a),
        t * (h * d * a),
        positions * (2 * g * d * k),
    )


def norm(name: str, t: Number, d: Number, vectors: Number, w: Number, a: Number) -> Operator:
    """A norm over rows of d elements, with `vectors` learned vectors (RMSNorm 1, LayerNorm 2)."""
    elements = t * d
    moved = elements * a
    return Operator(name, "vector", NORM_FLOPS * elements, vectors * d * w, moved, moved)


def norm_heads(
    name: str, t: Number, heads: Number, d: Number, learned: Number, w: Number, a: Number
) -> Operator:
    """A norm of each query head, with `learned` parameters in all."""
    elements = t * heads * d
    return Operator(name, "vector", NORM_FLOPS * elements, learned * w, elements * a, elements * a)


def norm_into_cache(
    name: str, t: Number, heads: Number, d: Number, learned: Number, w: Number, a: Number, k: Number
) -> Operator:
    """A norm of each key head, whose output is what the cache keeps."""
    elements = t * heads * d
    return Operator(
        name, "vector", NORM_FLOPS * elements, learned * w, elements * a, 0, 0, elements * k
    )


def residual_add(name: str, t: Number, d: Number, a: Number) -> Operator:
    """The sum of the residual stream and a branch: two operands in, one out."""
    return Operator(name, "vector", t * d, 0, t * (2 * d * a), t * (d * a))


def activation(t: Number, d: Number, gated: Number, a: Number) -> Operator:
    """The MLP's nonlinearity at its intermediate width; gated is 1 or 0.

    One FLOP for the function, and one for the product with the gate.
    """
    return Operator(
        "mlp_act", "vector", t * ((1 + gated) * d), 0, t * ((1 + gated) * d * a), t * (d * a)
    )


def gather(name: str, t: Number, d: Number, w: Number, a: Number) -> Operator:
    """The embedding: t rows of d weights are read, no arithmetic is done."""
    return Operator(name, "vector", 0 * t, t * d * w, 0, t * d * a)


def add_positions(t: Number, d: Number, w: Number, a: Number) -> Operator:
    """Learned positions: a row is gathered and added for every token."""
    return Operator("position_embedding", "vector", t * d, t * d * w, t * d * a, t * d * a)


def gate(name: str, t: Number, d: Number, a: Number) -> Operator:
    """A sigmoid and a product: t rows of d elements and as many gates in, d out."""
    return Operator(name, "vector", t * (2 * d), 0, t * (2 * d * a), t * (d * a))


def linear_heads(
    name: str, t: Number, h: Number, d_in: Number, d_out: Number, w: Number, a: Number
) -> Operator:
    """A projection of its own for each of h heads, from d_in to d_out features."""
    moved_in, moved_out = t * (h * d_in * a), t * (h * d_out * a)
    weights = h * d_in * d_out
    return Operator(name, "linear", t * (2 * weights), weights * w, moved_in, moved_out)


def norm_latent(t: Number, rank: Number, rope: Number, w: Number, a: Number, k: Number) -> Operator:
    """The norm of the latent; it and the rotary key beside it are what the cache keeps."""
    wide = rank + rope
    return Operator(
        "kv_a_norm", "vector", t * (NORM_FLOPS * rank), rank * w, t * (wide * a), 0, 0, t * wide * k
    )


def expand_latent(
    positions: Number, rank: Number, d_out: Number, w: Number, a: Number, k: Number
) -> Operator:
    """Keys and values of every head from the latents of all positions (unabsorbed MLA)."""
    flops, weights = positions * (2 * rank * d_out), rank * d_out * w
    written, read = positions * (d_out * a), positions * (rank * k)
    return Operator("kv_b_proj", "linear", flops, weights, 0, written, read)


def attention_core(
    pairs: Number,
    h: Number,
    key: Number,
    value: Number,
    read: Number,
    written: Number,
    kv_read: Number,
) -> Operator:
    """Fused attention with keys and values of different widths; bytes are handed in."""
    flops = pairs * (h * (2 * key + 2 * value + SOFTMAX_FLOPS))
    return Operator("fused_attention", "attention", flops, 0, read, written, kv_read)


def unfused_core(
    pairs: Number,
    h: Number,
    key: Number,
    value: Number,
    a: Number,
    moved: tuple[Number, Number, Number, Number],
) -> list[Operator]:
    """The same as three kernels; `moved`: queries read, output written, KV read by each product."""
    read, written, kv_of_keys, kv_of_values = moved
    scores = pairs * (h * a)
    return [
        Operator("qk_matmul", "attention", pairs * (2 * h * key), 0, read, scores, kv_of_keys),
        softmax(pairs, h, a),
        Operator(
            "sv_matmul", "attention", pairs * (2 * h * value), 0, scores, written, kv_of_values
        ),
    ]


def short_conv(
    t: Number, sequences: Number, width: Number, kernel: Number, bias: Number, w: Number, a: Number
) -> Operator:
    """A causal convolution of each channel with its last inputs, and a nonlinearity.

    The kernel - 1 inputs before the pass are kept, read and written as activations.
    """
    kept = sequences * width * (kernel - 1) * a
    return Operator(
        "conv1d",
        "vector",
        t * width * (2 * kernel + 1 + bias),
        (kernel + bias) * width * w,
        t * (width * a),
        t * (width * a),
        kept,
        kept,
    )


def recurrence(
    name: str,
    flops: Number,
    state: Number,
    learned: Number,
    read: Number,
    written: Number,
    s: Number,
) -> Operator:
    """A linear recurrence over a pass: its state, of s bytes an element, is read and written once.

    Parameters
    ----------
    flops, learned, read, written : work in FLOPs; bytes of the decay's learned vectors, of
        activations read and of those written.
    state : elements of the states of all sequences.
    """
    return Operator(name, "vector", flops, learned, read, written, state * s, state * s)


def gated_norm(t: Number, width: Number, learned: Number, w: Number, a: Number) -> Operator:
    """A norm times the nonlinearity of a gate: width elements and as many gates in, width out."""
    flops = t * ((NORM_FLOPS + 2) * width)
    return Operator("gated_norm", "vector", flops, learned * w, t * (2 * width * a), t * width * a)


def combine_experts(t: Number, top_k: Number, d: Number, a: Number) -> Operator:
    """The weighted sum of top_k experts' outputs."""
    return Operator(
        "expert_sum", "vector", t * (2 * top_k * d), 0, t * (top_k * d * a), t * (d * a)
    )
