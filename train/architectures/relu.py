"""The baseline SAE of Rajamanoharan et al. 2024, section 2 (eqs. 2 to 4), which is that of Bricken et al. 2023."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Params, Terms


@dataclass(frozen=True)
class ReluParams(Params):
    """The baseline: W_enc, W_dec (d_sae, d_in); b_dec (d_in); b_enc (d_sae)."""

    b_enc: Tensor

    GATE: ClassVar[str] = "b_enc"
    BIASES: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")
    PRODUCTS: ClassVar[int] = 5
    BUFFERS: ClassVar[int] = 2
    SAVED_AS: ClassVar[str] = "standard"  # SAELens's name

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in): relu(W_enc (x - b_dec) + b_enc), eq. 2."""
        return torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def terms(self, x: Tensor) -> Terms:
        """Eq. 4. The penalty is on the features, which shrinks them."""
        f = self.encode(x)
        return Terms(f, self.decode(f), f.sum(1), f.new_zeros(len(x)))
