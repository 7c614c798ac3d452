"""What every architecture has: a dictionary, a forward pass, and eq. 8's loss over that pass.

An architecture is one subclass in one file: its parameters, `terms`, and a few facts that training, saving and
resampling ask for. `bank` computes the same for `gated` and `relu`, faster; `autograd` trains any of them as it stands.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """One forward pass over (rows, d_in) inputs.

    f (rows, d_sae) are the features, x_hat (rows, d_in) the reconstructions; penalty (rows,) is what the
    l1_coefficient multiplies, auxiliary (rows,) a squared error that is added to the loss.
    """

    f: Tensor
    x_hat: Tensor
    penalty: Tensor
    auxiliary: Tensor

    def losses(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """Each row's loss (rows,) at x (rows, d_in), which the pass was over: sums over features and dimensions."""
        return (x - self.x_hat).square().sum(1) + self.auxiliary + l1_coefficient * self.penalty


@dataclass(frozen=True)
class Params(ABC):
    """W_enc, W_dec (d_sae, d_in), rows of W_dec being dictionary directions of unit norm; b_dec (d_in); and more."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    GATE: ClassVar[str]  # the bias that decides whether a latent fires
    BIASES: ClassVar[tuple[str, ...]]  # in the units of the inputs, b_dec among them
    FROZEN: ClassVar[tuple[str, ...]] = ()  # not trained
    PRODUCTS: ClassVar[int]  # of a dense training step, with W_enc or W_dec

    @abstractmethod
    def terms(self, x: Tensor) -> Terms:
        """The forward pass for x (rows, d_in)."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in)."""

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructions (rows, d_in) of features f (rows, d_sae); eq. 3."""
        return f @ self.W_dec + self.b_dec

    def losses(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """Each row's loss (rows,) at x (rows, d_in)."""
        return self.terms(x).losses(x, l1_coefficient)

    def loss(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """Eq. 8 (eq. 4 for the baseline) for x (rows, d_in): the mean of the rows' losses; a scalar."""
        return self.losses(x, l1_coefficient).mean()

    def saelens(self) -> tuple[str, dict[str, Tensor]]:
        """The name under which SAELens knows the architecture, and its tensors, matrices still as (d_sae, d_in)."""
        raise NotImplementedError
