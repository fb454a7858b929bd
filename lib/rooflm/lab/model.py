"""One LLaMA-style transformer for every technique of the book.

RMSNorm before each half of a block, rotary positions, grouped-query attention, SwiGLU, no
biases, the head tied to the embedding: the architecture that `rooflm.analyze` predicts, under
the same operator names. `model.layers[3].q_proj` is an `nn.Linear` that may be replaced by
anything that maps (…, d_in) to (…, d_out); that is how a technique enters.

The KV cache is an object that is handed in, and it does the attention: what is kept, in which
format, at which positions and for how long is its business. A cache has a `length` (tokens seen),
`nbytes` (what it keeps of them) and one method, `attend(layer, queries, keys, values, rope)`,
which takes the new positions' queries, keys and values before any rotation.

Rotary pairs are neighbours, (0, 1), (2, 3), …, as in the paper; a checkpoint of the Hugging
Face convention, whose pairs lie half a head apart, must have its q and k rows permuted first.

Sources: LLaMA, arXiv 2302.13971, section 2; RoPE, arXiv 2104.09864, section 3.2.2, eq. 15; GQA,
arXiv 2305.13245; RMSNorm, arXiv 1910.07467, eq. 4; SwiGLU, arXiv 2002.05202, eq. 5.

Chapter: number formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.roofline.config import load_model
from rooflm.roofline.model import Model
from rooflm.roofline.numeric import shorten, size

# The Hugging Face names of the fields, which are those of a config.json.
_HF_NAMES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "window": "max_position_embeddings",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
_HF_CONSTANTS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Config:
    """The dimensions of a `Transformer`.

    Parameters
    ----------
    vocab : tokens in the vocabulary.
    hidden : width of the residual stream.
    layers, heads, kv_heads : numbers of blocks, query heads and key-value heads.
    intermediate : width of the MLP.
    window : positions that it was trained on; a longer context is allowed and unreliable.
    rope_base, norm_eps : base of the rotary frequencies; added to the mean square of a norm.
    head_width : of each head, where heads have been removed; None for hidden / heads.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    window: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    head_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "window"):
            value = getattr(self, name)
            if not isinstance(value, int):  # `size` takes arrays and 64.0 too; a layer does not
                raise ValueError(f"{name} is {shorten(value)}; allowed: an int")
            size(name, value)
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {shorten(value)}; allowed: a positive number")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; allowed: a divisor of {self.heads}")
        if self.head_width is None and self.hidden % (2 * self.heads):
            raise ValueError(f"hidden is {self.hidden}; allowed: a multiple of {2 * self.heads}")
        if self.head_width is not None:
            width = size("head_width", self.head_width)
            if not isinstance(width, int) or width % 2:  # rotary positions turn pairs
                raise ValueError(f"head_width is {shorten(width)}; allowed: an even int")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_width or self.hidden // self.heads

    def to_dict(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json, which `rooflm.load_model` reads."""
        fields = {hf: getattr(self, name) for name, hf in _HF_NAMES.items()}
        own = {} if self.head_width is None else {"head_dim": self.head_width}
        return {**_HF_CONSTANTS, **fields, **own}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Config:
        """The config of a Hugging Face config.json's fields.

        Raises
        ------
        ValueError
            for a missing field or an architecture that `Transformer` is not.
        """
        for name, value in _HF_CONSTANTS.items():
            if name != "architectures" and fields.get(name, value) != value:
                given = shorten(fields[name])
                raise ValueError(f"{name} is {given}; allowed for a lab model: {value!r}")
        missing = [hf for hf in _HF_NAMES.values() if hf not in fields]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if fields.get("rope_scaling") is not None:
            given = shorten(fields["rope_scaling"])
            raise ValueError(f"rope_scaling is {given}; allowed for a lab model: None")
        sizes = {name: fields[hf] for name, hf in _HF_NAMES.items()}
        config = cls(**sizes, head_width=fields.get("head_dim"))
        if config.head_width is not None and config.head_width * config.heads == config.hidden:
            return replace(config, head_width=None)  # what it is without being said
        return config


class Rope:
    """Rotary positions: turns queries and keys by the angles of their positions.

    Parameters
    ----------
    head_dim : width of a head.
    base : of the frequencies base^(-2 i / head_dim), i = 0 ... head_dim / 2 - 1.

    Source: RoPE, arXiv 2104.09864, section 3.2.2, eq. 15.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        none = torch.empty(0, head_dim // 2, device="cpu")  # also where a model is made on "meta"
        self._table = none, none

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:
        """Turn (…, tokens, head_dim), whose first token stands at position `start`."""
        stop = start + x.shape[-2]
        self._reach(stop)
        return rotate(x, tuple(t[start:stop].to(x.device) for t in self._table))

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn (…, tokens, head_dim) at positions of any shape that broadcasts to (…, tokens)."""
        self._reach(int(positions.max()) + 1 if positions.numel() else 0)
        return rotate(x, tuple(t[positions.cpu()].to(x.device) for t in self._table))

    def _reach(self, stop: int) -> None:
        known = len(self._table[0])
        if stop > known:  # the angles of all positions, once; they grow by doubling
            positions = torch.arange(max(stop, 2 * known, 64))
            self._table = rope_table(positions, self.head_dim, self.base)


class Cache(Protocol):
    """What a KV cache offers."""

    @property
    def length(self) -> int:
        """Tokens seen, kept or not: the position of the next one, between two passes."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept in all layers, scales and parts in full precision included."""

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """Take in new positions and return attention's output for them.

        Parameters
        ----------
        layer : the layers of a pass come in order, 0 first.
        queries : (batch, heads, new_tokens, head_dim), before rotation.
        keys, values : (batch, kv_heads, new_tokens, head_dim), before rotation.
        rope : turns them; the first new token stands at position `length`.

        Returns
        -------
        Tensor
            (batch, heads, new_tokens, head_dim); a token sees itself and what is before it.
        """


class FullCache:
    """Every key and value in full precision, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._filled: list[int] = []

    @property
    def length(self) -> int:
        """Positions held."""
        return self._filled[-1] if self._filled else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the positions held; the buffers' free rows are not counted."""
        pairs = zip(self._keys, self._values, self._filled, strict=True)
        return sum((k[:, :, :n].nbytes + v[:, :, :n].nbytes) for k, v, n in pairs)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, rope: Rope
    ) -> Tensor:
        """As `Cache.attend`."""
        start = self._filled[layer] if layer < len(self._filled) else 0
        all_keys, all_values = self.extend(layer, rope(keys, start), values)
        return attend(rope(queries, start), all_keys, all_values)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rotated keys and values, (batch, kv_heads, new, head_dim); views of all."""
        if layer == len(self._keys):
            self._keys.append(keys.new_empty(*keys.shape[:2], 0, keys.shape[3]))
            self._values.append(keys.new_empty(*keys.shape[:2], 0, keys.shape[3]))
            self._filled.append(0)
        start, stop = self._filled[layer], self._filled[layer] + keys.shape[2]
        if stop > self._keys[layer].shape[2]:
            self._keys[layer] = _grown(self._keys[layer], start, stop)
            self._values[layer] = _grown(self._values[layer], start, stop)
        self._keys[layer][:, :, start:stop] = keys
        self._values[layer][:, :, start:stop] = values
        self._filled[layer] = stop
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]

    def rewind(self, length: int) -> None:
        """Forget what stands at position `length` and after it, in all layers."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}; allowed: 0 to {self.length}, what is held")
        self._filled = [length] * len(self._filled)


def _grown(buffer: Tensor, filled: int, needed: int) -> Tensor:
    b, g, _, d = buffer.shape
    larger = buffer.new_empty(b, g, max(needed, 2 * filled, 64), d)
    larger[:, :, :filled] = buffer[:, :, :filled]
    return larger


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (positions, head_dim / 2), in FP32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = positions.double()[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    """Turn each pair of neighbours of (…, tokens, head_dim) by its position's angle (eq. 15).

    Parameters
    ----------
    table : cosines and sines, each (…, tokens, head_dim / 2).
    """
    cos, sin = (t.to(x.dtype) for t in table)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to the same shape."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TransformerBlock(nn.Module):
    """One block; its submodules carry the operator names of the roofline's rows."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        hidden, kv_width = config.hidden, config.kv_heads * config.head_dim
        q_width = config.heads * config.head_dim
        self.config, self.index = config, index
        self.attn_norm = RMSNorm(hidden, config.norm_eps)
        self.q_proj = nn.Linear(hidden, q_width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, hidden, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: Cache | None) -> Tensor:
        """(batch, new_tokens, hidden) to the same shape."""
        x = x + self.attention(self.attn_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: Tensor, rope: Rope, cache: Cache | None) -> Tensor:
        """Causal grouped-query attention over the cached positions and the new ones."""
        b, n, _ = x.shape
        h, g, d = self.config.heads, self.config.kv_heads, self.config.head_dim
        q = self.q_proj(x).view(b, n, h, d).transpose(1, 2)
        k = self.k_proj(x).view(b, n, g, d).transpose(1, 2)
        v = self.v_proj(x).view(b, n, g, d).transpose(1, 2)
        if cache is None:
            y = attend(rope(q), rope(k), v)
        else:
            y = cache.attend(self.index, q, k, v, rope)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, h * d))

    def mlp(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention; the last query sees every position, the one before it one less.

    Parameters
    ----------
    q : (batch, heads, new_tokens, head_dim).
    k, v : (batch, kv_heads, context, head_dim); query head j reads KV head j // (h/g).
    mask : which positions each query sees, in place of the causal rule: True where it looks;
        broadcastable to (batch, heads, new_tokens, context).

    Returns
    -------
    Tensor
        (batch, heads, new_tokens, head_dim).
    """
    b, h, n, d = q.shape
    g, context = k.shape[1], k.shape[2]
    if n == 1 and mask is None:  # a KV head's query heads become rows: it is read once for all
        rows = q.reshape(b, g, h // g, d)
        return functional.scaled_dot_product_attention(rows, k, v).reshape(b, h, 1, d)
    k, v = (t.repeat_interleave(h // g, dim=1) if h > g else t for t in (k, v))
    if mask is None and n == context:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = torch.ones(n, context, dtype=torch.bool, device=q.device).tril(context - n)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Transformer(nn.Module):
    """A decoder-only language model.

    Parameters
    ----------
    config : its dimensions. Weights start as normal noise of deviation 0.02, the projections
        into the residual stream smaller by sqrt(2 layers) (GPT-2).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config.head_dim, config.rope_base)
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.layers))
        self.final_norm = RMSNorm(config.hidden, config.norm_eps)
        self.head: nn.Linear | None = None  # a head of its own, where a technique unties it
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                spread = 0.02 / (2 * config.layers) ** 0.5 if into_stream else 0.02
                nn.init.normal_(parameter, std=spread)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of every position.

        Parameters
        ----------
        tokens : (batch, new_tokens), whole numbers below `vocab`.
        cache : holds the positions before; the new ones are added to it.

        Returns
        -------
        Tensor
            (batch, new_tokens, vocab).
        """
        return self.logits(self.states(tokens, cache))

    def states(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The residual stream after the last block, (batch, new_tokens, hidden)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.rope, cache)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """The head on (…, hidden): (…, vocab)."""
        x = self.final_norm(states)
        return functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def to_roofline(self) -> Model:
        """The model that `rooflm.analyze` takes."""
        tied = {"tie_word_embeddings": self.head is None}  # rotation and packing untie it
        return load_model(self.config.to_dict() | tied)
