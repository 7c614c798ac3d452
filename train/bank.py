"""SAEs of one architecture and width, stacked, and one exact training step for all of them.

The encoders are one matrix product. The backward pass is written out by hand: 7 products of 2 * rows * d_in * d_sae
flops for a Gated SAE where autograd takes 8 (b_dec never needs one), 5 for the baseline, into buffers kept from
step to step. With bfloat16 products the weights are cast once a step, inside Adam, and inputs are centred first, so
that rounding is relative to what varies.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import elementwise, optim
from .params import Params
from .sae import PARAMS, names

try:
    from . import kernels
except ImportError:  # without numba everything works, slower
    kernels = None  # type: ignore[assignment]


def kernel_threads(count: int) -> AbstractContextManager[None]:
    """Let the compiled functions, if there are any, use so many threads."""
    return kernels.threads(count) if kernels is not None else nullcontext()


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


@dataclass(frozen=True)
class Figures:
    """Sums over the rows of a batch, on the bank's device; float64 (saes,), save `fired` (saes, d_sae)."""

    squared_error: Tensor
    auxiliary_error: Tensor
    norm: Tensor  # ||x_hat||^2
    inner: Tensor  # x_hat . x
    l0: Tensor
    l1: Tensor  # of relu(pi_gate), or of the baseline's features
    fired: Tensor  # rows that each latent fired on

    def loss(self, l1_coefficients: Tensor) -> Tensor:
        """Eq. 8 (or 4), summed over the rows (saes,)."""
        return self.squared_error + self.auxiliary_error + l1_coefficients * self.l1


class Bank:
    """A stack of SAEs: parameters in `params` as (saes, ...), second moments of the same shapes in `moments`."""

    def __init__(
        self, arch: str, start: list[Params], centre: Tensor, operands: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        """`start` are the SAEs at step 0, `centre` (d_in) the mean of the scaled inputs.

        `operands` is the type of the matrix products' operands; weights stay in the type of `start`.
        """
        self.arch, self.saes = arch, len(start)
        stacked = {name: torch.stack([getattr(one, name) for one in start]).to(device) for name in names(arch)}
        self.params: dict[str, Tensor] = stacked
        self.moments = {name: torch.zeros_like(tensor) for name, tensor in stacked.items()}
        self.d_sae, self.d_in = stacked["W_dec"].shape[1:]
        # After which step each latent's second moments began: 0, or when `reset` last restarted it.
        self.born = torch.zeros(self.saes, self.d_sae, dtype=torch.int64, device=device)
        self.steps = 0
        self.centre = centre.to(stacked["b_dec"])
        self.copies = 2 if arch == "gated" else 1
        self.operands = operands
        self.W_enc, self.W_dec = (stacked[name].to(operands) for name in ("W_enc", "W_dec"))
        self._buffers: dict[int, SimpleNamespace] = {}
        # Either module, under one set of signatures.
        compiled = kernels is not None and kernels.usable(self.W_enc) and centre.dtype == torch.float32
        self.elementwise: Any = kernels if compiled else elementwise
        self._adam: Any = kernels if compiled else optim

    def one(self, index: int) -> Params:
        """The SAE at one place of the stack, copied to the CPU."""
        return PARAMS[self.arch](**{name: tensor[index].cpu().clone() for name, tensor in self.params.items()})

    @property
    def paths(self) -> tuple[str, ...]:
        """Which step each SAE takes next, "dense" or "sparse"."""
        return ("dense",) * self.saes

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, as it is; the tensors are the bank's own."""
        moments = {f"{name}.second_moment": tensor for name, tensor in self.moments.items()}
        return self.params | moments | {"born": self.born, "steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])
        self._cast_weights()

    def reset(self, sae: int, latents: Tensor) -> None:
        """Let latents whose rows of `params` were written anew start afresh: no moments, their own bias correction."""
        for name, moment in self.moments.items():
            if name != "b_dec":
                moment[sae, latents] = 0
        self.born[sae, latents] = self.steps
        self._cast_weights()

    def _cast_weights(self) -> None:
        self.W_enc.copy_(self.params["W_enc"])
        self.W_dec.copy_(self.params["W_dec"])

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> Figures:
        """One whole training step on x (rows, d_in), the scaled inputs less `centre`; l1_coefficients (saes,) float64.

        An SAE whose rate is 0, or whose loss on this batch is not finite, is left entirely untouched.
        """
        gradients, figures = self.gradients(x, l1_coefficients)
        finite = torch.isfinite(figures.loss(l1_coefficients))
        self.update(gradients, replace(adam, lr=torch.where(finite, adam.lr, 0)))
        self.steps = adam.step
        return figures

    def gradients(self, x: Tensor, l1_coefficients: Tensor) -> tuple[Gradients, Figures]:
        """All gradients of eq. 8 (or 4) at x (rows, d_in), the scaled inputs less `centre`; with the batch's sums.

        l1_coefficients (saes,). The gradients live in buffers that the next call overwrites.
        """
        rows, p, do = len(x), self.params, self.elementwise
        buffers = self._workspace(rows, x.device)
        pre, acts, recon = buffers.pre, buffers.acts, buffers.recon
        operand = x.to(self.operands)
        offset = p["b_dec"] - self.centre
        shift = torch.bmm(offset[:, None], p["W_enc"].transpose(1, 2))[:, 0]
        vectors = [p[name] for name in names(self.arch)[3:]]

        torch.mm(self.W_enc.view(-1, self.d_in), operand.T, out=pre.view(-1, rows))
        forward: Callable[..., tuple[Tensor, Tensor]] = getattr(do, f"{self.arch}_forward")
        fired, penalty = forward(pre, shift, *vectors, acts)
        for copy in range(self.copies):
            torch.bmm(acts[copy].transpose(1, 2), self.W_dec, out=recon[copy])
        error_sum, sums = do.errors(recon, x, offset, self.centre)
        torch.bmm(acts[0], recon[0], out=buffers.dW_dec)
        for copy in range(self.copies):
            torch.bmm(self.W_dec, recon[copy].transpose(1, 2), out=acts[copy])
        l1 = (l1_coefficients / rows).to(shift)
        if self.arch == "gated":
            da_sum, d_gate, d_mag, d_rate = do.gated_backward(pre, shift, *vectors, acts, l1)
            biases = {"b_gate": d_gate, "b_mag": d_mag, "r_mag": d_rate}
        else:
            da_sum = do.relu_backward(pre, shift, *vectors, acts, l1)
            biases = {"b_enc": da_sum}
        torch.mm(pre.view(-1, rows), operand, out=buffers.dW_enc.view(-1, self.d_in))
        biases["b_dec"] = error_sum - torch.bmm(da_sum[:, None], p["W_enc"])[:, 0]

        gradients = Gradients(buffers.dW_enc, buffers.dW_dec, biases, da_sum, offset)
        error, auxiliary, norm, inner = sums.unbind(1)
        l0, total = fired.sum(1, dtype=torch.float64), penalty.sum(1, dtype=torch.float64)
        return gradients, Figures(error, auxiliary, norm, inner, l0, total, fired)

    def update(self, g: Gradients, adam: Adam) -> None:
        """One Adam step for every SAE whose rate is not 0; decoder rows have unit norm after it."""
        p, v = self.params, self.moments
        rates = adam.lr, adam.beta2, adam.correction(self.born).to(p["W_dec"]), adam.eps
        self._adam.adam_decoder(p["W_dec"], self.W_dec, g.W_dec, v["W_dec"], *rates)
        self._adam.adam_encoder(p["W_enc"], self.W_enc, g.W_enc, g.sums, g.offset, v["W_enc"], *rates)
        for name, gradient in g.vectors.items():
            correction = adam.correction(self.born.new_zeros(1)).to(gradient) if name == "b_dec" else rates[2]
            optim.adam_vector(p[name], gradient, v[name], adam.lr, adam.beta2, correction, adam.eps)

    def _workspace(self, rows: int, device: torch.device) -> SimpleNamespace:
        if rows not in self._buffers:
            shape = (self.saes, self.d_sae, rows)

            def empty(*shape: int) -> Tensor:
                return torch.empty(shape, dtype=self.operands, device=device)

            weights = (self.saes, self.d_sae, self.d_in)
            self._buffers = {
                rows: SimpleNamespace(
                    pre=empty(*shape),
                    acts=empty(self.copies, *shape),
                    recon=empty(self.copies, self.saes, rows, self.d_in),
                    dW_enc=empty(*weights),
                    dW_dec=empty(*weights),
                )
            }
        return self._buffers[rows]
