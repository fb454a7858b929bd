"""The other half of a block: a dense MLP, or experts of which a token takes a few.

Sources: SwiGLU, arXiv 2002.05202; mixture of experts, arXiv 2101.03961, section 2.1; shared
experts, DeepSeekMoE, arXiv 2401.06066; the released modelling code of each family for shapes.

Chapter: one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rooflm.roofline import operators as op
from rooflm.roofline.formats import Precision
from rooflm.roofline.forward_pass import ForwardPass
from rooflm.roofline.numeric import Number
from rooflm.roofline.operators import Operator


class FeedForward(Protocol):
    """What a `Block` asks of its MLP."""

    @property
    def hidden(self) -> Number:
        """Width of the residual stream."""

    @property
    def parameters(self) -> Number:
        """Weights and biases."""

    @property
    def active_parameters(self) -> Number:
        """Those that one token uses."""

    def operators(self, step: ForwardPass, p: Precision) -> list[Operator]:
        """The rows of one pass."""


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

    @property
    def active_parameters(self) -> Number:
        """All of them."""
        return self.parameters

    def operators(self, step: ForwardPass, p: Precision) -> list[Operator]:
        """The rows gate_proj (where gated), up_proj, mlp_act and down_proj."""
        t = step.batch * step.new_tokens
        return self.rows(t, p.weights.bytes, p.activations.bytes)

    def rows(self, t: Number, w: Number, a: Number) -> list[Operator]:
        """The operators for t rows of input, at w and a bytes an element."""
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
class Experts:
    """E experts of which each token takes k, and perhaps one that every token takes.

    Bytes of weights are those of the distinct experts that a pass hits, under uniform and
    independent routing; FLOPs are those of k experts a token.

    Parameters
    ----------
    hidden, intermediate : width of the stream, and of one expert.
    experts, top_k : E and k.
    shared : width of the shared expert, 0 for none (several are counted as one, side by side).
    shared_gate : whether a learned gate of `hidden` weights scales the shared expert (Qwen).
    router_bias : whether the router has a bias or a correction for each expert.
    bias, gated : of the experts, as in `MLP`.

    Source: arXiv 1701.06538, section 2; distinct experts hit, E (1 - (1 - k/E)^t): an expert is
    missed by a token with probability 1 - k/E.
    """

    hidden: Number
    intermediate: Number
    experts: Number
    top_k: Number
    shared: Number = 0
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    gated: bool = True

    @property
    def parameters(self) -> Number:
        """Router, all experts, the shared one."""
        return self._always + self.experts * self._expert.parameters

    @property
    def active_parameters(self) -> Number:
        """Router, top_k experts, the shared one."""
        return self._always + self.top_k * self._expert.parameters

    def operators(self, step: ForwardPass, p: Precision) -> list[Operator]:
        """The router's row, the experts' rows, the shared expert's rows."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        hit = op.experts_hit(t, self.experts, self.top_k)
        routed = t * self.top_k
        rows = [op.linear("router", t, self.hidden, self.experts, int(self.router_bias), w, a)]
        for row in self._expert.rows(routed, w, a):
            more = "" if row.name == "mlp_act" else "expert_"
            name = "expert_act" if not more else more + row.name
            rows.append(row._replace(name=name, weight_bytes=row.weight_bytes * hit))
        rows.append(op.combine_experts(t, self.top_k, self.hidden, a))
        if self.shared:
            for row in MLP(self.hidden, self.shared, self.gated, self.bias).rows(t, w, a):
                name = "shared_act" if row.name == "mlp_act" else "shared_" + row.name
                rows.append(row._replace(name=name))
        if self.shared_gate:
            rows.append(op.linear("shared_gate", t, self.hidden, 1, 0, w, a))
        return rows

    @property
    def _expert(self) -> MLP:
        return MLP(self.hidden, self.intermediate, self.gated, self.bias)

    @property
    def _always(self) -> Number:
        router = (self.hidden + int(self.router_bias)) * self.experts
        shared: Number = 0
        if self.shared:
            shared = MLP(self.hidden, self.shared, self.gated, self.bias).parameters
        return router + shared + int(self.shared_gate) * self.hidden
