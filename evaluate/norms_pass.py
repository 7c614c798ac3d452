"""A first pass over held-out rows, before any SAE runs: their mean row, and the norm of the largest thousandth.

Both are exact and do not depend on the order of rows. The cost is one more decoding of the rows. Because the mean is
known, sums about it need no correction for each document, so memory does not grow with the number of documents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gsae.store import Site

from .metrics import row_norms

LARGEST = 1000  # one row in this many is left out of the metrics without the largest rows


@dataclass(frozen=True)
class NormsPass:
    """mean: (d_in,) of the rows with ||x|| < the norm limit. norm_cut: rows of this norm or more are the largest."""

    mean: NDArray[np.float64]
    norm_cut: float


def read_norms(site: Site, norm_limit: float, batch_rows: int, listen: Callable[[int], None]) -> NormsPass:
    """Read every row of `site` once; `listen` gets the number of rows read so far.

    The cut is the k-th largest norm, k being a thousandth of the rows rounded down, or inf where k is 0. A row with a
    NaN counts as the largest.
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
    return NormsPass((total / max(kept, 1)).numpy(), float(largest.min()) if top else np.inf)
