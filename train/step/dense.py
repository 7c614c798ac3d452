"""One exact training step of a stack of SAEs by dense products: where many gates are open, and on any device.

The encoders are one matrix product. The backward pass is written out by hand: 7 products of 2 * rows * d_in * d_sae
flops for a Gated SAE where autograd takes 8 (b_dec never needs one), 5 for the baseline, into buffers kept from
step to step. With bfloat16 products the weights are cast once a step, inside Adam, and inputs are centred first, so
that rounding is relative to what varies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import adam as optim
from .adam import Adam
from .stack import Figures, Scratch, Stack


@dataclass(frozen=True)
class Gradients:
    """Of the loss by every parameter, stacked.

    W_enc lacks its rank-one part, the outer product of `sums` (saes, d_sae) and `offset` (saes, d_in), which Adam
    takes off in passing; `full_W_enc` has it.
    """

    W_enc: Tensor
    W_dec: Tensor
    vectors: dict[str, Tensor]
    sums: Tensor
    offset: Tensor

    def full_W_enc(self) -> Tensor:  # noqa: N802  (the parameter's name)
        """The encoder's whole gradient (saes, d_sae, d_in)."""
        return self.W_enc.to(self.sums.dtype) - self.sums[..., None] * self.offset[:, None]


def gradients(
    stack: Stack, x: Tensor, centre: Tensor, l1_coefficients: Tensor, elementwise: ModuleType, scratch: Scratch
) -> tuple[Gradients, Figures, Tensor]:
    """All gradients of eq. 8 (or 4) at x (rows, d_in), the scaled inputs less `centre`; with the batch's sums
    and how many gates were open (saes,).

    l1_coefficients (saes,). The gradients live in buffers that the next call overwrites.
    """
    p, do, rows = stack.params, elementwise, len(x)
    W_enc, W_dec = stack.operands["W_enc"], stack.operands["W_dec"]
    saes, d_sae, d_in = W_dec.shape
    arch, copies = ("gated", 2) if "b_gate" in p else ("relu", 1)
    pre = scratch("pre", (saes, d_sae, rows), W_enc.dtype)
    acts = scratch("acts", (copies, saes, d_sae, rows), W_enc.dtype)
    recon = scratch("recon", (copies, saes, rows, d_in), W_enc.dtype)
    dW_enc, dW_dec = (scratch(name, (saes, d_sae, d_in), W_enc.dtype) for name in ("dW_enc", "dW_dec"))
    operand = x.to(W_enc.dtype)
    offset = p["b_dec"] - centre
    shift = torch.bmm(offset[:, None], p["W_enc"].transpose(1, 2))[:, 0]
    vectors = list(stack.vectors().values())

    torch.mm(W_enc.reshape(-1, d_in), operand.T, out=pre.view(-1, rows))
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = getattr(do, f"{arch}_forward")
    fired, opened, penalty = forward(pre, shift, *vectors, acts)
    for copy in range(copies):
        torch.bmm(acts[copy].transpose(1, 2), W_dec, out=recon[copy])
    error_sum, sums = do.errors(recon, x, offset, centre)
    torch.bmm(acts[0], recon[0], out=dW_dec)
    for copy in range(copies):
        torch.bmm(W_dec, recon[copy].transpose(1, 2), out=acts[copy])
    l1 = (l1_coefficients / rows).to(shift)
    if arch == "gated":
        da_sum, d_gate, d_mag, d_rate = do.gated_backward(pre, shift, *vectors, acts, l1)
        biases = {"b_gate": d_gate, "b_mag": d_mag, "r_mag": d_rate}
    else:
        da_sum = do.relu_backward(pre, shift, *vectors, acts, l1)
        biases = {"b_enc": da_sum}
    torch.mm(pre.view(-1, rows), operand, out=dW_enc.view(-1, d_in))
    biases["b_dec"] = error_sum - torch.bmm(da_sum[:, None], p["W_enc"])[:, 0]

    error, auxiliary, norm, inner = sums.unbind(1)
    l0, total, gates = (counted.sum(1, dtype=torch.float64) for counted in (fired, penalty, opened))
    figures = Figures(error, auxiliary, norm, inner, l0, total, fired)
    return Gradients(dW_enc, dW_dec, biases, da_sum, offset), figures, gates


def update(stack: Stack, g: Gradients, adam: Adam, module: ModuleType) -> None:
    """One Adam step for every SAE whose rate is not 0; decoder rows have unit norm after it.

    `module` is `optim` or its compiled twin, `kernels`.
    """
    p, v, operands = stack.params, stack.moments, stack.operands
    correction = adam.correction(stack.born).to(p["W_dec"])
    rates = adam.lr, adam.beta2, correction, adam.eps
    module.adam_decoder(p["W_dec"], operands["W_dec"], g.W_dec, v["W_dec"], *rates)
    module.adam_encoder(p["W_enc"], operands["W_enc"], g.W_enc, g.sums, g.offset, v["W_enc"], *rates)
    for name, gradient in g.vectors.items():
        own = adam.correction(stack.born.new_zeros(1)).to(gradient) if name == "b_dec" else correction
        optim.adam_vector(p[name], gradient, v[name], adam.lr, adam.beta2, own, adam.eps)
    stack.stamps.masked_fill_(adam.lr[:, None] > 0, adam.step)
