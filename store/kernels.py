"""The inner loops of the store, each twice: compiled with numba, and in plain numpy under the same signature.

The plain version is the oracle in the tests and what runs where numba is not installed. Kernels take arrays and
fill arrays, hold no GIL and allocate next to nothing. They trust their indices: callers check them first.

Legend: R rows of a block, C channels, H = (C + 1) // 2 bytes of nibbles a row (low nibbles are the first H
channels, high nibbles the others, so that unpacking is two straight vector loops).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

LANES = 16

try:
    import numba

    HAVE_NUMBA = True
except ImportError:  # pragma: no cover - exercised by the tests in a process where numba is blocked
    HAVE_NUMBA = False


def _either(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile the decorated loop when numba is there, else use `plain`; `.plain` is always the numpy version."""

    def choose(loop: Callable[..., Any]) -> Callable[..., Any]:
        chosen: Any = numba.njit(cache=True, nogil=True)(loop) if HAVE_NUMBA else plain
        chosen.plain = plain
        return chosen  # type: ignore[no-any-return]

    return choose


def _exponents(x: U16) -> U8:
    return ((x >> 7) & 0xFF).astype(np.uint8)


def _sign_mantissa(x: U16) -> U8:
    return (((x >> 8) & 0x80) | (x & 0x7F)).astype(np.uint8)


def _channel_medians_plain(x: U16, medians: U8) -> None:
    e = np.sort(_exponents(x), axis=0)
    medians[:] = e[len(e) // 2]


@_either(_channel_medians_plain)
def channel_medians(x: U16, medians: U8) -> None:
    """Fill medians (C,) with the upper median exponent of each channel of x (R, C)."""
    rows, channels = x.shape
    counts = np.zeros((256, 64), np.uint32)
    for first in range(0, channels, 64):
        width = min(64, channels - first)
        counts[:] = 0
        for r in range(rows):
            for j in range(width):
                counts[(x[r, first + j] >> 7) & 0xFF, j] += 1
        for j in range(width):
            seen, e = np.uint32(0), 0
            while seen + counts[e, j] <= rows // 2:
                seen += counts[e, j]
                e += 1
            medians[first + j] = e


def _delta_counts_plain(x: U16, medians: U8, counts: I64) -> None:
    counts[:] = np.bincount((_exponents(x) - medians).ravel(), minlength=256)


@_either(_delta_counts_plain)
def delta_counts(x: U16, medians: U8, counts: I64) -> None:
    """Fill counts (256,) with how often each (exponent - its channel's median) mod 256 occurs in x (R, C)."""
    rows, channels = x.shape
    counts[:] = 0
    for r in range(rows):
        for c in range(channels):
            counts[(((x[r, c] >> 7) & 0xFF) - medians[c]) & 0xFF] += 1


def _pack_plain(x: U16, base: U8, first: int, low: U8, nibbles: U8, at: U32, exponents: U8, n: int) -> int:
    half = nibbles.shape[1]
    channels = x.shape[1]
    low[:] = _sign_mantissa(x)
    delta = _exponents(x) - base
    found = np.flatnonzero(delta > 15)
    if n + len(found) > len(at):
        return -1
    at[n : n + len(found)] = first * channels + found
    exponents[n : n + len(found)] = _exponents(x).ravel()[found]
    clamped = np.minimum(delta, 15)
    nibbles[:] = clamped[:, :half]
    nibbles[:, : channels - half] |= clamped[:, half:] << 4
    return n + len(found)


@_either(_pack_plain)
def pack(x: U16, base: U8, first: int, low: U8, nibbles: U8, at: U32, exponents: U8, n: int) -> int:
    """Split x (R, C) into low (R, C), nibbles (R, H) and exceptions; return the new number of exceptions.

    base: (C,) the exponent of nibble 0. first: the block's first row in the chunk. Exceptions (exponents outside
    base .. base + 15) are appended to at (flat position in the chunk) and exponents from n on; -1 when they are full.
    """
    rows, channels = x.shape
    half = nibbles.shape[1]
    delta = np.zeros(2 * half, np.uint8)
    for r in range(rows):
        outside = np.uint8(0)
        for c in range(channels):
            v = x[r, c]
            low[r, c] = np.uint8((v >> 8) & 0x80) | np.uint8(v & 0x7F)
            d = np.uint8(np.uint8(v >> 7) - base[c])
            delta[c] = min(d, np.uint8(15))
            outside |= d & np.uint8(0xF0)
        for c in range(half):
            nibbles[r, c] = delta[c] | (delta[half + c] << 4)
        if outside:
            for c in range(channels):
                e = np.uint8(x[r, c] >> 7)
                if np.uint8(e - base[c]) > 15:
                    if n == len(at):
                        return -1
                    at[n] = (first + r) * channels + c
                    exponents[n] = e
                    n += 1
    return n


def _unpack_plain(low: U8, nibbles: U8, base: U8, out: U16, places: I64) -> None:
    channels = low.shape[1]
    half = nibbles.shape[1]
    e = np.empty(low.shape, np.uint8)
    e[:, :half] = nibbles & 15
    e[:, half:] = (nibbles >> 4)[:, : channels - half]
    e += base
    out[places] = _join(low, e)


def _join(low: U8, exponents: U8) -> U16:
    wide = low.astype(np.uint16)
    joined = ((wide & 0x80) << 8) | (exponents.astype(np.uint16) << 7) | (wide & 0x7F)
    return joined.astype(np.uint16, copy=False)


@_either(_unpack_plain)
def unpack(low: U8, nibbles: U8, base: U8, out: U16, places: I64) -> None:
    """Join low (R, C) and nibbles (R, H) around base (C,) into rows places (R,) of out (any, C)."""
    rows, channels = low.shape
    half = nibbles.shape[1]
    for r in range(rows):
        to = out[places[r]]
        for c in range(half):
            v = np.uint16(low[r, c])
            e = np.uint16(np.uint8((nibbles[r, c] & np.uint8(15)) + base[c]))
            to[c] = ((v & np.uint16(0x80)) << 8) | (e << 7) | (v & np.uint16(0x7F))
        for c in range(channels - half):
            v = np.uint16(low[r, half + c])
            e = np.uint16(np.uint8((nibbles[r, c] >> 4) + base[half + c]))
            to[half + c] = ((v & np.uint16(0x80)) << 8) | (e << 7) | (v & np.uint16(0x7F))


def _patch_plain(at: U32, exponents: U8, first: int, out: U16, places: I64) -> None:
    row, channel = np.divmod(at.astype(np.int64), out.shape[1])
    old = out[places[row - first], channel]
    out[places[row - first], channel] = (old & np.uint16(0x807F)) | (exponents.astype(np.uint16) << np.uint16(7))


@_either(_patch_plain)
def patch(at: U32, exponents: U8, first: int, out: U16, places: I64) -> None:
    """Put the exceptions of a block, whose first row in the chunk is `first`, into the rows just unpacked."""
    channels = out.shape[1]
    for i in range(len(at)):
        row = at[i] // channels
        channel = at[i] - row * channels
        old = out[places[row - first], channel]
        out[places[row - first], channel] = (old & np.uint16(0x807F)) | (np.uint16(exponents[i]) << 7)


def _join_bytes_plain(low: U8, exponents: U8, out: U16, places: I64) -> None:
    out[places] = _join(low, exponents)


@_either(_join_bytes_plain)
def join_bytes(low: U8, exponents: U8, out: U16, places: I64) -> None:
    """Join low and exponents, both (R, C), into rows places (R,) of out: the form for unpredictable exponents."""
    rows, channels = low.shape
    for r in range(rows):
        to = out[places[r]]
        for c in range(channels):
            v = np.uint16(low[r, c])
            to[c] = ((v & np.uint16(0x80)) << 8) | (np.uint16(exponents[r, c]) << 7) | (v & np.uint16(0x7F))


def _split_bytes_plain(x: U16, low: U8, exponents: U8) -> None:
    low[:] = _sign_mantissa(x)
    exponents[:] = _exponents(x)


@_either(_split_bytes_plain)
def split_bytes(x: U16, low: U8, exponents: U8) -> None:
    """Split x (R, C) into low and exponents, both (R, C)."""
    rows, channels = x.shape
    for r in range(rows):
        for c in range(channels):
            v = x[r, c]
            low[r, c] = np.uint8((v >> 8) & 0x80) | np.uint8(v & 0x7F)
            exponents[r, c] = np.uint8(v >> 7)


def _scatter_plain(rows: NDArray[Any], out: NDArray[Any], places: I64) -> None:
    out[places] = rows


@_either(_scatter_plain)
def scatter(rows: NDArray[Any], out: NDArray[Any], places: I64) -> None:
    """Copy rows (R, C) into rows places (R,) of out (any, C)."""
    for r in range(rows.shape[0]):
        to = out[places[r]]
        for c in range(rows.shape[1]):
            to[c] = rows[r, c]


def _squared_norms_plain(x: NDArray[np.float32], norms: F64) -> None:
    rows, channels = x.shape
    padded = np.zeros((rows, -(-channels // LANES) * LANES), np.float64)
    padded[:, :channels] = x
    lanes = np.zeros((rows, LANES), np.float64)
    for first in range(0, padded.shape[1], LANES):
        part = padded[:, first : first + LANES]
        lanes += part * part
    total = np.zeros(rows, np.float64)
    for lane in range(LANES):
        total += lanes[:, lane]
    norms[:] = total


@_either(_squared_norms_plain)
def squared_norms(x: NDArray[np.float32], norms: F64) -> None:
    """Fill norms (R,) with ||x||^2 of x (R, C) in float64, summed in LANES fixed lanes: the same bits everywhere."""
    rows, channels = x.shape
    lanes = np.zeros(LANES, np.float64)
    whole = channels // LANES * LANES
    for r in range(rows):
        lanes[:] = 0
        for first in range(0, whole, LANES):
            for lane in range(LANES):
                v = np.float64(x[r, first + lane])
                lanes[lane] += v * v
        for c in range(whole, channels):
            v = np.float64(x[r, c])
            lanes[c - whole] += v * v
        total = 0.0
        for lane in range(LANES):
            total += lanes[lane]
        norms[r] = total


def _binned_sums_plain(x: NDArray[np.float32], bins: I64, sums: F64, squares: F64) -> None:
    for r in range(len(x)):
        if bins[r] >= 0:
            wide = x[r].astype(np.float64)
            sums[bins[r]] += wide
            squares[bins[r]] += wide * wide


@_either(_binned_sums_plain)
def binned_sums(x: NDArray[np.float32], bins: I64, sums: F64, squares: F64) -> None:
    """Add each row of x (R, C), and its square, to row bins[r] of sums and squares (any, C); skip negative bins."""
    rows, channels = x.shape
    for r in range(rows):
        if bins[r] >= 0:
            to_sum, to_square = sums[bins[r]], squares[bins[r]]
            for c in range(channels):
                v = np.float64(x[r, c])
                to_sum[c] += v
                to_square[c] += v * v
