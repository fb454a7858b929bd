"""Models whose projections are two factors: a mixer and an MLP like any other.

`factorize` puts `LowRankAttention` and `LowRankMLP` into a model; `low_rank` has what a pair of
factors costs. A factorized q_proj is two rows, q_proj_a and q_proj_b, and the activation between
them is written and read.

Source: survey (arXiv 2402.16363), section 3.4.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from rooflm.roofline.config import load_model
from rooflm.roofline.formats import Precision
from rooflm.roofline.forward_pass import ForwardPass
from rooflm.roofline.low_rank import Shape, linear_pair, rank_of_share
from rooflm.roofline.mixers import Attention, CacheElements, Edges, Mixer
from rooflm.roofline.mlp import MLP
from rooflm.roofline.model import Block, Model
from rooflm.roofline.numeric import Number, shorten, unknown
from rooflm.roofline.operators import Operator

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LowRankAttention:
    """Softmax attention, some of whose projections are two factors.

    Parameters
    ----------
    base : the attention as it was; its cache and its scores stay.
    q, k, v, o : the rank of each projection; 0 where it is one matrix. A bias stays with the
        second factor.
    """

    base: Attention
    q: Number = 0
    k: Number = 0
    v: Number = 0
    o: Number = 0

    @property
    def hidden(self) -> Number:
        """Width of the residual stream."""
        return self.base.hidden

    @property
    def parameters(self) -> Number:
        """Those of the base, with each factorized matrix's numbers replaced by its factors'."""
        return self.base.parameters + _more_numbers(self, attention_shapes(self.base))

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """Those of the base."""
        return self.base.cache_elements(batch, context)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows of the base; a factorized q_proj is q_proj_a and q_proj_b."""
        rows = self.base.operators(step, p, attention)
        return _factorized(self, rows, attention_shapes(self.base), step, p)

    def edges(self) -> Edges:
        """Those of the base."""
        return self.base.edges()


@dataclass(frozen=True)
class LowRankMLP:
    """A dense MLP, some of whose matrices are two factors.

    Parameters
    ----------
    base : the MLP as it was.
    gate, up, down : the rank of each matrix; 0 where it is one.
    """

    base: MLP
    gate: Number = 0
    up: Number = 0
    down: Number = 0

    @property
    def hidden(self) -> Number:
        """Width of the residual stream."""
        return self.base.hidden

    @property
    def parameters(self) -> Number:
        """Those of the base, with each factorized matrix's numbers replaced by its factors'."""
        return self.base.parameters + _more_numbers(self, mlp_shapes(self.base))

    @property
    def active_parameters(self) -> Number:
        """All of them."""
        return self.parameters

    def operators(self, step: ForwardPass, p: Precision) -> list[Operator]:
        """The rows of the base; a factorized up_proj is up_proj_a and up_proj_b."""
        return _factorized(self, self.base.operators(step, p), mlp_shapes(self.base), step, p)


def factorize(
    model: Model | str | dict[str, Any],
    rank: Number | None = None,
    share: float | None = None,
    projections: Iterable[str] = PROJECTIONS,
) -> Model:
    """The model whose projections are two factors, the same way in every layer.

    Parameters
    ----------
    model : dense; embedding and head stay.
    rank : of all projections.
    share : instead: of the numbers of every projection; 1 keeps the break-even rank, not the
        matrix. One of the two is given.
    projections : those of `PROJECTIONS` that are factorized.

    Raises
    ------
    ValueError
        for neither or both of rank and share, one out of range, an unknown projection, or a
        model with other layers than softmax attention and a dense MLP.

    >>> half = factorize("meta-llama/Llama-2-7b-hf", share=0.5)
    >>> f"{half.parameters / 1e9:.2f} of 6.74 billion"
    '3.50 of 6.74 billion'
    """
    model, wanted = load_model(model), tuple(projections)
    if (rank is None) == (share is None):
        raise ValueError(
            f"rank is {shorten(rank)} and share {shorten(share)}; allowed: one of them"
        )
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {shorten(share)}; allowed: above 0, up to 1")
    for name in wanted:
        if name not in PROJECTIONS:
            raise unknown("projection", name, PROJECTIONS)

    def ranks(shapes: dict[str, Shape]) -> dict[str, Number]:
        found = {}
        for name in wanted:
            if name in shapes:
                d_in, d_out, _ = shapes[name]
                given = rank if share is None else rank_of_share(d_in, d_out, share)
                found[name] = _checked(given, d_in, d_out)
        return found

    def smaller(block: Block) -> Block:
        attention, mlp = block.dense("factorization")
        return replace(
            block,
            mixer=LowRankAttention(attention, **ranks(attention_shapes(attention))),
            mlp=LowRankMLP(mlp, **ranks(mlp_shapes(mlp))),
        )

    return replace(model, blocks=tuple((count, smaller(block)) for count, block in model.blocks))


def attention_of(mixer: Mixer | None) -> Attention | None:
    """The softmax attention that a layer computes, factorized or not; None where it has none."""
    if isinstance(mixer, LowRankAttention):
        return mixer.base
    return mixer if isinstance(mixer, Attention) else None


def attention_shapes(mixer: Attention) -> dict[str, Shape]:
    """The projections of an attention by name: q, k, v, o."""
    bias, out = int(mixer.qkv_bias), int(mixer.out_bias)
    q_out = mixer.q_width * (2 if mixer.output_gate else 1)
    shapes = {"q": Shape(mixer.hidden, q_out, bias), "o": Shape(mixer.q_width, mixer.hidden, out)}
    if mixer.own_cache:
        shapes |= {name: Shape(mixer.hidden, mixer.kv_width, bias) for name in ("k", "v")}
    return shapes


def mlp_shapes(mlp: MLP) -> dict[str, Shape]:
    """The matrices of an MLP by name: gate (where gated), up, down."""
    into = Shape(mlp.hidden, mlp.intermediate, int(mlp.bias))
    shapes = {"up": into, "down": Shape(mlp.intermediate, mlp.hidden, int(mlp.bias))}
    return shapes | ({"gate": into} if mlp.gated else {})


def _checked(rank: Number, d_in: Number, d_out: Number) -> Number:
    sizes = (rank, d_in, d_out)
    if all(type(x) is int for x in sizes) and not 1 <= rank <= min(d_in, d_out):
        raise ValueError(f"rank is {rank}; allowed: 1 to {min(d_in, d_out)} for {d_in} x {d_out}")
    return rank


def _ranks(of: LowRankAttention | LowRankMLP) -> dict[str, Number]:
    """The ranks of what is factorized, by the projection's name."""
    named = {field.name: getattr(of, field.name) for field in fields(of) if field.name != "base"}
    return {name: rank for name, rank in named.items() if type(rank) is not int or rank}


def _more_numbers(of: LowRankAttention | LowRankMLP, shapes: dict[str, Shape]) -> Number:
    more: Number = 0
    for name, rank in _ranks(of).items():
        d_in, d_out, _ = shapes[name]
        more = more + rank * (d_in + d_out) - d_in * d_out
    return more


def _factorized(
    of: LowRankAttention | LowRankMLP,
    rows: list[Operator],
    shapes: dict[str, Shape],
    step: ForwardPass,
    p: Precision,
) -> list[Operator]:
    """The rows with two for each that is factorized; the second writes where the one wrote."""
    t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
    ranks = {f"{name}_proj": (shapes[name], rank) for name, rank in _ranks(of).items()}
    found = []
    for row in rows:
        if row.name not in ranks:
            found.append(row)
            continue
        first, second = linear_pair(row.name, t, *ranks[row.name], w, a)
        written, cached = row.activations_written, row.kv_written
        found += [first, second._replace(activations_written=written, kv_written=cached)]
    return found
