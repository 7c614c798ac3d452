"""What a dense step does between its matrix products, in plain torch: gates, errors, their derivatives, and sums.

Each function works on a whole stack in place, latent-major (saes, d_sae, rows), in any float type on any device. On
a CPU the compiled twins of the same signature in `kernels` do it in one pass, 10 to 60 times faster. Arithmetic is
float32 (float64 for float64 stacks) whatever type the products' operands have.
"""

import torch
from torch import Tensor


def gated_forward(
    pre: Tensor, shift: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, acts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Open the gates: Rajamanoharan et al. 2024, eqs. 6 and 7.

    pre (saes, d_sae, rows): W_enc x, from which `shift` (saes, d_sae) = W_enc b_dec is taken. acts (2, saes, d_sae,
    rows) receives the features f and relu(pi_gate). Returns on how many rows each latent fired and was open, and the
    sum of its relu(pi_gate), all (saes, d_sae).
    """
    a = pre.to(b_gate.dtype) - shift[..., None]
    pi_gate = a + b_gate[..., None]
    f = (pi_gate > 0) * torch.relu(torch.exp(r_mag)[..., None] * a + b_mag[..., None])
    open_gates = torch.relu(pi_gate)
    acts[0], acts[1] = f, open_gates
    fired, opened = ((t > 0).sum(2, dtype=torch.int32) for t in (f, open_gates))
    return fired, opened, open_gates.sum(2)


def relu_forward(pre: Tensor, shift: Tensor, b_enc: Tensor, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The baseline's features, eq. 2, into acts (1, saes, d_sae, rows); returns as `gated_forward` does."""
    f = torch.relu(pre.to(b_enc.dtype) + (b_enc - shift)[..., None])
    acts[0] = f
    fired = (f > 0).sum(2, dtype=torch.int32)
    return fired, fired, f.sum(2)


def errors(recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Turn decoded sums into the derivatives of the squared errors by the reconstructions.

    recon (copies, saes, rows, d_in): f W_dec, and for a Gated SAE relu(pi_gate) W_dec; becomes 2 (x_hat - x) / rows.
    x (rows, d_in) are the inputs less `centre` (d_in), offset (saes, d_in) = b_dec - centre. Returns the first
    copy's sum over the rows (saes, d_in), and (saes, 4) float64: squared error, the auxiliary's squared error,
    sum of ||x_hat||^2 and of x_hat . x, these two of uncentred vectors.
    """
    e = recon.to(x.dtype) + (offset[:, None] - x)
    square = e.square().sum((2, 3), dtype=torch.float64)
    whole = x + centre
    x_hat = e[0] + whole
    inner = (x_hat * whole).sum((1, 2), dtype=torch.float64)
    auxiliary = square[1] if len(square) == 2 else torch.zeros_like(square[0])
    sums = torch.stack([square[0], auxiliary, x_hat.square().sum((1, 2), dtype=torch.float64), inner], 1)
    e *= 2 / x.shape[0]
    recon.copy_(e)
    return e[0].sum(1), sums


def gated_backward(
    pre: Tensor,
    shift: Tensor,
    b_gate: Tensor,
    b_mag: Tensor,
    r_mag: Tensor,
    acts: Tensor,
    l1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of eq. 8 by the gates; no gradient passes the step function itself.

    acts (2, saes, d_sae, rows) are those by f and, still without the sparsity term, by relu(pi_gate);
    l1 (saes,) = l1_coefficient / rows. pre becomes the derivative by the shared encoder product. Returns its sums
    over the rows, then the gradients of b_gate, b_mag and r_mag, all (saes, d_sae).
    """
    a = pre.to(b_gate.dtype) - shift[..., None]
    rate = torch.exp(r_mag)[..., None]
    opened = a + b_gate[..., None] > 0
    d_mag = torch.where(opened & (rate * a + b_mag[..., None] > 0), acts[0].to(a.dtype), 0)
    d_gate = torch.where(opened, acts[1].to(a.dtype) + l1[:, None, None], 0)
    da = rate * d_mag + d_gate
    pre.copy_(da)
    return da.sum(2), d_gate.sum(2), d_mag.sum(2), (d_mag * rate * a).sum(2)


def relu_backward(pre: Tensor, shift: Tensor, b_enc: Tensor, acts: Tensor, l1: Tensor) -> Tensor:
    """As `gated_backward` for the baseline, eq. 4; returns the gradient of b_enc (saes, d_sae)."""
    fired = pre.to(b_enc.dtype) + (b_enc - shift)[..., None] > 0
    da = torch.where(fired, acts[0].to(b_enc.dtype) + l1[:, None, None], 0)
    pre.copy_(da)
    return da.sum(2)
