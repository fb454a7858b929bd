"""A model: an embedding, then ((count, Block), ...), then a head.

A `Block` is a mixer and an MLP between norms. Each part is a frozen dataclass that yields its
operators, its parameters and its cache bytes; a new architecture is a new mixer or MLP and
nothing else. Dimensions may be symbols: nothing here checks them (`config` does, where a
config file enters).

Source of the structure: survey (arXiv 2402.16363), section 2.1; the released modelling code
of each family for its norms and biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from rooflm.roofline import operators as op
from rooflm.roofline.formats import Precision
from rooflm.roofline.numeric import Number, is_array, maximum, size
from rooflm.roofline.operators import Operator


@dataclass(frozen=True)
class ForwardPass:
    """One pass of the model over `new_tokens` per sequence, with a cache before them.

    Parameters
    ----------
    batch : sequences processed together.
    new_tokens : tokens per sequence that enter this pass.
    cached_tokens : tokens per sequence already in the KV cache.
    logits : positions per sequence that reach the LM head: 1, all n in verification, 0 for a
        chunk that is not the last.

    Sizes are whole numbers, or arrays of them (a sweep), or symbols (a formula).

    >>> ForwardPass.decode(batch=1, context=2048)
    ForwardPass(batch=1, new_tokens=1, cached_tokens=2047, logits=1)
    """

    batch: Number
    new_tokens: Number
    cached_tokens: Number = 0
    logits: Number = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "batch", size("batch", self.batch))
        put(self, "new_tokens", size("new_tokens", self.new_tokens))
        put(self, "cached_tokens", size("cached_tokens", self.cached_tokens, smallest=0))
        put(self, "logits", size("logits", self.logits, smallest=0))
        if is_array(self.logits) and not self.logits.all():
            raise ValueError("logits holds a 0; allowed: 0 for all passes, or at least 1 for each")
        if self.logits is not self.new_tokens:
            too_many = self.logits > self.new_tokens
            if too_many is True or (is_array(too_many) and too_many.any()):
                raise ValueError(
                    f"logits is {self.logits}; allowed: at most new_tokens ({self.new_tokens})"
                )

    @classmethod
    def prefill(cls, batch: Number, prompt_tokens: Number) -> ForwardPass:
        """The whole prompt at once, from an empty cache."""
        return cls(batch, size("prompt_tokens", prompt_tokens))

    @classmethod
    def decode(cls, batch: Number, context: Number) -> ForwardPass:
        """One new token; `context` counts it, so the cache holds context - 1."""
        return cls(batch, 1, size("context", context) - 1)

    @classmethod
    def verify(cls, batch: Number, draft_tokens: Number, context: Number) -> ForwardPass:
        """The last accepted token and `draft_tokens` drafts, all of them scored.

        `context` counts them, so the cache holds context - draft_tokens - 1
        (arXiv 2211.17192, algorithm 1).
        """
        new = size("draft_tokens", draft_tokens, smallest=0) + 1
        cached = size("context", context) - new
        short = cached < 0
        if short is True or (is_array(short) and short.any()):
            raise ValueError(f"context is {context}; allowed: at least draft_tokens + 1 ({new})")
        return cls(batch, new, cached, new)

    @property
    def context(self) -> Number:
        """Tokens per sequence once the pass is done."""
        return self.cached_tokens + self.new_tokens

    @property
    def tokens(self) -> Number:
        """t = b n, the rows of every linear layer's input."""
        return self.batch * self.new_tokens


@dataclass(frozen=True)
class Attention:
    """Softmax attention with h query heads on g key-value heads (MHA, GQA, MQA).

    Parameters
    ----------
    hidden, heads, kv_heads, head_dim : widths and counts.
    qkv_bias, out_bias : whether the projections have a bias.
    qk_norm : "" for none, "head" for one weight of head_dim (Qwen3), "width" for a weight of
        all heads together (OLMo-2, Cohere).
    qk_norm_vectors : learned vectors of that norm.
    """

    hidden: Number
    heads: Number
    kv_heads: Number
    head_dim: Number
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = ""
    qk_norm_vectors: int = 1

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
        """Weights and biases of the four projections and of the q/k norms."""
        qkv = (self.hidden + int(self.qkv_bias)) * (self.q_width + 2 * self.kv_width)
        out = (self.q_width + int(self.out_bias)) * self.hidden
        return (
            qkv + out + self._norm_parameters(self.q_width) + self._norm_parameters(self.kv_width)
        )

    def cache_bytes(self, batch: Number, context: Number, k: Number) -> Number:
        """Bytes of keys and values of one layer for `context` tokens a sequence."""
        return 2 * batch * context * self.kv_width * k

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from q_proj to o_proj; `attention` is "flash" or "unfused"."""
        b, n, c = step.batch, step.new_tokens, step.cached_tokens
        t = b * n
        w, a, k = p.weights.bytes, p.activations.bytes, p.kv_cache.bytes
        h, g, d, bias = self.heads, self.kv_heads, self.head_dim, int(self.qkv_bias)
        q_width, kv_width = h * d, g * d
        rows = [op.linear("q_proj", t, self.hidden, q_width, bias, w, a)]
        if self.qk_norm:  # the norm, not the projection, makes the keys that are kept
            rows.append(op.linear("k_proj", t, self.hidden, kv_width, bias, w, a))
        else:
            rows.append(op.linear_into_cache("k_proj", t, self.hidden, kv_width, bias, w, a, k))
        rows.append(op.linear_into_cache("v_proj", t, self.hidden, kv_width, bias, w, a, k))
        if self.qk_norm:
            of_q, of_k = self._norm_parameters(q_width), self._norm_parameters(kv_width)
            rows.append(op.norm_heads("q_norm", t, h, d, of_q, w, a))
            rows.append(op.norm_into_cache("k_norm", t, g, d, of_k, w, a, k))
        pairs = op.causal_pairs(b, n, c)
        positions = b * (c + n)
        if attention == "flash":
            rows.append(op.fused_attention(t, pairs, positions, h, g, d, a, k))
        else:
            rows.append(op.qk_matmul(t, pairs, positions, h, g, d, a, k))
            rows.append(op.softmax(pairs, h, a))
            rows.append(op.sv_matmul(t, pairs, positions, h, g, d, a, k))
        rows.append(op.linear("o_proj", t, q_width, self.hidden, int(self.out_bias), w, a))
        return rows

    def _norm_parameters(self, width: Number) -> Number:
        if not self.qk_norm:
            return 0
        return self.qk_norm_vectors * (self.head_dim if self.qk_norm == "head" else width)


@dataclass(frozen=True)
class MLP:
    """A dense feed-forward layer, gated (SwiGLU, GeGLU: three matrices) or plain (two)."""

    hidden: Number
    intermediate: Number
    gated: bool = True
    bias: bool = False

    @property
    def parameters(self) -> Number:
        """Weights and biases."""
        bias = int(self.bias)
        into = (self.hidden + bias) * self.intermediate
        return (1 + self.gated) * into + (self.intermediate + bias) * self.hidden

    active_parameters = parameters

    def operators(self, step: ForwardPass, p: Precision) -> list[Operator]:
        """The rows gate_proj (where gated), up_proj, mlp_act and down_proj."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        hidden, inner, bias = self.hidden, self.intermediate, int(self.bias)
        rows = [
            op.linear("up_proj", t, hidden, inner, bias, w, a),
            op.activation(t, inner, int(self.gated), a),
            op.linear("down_proj", t, inner, hidden, bias, w, a),
        ]
        if self.gated:
            rows.insert(0, op.linear("gate_proj", t, hidden, inner, bias, w, a))
        return rows


@dataclass(frozen=True)
class Block:
    """One transformer layer.

    Parameters
    ----------
    mixer, mlp : the two branches.
    norms : those of attn_norm, attn_post_norm, mlp_norm, mlp_post_norm that the layer has:
        two as a rule, four in Gemma-2, one before both branches in GPT-J and Phi.
    norm_vectors : learned vectors per norm (RMSNorm 1, LayerNorm with bias 2).
    parallel : whether both branches read the same input (GPT-J, Phi); the cost is the same.
    """

    mixer: Attention
    mlp: MLP
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    norm_vectors: int = 1
    parallel: bool = False

    @property
    def parameters(self) -> Number:
        """Parameters of one layer."""
        norms = len(self.norms) * self.norm_vectors * self.mixer.hidden
        return self.mixer.parameters + self.mlp.parameters + norms

    @property
    def active_parameters(self) -> Number:
        """Parameters of one layer that one token uses."""
        return self.parameters - self.mlp.parameters + self.mlp.active_parameters

    def cache_bytes(self, batch: Number, context: Number, k: Number) -> Number:
        """Bytes that one layer keeps per batch of sequences of that length."""
        return self.mixer.cache_bytes(batch, context, k)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """Every row of one layer, in the order in which it runs."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        hidden, norms, vectors = self.mixer.hidden, self.norms, self.norm_vectors
        rows = []
        if "attn_norm" in norms:
            rows.append(op.norm("attn_norm", t, hidden, vectors, w, a))
        rows += self.mixer.operators(step, p, attention)
        if "attn_post_norm" in norms:
            rows.append(op.norm("attn_post_norm", t, hidden, vectors, w, a))
        rows.append(op.residual_add("attn_add", t, hidden, a))
        if "mlp_norm" in norms:
            rows.append(op.norm("mlp_norm", t, hidden, vectors, w, a))
        rows += self.mlp.operators(step, p)
        if "mlp_post_norm" in norms:
            rows.append(op.norm("mlp_post_norm", t, hidden, vectors, w, a))
        rows.append(op.residual_add("mlp_add", t, hidden, a))
        return rows


# The part of the model that an operator stands in, how many layers run it, the operator.
PlacedOperator = tuple[str, int, Operator]


@dataclass(frozen=True)
class Model:
    """A decoder-only language model, described by what its cost depends on.

    Parameters
    ----------
    name : as it was asked for.
    hidden, vocab : widths.
    blocks : (count, Block) pairs in order.
    tied : whether the LM head is the embedding's own matrix.
    head_bias : whether the LM head has a bias (GPT-J, Phi).
    norm_vectors : learned vectors of the final norm.
    final_norm, embedding_norm : whether there is one after the last layer (not in OPT-350m),
        and one on the embedding (BLOOM).
    positions : rows of the learned position table, offset included; 0 for rotary positions.
    embedding_dim : width of the embedding where it is not `hidden` (OPT-350m); 0 otherwise.
    window : the attention window of some or all layers, in tokens, 0 for none. It is not
        modelled yet: reports say so where the context exceeds it.
    """

    name: str
    hidden: Number
    vocab: Number
    blocks: tuple[tuple[int, Block], ...]
    tied: bool = False
    head_bias: bool = False
    norm_vectors: int = 1
    final_norm: bool = True
    embedding_norm: bool = False
    positions: Number = 0
    embedding_dim: Number = 0
    window: int = 0

    @property
    def parameters(self) -> Number:
        """The sum of the shapes of the model's tensors, tied ones once."""
        return self._outer_parameters + sum(
            count * block.parameters for count, block in self.blocks
        )

    @property
    def active_parameters(self) -> Number:
        """The parameters that one token uses; all of them in a dense model."""
        inner = sum(count * block.active_parameters for count, block in self.blocks)
        return self._outer_parameters + inner

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(count for count, _ in self.blocks)

    @property
    def _outer_parameters(self) -> Number:
        width = self.embedding_dim or self.hidden
        tables = (1 if self.tied else 2) * self.vocab * width + int(self.head_bias) * self.vocab
        projections = 2 * self.embedding_dim * self.hidden
        norms = (self.final_norm + self.embedding_norm) * self.norm_vectors * self.hidden
        return tables + projections + norms + self.positions * self.hidden

    def cache_bytes(self, batch: Number, context: Number, k: Number) -> Number:
        """Bytes of the KV cache of all layers.

        Parameters
        ----------
        batch, context : sequences, and tokens that each holds.
        k : bytes per element of the cache.
        """
        return sum(count * block.cache_bytes(batch, context, k) for count, block in self.blocks)

    def repeated_rows(self, step: ForwardPass) -> Number:
        """Elements of table rows that a pass gathers more than once, whatever its tokens are."""
        width = self.embedding_dim or self.hidden
        repeated = maximum(step.tokens - self.vocab, 0) * width
        if self.positions:  # every sequence gathers the same positions
            repeated = repeated + (step.tokens - step.new_tokens) * self.hidden
        return repeated

    def operators(
        self, step: ForwardPass, p: Precision, attention: str = "flash"
    ) -> list[PlacedOperator]:
        """Every operator of the pass, each once, with the number of layers that run it."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        hidden = self.hidden
        width = self.embedding_dim or hidden
        rows: list[PlacedOperator] = [("embedding", 1, op.gather("embedding", t, width, w, a))]
        if self.embedding_dim:
            rows.append(("embedding", 1, op.linear("project_in", t, width, hidden, 0, w, a)))
        if self.positions:
            rows.append(("embedding", 1, op.add_positions(t, hidden, w, a)))
        if self.embedding_norm:
            norm = op.norm("embedding_norm", t, hidden, self.norm_vectors, w, a)
            rows.append(("embedding", 1, norm))
        for number, (count, block) in enumerate(self.blocks):
            label = f"block {number}"
            rows += [(label, count, row) for row in block.operators(step, p, attention)]
        if self.final_norm:
            norm = op.norm("final_norm", t, hidden, self.norm_vectors, w, a)
            rows.append(("head", 1, norm))
        if self.embedding_dim:
            rows.append(("head", 1, op.linear("project_out", t, hidden, width, 0, w, a)))
        if type(step.logits) is not int or step.logits:
            scored = step.batch * step.logits
            head = op.linear("lm_head", scored, width, self.vocab, int(self.head_bias), w, a)
            rows.append(("head", 1, head))
        return rows
