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
from rooflm.roofline.forward_pass import ForwardPass
from rooflm.roofline.mixers import Attention, CacheElements, Mixer
from rooflm.roofline.mlp import MLP, FeedForward
from rooflm.roofline.numeric import Number, maximum
from rooflm.roofline.operators import Operator

__all__ = ["MLP", "Attention", "Block", "ForwardPass", "Model", "PlacedOperator"]


@dataclass(frozen=True)
class Block:
    """One layer.

    Parameters
    ----------
    mixer, mlp : the two branches; one of them is None in a layer of one branch (Mamba-2,
        Nemotron-H).
    norms : those of attn_norm, attn_post_norm, mlp_norm, mlp_post_norm that the layer has:
        two as a rule, four in Gemma-2, one before both branches in GPT-J and Phi.
    norm_vectors : learned vectors per norm (RMSNorm 1, LayerNorm with bias 2).
    parallel : whether both branches read the same input (GPT-J, Phi); the cost is the same.
    """

    mixer: Mixer | None
    mlp: FeedForward | None
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    norm_vectors: int = 1
    parallel: bool = False

    @property
    def hidden(self) -> Number:
        """Width of the residual stream."""
        branch = self.mixer or self.mlp
        if branch is None:
            raise ValueError("a block has neither a mixer nor an MLP; allowed: one or both")
        return branch.hidden

    @property
    def parameters(self) -> Number:
        """Parameters of one layer."""
        return self._outside_mlp + (self.mlp.parameters if self.mlp else 0)

    @property
    def active_parameters(self) -> Number:
        """Parameters of one layer that one token uses."""
        return self._outside_mlp + (self.mlp.active_parameters if self.mlp else 0)

    @property
    def _outside_mlp(self) -> Number:
        norms = len(self.norms) * self.norm_vectors * self.hidden
        return norms + (self.mixer.parameters if self.mixer else 0)

    def dense(self, what: str) -> tuple[Attention, MLP]:
        """Attention and MLP of a layer that has exactly these.

        Parameters
        ----------
        what : what covers no other kind of layer, for the message.

        Raises
        ------
        ValueError
            for a layer of another kind.
        """
        if isinstance(self.mixer, Attention) and isinstance(self.mlp, MLP):
            return self.mixer, self.mlp
        other = self.mlp if isinstance(self.mixer, Attention) else self.mixer
        raise ValueError(
            f"{what} covers layers of softmax attention and a dense MLP; "
            f"given a layer with {type(other).__name__}"
        )

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """What one layer keeps per batch of sequences of that length."""
        return self.mixer.cache_elements(batch, context) if self.mixer else CacheElements()

    def cache_bytes(
        self, batch: Number, context: Number, k: Number, state: Number = 4, conv: Number = 2
    ) -> Number:
        """Bytes that one layer keeps; the arguments are those of `Model.cache_bytes`."""
        return self.cache_elements(batch, context).nbytes(k, state, conv)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """Every row of one layer, in the order in which it runs."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        rows = []
        branches = (
            ("attn", self.mixer.operators(step, p, attention) if self.mixer else []),
            ("mlp", self.mlp.operators(step, p) if self.mlp else []),
        )
        for branch, inner in branches:
            for norm in (f"{branch}_norm", f"{branch}_post_norm"):
                if norm.endswith("post_norm"):
                    rows += inner
                if norm in self.norms:
                    rows.append(op.norm(norm, t, self.hidden, self.norm_vectors, w, a))
            if inner:
                rows.append(op.residual_add(f"{branch}_add", t, self.hidden, a))
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
    blocks : (count, Block) pairs; equal layers are counted together, in the order of their first.
    tied : whether the LM head is the embedding's own matrix.
    head_bias : whether the LM head has a bias (GPT-J, Phi).
    norm_vectors : learned vectors of the final norm.
    final_norm, embedding_norm : whether there is one after the last layer (not in OPT-350m),
        and one on the embedding (BLOOM).
    positions : rows of the learned position table, offset included; 0 for rotary positions.
    embedding_dim : width of the embedding where it is not `hidden` (OPT-350m); 0 otherwise.
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
    def is_dense(self) -> bool:
        """Whether every layer is softmax attention and a dense MLP."""
        return all(
            isinstance(block.mixer, Attention) and isinstance(block.mlp, MLP)
            for _, block in self.blocks
        )

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

    def cache_bytes(
        self, batch: Number, context: Number, k: Number, state: Number = 4, conv: Number = 2
    ) -> Number:
        """Bytes of the cache and the states of all layers.

        Parameters
        ----------
        batch, context : sequences, and tokens that each holds.
        k : bytes per element of keys, values and latents.
        state, conv : the same of recurrent states and of the inputs that short convolutions keep.
        """
        layers = (
            count * block.cache_bytes(batch, context, k, state, conv)
            for count, block in self.blocks
        )
        return sum(layers)

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """Numbers that all layers keep, by kind."""
        kv: Number = 0
        state: Number = 0
        conv: Number = 0
        for count, block in self.blocks:
            one = block.cache_elements(batch, context)
            kv, state, conv = (
                kv + count * one.kv, state + count * one.state, conv + count * one.conv
            )  # fmt: skip
        return CacheElements(kv, state, conv)

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
