"""The inner loops of the codec `gsae.planes`, compiled with numba, and each in plain numpy as the oracle of its tests.

Kernels take arrays and fill arrays, hold no GIL and allocate next to nothing. They do not check their places: callers
do that first.

Legend: R rows of a block, C channels, H = (C + 1) // 2 bytes of nibbles a row (low nibbles are the first H channels,
high nibbles the others, so that unpacking is two straight vector loops).
"""

import numpy as np
from numpy.typing import NDArray

from .numba_support import compiled
from .scatter import LINE_BYTES, fence, stream_line, streamable

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


def _exponents(x: U16) -> U8:
    return ((x >> 7) & 0xFF).astype(np.uint8)


def _sign_mantissa(x: U16) -> U8:
    return (((x >> 8) & 0x80) | (x & 0x7F)).astype(np.uint8)


def channel_medians_plain(e: U8, medians: U8) -> None:
    """Compute as `channel_medians` does, in plain numpy."""
    medians[:] = np.sort(e, axis=0)[len(e) // 2]


@compiled
def channel_medians(e: U8, medians: U8) -> None:
    """Fill medians (C,) with the upper median of each channel of the exponents e (R, C), R from 1 to 65,535.

    Bits are found from the top for all channels at once: these are vector loops, and a histogram would be scalar.
    """
    rows, channels = e.shape
    below = np.empty(channels, np.uint16)
    medians[:] = 0
    for bit in range(7, -1, -1):
        step = np.uint8(1 << bit)
        below[:] = 0
        for r in range(rows):
            for c in range(channels):
                below[c] += np.uint16(e[r, c] < np.uint8(medians[c] + step))
        for c in range(channels):
            if below[c] <= rows // 2:
                medians[c] += step


def deviation_sums_plain(e: U8, medians: U8, limit: int, sums: I32) -> None:
    """Compute as `deviation_sums` does, in plain numpy."""
    sums[:] = np.clip(e.astype(np.int32) - medians, -limit, limit).sum(axis=0)


@compiled
def deviation_sums(e: U8, medians: U8, limit: int, sums: I32) -> None:
    """Fill sums (C,) with each channel's sum of e (R, C) minus its median, each clipped to -limit .. limit."""
    rows, channels = e.shape
    sums[:] = 0
    for r in range(rows):
        for c in range(channels):
            deviation = np.int32(e[r, c]) - np.int32(medians[c])
            sums[c] += min(max(deviation, np.int32(-limit)), np.int32(limit))


def deviation_counts_plain(e: U8, centres: U8, eighths: U8, counts: I64) -> None:
    """Compute as `deviation_counts` does, in plain numpy."""
    cells = eighths.astype(np.int64) * 256 + (e - centres)
    counts[:] = np.bincount(cells.ravel(), minlength=counts.size).reshape(counts.shape)


@compiled
def deviation_counts(e: U8, centres: U8, eighths: U8, counts: I64) -> None:
    """Fill counts (8, 256): how often e (R, C) minus its channel's centre is each value mod 256, by eighths (C,)."""
    rows, channels = e.shape
    counts[:] = 0
    for r in range(rows):
        for c in range(channels):
            counts[eighths[c], np.uint8(e[r, c] - centres[c])] += 1


def pack_plain(x: U16, base: U8, low: U8, nibbles: U8, at: U32, exponents: U8) -> int:
    """Compute as `pack` does, in plain numpy."""
    half = nibbles.shape[1]
    low[:] = _sign_mantissa(x)
    delta = _exponents(x) - base
    found = np.flatnonzero(delta > 15)
    if len(found) > len(at):
        return -1
    at[: len(found)] = found
    exponents[: len(found)] = _exponents(x).ravel()[found]
    clamped = np.minimum(delta, 15)
    nibbles[:] = clamped[:, :half]
    nibbles[:, : x.shape[1] - half] |= clamped[:, half:] << 4
    return len(found)


@compiled
def pack(x: U16, base: U8, low: U8, nibbles: U8, at: U32, exponents: U8) -> int:
    """Split x (R, C) into low (R, C), nibbles (R, H) and exceptions; return how many exceptions there are.

    base: (C,) the exponent of nibble 0. Exceptions (exponents outside base .. base + 15) go to at (row * C + channel,
    ascending) and exponents; -1 when these are too short.
    """
    rows, channels = x.shape
    half = np.uint64(nibbles.shape[1])  # unsigned, because an index that could wrap around keeps loops scalar
    delta = np.zeros(2 * nibbles.shape[1], np.uint8)
    n = 0
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
                    at[n] = r * channels + c
                    exponents[n] = e
                    n += 1
    return n


def unpack_plain(low: U8, nibbles: U8, base: U8, at: U32, exponents: U8, first: int, out: U16, places: I64) -> int:
    """Compute as `unpack` does, in plain numpy."""
    rows, channels = low.shape
    half = nibbles.shape[1]
    e = np.empty(low.shape, np.uint8)
    e[:, :half] = nibbles & 15
    e[:, half:] = (nibbles >> 4)[:, : channels - half]
    e += base
    inside = at.astype(np.int64) - first * channels
    row = inside // channels
    in_order = (row >= np.maximum.accumulate(np.append(0, row[:-1]))) & (row < rows)
    applied = len(at) if in_order.all() else int(np.argmin(in_order))
    e.ravel()[inside[:applied]] = exponents[:applied]
    out[places] = _join(low, e)
    return applied


def _join(low: U8, exponents: U8) -> U16:
    wide = low.astype(np.uint16)
    joined = ((wide & 0x80) << 8) | (exponents.astype(np.uint16) << 7) | (wide & 0x7F)
    return joined.astype(np.uint16, copy=False)


@compiled
def unpack(low: U8, nibbles: U8, base: U8, at: U32, exponents: U8, first: int, out: U16, places: I64) -> int:
    """Join low (R, C) and nibbles (R, H) around base (C,) into rows places (R,) of out (any, C), C-contiguous.

    first: the block's first row in the chunk. at, exponents: its exceptions, from `pack`. Returns how many of them
    were applied: all, unless one lies outside the block or in a row before that of the exception before it.
    """
    rows, channels = low.shape
    half = np.uint64(nibbles.shape[1])
    line = np.empty(channels, np.uint16)  # a row is made in the first-level cache and then written at once
    streamed = streamable(out)
    origin, end, size = line.ctypes.data, out.ctypes.data, channels * 2
    n = 0
    for r in range(rows):
        for c in range(half):
            v = np.uint16(low[r, c])
            e = np.uint16(np.uint8((nibbles[r, c] & np.uint8(15)) + base[c]))
            line[c] = ((v & np.uint16(0x80)) << 8) | (e << 7) | (v & np.uint16(0x7F))
        for c in range(np.uint64(channels) - half):
            v = np.uint16(low[r, half + c])
            e = np.uint16(np.uint8((nibbles[r, c] >> 4) + base[half + c]))
            line[half + c] = ((v & np.uint16(0x80)) << 8) | (e << 7) | (v & np.uint16(0x7F))
        start = (first + r) * channels
        while n < len(at) and start <= at[n] < start + channels:
            channel = np.uint64(at[n] - start)
            line[channel] = (line[channel] & np.uint16(0x807F)) | (np.uint16(exponents[n]) << 7)
            n += 1
        if streamed:
            for i in range(0, size, LINE_BYTES):
                stream_line(origin + i, end + places[r] * size + i)
        else:
            to = out[places[r]]
            for c in range(channels):
                to[c] = line[c]
    if streamed:
        fence()
    return n


def join_bytes_plain(low: U8, exponents: U8, out: U16, places: I64) -> None:
    """Compute as `join_bytes` does, in plain numpy."""
    out[places] = _join(low, exponents)


@compiled
def join_bytes(low: U8, exponents: U8, out: U16, places: I64) -> None:
    """Join low and exponents, both (R, C), into rows places (R,) of out: form 1, for unpredictable exponents."""
    rows, channels = low.shape
    for r in range(rows):
        to = out[places[r]]
        for c in range(channels):
            v = np.uint16(low[r, c])
            to[c] = ((v & np.uint16(0x80)) << 8) | (np.uint16(exponents[r, c]) << 7) | (v & np.uint16(0x7F))


def split_bytes_plain(x: U16, low: U8, exponents: U8) -> None:
    """Compute as `split_bytes` does, in plain numpy."""
    low[:] = _sign_mantissa(x)
    exponents[:] = _exponents(x)


@compiled
def split_bytes(x: U16, low: U8, exponents: U8) -> None:
    """Split x (R, C) into low and exponents, both (R, C)."""
    rows, channels = x.shape
    for r in range(rows):
        for c in range(channels):
            v = x[r, c]
            low[r, c] = np.uint8((v >> 8) & 0x80) | np.uint8(v & 0x7F)
            exponents[r, c] = np.uint8(v >> 7)
