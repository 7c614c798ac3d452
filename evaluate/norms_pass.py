"""A first pass over held-out rows, before any SAE runs: their mean row, and where the largest thousandth begins.

Both are exact, not read off a histogram, and do not depend on the order of rows; it costs one more decoding of them.
With the mean known, sums about it need no correction by context, so memory does not grow with their number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.store import Site

from .metrics import row_norms

LARGEST = 1000  # one row in this many is left out of the figures without the largest rows


@dataclass(frozen=True)
class Survey:
    """mean: (d_in,) of the rows with ||x|| < the norm limit. norm_cut: rows of this norm or more are the largest."""

    mean: NDArray[np.float64]
    norm_cut: float


def survey(site: Site, norm_limit: float, batch_rows: int, listen: Callable[[int], None]) -> Survey:
    """Read every row of `site` once; `listen` is told how many were read.

    The cut is the k-th largest norm, k a thousandth of the rows, rounded down; inf where k is 0. A row with a NaN
    counts as the largest there is.
    """
    largest, top = np.zeros(0), site.rows // LARGEST
    total, kept, done = torch.zeros(site.d_in, dtype=torch.float64), 0, 0
    for _, x in site.in_order(batch_rows):
        norm = row_norms(x)
        here = norm < norm_limit
        total += x[here].sum(0, dtype=torch.float64)
        kept += int(here.sum())
        largest = np.concatenate((largest, np.nan_to_num(norm.numpy(), nan=np.inf)))
        if len(largest) > top:
            largest = np.partition(largest, len(largest) - top - 1)[len(largest) - top :]
        done += len(x)
        listen(done)
    return Survey((total / max(kept, 1)).numpy(), float(largest.min()) if top else np.inf)
