"""The passes between the matrix products of a dense step, in plain torch: gates, errors, derivatives and sums.

Each function works on a whole stack, latent-major (saes, d_sae, rows), in any float type on any device. The compiled
twins in `dense_numba` do it in one pass over memory, 10 to 60 times faster on a CPU. Arithmetic is float32 (float64 for
float64 stacks), whatever the type of the products' operands.
"""

import torch
from torch import Tensor

from .latent_vectors import GatedVectors, ReluVectors, Vectors
from .wide import wide


def forward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute features and open gates: Rajamanoharan et al. 2024, eqs. 6 and 7, of the baseline eq. 2.

    pre (saes, d_sae, rows): W_enc x, from which shift (saes, d_sae) = W_enc b_dec is subtracted.
    acts (reconstructions, saes, d_sae, rows): receives the features, and of a Gated SAE relu(pi_gate).
    Returns, all (saes, d_sae): the rows on which each latent fired, those on which its gate was open, and the sum of
    what is penalised.
    """
    match vectors:
        case GatedVectors(b_gate, b_mag, r_mag):
            a = pre.to(b_gate.dtype) - shift[..., None]
            pi_gate = a + b_gate[..., None]
            f = (pi_gate > 0) * torch.relu(torch.exp(r_mag)[..., None] * a + b_mag[..., None])
            open_gates = torch.relu(pi_gate)
            acts[0], acts[1] = f, open_gates
            fired, opened = ((t > 0).sum(2, dtype=torch.int32) for t in (f, open_gates))
            return fired, opened, open_gates.sum(2)
        case ReluVectors(b_enc):
            f = torch.relu(pre.to(b_enc.dtype) + (b_enc - shift)[..., None])
            acts[0] = f
            fired = (f > 0).sum(2, dtype=torch.int32)
            return fired, fired, f.sum(2)


def errors(recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Turn decoded sums into the derivatives of the squared errors by the reconstructions.

    recon (reconstructions, saes, rows, d_in): f W_dec, and of a Gated SAE relu(pi_gate) W_dec; becomes
    2 (x_hat - x) / rows. x (rows, d_in): the inputs less centre (d_in). offset (saes, d_in) = b_dec - centre.
    Returns the sum over the rows of the first (saes, d_in), and (saes, 4) float64: the squared error, that of the
    auxiliary reconstruction, and the sums of ||x_hat||^2 and of x_hat . x, the last two of uncentred vectors.
    """
    e = recon.to(x.dtype) + (offset[:, None] - x)
    kind = wide(x.device)
    square = e.square().sum((2, 3), dtype=kind)
    whole = x + centre
    x_hat = e[0] + whole
    inner = (x_hat * whole).sum((1, 2), dtype=kind)
    auxiliary = square[1] if len(square) == 2 else torch.zeros_like(square[0])
    sums = torch.stack([square[0], auxiliary, x_hat.square().sum((1, 2), dtype=kind), inner], 1)
    e *= 2 / x.shape[0]
    recon.copy_(e)
    return e[0].sum(1), sums


def backward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor, l1: Tensor) -> tuple[Tensor, Vectors]:
    """Compute the derivatives of eq. 8, of the baseline eq. 4, by the gates. The step function has no gradient.

    acts: the derivatives by the features and, still without the sparsity term, by relu(pi_gate).
    l1 (saes,) = l1_coefficient / rows. pre becomes the derivative by the encoder product. Returns its sums over the
    rows (saes, d_sae), and the gradients of `vectors`.
    """
    match vectors:
        case GatedVectors(b_gate, b_mag, r_mag):
            a = pre.to(b_gate.dtype) - shift[..., None]
            rate = torch.exp(r_mag)[..., None]
            opened = a + b_gate[..., None] > 0
            d_mag = torch.where(opened & (rate * a + b_mag[..., None] > 0), acts[0].to(a.dtype), 0)
            d_gate = torch.where(opened, acts[1].to(a.dtype) + l1[:, None, None], 0)
            da = rate * d_mag + d_gate
            pre.copy_(da)
            return da.sum(2), GatedVectors(d_gate.sum(2), d_mag.sum(2), (d_mag * rate * a).sum(2))
        case ReluVectors(b_enc):
            fired = pre.to(b_enc.dtype) + (b_enc - shift)[..., None] > 0
            da = torch.where(fired, acts[0].to(b_enc.dtype) + l1[:, None, None], 0)
            pre.copy_(da)
            da_sum = da.sum(2)
            return da_sum, ReluVectors(da_sum)
