"""A ratio of sums over documents, and its standard error: how far it would be off on other documents of the same kind.

Documents are the independent draws, because the tokens of one document are alike, and so are its contexts. The standard
error is that of a ratio of two sums, by linearisation, and costs one pass over (documents,) arrays. Quantities that are
not such a ratio are redrawn instead (`report/bootstrap.py`).
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error. The value is None where it is not defined, the error also below two documents."""

    value: float | None
    error: float | None

    def complement(self) -> "Estimate":
        """Return 1 - value, with the same error."""
        return Estimate(None if self.value is None else 1.0 - self.value, self.error)


def ratio(a: float, b: float) -> float | None:
    """Return a / b, None where that is not a finite number."""
    if b == 0:
        return None
    value = a / b
    return value if isfinite(value) else None


def ratio_of_sums(a: Sums, b: Sums | NDArray[np.int64]) -> Estimate:
    """Return sum(a) / sum(b) over documents, (documents,) each.

    Its standard error over n documents is sqrt(n / (n - 1) * sum((a - value * b)^2)) / |sum(b)| (Cochran 1977, 2.46).
    """
    below, n = float(b.sum()), len(a)
    value = ratio(float(a.sum()), below)
    if value is None or n < 2:
        return Estimate(value, None)
    squares = float(np.square(a - value * b).sum())
    return Estimate(value, float(np.sqrt(n / (n - 1) * squares)) / abs(below))
