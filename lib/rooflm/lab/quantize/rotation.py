"""Random Hadamard rotations: spread outliers evenly before anything is rounded.

A layer y = x W^T computes the same from x Q and W Q for any orthogonal Q. Where x or W has a few
large entries, the entries of x Q and W Q are sums of all of them with random signs, about equally
large, and a grid that must span the largest wastes no codes. How unequal a matrix's entries are is
its incoherence, mu = max|W_ij| sqrt(m n) / |W|_F: 1 if all are equal, sqrt(m n) if one is alone.

Conventions: features are rows' last dimension, rotated as x Q with Q = diag(signs) H. H is
Sylvester's Hadamard matrix over sqrt(n) where n is a power of two; otherwise block-diagonal, with
blocks of n's largest power-of-two divisor (768 = 3 x 256, 576 = 9 x 64, 1536 = 3 x 512): orthogonal
all the same, mixing within a block only; for odd n it mixes nothing. H is symmetric, so H H = I.

In a `Transformer` (`rotate_model`), four steps, each of which leaves the logits alone:
1. the norms' weights move into the weights that follow; RMSNorm without a weight commutes with
   any rotation, since it only divides by the length. The head is untied: the final norm's weight
   belongs to it and not to the embedding;
2. the residual stream turns by Q: embedding and head, the inputs of q, k, v, gate and up, the
   outputs of o and down;
3. values turn within each KV head, folded into v_proj's rows and o_proj's columns;
4. down_proj's input, whose nonlinearity no rotation passes, is turned while running, by
   `RotatedLinear`; only the signs are folded, into up_proj.
Left out: QuaRot's Hadamard across heads before o_proj and of the keys after RoPE.

Sources: QuIP#, arXiv 2402.04396, section 3 (random Hadamard transform); QuaRot, arXiv 2404.00456,
section 3.2, eq. 2 (incoherence) and section 4, stages 1a (steps 1 and 2), 1b (4) and 1c (3).

Chapter: quantization methods.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from rooflm.lab.calibrate import plain_linear
from rooflm.lab.model import Transformer, TransformerBlock
from rooflm.roofline.numeric import size


def block_size(n: int) -> int:
    """The largest power of two that divides n: the size of H's blocks.

    >>> block_size(768), block_size(256), block_size(7)
    (256, 256, 1)
    """
    size("n", n)
    return n & -n


def hadamard(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal (n, n) matrix H, symmetric, with entries 0 and ±1/sqrt(block_size(n)).

    Sylvester: H_1 = 1, H_2m = [[H_m, H_m], [H_m, -H_m]] / sqrt(2).

    >>> hadamard(4) * 2
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]])
    """
    block = torch.ones(1, 1, dtype=dtype)
    while len(block) < block_size(n):
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block * len(block) ** -0.5] * (n // len(block)))


def fast_hadamard(x: Tensor) -> Tensor:
    """x H in n log2(block_size(n)) additions instead of n^2 multiplications.

    Parameters
    ----------
    x : (…, n), of a floating dtype.

    Returns
    -------
    Tensor
        (…, n), of the same dtype. Applied twice it gives x back.
    """
    n = x.shape[-1]
    block, half, y = block_size(n), 1, x
    while half < block:  # butterflies between entries `half` apart
        y = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = y[..., 0, :], y[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return y.reshape(x.shape) * block**-0.5


def random_signs(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n,) of independent fair signs, the random part of Q = diag(signs) H."""
    bits = torch.randint(0, 2, (size("n", n),), generator=generator)
    return (2 * bits - 1).to(dtype)


def rotate_features(x: Tensor, signs: Tensor) -> Tensor:
    """x Q: (…, n) by signs of (n,)."""
    return fast_hadamard(x * signs)


def unrotate_features(x: Tensor, signs: Tensor) -> Tensor:
    """x Q^T, which undoes `rotate_features`."""
    return fast_hadamard(x) * signs


def rotate_weight(weight: Tensor, signs_in: Tensor, signs_out: Tensor | None = None) -> Tensor:
    """Q_out^T W Q_in: the weight that reads rotated features and makes rotated ones.

    Parameters
    ----------
    weight : (d_out, d_in); or a Hessian (d_in, d_in) with `signs_in` for both.
    signs_in : (d_in,).
    signs_out : (d_out,), or None to leave the output unrotated.

    Returns
    -------
    Tensor
        (d_out, d_in). `unrotate_weight` undoes it. Squared errors are the same on both sides, so
        a rounding done in between has its effect at once: the weight-only use of QuIP#.
    """
    turned = rotate_features(weight, signs_in)
    return turned if signs_out is None else rotate_features(turned.T, signs_out).T


def unrotate_weight(weight: Tensor, signs_in: Tensor, signs_out: Tensor | None = None) -> Tensor:
    """Q_out W Q_in^T, (d_out, d_in)."""
    turned = unrotate_features(weight, signs_in)
    return turned if signs_out is None else unrotate_features(turned.T, signs_out).T


def incoherence(weight: Tensor) -> float:
    """mu = max|W_ij| sqrt(m n) / |W|_F, from 1 to sqrt(m n); 1 for a matrix of zeros.

    Source: arXiv 2404.00456, eq. 2; QuIP#, section 2.

    >>> incoherence(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    1.0
    """
    w = weight.double()
    norm = w.norm().item()
    return w.abs().max().item() * w.numel() ** 0.5 / norm if norm else 1.0


class RotatedLinear(nn.Module):
    """A linear layer that turns its input by a fast Hadamard transform while running.

    `linear` is an ordinary `nn.Linear` on the rotated features: what is to be calibrated, and
    quantized, is that one.

    Parameters
    ----------
    linear : d_in to d_out; its weight must already be rotated (W H).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """The rotated weight, (d_out, d_in)."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return self.linear(fast_hadamard(x))


def rotate_model(
    model: Transformer, seed: int = 0, residual: Tensor | None = None, online: bool = True
) -> Transformer:
    """A copy of the model that computes the same from rotated weights and activations.

    Parameters
    ----------
    model : unquantized; it is not changed. The folding runs in float64 and is rounded once.
    seed : of all random signs.
    residual : (hidden, hidden), orthogonal, the rotation of the residual stream; None for a
        random Hadamard one. Any does: the principal axes of the residual stream gather its
        energy in few channels, the opposite of what a Hadamard does and a fair control.
    online : whether to rotate down_proj's input, which costs a transform per token and layer;
        without it every layer stays an `nn.Linear`.

    Returns
    -------
    Transformer
        with the same logits up to rounding, norms' weights of 1 and a `head` of its own.

    Raises
    ------
    ValueError
        for a `residual` that is not orthogonal, or a layer that is no plain `nn.Linear`.

    Source: arXiv 2404.00456, section 4, stages 1a-1c.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = model.embedding.weight.dtype
    model = deepcopy(model).double()
    hidden = model.config.hidden
    if residual is None:
        signs = random_signs(hidden, generator, torch.float64)
        residual = signs[:, None] * hadamard(hidden, torch.float64)
    head = _fold_norms(model)
    _rotate_residual(model, head, _check_orthogonal(residual, hidden))
    for block in model.layers:
        _rotate_values(block, generator)
        if online:
            _rotate_before_down(block, generator)
    return model.to(kind)


@torch.no_grad()
def _fold_norms(model: Transformer) -> nn.Linear:
    """Move every norm's weight into the layers that follow, in place; returns the untied head."""
    if model.head is None:
        vocab, hidden = model.embedding.weight.shape
        model.head = nn.Linear(hidden, vocab, bias=False).to(model.embedding.weight)
        model.head.weight.copy_(model.embedding.weight)
    pairs: list[tuple[nn.Module, list[nn.Linear]]] = [(model.final_norm, [model.head])]
    for block in model.layers:
        pairs.append((block.attn_norm, [plain_linear(block, f"{x}_proj") for x in "qkv"]))
        pairs.append((block.mlp_norm, [plain_linear(block, f"{x}_proj") for x in ("gate", "up")]))
    for norm, readers in pairs:
        for linear in readers:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    return model.head


@torch.no_grad()
def _rotate_residual(model: Transformer, head: nn.Linear, q: Tensor) -> None:
    for reader in (model.embedding, head):
        reader.weight.copy_(reader.weight @ q)
    for block in model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            weight = plain_linear(block, name).weight
            weight.copy_(weight @ q)
        for name in ("o_proj", "down_proj"):
            weight = plain_linear(block, name).weight
            weight.copy_(q.T @ weight)


@torch.no_grad()
def _rotate_values(block: TransformerBlock, generator: torch.Generator) -> None:
    """One rotation for all heads of a block: query heads that share a KV head agree."""
    d = block.config.head_dim
    signs = random_signs(d, generator, torch.float64)
    v, o = block.v_proj.weight, block.o_proj.weight
    # (kv_heads, head_dim, hidden) and (hidden, heads, head_dim)
    v.copy_(rotate_features(v.view(-1, d, v.shape[1]).mT, signs).mT.reshape(v.shape))
    o.copy_(rotate_features(o.view(o.shape[0], -1, d), signs).reshape(o.shape))


@torch.no_grad()
def _rotate_before_down(block: TransformerBlock, generator: torch.Generator) -> None:
    up, down = block.up_proj.weight, block.down_proj.weight
    signs = random_signs(len(up), generator, torch.float64)
    up.mul_(signs[:, None])  # silu(gate) * up is linear in up: the signs need no run time
    down.copy_(rotate_features(down, signs))
    block.down_proj = RotatedLinear(block.down_proj)


def _check_orthogonal(q: Tensor, n: int) -> Tensor:
    if q.shape != (n, n):
        raise ValueError(f"residual is {tuple(q.shape)}; allowed: ({n}, {n})")
    q = q.double()
    off = (q.T @ q - torch.eye(n, dtype=torch.float64)).abs().max().item()
    if not off < 1e-6:
        raise ValueError(f"residual^T residual differs from the identity by {off:.1g}; allowed: 0")
    return q
