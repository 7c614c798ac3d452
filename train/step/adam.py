"""Adam as the paper runs it: beta1 = 0, so there is no first moment to keep, and unit-norm decoder rows.

The decoder's gradient is projected orthogonal to each row before Adam sees it, and rows are renormalised after the
step (Rajamanoharan et al. 2024, appendix D). Everything is in place; a rate of 0 leaves an SAE entirely untouched,
whatever its gradient holds. `kernels` has the compiled twins of the two functions for weight matrices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adam:
    """What the optimiser needs for one step: rates (saes,), 0 for an SAE that is stopped; step counts from 1."""

    lr: Tensor
    beta2: float
    eps: float
    step: int

    def correction(self, born: Tensor) -> Tensor:
        """Bias correction of the square root of second moments that began after step `born`; as it, float64."""
        return (1 - self.beta2 ** (self.step - born).double()).rsqrt()


def adam_decoder(
    W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float
) -> None:
    """One step for a stack of decoders W (saes, d_sae, d_in) with rows of unit norm.

    operand receives the new weights in the products' type; v (as W) is the second moment, lr (saes,) the rates,
    correction (saes, d_sae) = 1 / sqrt(1 - beta2^t) the bias correction of each row's step t.
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

    Their gradient is grad less the outer product of sums (saes, d_sae) and offset (saes, d_in): what is missing
    when the product was taken with x in place of x - offset. The rest is as in `adam_decoder`.
    """
    g = grad.to(W.dtype) - sums[..., None] * offset[:, None]
    _assign(W, W - _step(g, v, lr, beta2, correction[..., None], eps), lr)
    if operand is not W:
        operand.copy_(W)


def adam_vector(p: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float) -> None:
    """One step for a stack of vectors p (saes, n), each entry with its own bias correction."""
    _assign(p, p - _step(grad, v, lr, beta2, correction, eps), lr)


def _step(g: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float) -> Tensor:
    _assign(v, v * beta2 + (1 - beta2) * g * g, lr)
    rate = lr.view(-1, *[1] * (g.dim() - 1))
    return rate * g / (v.sqrt() * correction + eps)


def _assign(target: Tensor, value: Tensor, lr: Tensor) -> None:
    running = lr.view(-1, *[1] * (value.dim() - 1)) > 0
    torch.where(running, value, target, out=target)
