"""What every architecture has: a dictionary, a forward pass, a loss over that pass, a start and a form to be saved in.

An architecture is a subclass of `Params` in one file, and a line in `registry`. Training computes the same as `terms`,
faster, for architectures with a fast step (`step/fast_bank`), and by autograd for all others.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

ROUNDING = 1e-6  # of the norm of a row that was normalised in float32


@dataclass(frozen=True)
class Terms:
    """One forward pass over inputs (rows, d_in).

    f (rows, d_sae): features. x_hat (rows, d_in): reconstructions. penalty (rows,): what the sparsity coefficient
    multiplies. auxiliary (rows,): a squared error that is added to the loss.
    """

    f: Tensor
    x_hat: Tensor
    penalty: Tensor
    auxiliary: Tensor

    def losses(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """The loss of each row (rows,) of the inputs x (rows, d_in): sums over features and dimensions."""
        return (x - self.x_hat).square().sum(1) + self.auxiliary + l1_coefficient * self.penalty


@dataclass(frozen=True)
class Params(ABC):
    """The parameters of an SAE: W_enc, W_dec (d_sae, d_in), b_dec (d_in) and those that a subclass adds.

    Rows of W_dec are dictionary directions of unit norm. Names of matrices begin with "W_" and their shape is
    (d_sae, d_in); other added parameters have the shape (d_sae,).
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    GATE: ClassVar[str]  # the bias that decides whether a latent fires
    BIASES: ClassVar[tuple[str, ...]]  # parameters in the units of the inputs, b_dec among them
    PRODUCTS: ClassVar[int]  # matrix products of a dense training step; for the estimate of flops
    BUFFERS: ClassVar[int] = 3  # (rows, d_sae) arrays that a dense training step holds; for the estimate of memory
    FROZEN: ClassVar[tuple[str, ...]] = ()  # parameters that are not trained
    PENALISED: ClassVar[bool] = True  # False: no sparsity penalty, so that l1 need not be given
    STARTS_FROM_SAVED: ClassVar[bool] = False  # True: there is no random start, `init` must be given
    SAVED_AS: ClassVar[str]  # `architecture` in cfg.json; set by classes that `saved` returns

    @abstractmethod
    def terms(self, x: Tensor) -> Terms:
        """The forward pass for inputs x (rows, d_in)."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in)."""

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructions (rows, d_in) of features f (rows, d_sae); Rajamanoharan et al. 2024, eq. 3."""
        return f @ self.W_dec + self.b_dec

    def losses(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """The loss of each row (rows,) of x (rows, d_in)."""
        return self.terms(x).losses(x, l1_coefficient)

    def loss(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """The mean loss over the rows of x (rows, d_in), a scalar; for a Gated SAE eq. 8."""
        return self.losses(x, l1_coefficient).mean()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the parameters, in the order of the fields."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def initial(cls, d_in: int, d_sae: int, seed: int, scaled_mean: Tensor, encoder_norm: float = 1.0) -> Self:
        """The SAE that training starts from, float32 on the CPU; a function of its arguments alone.

        Rows of W_dec are random directions of unit norm, encoders are W_dec times `encoder_norm`, b_dec is
        `scaled_mean` (d_in), the mean of the scaled inputs, and all else is 0. Half of all latents are open then, so
        the reconstruction of z - mean is d_sae / (2 d_in) times the norm of the encoder's rows too large.
        """
        directions = torch.randn(d_sae, d_in, generator=torch.Generator("cpu").manual_seed(seed))
        W_dec = directions / directions.norm(dim=1, keepdim=True)
        b_dec = scaled_mean.to("cpu", torch.float32, copy=True)
        others = {name: W_dec * encoder_norm if name.startswith("W_") else torch.zeros(d_sae) for name in cls.names()}
        return cls(**(others | {"W_dec": W_dec, "b_dec": b_dec}))

    @classmethod
    def from_saved(cls, saved: "Params") -> Self | None:
        """An SAE of this architecture that continues from a saved one, in the saved units; None if it cannot."""
        if sorted(saved.names()) != sorted(cls.names()):
            return None
        return cls(**{name: tensor.clone() for name, tensor in vars(saved).items()})

    def with_unit_rows(self) -> Self:
        """The SAE with the same reconstructions whose decoder rows have unit norm, as training keeps them.

        Features are multiplied by the norms that the rows had. Rows within rounding of unit norm stay as they are; a
        row of zeros has no direction and becomes NaN.
        """
        norms = self.W_dec.double().norm(dim=1)
        norms = torch.where((norms - 1).abs() <= ROUNDING, torch.ones_like(norms), norms)
        features = [name for name in self.names() if name.startswith("W_") or name in self.BIASES]
        changed = {"W_dec": self.W_dec.double() / norms[:, None]}
        for name in features:
            tensor = getattr(self, name)
            if name not in ("W_dec", "b_dec"):
                changed[name] = tensor.double() * norms.view(-1, *[1] * (tensor.dim() - 1))
        return replace(self, **{name: tensor.to(self.b_dec) for name, tensor in changed.items()})

    def saved(self) -> "Params":
        """This SAE as it is saved: itself, or an equal SAE of an architecture that other tools read."""
        return self

    def folded(self, scale: float) -> Self:
        """The SAE for raw x that corresponds to this one for scale * x: features times 1/scale, the same gates.

        Only biases change. Weights stay, so that rows of W_dec keep unit norm.
        """
        return replace(self, **{name: getattr(self, name) / scale for name in self.BIASES})

    def unfolded(self, scale: float) -> Self:
        """The SAE for scale * x that corresponds to this one for raw x; the inverse of `folded`."""
        return replace(self, **{name: (getattr(self, name).double() * scale).float() for name in self.BIASES})
