"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014), eqs. 6 to 8, and the paper's ablations of it.

An ablation changes one choice of the paper's: the encoder shared by gate and magnitude (`untied`), its rescaling by
r_mag (`no_r_mag`), or the auxiliary decoder that learns nothing (`unfrozen`). All but `untied` are Gated SAEs once
trained, and are saved as such.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Params, Terms


@dataclass(frozen=True)
class _Gated(Params):
    """b_gate, b_mag (d_sae): the biases of the two paths."""

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
        """Eq. 8: the penalty is on relu(pi_gate), from which the auxiliary reconstruction is made too.

        The auxiliary decoder is the decoder, seen as a constant.
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

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae) of x (rows, d_in), eqs. 6 and 7: both share one encoder product."""
        a = (x - self.b_dec) @ self.W_enc.T
        return a + self.b_gate, torch.exp(self.r_mag) * a + self.b_mag

    def saelens(self) -> tuple[str, dict[str, Tensor]]:
        """SAELens's `gated`."""
        return "gated", dict(vars(self))


@dataclass(frozen=True)
class UnfrozenParams(GatedParams):
    """The ablation whose auxiliary loss trains the decoder too (section 5 of the paper finds it worse)."""

    AUXILIARY_FROZEN: ClassVar[bool] = False
    PRODUCTS: ClassVar[int] = 8


@dataclass(frozen=True)
class NoRMagParams(_Gated):
    """The ablation without r_mag: gate and magnitude differ in their bias alone."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae): one pre-activation with two biases."""
        a = (x - self.b_dec) @ self.W_enc.T
        return a + self.b_gate, a + self.b_mag

    def saelens(self) -> tuple[str, dict[str, Tensor]]:
        """SAELens's `gated` with an r_mag of 0."""
        return "gated", {**vars(self), "r_mag": torch.zeros_like(self.b_mag)}


@dataclass(frozen=True)
class UntiedParams(_Gated):
    """The ablation with two encoders: W_mag (d_sae, d_in) for the magnitudes, W_enc for the gates alone."""

    W_mag: Tensor

    PRODUCTS: ClassVar[int] = 10

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae), each from an encoder of its own."""
        centred = x - self.b_dec
        return centred @ self.W_enc.T + self.b_gate, centred @ self.W_mag.T + self.b_mag

    def saelens(self) -> tuple[str, dict[str, Tensor]]:
        """A name of our own: SAELens has no such architecture, and says so."""
        return "gsae_gated_untied", dict(vars(self))
