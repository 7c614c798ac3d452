"""The training step of any architecture, as its file defines the loss: autograd for the gradients, one SAE at a time.

It is slower than `fast_bank`, which has written-out gradients for two architectures, and has the same interface. It
trains the ablations, new architectures, and SAEs with clipped gradients, for which all gradients must be known first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gsae.train.architectures.base import Params

from .adam import Adam
from .adam_plain import adam_decoder, adam_rows, adam_vector
from .batch_sums import BatchSums
from .latent_vectors import largest
from .product_rounding import products_in_tf32
from .wide import wide


class AutogradBank:
    """SAEs of one architecture and width: parameters in `params` as (saes, ...), second moments in `moments`."""

    def __init__(
        self,
        start: Sequence[Params],
        centre: Tensor,
        operands: torch.dtype,
        device: str | torch.device = "cpu",
        clip: float | None = None,
        *,
        tf32: bool = False,
    ) -> None:
        """As `FastBank`; clip: the largest norm of all gradients of an SAE together."""
        self._tf32 = tf32
        self._params_type, self.saes, self._clip = type(start[0]), len(start), clip
        names = self._params_type.names()
        self.params = {name: torch.stack([getattr(one, name) for one in start]).to(device) for name in names}
        self.trained = tuple(name for name in names if name not in self._params_type.FROZEN)
        self.moments = {name: torch.zeros_like(self.params[name]) for name in self.trained}
        self.d_sae, self.d_in = self.params["W_dec"].shape[1:]
        self.centre = centre.to(self.params["b_dec"])
        # The step after which the second moments of each latent began: 0, or that of the last `reset`.
        self.born = torch.zeros(self.saes, self.d_sae, dtype=torch.int64, device=device)
        self.steps = 0
        self._cast = operands if operands != self.params["b_dec"].dtype else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The step that each SAE takes next: always "dense"."""
        return ("dense",) * self.saes

    @property
    def went(self) -> Tensor | None:
        """As `Bank.went`: every step takes place."""
        return None

    def give_up(self, step: int, beta2: float) -> None:
        """As `Bank.give_up`, which is never called."""

    def look(self, step: int, rows: int) -> None:
        """As `Bank.look`, which is never called."""

    def one(self, index: int) -> Params:
        """One SAE, copied to the CPU."""
        return self._params_type(**{name: tensor[index].cpu().clone() for name, tensor in self.params.items()})

    def step(self, x: Tensor, l1_coefficients: Tensor, adam: Adam) -> BatchSums:
        """Take one training step on x (rows, d_in), the scaled inputs less `centre`; l1_coefficients (saes,) float64.

        An SAE with a rate of 0, or with a loss that is not finite on this batch, is left unchanged; with a gradient
        that is not finite, the latents concerned are, and its sums are NaN.
        """
        self.steps = int(adam.step)
        z = x + self.centre
        with products_in_tf32(self._tf32):
            found = [self._one_step(index, z, l1_coefficients[index], adam) for index in range(self.saes)]
        return BatchSums(*(torch.stack(column) for column in zip(*found, strict=True)))

    def _one_step(self, index: int, z: Tensor, l1: Tensor, adam: Adam) -> tuple[Tensor, ...]:
        leaves = {n: t[index].detach().requires_grad_(n in self.trained) for n, t in self.params.items()}
        with torch.autocast(z.device.type, self._cast, enabled=self._cast is not None):
            terms = self._params_type(**leaves).terms(z)
        error = (z - terms.x_hat).square().sum()
        auxiliary, penalty = terms.auxiliary.sum(), terms.penalty.sum()
        loss = (error + auxiliary + l1.to(error) * penalty) / len(z)
        trained = [leaves[name] for name in self.trained]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        own = replace(adam, lr=adam.lr[index : index + 1] * torch.isfinite(loss.detach()))
        finite = self._update(index, dict(zip(self.trained, self._clipped(gradients), strict=True)), own)
        x_hat, fired = terms.x_hat.detach().to(z.dtype), (terms.f.detach() > 0).sum(0, dtype=torch.int32)
        sums = (error, auxiliary, x_hat.square().sum(), (x_hat * z).sum(), fired.sum(), penalty)
        return (*(torch.where(finite, total.detach().to(wide(z.device)), torch.nan) for total in sums), fired)

    def _clipped(self, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        if self._clip is None:
            return list(gradients)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        share = (self._clip / (norm + 1e-6)).clamp(max=1.0)
        return [g * share for g in gradients]

    def _update(self, index: int, gradients: dict[str, Tensor], adam: Adam) -> Tensor:
        """Take one Adam step of one SAE, with a bias correction for each latent; returns whether gradients are finite.

        As stacks of one: adam.lr is (1,).
        """
        finite = torch.ones(1, dtype=torch.bool, device=self.born.device)
        for name, g in gradients.items():
            p, v = self.params[name][index : index + 1], self.moments[name][index : index + 1]
            born = self.born.new_zeros(1, 1) if name == "b_dec" else self.born[index : index + 1]
            correction = adam.correction(born).to(p)
            if name == "W_dec":
                finite &= adam_decoder(p, p, g[None], v, adam, correction)
            elif p.dim() == 3:
                finite &= adam_rows(p, p, g[None], v, adam, correction)
            else:
                finite &= adam_vector(p, g[None], v, adam, correction, largest(name))
        return finite[0]

    def reset(self, sae: int, latents: Tensor) -> None:
        """Forget the moments of latents (n,) with new parameters; their bias correction starts again."""
        for name, moment in self.moments.items():
            if name != "b_dec":
                moment[sae, latents] = 0
        self.born[sae, latents] = self.steps

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold; the tensors are those of the bank, not copies."""
        moments = {f"{name}.second_moment": moment for name, moment in self.moments.items()}
        return {**self.params, **moments, "born": self.born, "steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])
