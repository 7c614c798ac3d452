"""A trained baseline whose magnitudes alone are learned anew: does undoing shrinkage suffice? (It does not.)

The ablation of Rajamanoharan et al. 2024, section 5 and appendix: dictionary, biases and which latents fire stay as
the baseline has them; each latent learns a rescaling and a shift of its magnitude, from the reconstruction alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Params, Terms


@dataclass(frozen=True)
class RescaleShiftParams(Params):
    """A baseline (W_enc, W_dec, b_dec, b_enc), frozen; r_mag, b_shift (d_sae), which begin at 0 and change nothing."""

    b_enc: Tensor
    r_mag: Tensor
    b_shift: Tensor

    GATE: ClassVar[str] = "b_enc"
    BIASES: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc", "b_shift")
    FROZEN: ClassVar[tuple[str, ...]] = ("W_enc", "W_dec", "b_dec", "b_enc")
    PRODUCTS: ClassVar[int] = 3

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae): 1[pi > 0] * relu(exp(r_mag) pi + b_shift), with the baseline's own pi."""
        pi = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        return (pi > 0) * torch.relu(torch.exp(self.r_mag) * pi + self.b_shift)

    def terms(self, x: Tensor) -> Terms:
        """The squared error alone: which latents fire is fixed, so a penalty could only shrink them again."""
        f = self.encode(x)
        none = f.new_zeros(len(x))
        return Terms(f, self.decode(f), none, none)

    def saelens(self) -> tuple[str, dict[str, Tensor]]:
        """SAELens's `gated`, which this is: the baseline's bias opens the gates."""
        weights = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_dec": self.b_dec, "r_mag": self.r_mag}
        b_mag = torch.exp(self.r_mag) * self.b_enc + self.b_shift
        return "gated", {**weights, "b_gate": self.b_enc, "b_mag": b_mag}
