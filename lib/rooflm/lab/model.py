"""One LLaMA-style transformer for every technique of the book.

RMSNorm before each half of a block, rotary positions, grouped-query attention, SwiGLU, no
biases, the head tied to the embedding: the architecture that `rooflm.analyze` predicts, under
the same operator names. `model.layers[3].q_proj` is an `nn.Linear` that may be replaced by
anything that maps (…, d_in) to (…, d_out); that is how a technique enters.

The KV cache is an object that is handed in. A cache has a `length` (positions held) and one
method, `extend(layer, keys, values)`, which takes the new positions' keys and values, both
(batch, kv_heads, new_tokens, head_dim), and returns all that attention shall read.

Rotary pairs are neighbours, (0, 1), (2, 3), …, as in the paper; a checkpoint of the Hugging
Face convention, whose pairs lie half a head apart, must have its q and k rows permuted first.

Sources: LLaMA, arXiv 2302.13971, section 2; RoPE, arXiv 2104.09864, section 3.2.2, eq. 15; GQA,
arXiv 2305.13245; RMSNorm, arXiv 1910.07467, eq. 4; SwiGLU, arXiv 2002.05202, eq. 5.

Chapter: number formats.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden is {self.hidden}; allowed: a multiple of {2 * self.heads}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def to_dict(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json, which `rooflm.load_model` reads."""
        fields = {_HF_NAMES[name]: value for name, value in asdict(self).items()}
        return {**_HF_CONSTANTS, **fields}

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
        config = cls(**{name: fields[hf] for name, hf in _HF_NAMES.items()})
        for name, value in (("rope_scaling", None), ("head_dim", config.head_dim)):
            if fields.get(name) not in (None, value):
                given = shorten(fields[name])
                raise ValueError(f"{name} is {given}; allowed for a lab model: {value}")
        return config


class Cache(Protocol):
    """What a KV cache offers."""

    @property
    def length(self) -> int:
        """Positions held, the same for all layers between two passes."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new positions; return the keys and values that attention shall read."""


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

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim); returns views of all positions."""
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


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbours of (…, tokens, head_dim) by its position's angle (eq. 15)."""
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
        self.config, self.index = config, index
        self.attn_norm = RMSNorm(hidden, config.norm_eps)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, hidden, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """(batch, new_tokens, hidden) to the same shape."""
        x = x + self.attention(self.attn_norm(x), table, cache)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: Tensor, table: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """Causal grouped-query attention over the cached positions and the new ones."""
        b, n, _ = x.shape
        h, g, d = self.config.heads, self.config.kv_heads, self.config.head_dim
        q = rotate(self.q_proj(x).view(b, n, h, d).transpose(1, 2), table)
        k = rotate(self.k_proj(x).view(b, n, g, d).transpose(1, 2), table)
        v = self.v_proj(x).view(b, n, g, d).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        y = attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, h * d))

    def mlp(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; the last query sees every position, the one before it one less.

    Parameters
    ----------
    q : (batch, heads, new_tokens, head_dim).
    k, v : (batch, kv_heads, context, head_dim); query head j reads KV head j // (h/g).

    Returns
    -------
    Tensor
        (batch, heads, new_tokens, head_dim).
    """
    b, h, n, d = q.shape
    g, context = k.shape[1], k.shape[2]
    if n == 1:  # the h/g query heads of a KV head become rows, so that it is read once for all
        rows = q.reshape(b, g, h // g, d)
        return functional.scaled_dot_product_attention(rows, k, v).reshape(b, h, 1, d)
    k, v = (t.repeat_interleave(h // g, dim=1) if h > g else t for t in (k, v))
    if n == context:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
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
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1])
        table = rope_table(positions, self.config.head_dim, self.config.rope_base)
        table = (table[0].to(tokens.device), table[1].to(tokens.device))
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, table, cache)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """The head on (…, hidden): (…, vocab)."""
        x = self.final_norm(states)
        return functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def to_roofline(self) -> Model:
        """The model that `rooflm.analyze` takes."""
        tied = {"tie_word_embeddings": self.head is None}  # rotation and packing untie it
        return load_model(self.config.to_dict() | tied)
