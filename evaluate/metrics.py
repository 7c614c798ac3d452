"""How well an SAE describes rows: totals of sums, so that no figure is a mean of per-batch ratios.

The SAE runs in float32, every sum over rows and dimensions is float64, and moments are taken about a shift
near the mean, so that figures about the mean need one pass and lose no digits. All of it happens where the SAE is;
costs a few float64 passes over (rows, d_in) beside the SAE's products.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ratio_errors import ratio


class Sae(Protocol):
    """What evaluation needs of an SAE that takes raw activations."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Latents (rows, d_sae) of float32 rows (rows, d_in)."""

    def decode(self, f: Tensor, /) -> Tensor:
        """Reconstruction (rows, d_in) of latents (rows, d_sae)."""


@dataclass(frozen=True)
class Rows:
    """Rows as an evaluation needs them, made once a batch for every SAE.

    x: (rows, d_in) float32. wide: the same in float64. shifted: wide - shift. norm: (rows,) float64.
    """

    x: Tensor
    wide: Tensor
    shifted: Tensor
    norm: Tensor

    @classmethod
    def of(cls, x: Tensor, shift: Tensor) -> "Rows":
        """Prepare `x` (rows, d_in) of any float type; shift: (d_in,) float64 on the same device, near the mean row."""
        wide = x.double()
        return cls(x.float(), wide, wide - shift, row_norms(x))

    def pick(self, index: Tensor) -> "Rows":
        """Return the rows that `index` (a mask or positions) picks."""
        return Rows(self.x[index], self.wide[index], self.shifted[index], self.norm[index])


def row_norms(x: Tensor) -> Tensor:
    """Return ||x|| of each row in float64: (..., d_in) -> (...). What a norm limit is compared with."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norms


@dataclass(frozen=True)
class Reconstruction:
    """What an SAE made of rows: fires (d_sae,), x_hat (rows, d_in) float64, the others (rows,).

    sse: ||x - x_hat||^2. square: ||x_hat||^2. cross: x_hat . x. cosine: between x and x_hat, 0 where either is 0.
    l2_ratio: ||x_hat|| / ||x||, 0 where x is 0.
    """

    l0: Tensor
    fires: Tensor
    x_hat: Tensor
    sse: Tensor
    square: Tensor
    cross: Tensor
    cosine: Tensor
    l2_ratio: Tensor

    @classmethod
    def of(cls, rows: Rows, sae: Sae) -> "Reconstruction":
        """Encode and decode rows."""
        f = sae.encode(rows.x)
        wide = sae.decode(f).double()
        # Sums of ones are exact in float32 up to 2^24, and many times as fast as integer counts.
        fired = torch.ne(f, 0, out=torch.empty_like(f))
        cross, norm = dot(wide, rows.wide), row_norms(wide)
        product = rows.norm * norm
        return cls(
            l0=fired.sum(1).long(),
            fires=fired.sum(0).long(),
            x_hat=wide,
            sse=(rows.wide - wide).square().sum(1),
            square=norm.square(),
            cross=cross,
            cosine=torch.where(product > 0, cross / product, 0.0),
            l2_ratio=torch.where(rows.norm > 0, norm / rows.norm, 0.0),
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each pair of rows, (rows,)."""
    return (a * b).sum(-1)


@dataclass
class Totals:
    """Sums over rows x (rows, d_in) and reconstructions x_hat; primes are values less the shift.

    Two parts of a set add up to the totals of the whole: `a + b`.
    """

    rows: int
    fired: int  # sum of ||f||_0
    sse: float  # sum ||x - x_hat||^2
    cosine: float
    l2_ratio: float
    x_hat_square: float  # sum ||x_hat||^2
    cross: float  # sum x_hat . x
    square_shifted: float  # sum ||x'||^2
    x_hat_square_shifted: float
    cross_shifted: float
    x_shifted: Tensor  # sum x', (d_in,) float64
    x_hat_shifted: Tensor

    @classmethod
    def zero(cls, d_in: int, device: str = "cpu") -> "Totals":
        """Return the totals of no rows."""
        none = torch.zeros(d_in, dtype=torch.float64, device=device)
        return cls(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, none.clone(), none)

    def add(self, rows: Rows, made: Reconstruction, shift: Tensor) -> None:
        """Count rows and what an SAE made of them."""
        x_hat_shifted = made.x_hat - shift
        self.rows += len(rows.norm)
        self.fired += int(made.l0.sum())
        self.sse += float(made.sse.sum())
        self.cosine += float(made.cosine.sum())
        self.l2_ratio += float(made.l2_ratio.sum())
        self.x_hat_square += float(made.square.sum())
        self.cross += float(made.cross.sum())
        self.square_shifted += float(rows.shifted.square().sum())
        self.x_hat_square_shifted += float(x_hat_shifted.square().sum())
        self.cross_shifted += float((x_hat_shifted * rows.shifted).sum())
        self.x_shifted += rows.shifted.sum(0)
        self.x_hat_shifted += x_hat_shifted.sum(0)

    def __add__(self, other: "Totals") -> "Totals":
        """Return the totals of both sets of rows."""
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @property
    def sst(self) -> float:
        """Sum of ||x - mu||^2 over the rows, mu their own mean."""
        if self.rows == 0:
            return 0.0
        return self.square_shifted - float(self.x_shifted.square().sum()) / self.rows

    def figures(self) -> dict[str, float | None]:
        """Return the named metrics; None where one is not defined (no rows, or a denominator of 0).

        l0: mean number of latents that fire. mse: mean of ||x - x_hat||^2, as SAELens has it.
        explained_variance: 1 - SSE / SST with SST about the mean of these rows.
        gamma: E||x_hat||^2 / E[x_hat . x], below 1 for shrinkage (Rajamanoharan et al. 2024, eqs. 9-10);
        gamma_centred the same for x - mu and x_hat - mu, since a large mean mu hides shrinkage.
        cossim: mean of the cosine between x and x_hat. l2_ratio: mean of ||x_hat|| / ||x||.
        """
        n, sst = self.rows, self.sst
        error = ratio(self.sse, sst)
        offset = self.x_shifted / max(n, 1)  # mu - shift
        along = float(offset @ self.x_hat_shifted)
        square = self.x_hat_square_shifted - 2 * along + n * float(offset @ offset)
        return {
            "l0": ratio(self.fired, n),
            "explained_variance": None if error is None else 1.0 - error,
            "mse": ratio(self.sse, n),
            "gamma": ratio(self.x_hat_square, self.cross),
            "gamma_centred": ratio(square, self.cross_shifted - along),
            "cossim": ratio(self.cosine, n),
            "l2_ratio": ratio(self.l2_ratio, n),
        }
