"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014), eqs. 6 to 8, and the paper's ablations of it.

Each ablation changes one choice of the paper: the encoder that gate and magnitude share (`untied`), its rescaling by
r_mag (`no_r_mag`), or the frozen decoder of the auxiliary loss (`unfrozen`). After training, all but `untied` are
Gated SAEs and are saved as such.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Params, Terms


@dataclass(frozen=True)
class _Gated(Params):
    """What the Gated SAE and its ablations share. b_gate, b_mag (d_sae): the biases of the two paths."""

    b_gate: Tensor
    b_mag: Tensor

    GATE: ClassVar[str] = "b_gate"
    BIASES: ClassVar[tuple[str, ...]] = ("b_dec", "b_gate", "b_mag")
    PRODUCTS: ClassVar[int] = 7
    AUXILIARY_FROZEN: ClassVar[bool] = True

    @abstractmethod
    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae) of x (rows, d_in)."""

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in): 1[pi_gate > 0] * relu(pi_mag), eq. 6."""
        pi_gate, pi_mag = self.gates(x)
        return (pi_gate > 0) * torch.relu(pi_mag)

    def terms(self, x: Tensor) -> Terms:
        """Eq. 8. The penalty and the auxiliary reconstruction are made from relu(pi_gate).

        The auxiliary loss sees the decoder as a constant, unless AUXILIARY_FROZEN is False.
        """
        pi_gate, pi_mag = self.gates(x)
        f, open_gates = (pi_gate > 0) * torch.relu(pi_mag), torch.relu(pi_gate)
        W_dec, b_dec = self.W_dec, self.b_dec
        if self.AUXILIARY_FROZEN:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        auxiliary = (x - open_gates @ W_dec - b_dec).square().sum(1)
        return Terms(f, self.decode(f), open_gates.sum(1), auxiliary)


@dataclass(frozen=True)
class GatedParams(_Gated):
    """A Gated SAE: W_enc, W_dec (d_sae, d_in); b_dec (d_in); b_gate, b_mag, r_mag (d_sae)."""

    r_mag: Tensor

    SAVED_AS: ClassVar[str] = "gated"  # SAELens's name

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae) of x (rows, d_in), eqs. 6 and 7: both share one encoder product."""
        a = (x - self.b_dec) @ self.W_enc.T
        return a + self.b_gate, torch.exp(self.r_mag) * a + self.b_mag


@dataclass(frozen=True)
class UnfrozenParams(GatedParams):
    """The ablation in which the auxiliary loss trains the decoder too (section 5 of the paper finds it worse)."""

    AUXILIARY_FROZEN: ClassVar[bool] = False
    PRODUCTS: ClassVar[int] = 8

    def saved(self) -> Params:
        """A Gated SAE with the same parameters."""
        return GatedParams(**vars(self))


@dataclass(frozen=True)
class NoRMagParams(_Gated):
    """The ablation without r_mag: gate and magnitude differ in their biases only."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae): one pre-activation with two biases."""
        a = (x - self.b_dec) @ self.W_enc.T
        return a + self.b_gate, a + self.b_mag

    def saved(self) -> Params:
        """A Gated SAE with an r_mag of 0."""
        return GatedParams(**vars(self), r_mag=torch.zeros_like(self.b_mag))


@dataclass(frozen=True)
class UntiedParams(_Gated):
    """The ablation with two encoders: W_mag (d_sae, d_in) for the magnitudes, W_enc for the gates."""

    W_mag: Tensor

    PRODUCTS: ClassVar[int] = 10
    SAVED_AS: ClassVar[str] = "gsae_gated_untied"  # our name: SAELens has no such architecture and refuses it

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae), from two encoders."""
        centred = x - self.b_dec
        return centred @ self.W_enc.T + self.b_gate, centred @ self.W_mag.T + self.b_mag
