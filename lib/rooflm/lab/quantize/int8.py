"""LLM.int8(): an INT8 product that takes the outlier columns out and computes them unquantized.

An activation with an outlier of 60 has, at 8 bits, a step of about 60/127: every ordinary value
of its token is rounded to a few codes. The outliers sit in a few columns (features), the same for
almost all tokens, so those columns leave the integer product and join an ordinary one.

Conventions: x is (…, d_in), the weight (d_out, d_in), y = x @ weight.T. Vector-wise: one scale a
token of x, one a row (output channel) of the weight, both symmetric on `grids.py`'s 8-bit grid,
codes -127 to 127. A row's scale is fitted to the whole row, outlier columns included: it is
stored before any x is seen. The outlier part takes the original weight's columns, as in eq. 8.

Source: LLM.int8(), arXiv 2208.07339, sections 3.1 (vector-wise product, eq. 7) and 3.2
(decomposition, eq. 8; threshold 6.0); an outlier is "at least 6.0" as in section 4.1.

Chapter: quantization methods.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from rooflm.lab.quantize.grids import encode, fit_grid
from rooflm.roofline.numeric import shorten

THRESHOLD = 6.0


class DecomposedProduct(NamedTuple):
    """What `int8_product` returns.

    Parameters
    ----------
    y : (…, d_out), float32.
    outliers : (d_in,), bool: the columns that were computed unquantized.
    """

    y: Tensor
    outliers: Tensor


def vectorwise_product(x: Tensor, weight: Tensor) -> Tensor:
    """The INT8 product without decomposition: the control of `int8_product`.

    Parameters
    ----------
    x : (…, d_in), finite.
    weight : (d_out, d_in), finite.

    Returns
    -------
    Tensor
        (…, d_out), float32: the integer product, exact, times both scales.

    Raises
    ------
    ValueError
        for shapes that do not fit or numbers that are not finite.

    Source: arXiv 2208.07339, eq. 7.

    >>> import torch
    >>> vectorwise_product(torch.tensor([[127.0, 1.4]]), torch.tensor([[127.0, 127.0]]))
    tensor([[16256.]])
    """
    _check_shapes(x, weight)
    tokens, rows = fit_grid(x, 8, symmetric=True), fit_grid(weight, 8, symmetric=True)
    # A sum of d_in products of 127^2 stays below 2^53: float64 accumulates it without rounding,
    # as an INT32 accumulator does, and is far faster here than torch's integer product.
    sums = encode(x.float(), tokens).double() @ encode(weight.float(), rows).double().T
    return (sums * tokens.scale.double() * rows.scale.double().T).float()


def int8_product(x: Tensor, weight: Tensor, threshold: float = THRESHOLD) -> DecomposedProduct:
    """The INT8 product of the ordinary columns plus the FP32 product of the outlier columns.

    Parameters
    ----------
    x : (…, d_in), finite.
    weight : (d_out, d_in), finite.
    threshold : a column with any |x| >= threshold is an outlier column; 0 makes all of them so,
        infinity none (which leaves the vector-wise product).

    Returns
    -------
    DecomposedProduct
        y of (…, d_out) and the mask of outlier columns, (d_in,).

    Raises
    ------
    ValueError
        for shapes that do not fit, numbers that are not finite or a negative threshold.

    Source: arXiv 2208.07339, eq. 8.

    >>> import torch
    >>> x, weight = torch.tensor([[60.0, 0.3], [0.1, 0.2]]), torch.tensor([[0.1, 1.0]])
    >>> int8_product(x, weight).outliers
    tensor([ True, False])
    """
    _check_shapes(x, weight)
    if not threshold >= 0:
        raise ValueError(f"threshold is {shorten(threshold)}; allowed: 0 or more")
    outliers = (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)
    # A zero has code 0 and widens no range, so zeroing a column takes it out of the product.
    ordinary = vectorwise_product(x.masked_fill(outliers, 0), weight)
    high = x[..., outliers].float() @ weight[:, outliers].float().T
    return DecomposedProduct(ordinary + high, outliers)


class Int8Linear(nn.Module):
    """A linear layer whose product is `int8_product`, in place of an `nn.Linear`.

    Parameters
    ----------
    weight : (d_out, d_in), kept as it is; nothing is stored in 8 bits here, the numbers only
        come out as if it were.
    threshold : as in `int8_product`; infinity for the vector-wise product.
    """

    def __init__(self, weight: Tensor, threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return int8_product(x, self.weight, self.threshold).y.to(x.dtype)


def _check_shapes(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[-1] or not x.numel():
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "allowed: (…, d_in), not empty, and (d_out, d_in)"
        )
