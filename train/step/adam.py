"""What Adam needs for one step. There is no first moment, because beta1 = 0 (Rajamanoharan et al. 2024, appendix D)."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Adam:
    """lr (saes,): learning rates, 0 for an SAE that is stopped. step: number of this step, counted from 1."""

    lr: Tensor
    beta2: float
    eps: float
    step: int

    def correction(self, born: Tensor) -> Tensor:
        """Bias correction of the square root of second moments, float64, in the shape of `born`.

        born: the step after which each moment began.
        """
        return (1 - self.beta2 ** (self.step - born).double()).rsqrt()


class AdamSteps(Protocol):
    """The steps of weight matrices; `adam_plain` and `adam_numba` have them and document them."""

    def adam_decoder(
        self, W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor,
        eps: float,
    ) -> None:  # fmt: skip
        """One step for a stack of decoders."""

    def adam_encoder(
        self, W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, lr: Tensor,
        beta2: float, correction: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """One step for a stack of encoders."""
