"""Adam in plain torch, on any device: the test of the compiled twins in `adam_numba`, and what a GPU uses.

The decoder's gradient is projected orthogonal to each row before Adam sees it, and rows are renormalised after the
step (Rajamanoharan et al. 2024, appendix D). Everything is in place. A rate of 0 leaves an SAE unchanged, even if its
gradient is not finite.
"""

import torch
from torch import Tensor


def adam_decoder(
    W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float
) -> None:
    """One step for a stack of decoders W (saes, d_sae, d_in) with rows of unit norm.

    operand receives the new weights in the type of the matrix products. v (as W): second moments. lr (saes,): rates.
    correction (saes, d_sae): 1 / sqrt(1 - beta2^t), the bias correction for the step t of each row.
    """
    g = grad.to(W.dtype)
    g = g - (g * W).sum(-1, keepdim=True) * W
    moved = W - _step(g, v, lr, beta2, correction[..., None], eps)
    moved /= moved.norm(dim=-1, keepdim=True)
    _assign(W, moved, lr)
    if operand is not W:
        operand.copy_(W)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, lr: Tensor, beta2: float,
    correction: Tensor, eps: float,
) -> None:  # fmt: skip
    """One step for a stack of encoders W (saes, d_sae, d_in).

    The gradient is `grad` less the outer product of sums (saes, d_sae) and offset (saes, d_in), because the product
    that gave `grad` was taken with x in place of x - offset. The other arguments are those of `adam_decoder`.
    """
    g = grad.to(W.dtype) - sums[..., None] * offset[:, None]
    _assign(W, W - _step(g, v, lr, beta2, correction[..., None], eps), lr)
    if operand is not W:
        operand.copy_(W)


def adam_vector(p: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float) -> None:
    """One step for a stack of vectors p (saes, n), where each entry has a bias correction."""
    _assign(p, p - _step(grad, v, lr, beta2, correction, eps), lr)


def _step(g: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float) -> Tensor:
    _assign(v, v * beta2 + (1 - beta2) * g * g, lr)
    rate = lr.view(-1, *[1] * (g.dim() - 1))
    return rate * g / (v.sqrt() * correction + eps)


def _assign(target: Tensor, value: Tensor, lr: Tensor) -> None:
    running = lr.view(-1, *[1] * (value.dim() - 1)) > 0
    torch.where(running, value, target, out=target)
