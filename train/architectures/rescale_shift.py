"""A trained baseline of which only the magnitudes are trained again. It shows whether undoing shrinkage is enough.

The ablation of Rajamanoharan et al. 2024, section 5 and appendix, where it is not enough. Dictionary, biases and which
latents fire stay those of the baseline; each latent learns a rescaling and a shift of its magnitude.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Params, Terms
from .gated import GatedParams
from .relu import ReluParams


@dataclass(frozen=True)
class RescaleShiftParams(Params):
    """A frozen baseline (W_enc, W_dec, b_dec, b_enc) with r_mag, b_shift (d_sae), which start at 0."""

    b_enc: Tensor
    r_mag: Tensor
    b_shift: Tensor

    GATE: ClassVar[str] = "b_enc"
    BIASES: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc", "b_shift")
    PRODUCTS: ClassVar[int] = 3
    FROZEN: ClassVar[tuple[str, ...]] = ("W_enc", "W_dec", "b_dec", "b_enc")
    PENALISED: ClassVar[bool] = False
    STARTS_FROM_SAVED: ClassVar[bool] = True

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae): 1[pi > 0] * relu(exp(r_mag) pi + b_shift), where pi is that of the baseline."""
        pi = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        return (pi > 0) * torch.relu(torch.exp(self.r_mag) * pi + self.b_shift)

    def terms(self, x: Tensor) -> Terms:
        """The squared error without a penalty: which latents fire is fixed, so a penalty could only shrink them."""
        f = self.encode(x)
        zeros = f.new_zeros(len(x))
        return Terms(f, self.decode(f), zeros, zeros)

    @classmethod
    def from_saved(cls, saved: Params) -> "RescaleShiftParams | None":
        """A saved baseline with r_mag and b_shift of 0; None for another architecture."""
        if not isinstance(saved, ReluParams):
            return None
        tensors = {name: tensor.clone() for name, tensor in vars(saved).items()}
        zeros = {name: torch.zeros_like(saved.b_enc) for name in ("r_mag", "b_shift")}
        return cls(**tensors, **zeros)

    def saved(self) -> Params:
        """An equal Gated SAE, with the baseline's bias as the gates' bias."""
        b_mag = torch.exp(self.r_mag) * self.b_enc + self.b_shift
        return GatedParams(self.W_enc, self.W_dec, self.b_dec, self.b_enc, b_mag, self.r_mag)
