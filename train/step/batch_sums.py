"""What a training step reports of its batch: sums over the rows, from which metrics are made."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class BatchSums:
    """Sums over the rows of a batch, float64 (saes,); `fired` is (saes, d_sae) int32. On the device of the bank."""

    squared_error: Tensor
    auxiliary_error: Tensor
    norm: Tensor  # ||x_hat||^2
    inner: Tensor  # x_hat . x
    l0: Tensor
    l1: Tensor  # relu(pi_gate) of a Gated SAE, features of the baseline
    fired: Tensor  # rows that each latent fired on

    def loss(self, l1_coefficients: Tensor) -> Tensor:
        """The loss (Rajamanoharan et al. 2024, eq. 8 or 4), summed over the rows (saes,)."""
        return self.squared_error + self.auxiliary_error + l1_coefficients * self.l1

    @classmethod
    def of(cls, sums: Tensor, fired: Tensor) -> "BatchSums":
        """Make it from the sums (6, saes), in the order of the fields, and `fired`."""
        error, auxiliary, norm, inner, l0, l1 = sums
        return cls(error, auxiliary, norm, inner, l0, l1, fired)

    @classmethod
    def unknown(cls, saes: int, d_sae: int, device: torch.device) -> "BatchSums":
        """NaN everywhere: those of SAEs that took no step."""
        numbers = torch.full((len(fields(cls)) - 1, saes), float("nan"), dtype=torch.float64, device=device)
        return cls.of(numbers, torch.zeros(saes, d_sae, dtype=torch.int32, device=device))

    def spoil(self, which: Tensor) -> None:
        """Make the sums of some SAEs NaN; which (saes,) bool."""
        for each in fields(self):
            if each.name != "fired":
                getattr(self, each.name).masked_fill_(which, float("nan"))

    def put(self, which: slice | int, others: "BatchSums") -> None:
        """Replace the sums of some SAEs, or of one."""
        for each in fields(self):
            getattr(self, each.name)[which] = getattr(others, each.name)
