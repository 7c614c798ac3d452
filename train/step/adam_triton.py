"""Adam for weight matrices on GPUs, one pass over memory: the twins of `adam_plain`, in float32.

One program takes a latent's row: projection, second moments, the clip and the unit norm need all of it, and it fits in
registers. `adam_plain` moves about 304 bytes for a weight of both matrices, these 40 to 44.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernels are typed by Triton.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import Adam
from .triton_support import row_in_registers


def adam_decoder(W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, adam: Adam, correction: Tensor) -> Tensor:
    """As `adam_plain.adam_decoder`."""
    nothing = W.new_empty(1)
    return _step(W, operand, grad, v, nothing, nothing, adam, correction, decoder=True)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, adam: Adam, correction: Tensor
) -> Tensor:
    """As `adam_plain.adam_encoder`."""
    return _step(W, operand, grad, v, sums, offset, adam, correction, decoder=False)


def _step(
    W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, sums: Tensor, offset: Tensor, adam: Adam, correction: Tensor,
    *, decoder: bool,
) -> Tensor:  # fmt: skip
    saes, d_sae, d_in = W.shape
    bad = torch.zeros((saes, d_sae), dtype=torch.int32, device=W.device)
    _matrix[(saes * d_sae,)](
        W, operand, grad, v, sums, offset, adam.lr, correction, bad, d_sae, adam.beta2, 1 - adam.beta2, adam.eps,
        d_in, decoder, adam.row_clip, operand is not W, **row_in_registers(d_in),
    )  # fmt: skip
    return ~(bad > 0).any(1)


@triton.jit
def moved(w, g, v, lr, decay, rest, eps, correction, d_in, row_clip: tl.constexpr):
    """A row after Adam's step and its second moments, and whether the gradient is finite; w, g, v: (WIDTH,).

    The row itself where it is not.
    """
    v = decay * v + rest * g * g
    update = lr * g / (tl.sqrt(v) * correction + eps)
    square = tl.sum(update * update + v * 0, 0)
    finite = square - square == 0
    if row_clip:
        share = lr / tl.sqrt(square / d_in)
        update = update * tl.where(share < 1, share, 1.0)
    return tl.where(finite, w - update, w), v, finite


@triton.jit
def _matrix(
    W, operand, grad, moments, sums, offset, rates, corrections, bad, d_sae, beta2, rest, eps, d_in: tl.constexpr,
    decoder: tl.constexpr, row_clip: tl.constexpr, cast: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    lr = tl.load(rates + i // d_sae)
    if lr > 0:
        k = tl.arange(0, WIDTH)
        inside = k < d_in
        at = i * d_in + k
        w = tl.load(W + at, mask=inside, other=0.0)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(moments + at, mask=inside, other=0.0)
        if decoder:
            g -= tl.sum(g * w, 0) * w
        else:
            g -= tl.load(sums + i) * tl.load(offset + i // d_sae * d_in + k, mask=inside, other=0.0)
        w, v, finite = moved(w, g, v, lr, beta2, rest, eps, tl.load(corrections + i), d_in, row_clip)
        if decoder:
            w = tl.where(finite, w / tl.sqrt(tl.sum(w * w, 0)), w)
        tl.store(W + at, w, mask=inside)
        tl.store(moments + at, v, mask=inside)
        if cast:
            tl.store(operand + at, w.to(operand.dtype.element_ty), mask=inside)
        tl.store(bad + i, 1 - finite.to(tl.int32))
