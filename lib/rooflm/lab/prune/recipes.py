"""What can be done to a model: the two kinds of pruning as recipes, by the names of their methods.

A `Recipe` zeroes single weights, a `Removal` takes out heads, channels or layers. Both may be
followed by recovery training. `apply` carries them out.

Chapter: pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rooflm.lab.prune.masks import SCOPES, check_sparsity, read_pattern
from rooflm.roofline.numeric import size, unknown

# What each method scores by, and what its paper (or its control's) compares scores over.
METHODS: Mapping[str, tuple[str, str]] = {
    "dense": ("nothing goes; for rounding alone", "layer"),
    "magnitude": ("|w|", "layer"),
    "wanda": ("|w| times the norm of its input", "row"),
    "sparsegpt": ("the error that the columns to the right leave", "layer"),
    "random": ("the control: a lottery", "layer"),
}
# How parts of a model are chosen, and which of them may be: see `structured` and `depth`.
CRITERIA: Mapping[str, tuple[str, ...]] = {
    "first-order": ("layers", "groups", "heads", "channels"),
    "vector": ("layers", "groups", "heads", "channels"),
    "random": ("layers", "groups", "heads", "channels"),
    "influence": ("layers",),
    "loss": ("layers",),
    "last": ("layers",),
    "first": ("layers",),
}
RATE = 1e-3
PARTS = ("layers", "groups", "heads", "channels")


@dataclass(frozen=True)
class Recipe:
    """Weights to zero.

    Parameters
    ----------
    method : a name in `METHODS`.
    sparsity : share of the weights that go.
    pattern : "n:m", which sets the sparsity; "" for none.
    per : what scores are compared over, "row" or "layer"; "" for the method's own. SparseGPT's
        layer is all rows of a block of 128 columns.
    update : SparseGPT's update for the mask of another method.
    refit : the least squares values of the kept weights, row by row, for whatever mask: what the
        update stands for.
    owl : a sparsity for each block by its outliers.
    bits, group : of the grid that kept weights are rounded to, by the update; None for none.
    calibration : "pruned": each block's inputs come from the pruned blocks before it, as in the
        papers; "full": from the full model.
    steps, rate : of recovery training, and its peak learning rate; 0 steps for none.
    seed : of random masks and of recovery's batches.
    """

    method: str = "sparsegpt"
    sparsity: float = 0.5
    pattern: str = ""
    per: str = ""
    update: bool = False
    refit: bool = False
    owl: bool = False
    bits: int | None = None
    group: int = 0
    calibration: str = "pruned"
    steps: int = 0
    rate: float = RATE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, list(METHODS))
        check_sparsity(self.sparsity)
        if self.pattern:
            n, m = read_pattern(self.pattern)
            if self.sparsity != 1 - n / m:
                raise ValueError(
                    f"sparsity is {self.sparsity} with {self.pattern}; allowed: {1 - n / m}"
                )
        if self.per not in ("", *SCOPES):
            raise unknown("per", self.per, SCOPES)
        if self.calibration not in ("pruned", "full"):
            raise unknown("calibration", self.calibration, ("pruned", "full"))
        if self.owl and self.pattern:
            raise ValueError("owl and pattern are both given; allowed: one")
        if self.bits is not None and not self.compensates:
            raise ValueError(f"bits is given for {self.method}; allowed: with update=True")
        if self.refit and (self.update or self.bits is not None):
            raise ValueError("refit and update or bits are both given; allowed: one")
        if self.method == "dense" and self.sparsity:
            raise ValueError(f"sparsity is {self.sparsity} for dense; allowed: 0")
        size("steps", self.steps, 0)

    @property
    def scope(self) -> str:
        """What scores are compared over."""
        return self.per or METHODS[self.method][1]

    @property
    def compensates(self) -> bool:
        """Whether the columns to the right adapt."""
        return self.update or self.method in ("sparsegpt", "dense")


@dataclass(frozen=True)
class Removal:
    """Parts to take out; a count of 0 takes out none.

    Parameters
    ----------
    criterion : a name in `CRITERIA`; or "scratch": a model of the shape that is left, with random
        weights, to be trained as long: the control of recovery.
    layers : whole layers.
    groups : KV groups with their query heads, in every layer.
    heads : query heads in every KV group of every layer.
    channels : MLP channels in every layer.
    steps, rate : of recovery training, and its peak learning rate; 0 steps for none.
    seed : of a random choice and of recovery's batches.
    """

    criterion: str = "first-order"
    layers: int = 0
    groups: int = 0
    heads: int = 0
    channels: int = 0
    steps: int = 0
    rate: float = RATE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in (*CRITERIA, "scratch"):
            raise unknown("criterion", self.criterion, [*CRITERIA, "scratch"])
        for name in (*PARTS, "steps"):
            size(name, getattr(self, name), 0)
        wrong = set(self.parts) - set(CRITERIA.get(self.criterion, PARTS))
        if wrong:
            raise ValueError(f"{self.criterion} of {min(wrong)}; allowed: of layers alone")

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of parts that go."""
        return tuple(name for name in PARTS if getattr(self, name))
