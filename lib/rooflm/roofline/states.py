"""Mixers that keep a state of fixed size in place of keys and values.

Recurrences are counted as the algorithm's work, token by token: FLOPs per element of the state,
the state read and written once a pass. A chunked kernel does more arithmetic in prefill, on the
matrix units.

Sources: Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464; lightning attention,
arXiv 2501.08313; the released modelling code of each family for shapes.

Chapter: the cache and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rooflm.roofline import operators as op
from rooflm.roofline.formats import Precision
from rooflm.roofline.forward_pass import ForwardPass
from rooflm.roofline.mixers import CacheElements, Edges
from rooflm.roofline.numeric import Number
from rooflm.roofline.operators import Operator


@dataclass(frozen=True)
class GatedDeltaNet:
    """A linear recurrence that corrects what its state predicts (Qwen3-Next).

    S = alpha S (I - beta k k^T) + beta v k^T, one state of value_dim x key_dim a value head.

    Parameters
    ----------
    hidden, key_heads, value_heads, key_dim, value_dim : widths and counts.
    conv_kernel : taps of the short convolution over queries, keys and values.

    Source: arXiv 2412.06464, eq. 10; shapes of Qwen3NextGatedDeltaNet in transformers.
    """

    hidden: Number
    key_heads: Number
    value_heads: Number
    key_dim: Number
    value_dim: Number
    conv_kernel: Number = 4

    @property
    def _conv_width(self) -> Number:
        return 2 * self.key_heads * self.key_dim + self._value_width

    @property
    def _value_width(self) -> Number:
        return self.value_heads * self.value_dim

    @property
    def parameters(self) -> Number:
        """Projections, convolution, the decay's two vectors and the norm of a value head."""
        into = self._conv_width + self._value_width + 2 * self.value_heads
        conv = self._conv_width * self.conv_kernel
        out = self._value_width * self.hidden
        return self.hidden * into + conv + 2 * self.value_heads + self.value_dim + out

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """One state a value head, whatever the context."""
        state = self.value_heads * self.key_dim * self.value_dim
        conv = self._conv_width * (self.conv_kernel - 1)
        return CacheElements(state=batch * state, conv=batch * conv)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from in_proj to o_proj; `attention` changes nothing."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        width, conv = self._value_width, self._conv_width
        read = conv + 2 * self.value_heads
        state = step.batch * self.value_heads * self.key_dim * self.value_dim
        flops = op.DELTA_RULE_FLOPS * t * self.value_heads * self.key_dim * self.value_dim
        return [
            op.linear("in_proj", t, self.hidden, conv + width, 0, w, a),
            op.linear("ba_proj", t, self.hidden, 2 * self.value_heads, 0, w, a),
            op.short_conv(t, step.batch, conv, self.conv_kernel, 0, w, a),
            op.recurrence(
                "delta_rule",
                flops,
                state,
                2 * self.value_heads * w,
                t * read * a,
                t * width * a,
                p.state.bytes,
            ),
            op.gated_norm(t, width, self.value_dim, w, a),
            op.linear("o_proj", t, width, self.hidden, 0, w, a),
        ]

    def edges(self) -> Edges:
        """None: the cost does not depend on the context."""
        return Edges()


@dataclass(frozen=True)
class Mamba2:
    """A state-space layer with one decay a head (Mamba-2, Nemotron-H).

    h = exp(dt A) h + dt B x^T, y = C h + D x, one state of state x head_dim a head.

    Parameters
    ----------
    hidden, heads, head_dim, state, groups : widths and counts; B and C are shared in a group.
    conv_kernel, conv_bias : taps of the short convolution over x, B and C, and its bias.
    bias : whether in_proj and out_proj have one.

    Source: arXiv 2405.21060, sections 3 and 7; shapes of Mamba2Mixer in transformers.
    """

    hidden: Number
    heads: Number
    head_dim: Number
    state: Number
    groups: Number = 1
    conv_kernel: Number = 4
    conv_bias: bool = True
    bias: bool = False

    @property
    def _inner(self) -> Number:
        return self.heads * self.head_dim

    @property
    def _conv_width(self) -> Number:
        return self._inner + 2 * self.groups * self.state

    @property
    def parameters(self) -> Number:
        """Projections, convolution, the three vectors of a head each, and the norm."""
        bias = int(self.bias)
        into = (self.hidden + bias) * (self._inner + self._conv_width + self.heads)
        conv = self._conv_width * (self.conv_kernel + int(self.conv_bias))
        out = (self._inner + bias) * self.hidden
        return into + conv + 3 * self.heads + self._inner + out

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """One state a head, whatever the context."""
        conv = self._conv_width * (self.conv_kernel - 1)
        return CacheElements(state=batch * self._inner * self.state, conv=batch * conv)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from in_proj to o_proj; `attention` changes nothing."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        inner, conv, bias = self._inner, self._conv_width, int(self.bias)
        flops = t * inner * (op.STATE_SPACE_FLOPS * self.state + 2)
        state, read = step.batch * inner * self.state, conv + self.heads
        return [
            op.linear("in_proj", t, self.hidden, inner + conv + self.heads, bias, w, a),
            op.short_conv(t, step.batch, conv, self.conv_kernel, int(self.conv_bias), w, a),
            op.recurrence(
                "state_space",
                flops,
                state,
                3 * self.heads * w,
                t * read * a,
                t * inner * a,
                p.state.bytes,
            ),
            op.gated_norm(t, inner, inner, w, a),
            op.linear("o_proj", t, inner, self.hidden, bias, w, a),
        ]

    def edges(self) -> Edges:
        """None: the cost does not depend on the context."""
        return Edges()


@dataclass(frozen=True)
class LinearAttention:
    """Attention without softmax, as a state of head_dim x head_dim a head (MiniMax-01).

    Parameters
    ----------
    hidden, heads, head_dim : width, count, width of a head.

    Source: lightning attention, arXiv 2501.08313, section 2.2; shapes of
    MiniMaxLightningAttention in transformers (gated output, a norm over all heads).
    """

    hidden: Number
    heads: Number
    head_dim: Number

    @property
    def parameters(self) -> Number:
        """qkv_proj, the output's gate, o_proj and the norm; the decay is fixed."""
        width = self.heads * self.head_dim
        return 5 * self.hidden * width + width

    def cache_elements(self, batch: Number, context: Number) -> CacheElements:
        """One state a head, whatever the context."""
        return CacheElements(state=batch * self.heads * self.head_dim * self.head_dim)

    def operators(self, step: ForwardPass, p: Precision, attention: str) -> list[Operator]:
        """The rows from in_proj to o_proj; `attention` changes nothing."""
        t, w, a = step.batch * step.new_tokens, p.weights.bytes, p.activations.bytes
        width = self.heads * self.head_dim
        state = step.batch * width * self.head_dim
        flops = op.LINEAR_ATTENTION_FLOPS * t * width * self.head_dim
        moved = t * width * a
        return [
            op.linear("in_proj", t, self.hidden, 4 * width, 0, w, a),
            op.recurrence("linear_attention", flops, state, 0, 3 * moved, moved, p.state.bytes),
            op.gated_norm(t, width, width, w, a),
            op.linear("o_proj", t, width, self.hidden, 0, w, a),
        ]

    def edges(self) -> Edges:
        """None: the cost does not depend on the context."""
        return Edges()
