"""A bench that builds any variant of the map: decompositions, sensitivities and texts once.

Conventions: decompositions and quantizers are calibrated on the full model's inputs, also where
layers before are cut already, or trained. Recovery is that of pruning: the same text, batches and
rates, as many tokens, and every parameter is trained.

Chapter: factorization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.bench import Bench, linear_weights
from rooflm.lab.calibrate import LINEARS
from rooflm.lab.factorize import ranks as rules
from rooflm.lab.factorize.apply import cut_layers, decompose_layers, factorize, layer_shapes
from rooflm.lab.factorize.laser import Cut, laser
from rooflm.lab.factorize.pivot import Pivoted, PivotedLinear
from rooflm.lab.factorize.quantized import CLIP, GROUP, correct, quantize_factors
from rooflm.lab.factorize.sensitivity import sensitivities
from rooflm.lab.factorize.svd import Decomposition, FactorizedLinear, Factors, decompose, truncate
from rooflm.lab.factorize.tensor_train import TTEmbedding, matrix_train, token_train
from rooflm.lab.factorize.variants import EMBEDDINGS, Variant
from rooflm.lab.finetune import plain_layer
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.lab.quantize.methods import METHODS as QUANTIZERS
from rooflm.lab.quantize.methods import Knowledge, Recipe
from rooflm.lab.recovery import recovered, recovery_text
from rooflm.roofline.low_rank import rank_of_share

SEARCHED_ROWS = 8  # of the calibration text, in ASVD's search
FP16 = 16


class Built(NamedTuple):
    """A variant as a model.

    Parameters
    ----------
    model : a new Transformer.
    linear_bits : of all linear layers.
    embedding_bits : of the embedding, which a tied head reads whole.
    ranks : of the layers that are factorized.
    """

    model: Transformer
    linear_bits: float
    embedding_bits: float
    ranks: Mapping[str, int]


class FactorizeBench(Bench):
    """A bench that factorizes; its parameters are those of `Bench`."""

    def __init__(
        self, model: Transformer, held_out: Tensor, rows: Tensor, token_bytes: Tensor
    ) -> None:
        super().__init__(model, held_out, rows, token_bytes)
        self.shapes = layer_shapes(self)
        self._decompositions: dict[tuple[str, float], dict[str, Decomposition]] = {}
        self._sensitivities: dict[tuple[str, float, bool], dict[str, list[rules.Choice]]] = {}

    def decompositions(self, method: str, alpha: float = 0.5) -> dict[str, Decomposition]:
        """Every layer's, at first use; see `apply.decompose_layers`."""
        key = method, alpha if method == "asvd" else 0.5
        if key not in self._decompositions:
            self._decompositions[key] = decompose_layers(self, method, alpha)
        return self._decompositions[key]

    def sensitivities(
        self, method: str, alpha: float = 0.5, pivoted: bool = False
    ) -> dict[str, list[rules.Choice]]:
        """What each layer alone costs, at first use; see `sensitivity.sensitivities`."""
        key = method, alpha if method == "asvd" else 0.5, pivoted
        if key not in self._sensitivities:
            found = self.decompositions(method, alpha)
            rows = self.rows[:SEARCHED_ROWS]
            self._sensitivities[key] = sensitivities(self.model, rows, found, pivoted=pivoted)
        return self._sensitivities[key]

    @cached_property
    def recovery_tokens(self) -> Tensor:
        """The text of recovery, (tokens,)."""
        return recovery_text()

    def ranks(self, v: Variant) -> dict[str, int]:
        """The rank of each layer that a variant factorizes; a full one leaves it as it is."""
        shapes = {name: s for name, s in self.shapes.items() if name.endswith(v.kind)}
        budget = int(v.share * sum(d_out * d_in for d_out, d_in in shapes.values()))
        if v.rule == "uniform":
            return rules.uniform(shapes, v.share, v.pivoted)
        if v.rule in ("threshold", "measured"):
            search = rules.threshold if v.rule == "threshold" else rules.allocate
            return search(self.sensitivities(v.method, v.alpha, v.pivoted), budget)
        found = self.decompositions("two-sided" if v.rule == "loss" else "whitened")
        layers = {}
        for name, shape in shapes.items():
            singular = found[name].singular
            if v.rule == "relative":
                singular = singular / singular.norm()
            layers[name] = rules.choices(singular, shape, v.pivoted)
        return rules.allocate(layers, budget)

    def build(self, v: Variant) -> Built:
        """A variant as a model."""
        config, whole = self.model.config, FP16 * linear_weights(self.model.config)
        head = FP16 * config.vocab * config.hidden
        if v.method == "laser":
            return Built(laser(self.model, Cut(v.layer, v.matrix, v.share)), whole, head, {})
        if v.method in EMBEDDINGS:
            model, bits = self._with_embedding(v)
            return Built(model, whole, bits, {})
        ranks = {} if v.method == "plain" else self.ranks(v)
        found = None if v.method in ("plain", "random") else self.decompositions(v.method, v.alpha)
        factors = cut_layers(self, found, ranks)
        model, linear_bits = factorize(self.model, factors, v.pivoted)
        if v.steps:
            model = recovered(model, self.recovery_tokens, v.steps, v.rate, keep_zeros=False)
        if v.bits:
            linear_bits = self._quantize(model, v)
        return Built(model, linear_bits, head, {n: ranks[n] for n in factors})

    @torch.no_grad()
    def _quantize(self, model: Transformer, v: Variant) -> int:
        """Quantize the layers of a model in place; their bits."""
        total = 0
        for i, block in enumerate(model.layers):
            for kind in LINEARS:
                name = f"layers.{i}.{kind}"
                weight, inputs = self.layer(name)
                if v.steps:
                    weight = getattr(block, kind).weight.detach()
                found = stored_factors(block, kind)
                if found is None:
                    recipe = Recipe(v.quantizer, v.bits, GROUP, clip=CLIP)
                    stored = QUANTIZERS[v.quantizer].quantize(
                        weight, Knowledge(inputs, None), recipe
                    )
                    total += round(stored.bits_per_weight * weight.numel())
                    kept = stored.weight
                    if v.rank:
                        kept = kept + correct(weight, kept, inputs.hessian, v.rank).weight
                        total += FP16 * v.rank * sum(weight.shape)
                    setattr(block, kind, plain_layer(kept))
                    continue
                coded = quantize_factors(found, weight, inputs.hessian, v.bits, v.quantizer)
                total += coded.bits
                setattr(block, kind, rebuilt(coded.factors))
        return total

    @torch.no_grad()
    def _with_embedding(self, v: Variant) -> tuple[Transformer, int]:
        """A copy with another embedding, and the bits that it stores."""
        weight = self.model.embedding.weight.detach()
        vocab, hidden = weight.shape
        if v.method == "svd-embedding":
            rank = int(rank_of_share(vocab, hidden, v.share))
            kept, numbers = truncate(decompose(weight), rank).weight, rank * (vocab + hidden)
        else:
            made, order = _train(weight, v)
            kept, numbers = made.weight, made.numbers
            if v.method == "token-train":
                kept = kept[:, order.argsort()]
            else:
                kept = kept[order.argsort()]
        model = copy.deepcopy(self.model)
        if v.untied:
            model.head = nn.Linear(hidden, vocab, bias=False)
            model.head.weight.copy_(weight)
        model.embedding.weight.copy_(kept)
        return model, FP16 * numbers


def stored_factors(block: TransformerBlock, kind: str) -> Factors | Pivoted | None:
    """What a factorized layer of a block holds; None where it is one matrix."""
    layer = getattr(block, kind)
    if isinstance(layer, PivotedLinear):
        order = layer.place.argsort()
        return Pivoted(layer.first.weight.detach(), layer.second.weight.detach(), order)
    if isinstance(layer, FactorizedLinear):
        return Factors(layer.first.weight.detach(), layer.second.weight.detach())
    return None


def rebuilt(factors: Factors | Pivoted) -> nn.Module:
    """The layer of factors."""
    return PivotedLinear(factors) if isinstance(factors, Pivoted) else FactorizedLinear(factors)


def _train(weight: Tensor, v: Variant) -> tuple[TTEmbedding, Tensor]:
    """A tensor train of a weight, and the order that its channels or tokens were put in."""
    vocab, hidden = weight.shape
    length = hidden if v.method == "token-train" else vocab
    order = torch.arange(length)
    if v.shuffled:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    if v.method == "token-train":
        return token_train(weight[:, order], v.sizes[0], v.rank), order
    return matrix_train(weight[order], v.sizes[0], v.sizes[1], v.rank), order
