"""The memory of windows: two buffers, filled in turn. A buffer is free again as soon as its window is encoded.

One thread encodes a window into temporary files, and another publishes the window before it, so the next window is
filled while the disk still writes. At most `IN_FILES` windows are in temporary files. If the disk or the encoding falls
behind, the thread that moves rows waits here for a buffer, and the model waits only once `LEAD` batches wait for their
places (`row_mover.py`). Memory is two windows for each site, whatever is slow.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from gsae.store import EncodedWindow, Plan, Record, WindowTotals, empty_rows, unsigned

BUFFERS = 2
IN_FILES = 2

SiteRows = dict[str, NDArray[Any]]
"""Bit patterns (rows, d_in) of the rows of one window, by site name."""


class WindowBuffers:
    """Buffers of one window each. Use it in a `with`, which waits for the windows that are being written."""

    def __init__(self, plan: Plan, rows: int, written: Callable[[Record], None], totals: WindowTotals) -> None:
        """Make room for windows of at most `rows` rows.

        written: called with the record of each, in order. totals: get each window if it is their next one.
        """
        kind = unsigned(plan.model.dtype)
        self._buffers: deque[SiteRows] = deque(
            {site.name: empty_rows(rows, site.d_in, kind) for site in plan.sites} for _ in range(BUFFERS)
        )
        self._encoded: deque[Future[EncodedWindow]] = deque()  # of the last windows, oldest first, one a buffer
        self._published: deque[Future[Record]] = deque()  # oldest first, those that `collect` has not seen
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="gsae-write")
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="gsae-publish")
        self._written = written
        self._totals = totals

    def take(self, rows: int) -> Callable[[], SiteRows]:
        """Return what gives the buffer of the next window, of `rows` rows.

        Each call waits until the window that was in the buffer before is encoded, and raises the error of that.
        """
        buffer = {name: array[:rows] for name, array in self._buffers[0].items()}
        self._buffers.rotate(-1)
        before = self._encoded.popleft() if len(self._encoded) == BUFFERS else None

        def free() -> SiteRows:
            if before is not None:
                before.result()
            return buffer

        return free

    def write(self, encode: Callable[[], EncodedWindow]) -> None:
        """Encode the window that was taken last, then publish it, each on a thread.

        encode: waits for the window's rows and encodes them.
        """
        earlier = self._published[-IN_FILES] if len(self._published) >= IN_FILES else None

        def encode_in_turn() -> EncodedWindow:
            if earlier is not None:
                earlier.result()
            return encode()

        encoded = self._encoder.submit(encode_in_turn)
        self._encoded.append(encoded)
        self._published.append(self._publisher.submit(lambda: encoded.result().publish(self._totals)))

    def collect(self) -> None:
        """Report the windows that were published by now; raise the error of one that failed."""
        while self._published and self._published[0].done():
            self._written(self._published.popleft().result())

    def finish(self) -> None:
        """Wait for all windows, report them, and raise the first of their errors."""
        while self._published:
            self._written(self._published.popleft().result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._encoder.shutdown()
        self._publisher.shutdown()
