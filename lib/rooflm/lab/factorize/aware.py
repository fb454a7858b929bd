"""Low rank by what the layer reads: ASVD, the optimum for the output, and for the loss.

A cut through the singular values of W is nearest to W. What counts is the layer's output on its
inputs x, mean |x (W - W_r)^T|^2, which is tr (W - W_r) H (W - W_r)^T with H = X^T X / tokens.
All of these decompose another matrix and take the change back afterwards:

- ASVD scales the columns of W by the mean magnitude of their inputs, to a power alpha.
- `whitened` takes W L with L L^T = H. The output's error is then the tail of the singular values,
  and no rank-r weight has a smaller one on these inputs: it solves the problem.
- `two_sided` weighs the outputs too, by the second moments G of the loss's gradients: it minimizes
  tr G (W - W_r) H (W - W_r)^T, an estimate of twice what the loss rises by. The estimate leaves
  out the first-order term, has the empirical Fisher matrix (gradients for the text's own next
  tokens) in place of the Hessian, and in its place the Kronecker product of H and G: inputs and
  gradients as if independent, and no terms between tokens.

All of it runs in float64; H and G get a small part of their diagonal added to it.

Sources: ASVD, arXiv 2312.05821, section 3 (eq. 1, 3-8; eq. 9 is the Cholesky factor); SVD-LLM,
arXiv 2403.07378, section 3.1; the Kronecker product, K-FAC, arXiv 1503.05671. GFWSVD, arXiv
2505.17974, has the same two-sided form with other factors, fitted to the observed Fisher matrix.

Chapter: factorization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rooflm.lab.calibrate import LINEARS, plain_linear
from rooflm.lab.factorize.svd import Decomposition, check_matrix, decompose
from rooflm.lab.model import Transformer
from rooflm.lab.quantize.gptq import check_hessian, output_error
from rooflm.roofline.numeric import shorten

DAMP = 1e-9  # of each channel's power: enough to invert, too little to be seen in an error
MOST_DAMP = 1e-2


def asvd(weight: Tensor, mean_abs: Tensor, alpha: float = 0.5) -> Decomposition:
    """Activation-aware SVD: of W S, with S^-1 multiplied back.

    Parameters
    ----------
    weight : (d_out, d_in).
    mean_abs : (d_in,), mean magnitude of each input.
    alpha : S = diag(mean_abs^alpha). 0 is the plain SVD; 0.5 is what the authors' code is run at.

    Source: ASVD, arXiv 2312.05821, section 3, eq. 3-8; the 1e-6 is their code's.
    """
    if not 0 <= alpha <= 2:
        raise ValueError(f"alpha is {shorten(alpha)}; allowed: 0 to 2")
    if mean_abs.shape != weight.shape[1:] or not bool((mean_abs >= 0).all()):
        given = tuple(mean_abs.shape)
        raise ValueError(f"mean_abs is {given}; allowed: {weight.shape[1:]}, 0 or more")
    scale = mean_abs.double() ** alpha + 1e-6
    found = decompose(check_matrix(weight).double() * scale)
    return found._replace(right=found.right / scale)


def whitened(weight: Tensor, hessian: Tensor, damp: float = DAMP) -> Decomposition:
    """The decomposition whose cuts have the least output error of their rank.

    Parameters
    ----------
    weight : (d_out, d_in).
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    damp : added to the diagonal, as a part of itself; see `cholesky`.

    Returns
    -------
    Decomposition
        its `tails` are the output error of each rank, the mean over tokens of the squared
        error summed over outputs (with the damped Hessian).

    Raises
    ------
    ValueError
        for a Hessian that does not belong to the weight or has no inverse.

    Source: SVD-LLM, arXiv 2403.07378, section 3.1; ASVD, arXiv 2312.05821, eq. 9.
    """
    check_hessian(hessian, weight)
    lower = cholesky(hessian, damp)
    found = decompose(check_matrix(weight).double() @ lower)
    return found._replace(right=_times_inverse(found.right, lower))


def two_sided(
    weight: Tensor, hessian: Tensor, gradients: Tensor, damp: float = DAMP
) -> Decomposition:
    """The decomposition whose cuts raise the loss least, by the estimate above.

    Parameters
    ----------
    weight, hessian, damp : as in `whitened`.
    gradients : (d_out, d_out), mean g g^T of the loss's gradients with respect to the outputs,
        as of `output_gradients`.

    Returns
    -------
    Decomposition
        half of its `tails` estimate what the loss rises by, nats a token.

    Source: that the Fisher matrix is about the Kronecker product of H and G, K-FAC,
    arXiv 1503.05671; the same two-sided form with other factors, GFWSVD, arXiv 2505.17974.
    """
    check_hessian(hessian, weight)
    check_hessian(gradients, weight.T)
    inputs, outputs = cholesky(hessian, damp), cholesky(gradients, damp)
    found = decompose(outputs.T @ check_matrix(weight).double() @ inputs)
    left = torch.linalg.solve_triangular(outputs.T, found.left, upper=True)
    return Decomposition(left, found.singular, _times_inverse(found.right, inputs))


def errors(weight: Tensor, cut: Tensor, hessian: Tensor) -> tuple[float, float]:
    """Squared errors of a weight and of its outputs, as parts of their squares.

    Parameters
    ----------
    weight, cut : (d_out, d_in), the weight and what is to stand in its place.
    hessian : (d_in, d_in), inputs^T inputs / tokens.
    """
    of_weights = (weight - cut).square().sum() / weight.square().sum()
    whole = output_error(weight, 0 * weight, hessian)
    return float(of_weights), output_error(weight, cut, hessian) / whole


def output_gradients(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """Mean g g^T over the tokens of a text, for the outputs of every linear layer.

    Parameters
    ----------
    model : of plain layers.
    rows : (rows, window), tokens; the loss of a row is the sum over its predictions.

    Returns
    -------
    dict
        "layers.0.q_proj": (d_out, d_out), and so on.
    """
    found: dict[str, Tensor] = {}

    def gather(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2)
                found[name] = found.get(name, torch.zeros(())) + g.T @ g

            output.register_hook(add)

        return hook

    hooks = [
        plain_linear(block, name).register_forward_hook(gather(f"layers.{i}.{name}"))
        for i, block in enumerate(model.layers)
        for name in LINEARS
    ]
    try:
        with torch.enable_grad():
            for row in rows:
                states = model.embedding(row[None, :-1]).detach().requires_grad_(True)
                for block in model.layers:
                    states = block(states, model.rope, None)
                logits = model.logits(states)[0]
                functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    finally:
        for handle in hooks:
            handle.remove()
        model.zero_grad(set_to_none=True)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    return {name: gram / tokens for name, gram in found.items()}


def cholesky(matrix: Tensor, damp: float = DAMP) -> Tensor:
    """The lower triangular L with L L^T = M + damp diag(M), in float64.

    Each channel is damped by its own power, so that one of very large inputs does not drown the
    others. Where sums in float32 have left M without a factor, damp is raised tenfold until there
    is one. A channel that was never excited counts as little as damp times the mean power.

    Parameters
    ----------
    matrix : (d, d), symmetric, positive semi-definite up to rounding.
    damp : where to begin; up to `MOST_DAMP`.
    """
    power = matrix.diagonal().double()
    silent = power <= 0
    root = torch.where(silent, power.mean(), power).sqrt()
    even = matrix.double() / torch.outer(root, root)  # ones on the diagonal
    while 0 <= damp <= MOST_DAMP and bool((root > 0).all()):
        damped = even + damp * torch.eye(len(even), dtype=even.dtype, device=even.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return root[:, None] * lower
        damp = max(10 * damp, DAMP)
    raise ValueError("the matrix has no Cholesky factor; allowed: a matrix of second moments")


def _times_inverse(right: Tensor, lower: Tensor) -> Tensor:
    """right L^-1."""
    return torch.linalg.solve_triangular(lower, right, upper=False, left=False)
