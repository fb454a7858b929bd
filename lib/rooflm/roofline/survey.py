"""The survey's own counting, kept apart so that no exact formula holds an `if` for it.

It reproduces Table 1 and Figures 5-9, 11 and 18-20 of arXiv 2402.16363 and its tool
LLM-Viewer at commit 472f71f, whose choices differ from exact accounting so:

- attention is not halved for causality; scores are counted n x n;
- a residual add loads one operand, the MLP's activation is counted at the hidden width;
- norms load no weights, biases are absent, the head width is hidden / heads;
- the LM head has one operation per weight, not two, and its activations ignore the batch;
- embedding and final norm are absent, and the footprint holds neither embedding nor LM head;
- the INT8 roof applies only where weights, activations and cache are all at most 8 bits;
- unfused prefill loads the queries once per KV head; fused attention counts its output as
  n x n, stores it twice, reads the cache once per query head and once more for every
  head_dim rows.

Only for dense decoders, and for a prefill from an empty cache or a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator

from rooflm.roofline.formats import Precision, load_format
from rooflm.roofline.hardware import Hardware
from rooflm.roofline.model import MLP, Attention, ForwardPass, Model, PlacedOperator
from rooflm.roofline.numeric import Number, ceil, is_array
from rooflm.roofline.operators import NORM_FLOPS, SOFTMAX_FLOPS, Operator


def rate(device: Hardware, p: Precision) -> tuple[str, float]:
    """The one roof of all operators: INT8 where all three formats have at most 8 bits."""
    widest = max(p.weights.element_bits, p.activations.element_bits, p.kv_cache.element_bits)
    x = load_format("int8" if widest <= 8 else "fp16")
    return device.rate(x, x)


def operators(
    model: Model, step: ForwardPass, p: Precision, attention: str
) -> Iterator[PlacedOperator]:
    """The rows of a pass as LLM-Viewer counts them.

    Raises
    ------
    ValueError
        for a pass that is neither a prefill from an empty cache nor a decode step.
    """
    prefill = _is_prefill(step)
    w, a = p.weights.bytes, p.activations.bytes
    for number, (count, mixer, mlp) in enumerate(_dense_blocks(model)):
        for operator in _layer(mixer, mlp, step, prefill, p, attention):
            yield f"block {number}", count, operator
    weights, b = model.hidden * model.vocab, step.batch
    head = Operator(
        "lm_head", "survey", b * weights, weights * w, model.hidden * a, model.vocab * a
    )
    yield "head", 1, head


def memory_parts(
    model: Model, p: Precision, step: ForwardPass, attention: str
) -> tuple[Number, Number, Number]:
    """Weights, KV cache and activations in bytes, as Figures 7, 11 and 19 count them."""
    prefill = _is_prefill(step)
    weights: Number = 0
    outputs: Number = 0
    for count, mixer, mlp in _dense_blocks(model):
        layer = list(_layer(mixer, mlp, step, prefill, p, attention))
        weights = weights + count * sum(o.weight_bytes for o in layer)
        outputs = sum(o.activations_written for o in layer)
    return weights, cache_bytes(model, step, p), outputs


def cache_bytes(model: Model, step: ForwardPass, p: Precision) -> Number:
    """Bytes of the KV cache after the pass, of heads that are hidden / heads wide."""
    elements: Number = 0
    for count, mixer, _ in _dense_blocks(model):
        kv_width = mixer.hidden * mixer.kv_heads / mixer.heads
        elements = elements + count * 2 * step.batch * step.context * kv_width
    return elements * p.kv_cache.bytes


def capacity(device: Hardware) -> float | None:
    """Device memory in bytes as the survey counts it: an A6000's 48 GiB are 48e9."""
    return None if device.memory_capacity is None else device.memory_capacity / 2**30 * 1e9


def _dense_blocks(model: Model) -> Iterator[tuple[int, Attention, MLP]]:
    for count, block in model.blocks:
        yield count, *block.dense("survey accounting")


def _is_prefill(step: ForwardPass) -> bool:
    """True for a prefill, False for a decode step; anything else is refused."""
    one, empty, logits = step.new_tokens == 1, step.cached_tokens == 0, step.logits == 1
    every = [bool(x.all()) if is_array(x) else x is True for x in (one, empty, logits)]
    if every[2] and every[0]:
        return False
    if every[2] and every[1]:
        return True
    raise ValueError(
        "survey accounting covers a prefill from an empty cache or a decode step, with one "
        f"position of logits; given {step}; use exact accounting"
    )


def _layer(
    mixer: Attention, mlp: MLP, step: ForwardPass, prefill: bool, p: Precision, attention: str
) -> Iterator[Operator]:
    b, s = step.batch, step.context  # s: the survey's sequence length
    n = s if prefill else 1
    t = b * n
    w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
    hidden, h, g = mixer.hidden, mixer.heads, mixer.kv_heads
    d = hidden // h
    kv_width = hidden * g / h

    def linear(name: str, d_in: Number, d_out: Number, to_cache: bool = False) -> Operator:
        out, kept = (0, t * d_out * k) if to_cache else (t * d_out * a, 0)
        flops, weight = 2 * t * d_in * d_out, d_in * d_out * w
        return Operator(name, "survey", flops, weight, t * d_in * a, out, 0, kept)

    def pointwise(name: str, flops: Number, loaded: Number) -> Operator:
        return Operator(name, "survey", flops, 0, loaded * a, t * hidden * a)

    yield pointwise("attn_norm", NORM_FLOPS * t * hidden, t * hidden)
    yield linear("q_proj", hidden, hidden)
    yield linear("k_proj", hidden, kv_width, to_cache=True)
    yield linear("v_proj", hidden, kv_width, to_cache=True)
    scores = b * h * n * s
    matmul_flops, softmax_flops = 2 * scores * d, SOFTMAX_FLOPS * scores
    if attention == "flash":
        flops = 2 * matmul_flops + softmax_flops
        read, passes = t * h * d * a, ceil(n / d)
        kv_read = passes * 2 * b * s * h * d * k
        yield Operator("fused_attention", "survey", flops, 0, read, 2 * scores * a, kv_read)
    else:
        queries = t * (g if prefill else h) * d * a
        kv_read = b * s * g * d * k
        yield Operator("qk_matmul", "survey", matmul_flops, 0, queries, scores * a, kv_read)
        yield Operator("softmax", "survey", softmax_flops, 0, scores * a, scores * a)
        out = t * h * d * a
        yield Operator("sv_matmul", "survey", matmul_flops, 0, scores * a, out, kv_read)
    yield linear("o_proj", hidden, hidden)
    yield pointwise("attn_add", t * hidden, t * hidden)
    yield pointwise("mlp_norm", NORM_FLOPS * t * hidden, t * hidden)
    if mlp.gated:
        yield linear("gate_proj", hidden, mlp.intermediate)
    yield linear("up_proj", hidden, mlp.intermediate)
    yield pointwise("mlp_act", 2 * t * hidden, 2 * t * hidden)
    yield linear("down_proj", mlp.intermediate, hidden)
    yield pointwise("mlp_add", t * hidden, t * hidden)
