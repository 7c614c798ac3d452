"""One exact training step of a stack of SAEs by dense products: for many open gates, and for any device.

All encoders are one matrix product. The backward pass is written by hand: 7 products of 2 * rows * d_in * d_sae flops
for a Gated SAE, of which autograd needs 8 because of b_dec, and 5 for the baseline. Buffers are kept from step to step.
With bfloat16 products the weights are cast once a step, inside Adam, and inputs are centred first, so that rounding is
relative to what varies.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .adam import Adam, AdamSteps
from .adam_plain import adam_vector
from .batch_sums import BatchSums
from .buffers import Buffers
from .latent_vectors import Vectors, largest
from .product_rounding import products_in_tf32
from .stack import Stack
from .wide import wide


class DensePasses(Protocol):
    """The passes between the products; `dense_plain` and `dense_numba` have them, the first documents them."""

    def forward(self, pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute features and open gates."""

    def errors(self, recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Turn decoded sums into derivatives by the reconstructions."""

    def backward(
        self, pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor, l1: Tensor
    ) -> tuple[Tensor, Vectors]:
        """Compute the derivatives by the gates."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss by every parameter, stacked.

    vectors: by name, those of all parameters that are not matrices. W_enc lacks its rank-one part, the outer product of
    sums (saes, d_sae) and offset (saes, d_in), which Adam subtracts as it reads; `full_W_enc` has it.
    """

    W_enc: Tensor
    W_dec: Tensor
    vectors: dict[str, Tensor]
    sums: Tensor
    offset: Tensor

    def full_W_enc(self) -> Tensor:  # noqa: N802  (the parameter's name)
        """The whole gradient of the encoders (saes, d_sae, d_in)."""
        return self.W_enc.to(self.sums.dtype) - self.sums[..., None] * self.offset[:, None]


def gradients(
    stack: Stack, x: Tensor, centre: Tensor, l1_coefficients: Tensor, passes: DensePasses, buffers: Buffers,
    *, tf32: bool = False,
) -> tuple[Gradients, BatchSums, Tensor]:  # fmt: skip
    """All gradients of eq. 8 (or 4) at x (rows, d_in), the scaled inputs less `centre`; l1_coefficients (saes,).

    Also returns the sums of the batch and the number of open gates (saes,). The gradients are in buffers that the next
    call overwrites. tf32: a GPU rounds the products of 2 * rows * d_in * d_sae flops, and no others.
    """
    p, vectors, rows = stack.params, stack.vectors(), len(x)
    W_enc, W_dec = stack.operands["W_enc"], stack.operands["W_dec"]
    saes, d_sae, d_in = W_dec.shape
    copies = vectors.RECONSTRUCTIONS
    pre = buffers("pre", (saes, d_sae, rows), W_enc.dtype)
    acts = buffers("acts", (copies, saes, d_sae, rows), W_enc.dtype)
    recon = buffers("recon", (copies, saes, rows, d_in), W_enc.dtype)
    dW_enc, dW_dec = (buffers(name, (saes, d_sae, d_in), W_enc.dtype) for name in ("dW_enc", "dW_dec"))
    operand = x.to(W_enc.dtype)
    offset = p["b_dec"] - centre
    shift = torch.bmm(offset[:, None], p["W_enc"].transpose(1, 2))[:, 0]

    with products_in_tf32(tf32):
        torch.mm(W_enc.reshape(-1, d_in), operand.T, out=pre.view(-1, rows))
        fired, opened, penalty = passes.forward(pre, shift, vectors, acts)
        for copy in range(copies):
            torch.bmm(acts[copy].transpose(1, 2), W_dec, out=recon[copy])
        error_sum, sums = passes.errors(recon, x, offset, centre)
        torch.bmm(acts[0], recon[0], out=dW_dec)
        for copy in range(copies):
            torch.bmm(W_dec, recon[copy].transpose(1, 2), out=acts[copy])
        da_sum, by_vectors = passes.backward(pre, shift, vectors, acts, (l1_coefficients / rows).to(shift))
        torch.mm(pre.view(-1, rows), operand, out=dW_enc.view(-1, d_in))
    b_dec = error_sum - torch.bmm(da_sum[:, None], p["W_enc"])[:, 0]

    error, auxiliary, norm, inner = sums.unbind(1)
    l0, total, gates = (counted.sum(1, dtype=wide(x.device)) for counted in (fired, penalty, opened))
    batch = BatchSums(error, auxiliary, norm, inner, l0, total, fired)
    return Gradients(dW_enc, dW_dec, vars(by_vectors) | {"b_dec": b_dec}, da_sum, offset), batch, gates


def update(stack: Stack, g: Gradients, adam: Adam, steps: AdamSteps) -> Tensor:
    """Take one Adam step for every SAE with a rate above 0; decoder rows have unit norm after it.

    Returns which SAEs (saes,) have finite gradients; in others the latents concerned keep their weights.
    """
    p, v, operands = stack.params, stack.moments, stack.operands
    correction = adam.correction(stack.born).to(p["W_dec"])
    finite = steps.adam_decoder(p["W_dec"], operands["W_dec"], g.W_dec, v["W_dec"], adam, correction)
    encoders = p["W_enc"], operands["W_enc"], g.W_enc, g.sums, g.offset, v["W_enc"]
    finite &= steps.adam_encoder(*encoders, adam, correction)
    for name, gradient in g.vectors.items():
        own = adam.correction(stack.born.new_zeros(1)).to(gradient) if name == "b_dec" else correction
        finite &= adam_vector(p[name], gradient, v[name], adam, own, largest(name))
    stack.stamps.copy_(torch.where(adam.lr[:, None] > 0, adam.step, stack.stamps))  # masked_fill_ would wait
    return finite
