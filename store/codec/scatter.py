"""Rows copied to scattered places of a large buffer, and the buffers for that: whole cache lines, past the caches.

An ordinary store to a scattered row costs three trips to memory: the line is read, changed, and written back later.
A non-temporal store writes the line without reading it, which is two to three times as fast. It needs aligned lines
of 64 bytes, so buffers for scattered rows come from `empty_rows`. Smaller or unaligned buffers get ordinary stores.
"""

import mmap
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numpy.typing import NDArray

from .numba_support import compiled

LINE_BYTES = 64
# Buffers of at least this size are written past the caches: it is more than a core's share of any cache.
STREAM_BYTES = 16 << 20


def _stream_line(typing: Any, source: Any, target: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, addresses: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), LINE_BYTES // 8).as_pointer()
        origin, end = (builder.inttoptr(address, line) for address in addresses)
        store = builder.store(builder.load(origin, align=1), end, align=LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(source, target), generate


def _fence(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# For compiled loops only. stream_line(source, target) copies one line between two addresses; the target's must be a
# multiple of LINE_BYTES. fence() makes streamed lines visible to other threads before anything that follows.
stream_line: Any = extending.intrinsic(_stream_line)
fence: Any = extending.intrinsic(_fence)


@compiled
def streamable(out: NDArray[Any]) -> bool:
    """Whether rows of out (any, C) can be streamed: whole cache lines of a buffer that is larger than a cache."""
    whole_lines = (out.shape[1] * out.itemsize) % LINE_BYTES == 0 and out.ctypes.data % LINE_BYTES == 0
    return out.flags.c_contiguous and whole_lines and out.size * out.itemsize >= STREAM_BYTES


def scatter_plain(rows: NDArray[Any], out: NDArray[Any], places: NDArray[np.int64]) -> None:
    """Copy as `scatter` does, in plain numpy: the oracle of its tests."""
    out[places] = rows


@compiled
def scatter(rows: NDArray[Any], out: NDArray[Any], places: NDArray[np.int64]) -> None:
    """Copy rows (R, C) into rows places (R,) of out (any, C). Places are not checked."""
    if rows.flags.c_contiguous and rows.itemsize == out.itemsize and streamable(out):
        origin, end, size = rows.ctypes.data, out.ctypes.data, out.shape[1] * out.itemsize
        for r in range(rows.shape[0]):
            for i in range(0, size, LINE_BYTES):
                stream_line(origin + r * size + i, end + places[r] * size + i)
        fence()
        return
    for r in range(rows.shape[0]):
        to = out[places[r]]
        for c in range(rows.shape[1]):
            to[c] = rows[r, c]


def empty_rows(rows: int, width: int, dtype: Any) -> NDArray[Any]:
    """Return an uninitialised array (rows, width) in `pages`, so that rows can be streamed into it."""
    kind = np.dtype(dtype)
    size = rows * width * kind.itemsize
    made: NDArray[Any] = np.frombuffer(pages(max(size, 1)), kind, rows * width).reshape(rows, width)
    return made


def pages(size: int) -> mmap.mmap:
    """Take `size` bytes of fresh memory, in huge pages where possible: fewer TLB misses for scattered rows."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
