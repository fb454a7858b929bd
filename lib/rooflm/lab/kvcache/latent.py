"""Multi-head latent attention: one narrow vector a token stands for all keys and values.

A token keeps its latent c (kv_rank numbers) and one rotary key that all heads share (rope_dim
numbers). Keys and values are linear in c, so they can be made when they are needed
(`expanded_attention`), or never: the matrix that would make the keys is multiplied into the query
and the one that would make the values into the output (`absorbed_attention`). Then h query heads
read one shared KV head of kv_rank + rope_dim numbers, whose first kv_rank are the values too.
Rotation would stand between the two matrices; that is why the rotary part is kept apart.

Sources: DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 9 to 19; the norm after the
compression, its section 3.1.2; the absorption, its section 2.1.2.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.model import Config, RMSNorm, Rope, Transformer, TransformerBlock
from rooflm.roofline.mixers import LatentAttention
from rooflm.roofline.model import MLP, Block, Model
from rooflm.roofline.numeric import shorten


@dataclass(frozen=True)
class LatentConfig(Config):
    """The dimensions of a `LatentTransformer`; `kv_heads` is `heads`.

    Parameters
    ----------
    kv_rank : width of the latent, d_c in the paper.
    rope_dim : width of the shared rotary key, even.
    q_rank : width of the queries' own latent; 0 for queries that are not compressed.

    A head has `head_dim` numbers without position and rope_dim with it; its values head_dim.
    """

    kv_rank: int = 64
    rope_dim: int = 16
    q_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest, step in (("kv_rank", 1, 1), ("rope_dim", 2, 2), ("q_rank", 0, 1)):
            value = getattr(self, name)
            if type(value) is not int or value < smallest or value % step:
                kind = "an even int" if step == 2 else "an int"
                raise ValueError(f"{name} is {shorten(value)}; allowed: {kind} from {smallest}")
        if self.kv_heads != self.heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; allowed: heads ({self.heads})")


def expanded_attention(
    q: Tensor, q_rope: Tensor, entries: Tensor, key_up: Tensor, value_up: Tensor
) -> Tensor:
    """Attention with the keys and values of every head made from the latents (eq. 10-18).

    Parameters
    ----------
    q : (batch, heads, new_tokens, head_dim), without position.
    q_rope : (batch, heads, new_tokens, rope_dim), rotated.
    entries : (batch, context, kv_rank + rope_dim), latents and rotated keys side by side.
    key_up, value_up : (heads, head_dim, kv_rank), W^UK and W^UV by head.

    Returns
    -------
    Tensor
        (batch, heads, new_tokens, head_dim).
    """
    rank = key_up.shape[-1]
    latents, rope_keys = entries[..., :rank], entries[..., rank:]
    keys = torch.einsum("bsr,hdr->bhsd", latents, key_up)
    values = torch.einsum("bsr,hdr->bhsd", latents, value_up)
    scores = q @ keys.mT + q_rope @ rope_keys[:, None].mT
    return _weights(scores, q.shape[-1] + q_rope.shape[-1]) @ values


def absorbed_attention(
    q: Tensor, q_rope: Tensor, entries: Tensor, key_up: Tensor, value_up: Tensor
) -> Tensor:
    """The same, with W^UK in the queries and W^UV in the outputs; parameters as above.

    Every head reads the same entries, once for all: q^T (W^UK c) = (W^UK^T q)^T c.
    """
    b, h, n, d = q.shape
    rank = key_up.shape[-1]
    rows = torch.cat((q @ key_up, q_rope), -1)  # (batch, heads, new_tokens, kv_rank + rope_dim)
    scores = (rows.flatten(1, 2) @ entries.mT).view(b, h, n, -1)
    weights = _weights(scores, d + q_rope.shape[-1])
    mixed = (weights.flatten(1, 2) @ entries[..., :rank]).view(b, h, n, rank)
    return mixed @ value_up.mT


class LatentCache:
    """Latents and rotary keys, one row of kv_rank + rope_dim numbers for each token and layer."""

    def __init__(self) -> None:
        self._entries: list[Tensor] = []  # (batch, room, kv_rank + rope_dim)
        self._filled: list[int] = []

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._filled[-1] if self._filled else 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept in all layers."""
        both = zip(self._entries, self._filled, strict=True)
        return sum(entries[:, :filled].nbytes for entries, filled in both)

    def seen(self, layer: int) -> int:
        """Tokens that a layer has seen, the position of its next one."""
        return self._filled[layer] if layer < len(self._filled) else 0

    def extend(self, layer: int, entries: Tensor) -> Tensor:
        """Append (batch, new_tokens, kv_rank + rope_dim); returns a view of all rows."""
        if layer == len(self._entries):
            self._entries.append(entries.new_empty(len(entries), 0, entries.shape[2]))
            self._filled.append(0)
        start, stop = self._filled[layer], self._filled[layer] + entries.shape[1]
        held = self._entries[layer]
        if stop > held.shape[1]:  # room doubles, so that a token is copied about once
            larger = held.new_empty(len(held), max(stop, 2 * start, 64), held.shape[2])
            larger[:, :start] = held[:, :start]
            held = self._entries[layer] = larger
        held[:, start:stop] = entries
        self._filled[layer] = stop
        return held[:, :stop]


class LatentBlock(TransformerBlock):
    """A block whose attention is MLA; norms, MLP and o_proj are those of `TransformerBlock`."""

    config: LatentConfig

    def __init__(self, config: LatentConfig, index: int, absorbed: bool = True) -> None:
        super().__init__(config, index)
        del self.q_proj, self.k_proj, self.v_proj
        h, d, rope = config.heads, config.head_dim, config.rope_dim
        into = config.q_rank or config.hidden
        if config.q_rank:
            self.q_down_proj = nn.Linear(config.hidden, config.q_rank, bias=False)
            self.q_norm = RMSNorm(config.q_rank, config.norm_eps)
        self.q_proj = nn.Linear(into, h * (d + rope), bias=False)
        self.kv_down_proj = nn.Linear(config.hidden, config.kv_rank + rope, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, config.norm_eps)
        self.kv_up_proj = nn.Linear(config.kv_rank, h * 2 * d, bias=False)
        self.rope = Rope(rope, config.rope_base)
        self.absorbed = absorbed

    def attention(self, x: Tensor, rope: Any, cache: Any) -> Tensor:
        """Causal latent attention over the cached tokens and the new ones.

        `rope` is that of ordinary heads and is not used: the rotary part has a width of its own.
        """
        b, n, _ = x.shape
        c = self.config
        start = cache.seen(self.index) if cache is not None else 0
        compressed = self.q_norm(self.q_down_proj(x)) if c.q_rank else x  # eq. 12
        heads = self.q_proj(compressed).view(b, n, c.heads, -1).transpose(1, 2)
        q, q_rope = heads.split((c.head_dim, c.rope_dim), -1)  # eq. 13 and 14
        latent, rope_key = self.kv_down_proj(x).split((c.kv_rank, c.rope_dim), -1)  # eq. 9, 15
        entries = torch.cat((self.kv_norm(latent), self.rope(rope_key, start)), -1)
        if cache is not None:
            entries = cache.extend(self.index, entries)
        key_up, value_up = self.up_matrices()
        attend = absorbed_attention if self.absorbed else expanded_attention
        y = attend(q, self.rope(q_rope, start), entries, key_up, value_up)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))  # eq. 19

    def up_matrices(self) -> tuple[Tensor, Tensor]:
        """W^UK and W^UV, each (heads, head_dim, kv_rank)."""
        c = self.config
        both = self.kv_up_proj.weight.view(c.heads, 2, c.head_dim, c.kv_rank)
        return both[:, 0], both[:, 1]


class LatentTransformer(Transformer):
    """A `Transformer` with latent attention; its cache is a `LatentCache`.

    Parameters
    ----------
    config : its dimensions. Weights start as those of `Transformer`.
    absorbed : which of the two forms computes; `absorb` changes it.
    """

    config: LatentConfig

    def __init__(self, config: LatentConfig, absorbed: bool = True) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LatentBlock(config, i, absorbed) for i in range(config.layers))
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.split(".")[-2] in ("o_proj", "down_proj")
                spread = 0.02 / (2 * config.layers) ** 0.5 if into_stream else 0.02
                nn.init.normal_(parameter, std=spread)

    def absorb(self, absorbed: bool = True) -> LatentTransformer:
        """Compute in the absorbed form, or in the expanded one; the weights stay."""
        for layer in self.layers:
            layer.absorbed = absorbed
        return self

    def to_roofline(self) -> Model:
        """The model that `rooflm.analyze` takes."""
        c = self.config
        form = "absorbed" if self.layers[0].absorbed else "unabsorbed"
        mixer = LatentAttention(
            c.hidden, c.heads, c.q_rank, c.kv_rank, c.head_dim, c.rope_dim, c.head_dim, form
        )
        block = Block(mixer, MLP(c.hidden, c.intermediate))
        tied = self.head is None
        return Model("latent transformer", c.hidden, c.vocab, ((c.layers, block),), tied=tied)


def _weights(scores: Tensor, width: int) -> Tensor:
    """Causal softmax of (…, new_tokens, context) scores, the last row sees all (eq. 18)."""
    n, context = scores.shape[-2:]
    if n > 1:
        mask = torch.ones(n, context, dtype=torch.bool, device=scores.device).tril(context - n)
        scores = scores.masked_fill(~mask, -torch.inf)
    return functional.softmax(scores * width**-0.5, -1)
