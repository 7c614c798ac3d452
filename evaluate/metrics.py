"""How well an SAE reconstructs rows: totals of sums, so that no metric is a mean of ratios of batches.

The SAE runs in float32 and every sum over rows and dimensions is float64. Moments are taken about a shift near the mean
row, so that metrics about the mean need one pass and lose no digits. Everything runs on the SAE's device; if it has no
float64, sums are computed on the CPU. The cost is a few float64 passes over (rows, d_in) in addition to the SAE's
matrix products.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gsae.train import wide

from .eval_json import RowMetrics
from .ratio_errors import ratio


class Autoencoder(Protocol):
    """What an evaluation needs of an SAE. It takes raw activations."""

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
class PreparedRows:
    """A batch of rows in the forms that the metrics need, computed once for all SAEs.

    x: (rows, d_in) float32, on the SAEs' device. Where sums are computed, all float64: wide: the same rows; shifted:
    wide - shift; norm: (rows,).
    """

    x: Tensor
    wide: Tensor
    shifted: Tensor
    norm: Tensor

    @classmethod
    def of(cls, x: Tensor, shift: Tensor, device: str) -> "PreparedRows":
        """Prepare `x` (rows, d_in) of any float type for SAEs on `device`.

        shift: (d_in,) float64 near the mean row, where sums are computed.
        """
        x = x.to(shift.device)
        wide = x.double()
        return cls(x.to(device).float(), wide, wide - shift, row_norms(x))

    def pick(self, index: Tensor) -> "PreparedRows":
        """Return the rows at `index`, positions (n,)."""
        return PreparedRows(self.x[index.to(self.x.device)], self.wide[index], self.shifted[index], self.norm[index])


def sums_device(device: str | torch.device) -> torch.device:
    """Return where float64 sums are computed for SAEs or activations on a device."""
    found = torch.device(device)
    return found if wide(found) == torch.float64 else torch.device("cpu")


def row_norms(x: Tensor) -> Tensor:
    """Return ||x|| of each row, (..., d_in) -> (...) float64. Norm limits are compared with this norm."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norms


@dataclass(frozen=True)
class Reconstruction:
    """An SAE's output for a batch of rows, where sums are computed.

    fires: (d_sae,). x_hat: (rows, d_in) float64. The other fields: (rows,).
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
    def of(cls, rows: PreparedRows, sae: Autoencoder) -> "Reconstruction":
        """Encode and decode rows."""
        f = sae.encode(rows.x)
        there = rows.wide.device
        wide = sae.decode(f).to(there).double()
        # Sums of ones are exact in float32 up to 2^24, and much faster than counts of integers.
        fired = torch.ne(f, 0, out=torch.empty_like(f))
        cross, norm = dot(wide, rows.wide), row_norms(wide)
        product = rows.norm * norm
        return cls(
            l0=fired.sum(1).long().to(there),
            fires=fired.sum(0).long().to(there),
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
    """Sums over rows x (rows, d_in) and reconstructions x_hat. A prime (x') stands for a value minus the shift.

    The totals of two disjoint sets of rows add up: `a + b`.
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
    def zero(cls, d_in: int, device: str | torch.device = "cpu") -> "Totals":
        """Return the totals of no rows."""
        none = torch.zeros(d_in, dtype=torch.float64, device=device)
        return cls(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, none.clone(), none)

    def add(self, rows: PreparedRows, made: Reconstruction, shift: Tensor) -> None:
        """Add a batch of rows and an SAE's output for them."""
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
        """Sum of ||x - mu||^2 over the rows, where mu is their mean."""
        if self.rows == 0:
            return 0.0
        return self.square_shifted - float(self.x_shifted.square().sum()) / self.rows

    def metrics(self) -> RowMetrics:
        """Return the metrics that `RowMetrics` defines; None where one is not defined (no rows, a denominator of 0)."""
        n, sst = self.rows, self.sst
        error = ratio(self.sse, sst)
        offset = self.x_shifted / max(n, 1)  # mu - shift
        along = float(offset @ self.x_hat_shifted)
        square = self.x_hat_square_shifted - 2 * along + n * float(offset @ offset)
        return RowMetrics(
            l0=ratio(self.fired, n),
            explained_variance=None if error is None else 1.0 - error,
            mse=ratio(self.sse, n),
            gamma=ratio(self.x_hat_square, self.cross),
            gamma_centred=ratio(square, self.cross_shifted - along),
            cossim=ratio(self.cosine, n),
            l2_ratio=ratio(self.l2_ratio, n),
        )
