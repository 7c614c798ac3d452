"""The kernels of a site's moments: squared norms of rows, and sums of x and x^2 by bin.

Each is compiled with numba and stands beside its twin in plain numpy, the oracle of its tests. All sums are in float64
and in one fixed order (lanes within a row; stored order from row to row), so that their bits depend neither on numba
nor on threads nor on how rows are cut into parts. bfloat16 is widened in registers. The rows of a bin are added four
at a time, so that sums are loaded and stored once for four rows. Both kernels together read about 4 GB/s a core.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numba_support import compiled
from .planes_kernels import F64, I64

LANES = 32


def float_bits(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return rows as the leading bits of float32: uint16 for bfloat16, uint32 for float16 and float32. Exact."""
    if dtype == "bfloat16":
        return rows.view(np.uint16)
    kind = np.dtype({"float16": "<f2", "float32": "<f4"}[dtype])
    return rows.view(kind).astype(np.float32, copy=False).view(np.uint32)


def _wide(bits: NDArray[Any]) -> F64:
    shift = np.uint32(32 - 8 * bits.dtype.itemsize)
    return (bits.astype(np.uint32) << shift).view(np.float32).astype(np.float64)


@compiled
def _value(bits: Any, shift: np.uint32) -> float:
    """Return the float32 with these leading bits, as float64; shift: the number of bits that follow them."""
    return np.float64(np.uint32(np.uint32(bits) << shift).view(np.float32))


def squared_norms_plain(x: NDArray[Any], norms: F64) -> None:
    """Compute as `squared_norms` does, in plain numpy."""
    rows, channels = x.shape
    padded = np.zeros((rows, -(-channels // LANES) * LANES), np.float64)
    padded[:, :channels] = _wide(x)
    lanes = np.zeros((rows, LANES), np.float64)
    for first in range(0, padded.shape[1], LANES):
        part = padded[:, first : first + LANES]
        lanes += part * part
    total = np.zeros(rows, np.float64)
    for lane in range(LANES):
        total += lanes[:, lane]
    norms[:] = total


@compiled
def squared_norms(x: NDArray[Any], norms: F64) -> None:
    """Fill norms (R,) with ||x||^2 of x (R, C), from `float_bits`, summed in LANES fixed lanes."""
    rows, channels = x.shape
    shift = np.uint32(32 - 8 * x.itemsize)
    lanes = np.zeros(LANES, np.float64)
    whole = channels // LANES * LANES
    for r in range(rows):
        lanes[:] = 0
        row = x[r]
        for first in range(0, whole, LANES):
            for lane in range(LANES):
                v = _value(row[first + lane], shift)
                lanes[lane] += v * v
        for c in range(whole, channels):
            v = _value(row[c], shift)
            lanes[c - whole] += v * v
        total = 0.0
        for lane in range(LANES):
            total += lanes[lane]
        norms[r] = total


def binned_sums_plain(x: NDArray[Any], order: I64, starts: I64, slots: I64, sums: F64, squares: F64) -> None:
    """Compute as `binned_sums` does, in plain numpy."""
    for bin_ in range(len(slots)):
        for r in order[starts[bin_] : starts[bin_ + 1]]:
            wide = _wide(x[r])
            sums[slots[bin_]] += wide
            squares[slots[bin_]] += wide * wide


@compiled
def binned_sums(x: NDArray[Any], order: I64, starts: I64, slots: I64, sums: F64, squares: F64) -> None:
    """Add rows of x (R, C), from `float_bits`, and their squares to rows of sums and squares (any, C).

    Rows order[starts[i]] up to order[starts[i + 1]] of x are added, one after the other, to row slots[i].
    """
    channels = x.shape[1]
    shift = np.uint32(32 - 8 * x.itemsize)
    for i in range(len(slots)):
        s, q = sums[slots[i]], squares[slots[i]]
        k, stop = starts[i], starts[i + 1]
        while k + 4 <= stop:
            r0, r1, r2, r3 = x[order[k]], x[order[k + 1]], x[order[k + 2]], x[order[k + 3]]
            for c in range(channels):
                v0, v1, v2, v3 = _value(r0[c], shift), _value(r1[c], shift), _value(r2[c], shift), _value(r3[c], shift)
                s[c] = (((s[c] + v0) + v1) + v2) + v3
                q[c] = (((q[c] + v0 * v0) + v1 * v1) + v2 * v2) + v3 * v3
            k += 4
        while k < stop:
            row = x[order[k]]
            for c in range(channels):
                v = _value(row[c], shift)
                s[c] += v
                q[c] += v * v
            k += 1
