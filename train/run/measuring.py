"""The metrics of an SAE during training: from sums over the batches, and on held-out rows.

`mse` is summed over dimensions, in the units of the raw activations, as in SAELens and eval.json. `loss` and `l1` are
those of scaled inputs.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gsae.train.architectures.base import Params
from gsae.train.step.wide import wide

ROWS_AT_ONCE = 512


def training_metrics(total: Mapping[str, float], rows: float, spread: float, scale: float) -> dict[str, float | None]:
    """Metrics from sums over scaled rows.

    total: sums of loss, squared_error, l1, l0, norm and inner, as in `BatchSums`. rows: their number. spread: the sum
    of ||z - mean||^2. scale: of the inputs.
    """
    return {
        "loss": total["loss"] / rows,
        "mse": total["squared_error"] / (rows * scale**2),
        "l1": total["l1"] / rows,
        "l0": total["l0"] / rows,
        "explained_variance": 1 - total["squared_error"] / spread if spread else None,
        "gamma": total["norm"] / total["inner"] if total["inner"] else None,
    }


def heldout_metrics(params: Params, z: Tensor, scale: float) -> dict[str, Any]:
    """Metrics of one SAE on scaled rows z (rows, d_in), from totals in float64 where the device has it."""
    kind = wide(z.device)
    sums = torch.zeros(4, dtype=kind, device=z.device)
    for first in range(0, len(z), ROWS_AT_ONCE):
        part = z[first : first + ROWS_AT_ONCE]
        f = params.encode(part)
        x_hat = params.decode(f).to(kind)
        x = part.to(kind)
        sums += torch.stack([(f > 0).sum(), (x - x_hat).square().sum(), x_hat.square().sum(), (x_hat * x).sum()])
    l0, error, norm, inner = sums.tolist()
    spread = float((z.to(kind) - z.to(kind).mean(0)).square().sum())
    return {
        "rows": len(z),
        "d_in": z.shape[1],
        "l0": l0 / len(z),
        "mse": _finite(error / (len(z) * scale**2)),
        "explained_variance": _finite(1 - error / spread) if spread else None,
        "gamma": _finite(norm / inner) if inner else None,
    }


def _finite(value: float) -> float | None:
    """None for what JSON has no number for; an SAE may diverge after its last batch was good."""
    return value if math.isfinite(value) else None
