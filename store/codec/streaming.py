"""Writing whole cache lines past the caches, from compiled loops.

Rows that are scattered over a buffer far larger than the caches cost an ordinary store three trips to memory: the
line is read, changed, and written back later, and each new row waits for its first read. A non-temporal store
writes the line and reads nothing: two to three times the rows a second. It wants lines of 64 bytes, aligned, so
buffers for scattered rows come from `empty_rows`.
"""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE_BYTES = 64

try:
    from llvmlite import ir
    from numba import extending, types

    HAVE_NUMBA = True
except ImportError:  # pragma: no cover - exercised by the tests in a process where numba is blocked
    HAVE_NUMBA = False


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


# For compiled loops only. stream_line(source, target) copies one line between two addresses, the target's a multiple
# of LINE_BYTES; fence() makes streamed lines visible to other threads before anything that follows.
stream_line: Any = extending.intrinsic(_stream_line) if HAVE_NUMBA else None
fence: Any = extending.intrinsic(_fence) if HAVE_NUMBA else None


def empty_rows(rows: int, width: int, dtype: Any) -> NDArray[Any]:
    """Return an uninitialised array (rows, width) in `pages`, so that rows can be streamed into it."""
    kind = np.dtype(dtype)
    size = rows * width * kind.itemsize
    made: NDArray[Any] = np.frombuffer(pages(max(size, 1)), kind, rows * width).reshape(rows, width)
    return made


def pages(size: int) -> mmap.mmap:
    """Take memory in huge pages where the kernel has them: scattered rows would miss the TLB at each page otherwise."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
