"""Muon: momentum whose matrices are made orthogonal before they are applied.

A matrix's update is replaced by the nearest semi-orthogonal one, found by Newton-Schulz
iterations, so that every direction learns at the same pace; on small models this needs about
two thirds of the steps of AdamW. torch.optim has a Muon too; it iterates in BF16, which a
processor without BF16 units emulates at a hundredth of its speed, so that this one stays in FP32.

Sources: K. Jordan et al., "Muon", 2024 (the iteration's coefficients); arXiv 2502.16982, section
2.2, eq. 4 (the factor that gives its updates AdamW's size, so that both share a learning rate).

Chapter: number formats.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of (rows, columns) towards 1, and keep the singular vectors.

    Values above 0.002 of the Frobenius norm end between 0.68 and 1.21, smaller ones below that.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay.

    Parameters
    ----------
    parameters : matrices.
    lr, momentum, weight_decay : as in AdamW; an update has a root mean square of about 0.2 lr.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the parameters' gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)
