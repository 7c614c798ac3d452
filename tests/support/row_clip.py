"""The row clip written out in float64, around torch's own Adam: the oracle of every step."""

from collections.abc import Mapping

import torch
from torch import Tensor


def step_with_row_clip(oracle: torch.optim.Optimizer, parameters: Mapping[str, Tensor], lr: float) -> int:
    """Let the oracle take its step and bound it; returns how many rows and entries were bounded.

    What a row of a matrix (its name begins with W_) moves is divided by max(1, its RMS in units of lr); what an entry
    of a vector moves is at most lr.
    """
    before = {name: p.clone() for name, p in parameters.items()}
    oracle.step()
    bounded = 0
    for name, p in parameters.items():
        units = (p - before[name]) / lr
        size = units.square().mean(-1, keepdim=True).sqrt() if name.startswith("W_") else units.abs()
        bounded += int((size > 1 + 1e-9).sum())
        p.copy_(before[name] + lr * units / size.clamp(min=1))
    return bounded
