"""Adam in plain torch, on any device: the test of the compiled twins in `adam_numba`, and what a GPU uses.

The decoder's gradient is projected orthogonal to each row before Adam sees it, and rows are renormalised after the
step (Rajamanoharan et al. 2024, appendix D); the row clip is between the two (`adam`). Everything is in place. A rate
of 0 leaves an SAE unchanged, even if its gradient is not finite. A latent with a gradient whose square is not finite
keeps its weights; each function returns which SAEs (saes,) have none.
"""

import torch
from torch import Tensor

from .adam import Adam


def adam_decoder(W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, adam: Adam, correction: Tensor) -> Tensor:
    """One step for a stack of decoders W (saes, d_sae, d_in) with rows of unit norm.

    operand receives the new weights in the type of the matrix products. v (as W): second moments.
    correction (saes, d_sae): 1 / sqrt(1 - beta2^t), the bias correction for the step t of each row.
    """
    g = grad.to(W.dtype)
    g = g - (g * W).sum(-1, keepdim=True) * W
    update, finite = _row_updates(g, v, adam, correction)
    moved = W - update
    moved /= moved.norm(dim=-1, keepdim=True)
    return _moved(W, operand, moved, finite, adam)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, adam: Adam, correction: Tensor
) -> Tensor:
    """One step for a stack of encoders W (saes, d_sae, d_in).

    The gradient is `grad` less the outer product of sums (saes, d_sae) and offset (saes, d_in), because the product
    that gave `grad` was taken with x in place of x - offset. The other arguments are those of `adam_decoder`.
    """
    return adam_rows(W, operand, grad.to(W.dtype) - sums[..., None] * offset[:, None], v, adam, correction)


def adam_rows(W: Tensor, operand: Tensor, g: Tensor, v: Tensor, adam: Adam, correction: Tensor) -> Tensor:
    """One step for a stack of matrices that have a row for each latent and no unit norm, with gradients g (as W)."""
    update, finite = _row_updates(g, v, adam, correction)
    return _moved(W, operand, W - update, finite, adam)


def adam_vector(
    p: Tensor, g: Tensor, v: Tensor, adam: Adam, correction: Tensor, most: float = float("inf")
) -> Tensor:  # fmt: skip
    """One step for a stack of vectors p (saes, n), where each entry has a bias correction and is at most `most`."""
    rate = adam.lr[:, None].to(p)
    update, moment = _update(g, v, adam, rate, correction)
    finite = torch.isfinite(update + moment * 0)
    if adam.row_clip:
        update = torch.minimum(torch.maximum(update, -rate), rate)
    return _moved(p, p, (p - update).clamp(max=most), finite, adam)


def _row_updates(g: Tensor, v: Tensor, adam: Adam, correction: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows of a stack of matrices lose, the clip included, and which have finite gradients (saes, d_sae)."""
    rate = adam.lr[:, None, None].to(g)
    update, moment = _update(g, v, adam, rate, correction[..., None])
    square = (update * update + moment * 0).sum(-1, keepdim=True)
    if adam.row_clip:
        update = update * (rate / (square / g.shape[-1]).sqrt()).clamp(max=1.0)
    return update, torch.isfinite(square[..., 0])


def _update(g: Tensor, v: Tensor, adam: Adam, rate: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's update, and the second moments, which `v` receives if the rate is not 0."""
    moment = v * adam.beta2 + (1 - adam.beta2) * g * g
    torch.where(rate > 0, moment, v, out=v)
    return rate * g / (moment.sqrt() * correction + adam.eps), moment


def _moved(target: Tensor, operand: Tensor, value: Tensor, finite: Tensor, adam: Adam) -> Tensor:
    """Put new values in place where the rate is not 0 and gradients are finite."""
    running = finite & (adam.lr > 0)[:, None]
    torch.where(running if value.dim() == 2 else running[..., None], value, target, out=target)
    if operand is not target:
        operand.copy_(target)
    return finite.all(1)
