"""What Adam needs for one step. There is no first moment, because beta1 = 0 (Rajamanoharan et al. 2024, appendix D).

Without a first moment nothing bounds a step: a latent that fires once in k steps moves up to 31 times its rate an
element. The row clip does: the update of a latent's row of W_enc or W_dec is divided by max(1, its root mean square in
units of the rate), and that of a vector's entry is at most the rate. It needs one row alone, so latents that do not
fire still do not move, and the sparse step stays exact.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .wide import wide


@dataclass(frozen=True)
class Adam:
    """lr (saes,): learning rates, 0 for an SAE that is stopped. step: number of this step, counted from 1.

    In a CUDA graph the number is a tensor () int64 on the device.
    """

    lr: Tensor
    beta2: float
    eps: float
    step: int | Tensor
    row_clip: bool

    def correction(self, born: Tensor) -> Tensor:
        """Bias correction of the square root of second moments, float64 where there is it, in the shape of `born`.

        born: the step after which each moment began.
        """
        if wide(born.device) == torch.float64:
            return (1 - self.beta2 ** (self.step - born).double()).rsqrt()
        return (-torch.expm1((self.step - born).float() * math.log(self.beta2))).rsqrt()  # keeps the digits of 1 - b^n


class AdamSteps(Protocol):
    """The steps of weight matrices; `adam_plain` and `adam_numba` have them and document them."""

    def adam_decoder(
        self, W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, adam: Adam, correction: Tensor
    ) -> Tensor:
        """One step for a stack of decoders."""

    def adam_encoder(
        self, W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, adam: Adam,
        correction: Tensor,
    ) -> Tensor:  # fmt: skip
        """One step for a stack of encoders."""
