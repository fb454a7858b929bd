"""What the map of factorizations holds: each variant as a frozen description.

Chapter: factorization.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from rooflm.lab.bench import SMOLLM2
from rooflm.lab.calibrate import LINEARS
from rooflm.lab.factorize import laser
from rooflm.lab.factorize.apply import METHODS as DECOMPOSED
from rooflm.lab.factorize.quantized import QUANTIZERS
from rooflm.lab.model import Config
from rooflm.lab.prune.recipes import RATE
from rooflm.roofline.numeric import shorten, size, unknown

EMBEDDINGS = ("svd-embedding", "token-train", "matrix-train")
METHODS = ("plain", *DECOMPOSED, "laser", *EMBEDDINGS)
RULES = ("", "uniform", "threshold", "measured", "output", "relative", "loss")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
STEPS = 60  # of recovery


@dataclass(frozen=True)
class Variant:
    """One row of the map.

    Parameters
    ----------
    method : "plain" is the model as it is, to be quantized or trained; "svd", "asvd", "whitened",
        "two-sided" and their control "random" factorize the linear layers; "laser" cuts one
        matrix; the others compress the embedding.
    share : of the numbers of what is factorized; of "laser", of the rank.
    rule : how ranks are found: "uniform", the same share of each layer; "threshold", ASVD's search;
        or by the least sum of what each layer costs: of the losses measured with it alone cut
        ("measured"), of the output errors ("output"), of those relative to the layer's output
        ("relative"), or of the losses that are estimated from gradients ("loss").
    alpha : of ASVD.
    pivoted : stored as rows and coefficients, not as two factors.
    kind : the one kind of layer that is factorized; "" for all.
    bits, quantizer : of what is stored; 0 for FP16.
    rank : of the chains of a tensor train; of "plain", of a correction beside the quantized weight.
    modes : sizes of a tensor train, such as "4x4x4x4".
    shuffled : the control of a train: its channels (of "matrix-train": tokens) in a random order.
    untied : the head keeps the full embedding.
    layer, matrix : of "laser".
    steps, rate : of recovery, and its peak learning rate.
    """

    method: str = "plain"
    share: float = 1.0
    rule: str = ""
    alpha: float = 0.5
    pivoted: bool = False
    kind: str = ""
    bits: int = 0
    quantizer: str = ""
    rank: int = 0
    modes: str = ""
    shuffled: bool = False
    untied: bool = False
    layer: int = 0
    matrix: str = ""
    steps: int = 0
    rate: float = RATE

    def __post_init__(self) -> None:
        for what, allowed in (("method", METHODS), ("rule", RULES)):
            if getattr(self, what) not in allowed:
                raise unknown(what, getattr(self, what), allowed)
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {shorten(self.share)}; allowed: above 0, up to 1")
        if bool(self.rule) != (self.method in DECOMPOSED):
            raise ValueError(f"rule is {self.rule!r} for {self.method}; allowed with: {DECOMPOSED}")
        if self.method == "random" and self.rule not in ("", "uniform"):
            raise ValueError(f"rule is {self.rule!r} for random; allowed: uniform")
        if self.kind and self.kind not in LINEARS:
            raise unknown("kind", self.kind, LINEARS)
        if bool(self.bits) != bool(self.quantizer) or self.quantizer not in ("", *QUANTIZERS):
            raise unknown("quantizer", self.quantizer, QUANTIZERS)
        size("steps", self.steps, 0), size("rank", self.rank, 0)

    @property
    def names(self) -> dict[str, Any]:
        """The columns that tell it apart."""
        return {
            "method": self.method,
            "share": self.share,
            "rule": self.rule,
            "options": self.options,
        }

    @property
    def options(self) -> str:
        """What is not the default, as words."""
        words = []
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default or (field.name == "layer" and self.method == "laser"):
                words.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(words)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The modes as numbers: one tuple, or two where "/" stands between them."""
        return tuple(tuple(int(n) for n in part.split("x")) for part in self.modes.split("/"))


def variants(name: str, config: Config) -> list[Variant]:
    """What the map holds of a model; of SmolLM2 a choice."""
    if name == SMOLLM2:
        return _few()
    return [
        Variant(),
        *_methods(),
        *_allocations(),
        *_kinds(),
        *_quantized(),
        *_recovered(),
        *_embeddings(),
        *_laser(config),
    ]


def _methods() -> list[Variant]:
    uniform = [Variant(m, s, "uniform") for m in DECOMPOSED for s in SHARES]
    alphas = [Variant("asvd", s, "uniform", alpha=a) for a in (0.25, 1.0) for s in (0.9, 0.5)]
    pivoted = [Variant("whitened", s, "uniform", pivoted=True) for s in SHARES]
    return [*uniform, *alphas, *pivoted, Variant("svd", 0.9, "uniform", pivoted=True)]


def _allocations() -> list[Variant]:
    rules = [Variant("whitened", s, r) for r in ("output", "relative") for s in (0.9, 0.7, 0.5)]
    searched = [
        Variant(m, s, r)
        for m in ("asvd", "whitened")
        for r in ("threshold", "measured")
        for s in (0.9, 0.7, 0.5)
    ]
    searched += [Variant("svd", s, "threshold") for s in (0.9, 0.7, 0.5)]
    searched += [Variant("whitened", s, "measured", pivoted=True) for s in SHARES]
    loss = [Variant("two-sided", s, "loss", pivoted=p) for p in (False, True) for s in SHARES]
    # The same ranks with the cut of least output error, so that rule and cut stand apart.
    apart = [Variant("whitened", s, "loss") for s in (0.9, 0.7, 0.5)]
    apart += [Variant("whitened", s, "loss", pivoted=True) for s in (0.9, 0.7, 0.5, 0.3)]
    return [*rules, *searched, *loss, *apart]


def _kinds() -> list[Variant]:
    found = [Variant("whitened", 0.5, "uniform", kind=kind) for kind in LINEARS]
    return found + [Variant("random", 0.5, "uniform", kind=kind) for kind in LINEARS]


def _quantized() -> list[Variant]:
    plain = [Variant(bits=b, quantizer=q) for q in QUANTIZERS for b in (8, 4, 3, 2)]
    corrected = [Variant(bits=b, quantizer="gptq", rank=r) for b in (4, 3, 2) for r in (4, 8)]
    best = Variant("two-sided", 0.9, "loss", pivoted=True)
    bases = [Variant("whitened", 0.9, "uniform"), best]
    shares = (0.9, 0.75, 0.6, 0.5, 0.4)
    four = [replace(x, share=s, bits=4, quantizer="gptq") for x in bases for s in shares]
    other = [replace(best, share=s, bits=4, quantizer="round") for s in (0.9, 0.5)]
    other += [replace(best, share=s, bits=b, quantizer="gptq") for b in (8, 3) for s in (0.75, 0.5)]
    return [*plain, *corrected, *four, *other]


def _recovered() -> list[Variant]:
    best = Variant("two-sided", 0.9, "loss", pivoted=True, steps=STEPS)
    factors = [Variant("whitened", s, "uniform", steps=STEPS) for s in (0.9, 0.7, 0.5, 0.3)]
    factors += [replace(best, share=s) for s in (0.9, 0.7, 0.5, 0.3)]
    controls = [Variant(m, 0.5, "uniform", steps=STEPS) for m in ("svd", "asvd", "random")]
    then = [Variant(steps=STEPS, bits=b, quantizer="gptq") for b in (4, 3, 2)]
    then += [replace(best, share=s, bits=4, quantizer="gptq") for s in (0.9, 0.75, 0.6, 0.5, 0.3)]
    found = [Variant(steps=STEPS), *factors, *controls, *then]
    slow = [replace(x, rate=RATE / 5) for x in (*found[:9], *controls)]
    # Below two bits a weight, where scalar grids end.
    low = [
        Variant("whitened", s, "measured", pivoted=True, bits=4, quantizer="gptq")
        for s in (0.5, 0.3, 0.2)
    ]
    trained = [replace(x, steps=STEPS, rate=rate) for rate in (RATE, RATE / 5) for x in low]
    # Half of the numbers, pivoted, with no more than that: between two factors and searched ranks.
    between = [Variant("whitened", 0.5, rule, pivoted=True) for rule in ("uniform", "loss")]
    trained += [replace(x, steps=STEPS, rate=rate) for x in between for rate in (RATE, RATE / 5)]
    return [*found, *slow, *low, *trained]


def _embeddings() -> list[Variant]:
    chains = {"4x4x4x4": (1, 2, 3, 4, 6), "16x16": (1, 2, 4, 6)}
    tokens = [
        Variant("token-train", modes=modes, rank=rank) for modes in chains for rank in chains[modes]
    ]
    modes = "8x16x16/4x8x8"
    matrix = [Variant("matrix-train", modes=modes, rank=rank) for rank in (16, 32, 48, 64)]
    cuts = [Variant("svd-embedding", s) for s in (0.9, 0.75, 0.5, 0.375, 0.1875)]
    untied = [Variant("token-train", modes="16x16", rank=4), Variant("svd-embedding", 0.5)]
    shuffled = [Variant("token-train", modes="16x16", rank=4), matrix[-1]]
    return [
        *tokens,
        *matrix,
        *cuts,
        *(replace(x, untied=True) for x in untied),
        *(replace(x, shuffled=True) for x in shuffled),
    ]


def _laser(config: Config) -> list[Variant]:
    return [
        Variant("laser", cut.share, layer=cut.layer, matrix=cut.matrix)
        for cut in laser.scan(config)
    ]


def _few() -> list[Variant]:
    shares = (0.9, 0.7)
    uniform = [Variant(m, s, "uniform") for m in DECOMPOSED for s in shares if m != "two-sided"]
    pivoted = [Variant("whitened", s, "uniform", pivoted=True) for s in shares]
    loss = [Variant(m, s, "loss", pivoted=True) for m in ("two-sided", "whitened") for s in shares]
    return [Variant(), *uniform, *pivoted, *loss, Variant(bits=3, quantizer="gptq")]
