"""What the passes of the sparse step hand to one another: lists of open gates, without padding, and their errors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Open:
    """The open gates of a batch, row by row, latents ascending.

    starts (rows + 1) int64: where each row's entries begin; latents (n) int32; values (n): the encoder product.
    """

    starts: Tensor
    latents: Tensor
    values: Tensor


@dataclass(frozen=True)
class ByLatent:
    """The same entries latent by latent: starts (d_sae + 1) int64, entries (n) their places in `Open`, rows (n)."""

    starts: Tensor
    entries: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Errors:
    """Derivatives of the loss at the open gates.

    errors (rows, d_in): by the reconstruction, 2 (x_hat - x) / rows, and `total` (d_in) their sum over the rows.
    records (n, 4): feature, derivative by pi_mag, by pi_gate (of the baseline: 0, by its feature), encoder product.
    sums (6) float64: those of `Figures`.
    """

    errors: Tensor
    records: Tensor
    total: Tensor
    sums: Tensor
