"""One transformer layer, operator by operator, on random weights.

It runs the operators that `rooflm.analyze` predicts, under the names of its rows, and hands
each to a callback, which may time it. Nothing is learned here and no checkpoint is read: the
numbers are random, the shapes are those of a `Block`. Rotary embeddings are left out, as in
the prediction, which counts them as fused; the nonlinearity is SiLU whatever the model's is.

Chapter: decode time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rooflm.roofline.model import MLP, Attention, Block
from rooflm.roofline.numeric import size

# Called with an operator's name and the operator; returns what the operator returns.
Record = Callable[[str, Callable[[], Tensor]], Tensor]


def make_layer(
    block: Block, batch: int, context: int, kind: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights of a layer by name, and a full KV cache under "keys" and "values".

    A projection's weight is (d_out, d_in) under its row's name, its bias under name + ".bias";
    a norm's vectors are (vectors, width); the cache is (batch, kv_heads, context, head_dim).
    """
    mixer, mlp = block.dense("a layer that runs")
    size("batch", batch), size("context", context)
    layer: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        spread = shape[-1] ** -0.5  # keeps the activations near 1
        layer[name] = (torch.randn(shape) * spread).to(kind)

    def linear(name: str, d_in: int, d_out: int, bias: bool) -> None:
        put(name, d_out, d_in)
        if bias:
            put(f"{name}.bias", d_out)

    linear("q_proj", mixer.hidden, mixer.q_width, mixer.qkv_bias)
    linear("k_proj", mixer.hidden, mixer.kv_width, mixer.qkv_bias)
    linear("v_proj", mixer.hidden, mixer.kv_width, mixer.qkv_bias)
    linear("o_proj", mixer.q_width, mixer.hidden, mixer.out_bias)
    for name in ("gate_proj", "up_proj") if mlp.gated else ("up_proj",):
        linear(name, mlp.hidden, mlp.intermediate, mlp.bias)
    linear("down_proj", mlp.intermediate, mlp.hidden, mlp.bias)
    for name in block.norms:
        put(name, block.norm_vectors, mixer.hidden)
    if mixer.qk_norm:
        per_head = mixer.qk_norm == "head"
        put("q_norm", mixer.qk_norm_vectors, mixer.head_dim if per_head else mixer.q_width)
        put("k_norm", mixer.qk_norm_vectors, mixer.head_dim if per_head else mixer.kv_width)
    put("keys", batch, mixer.kv_heads, context, mixer.head_dim)
    put("values", batch, mixer.kv_heads, context, mixer.head_dim)
    return layer


def run_layer(block: Block, layer: dict[str, Tensor], x: Tensor, record: Record) -> Tensor:
    """One layer on x, every operator through `record(name, f)`, which returns f().

    Parameters
    ----------
    layer : what `make_layer` returns; the last new_tokens positions of its cache are written.
    x : (batch, new_tokens, hidden).

    Returns
    -------
    Tensor
        (batch, new_tokens, hidden).
    """
    names = block.norms
    mixer, mlp = block.dense("a layer that runs")

    def norm(name: str, y: Tensor) -> Tensor:
        return record(name, lambda: _norm(y, layer[name])) if name in names else y

    shared = norm("attn_norm", x)
    attended = norm("attn_post_norm", _attention(mixer, layer, shared, record))
    h = record("attn_add", lambda: x + attended)
    if block.parallel and "mlp_norm" not in names:
        into_mlp = shared
    else:
        into_mlp = norm("mlp_norm", x if block.parallel else h)
    out = norm("mlp_post_norm", _mlp(mlp, layer, into_mlp, record))
    return record("mlp_add", lambda: h + out)


def _attention(mixer: Attention, layer: dict[str, Tensor], x: Tensor, record: Record) -> Tensor:
    b, n, _ = x.shape
    h, g, d = mixer.heads, mixer.kv_heads, mixer.head_dim
    keys, values = layer["keys"], layer["values"]  # (b, g, c + n, d)
    cached = keys.shape[2] - n
    if cached < 0:
        raise ValueError(f"new_tokens is {n}; allowed: at most the context ({keys.shape[2]})")

    def into(cache: Tensor, new: Tensor) -> Tensor:
        return cache[:, :, cached:].copy_(new.view(b, n, g, d).transpose(1, 2))

    def per_head(name: str, y: Tensor, heads: int) -> Tensor:
        return _norm(y.view(b, n, heads, d) if mixer.qk_norm == "head" else y, layer[name])

    q = record("q_proj", lambda: _linear(layer, "q_proj", x))
    if mixer.qk_norm:
        k = record("k_proj", lambda: _linear(layer, "k_proj", x))
    else:
        record("k_proj", lambda: into(keys, _linear(layer, "k_proj", x)))
    record("v_proj", lambda: into(values, _linear(layer, "v_proj", x)))
    if mixer.qk_norm:
        q = record("q_norm", lambda: per_head("q_norm", q, h))
        record("k_norm", lambda: into(keys, per_head("k_norm", k, g)))
    # The h/g query heads of a KV head become rows of one query block, so that its keys and
    # values are read once for all of them. Query head j belongs to KV head j // (h/g).
    rows = q.reshape(b, n, g, h // g, d).permute(0, 2, 3, 1, 4).reshape(b, g, (h // g) * n, d)
    mask = None
    if n > 1:  # new token i sees the cached positions and the new ones up to itself
        mask = torch.ones(n, cached + n, dtype=torch.bool).tril(cached).repeat(h // g, 1)
    o = record(
        "fused_attention",
        lambda: functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask),
    )
    o = o.reshape(b, g, h // g, n, d).permute(0, 3, 1, 2, 4).reshape(b, n, h * d)
    return record("o_proj", lambda: _linear(layer, "o_proj", o))


def _mlp(mlp: MLP, layer: dict[str, Tensor], x: Tensor, record: Record) -> Tensor:
    gate = record("gate_proj", lambda: _linear(layer, "gate_proj", x)) if mlp.gated else None
    up = record("up_proj", lambda: _linear(layer, "up_proj", x))
    if gate is None:
        y = record("mlp_act", lambda: functional.silu(up))
    else:
        y = record("mlp_act", lambda: functional.silu(gate).mul_(up))
    return record("down_proj", lambda: _linear(layer, "down_proj", y))


def _linear(layer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, layer[name], layer.get(f"{name}.bias"))


def _norm(x: Tensor, vectors: Tensor) -> Tensor:
    """RMSNorm for one learned vector, LayerNorm for two (scale, bias) or none."""
    width = x.shape[-1:]
    if len(vectors) == 1:
        return functional.rms_norm(x, width, vectors[0], eps=1e-5)
    scale, bias = vectors if len(vectors) else (None, None)
    return functional.layer_norm(x, width, scale, bias)
