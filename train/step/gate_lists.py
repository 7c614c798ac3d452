"""What the passes of the sparse step hand to one another: lists of open gates, without padding, and derivatives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OpenGates:
    """The open gates of a batch, one row after the other, latents ascending in each.

    starts (rows + 1) int64: where the entries of each row begin. latents (n) int32. values (n): the encoder product.
    """

    starts: Tensor
    latents: Tensor
    values: Tensor


@dataclass(frozen=True)
class GatesByLatent:
    """The same entries, one latent after the other.

    starts (d_sae + 1) int64: where the entries of each latent begin. entries (n): their places in `OpenGates`.
    rows (n): their rows.
    """

    starts: Tensor
    entries: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of the loss, and the sums of the batch.

    errors (rows, d_in): by the reconstruction, 2 (x_hat - x) / rows; total (d_in): their sum over the rows.
    records (n, 4), for each open gate: feature, derivative by pi_mag, derivative by pi_gate, encoder product. For the
    baseline the second is 0 and the third is the derivative by its feature.
    sums (6) float64: those of `BatchSums`, in order.
    """

    errors: Tensor
    records: Tensor
    total: Tensor
    sums: Tensor
