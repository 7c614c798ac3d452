"""From the device to a window's buffer, behind the passes: while one batch is computed, the rows of the last are moved.

The pass only gathers a batch's rows on its device. From there they go to pinned host memory on a stream of their own,
and a background thread waits for the copy and puts each row in its place. At most `LEAD` batches are on the way, so the
memory beyond the windows is their rows, on the device and pinned. On a CPU there is nothing to copy, only the thread.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.store import scatter

LEAD = 2
BITS = {2: torch.uint16, 4: torch.uint32}

Rows = NDArray[Any]


class Copier(Protocol):
    """Brings rows to the host, and tells how long the device was at work between two marks."""

    def send(self, rows: Tensor, slot: tuple[int, str]) -> Callable[[], Tensor]:
        """Begin to copy rows (rows, d_in); the call that is returned waits for the end and gives them on the host.

        slot: a place that nobody else uses until then.
        """

    def mark(self) -> Any:
        """Note this moment of the device."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks; waits for the second."""


class HostCopier:
    """For rows that are in the host's memory already."""

    def send(self, rows: Tensor, slot: tuple[int, str]) -> Callable[[], Tensor]:
        """Return the rows themselves."""
        return lambda: rows

    def mark(self) -> float:
        """Return the time: passes end when their call does."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the difference."""
        return end - begin


class PinnedCopier:
    """For rows on CUDA devices: a side stream for each device, a pinned buffer for each slot."""

    def __init__(
        self, device: torch.device, cuda: Any = torch.cuda, empty: Callable[..., Tensor] = torch.empty
    ) -> None:
        """Mark time on `device`. cuda, empty: torch's own, but in tests."""
        self._device, self._cuda, self._empty = device, cuda, empty
        self._streams: dict[torch.device, Any] = {}
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def send(self, rows: Tensor, slot: tuple[int, str]) -> Callable[[], Tensor]:
        """Copy after what is queued on the rows' device by now, beside what will be."""
        if rows.device.type == "cpu":  # from a layer that a device map leaves there
            return lambda: rows
        stream = self._streams.get(rows.device)
        if stream is None:
            stream = self._streams[rows.device] = self._cuda.Stream(rows.device)
        pinned = self._buffer(slot, rows)
        stream.wait_stream(self._cuda.current_stream(rows.device))
        with self._cuda.stream(stream):
            pinned.copy_(rows, non_blocking=True)
            done = stream.record_event()
        rows.record_stream(stream)  # its memory is not reused before the copy is over

        def arrived() -> Tensor:
            done.synchronize()
            return pinned

        return arrived

    def mark(self) -> Any:
        """Return an event on the device's stream."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two events."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _buffer(self, slot: tuple[int, str], rows: Tensor) -> Tensor:
        held = self._buffers.get(slot)
        if held is None or len(held) < len(rows):
            held = self._buffers[slot] = self._empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return held[: len(rows)]


def copier_for(device: torch.device) -> Copier:
    """Return the copier for a model whose tokens go to `device`."""
    return PinnedCopier(device) if device.type == "cuda" else HostCopier()


class Mover:
    """Moves batches of rows into buffers, in order, on a thread of its own. Use it in a `with`."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gsae-rows")
        self._under_way: deque[Future[None]] = deque()
        self._sent = 0
        self.busy_seconds = 0.0

    def mark(self) -> Any:
        """Note the moment before a pass."""
        return self._copier.mark()

    def put(
        self, rows: Mapping[str, Tensor], buffers: Mapping[str, Rows], places: NDArray[np.int64], began: Any
    ) -> Future[None]:
        """Begin to move rows (rows, d_in) of each site to places (rows,) of its buffer (any, d_in) of bit patterns.

        began: the mark before the pass that made them. Waits while `LEAD` batches are on the way.
        """
        ended = self._copier.mark()
        while len(self._under_way) >= LEAD:
            self._under_way.popleft().result()
        slot = self._sent % LEAD
        arrivals = {name: self._copier.send(value, (slot, name)) for name, value in rows.items()}

        def move() -> None:
            for name, arrived in arrivals.items():
                values = arrived().contiguous()
                scatter(values.view(BITS[values.itemsize]).numpy(), buffers[name], places)
            self.busy_seconds += self._copier.seconds(began, ended)

        self._sent += 1
        self._under_way.append(self._thread.submit(move))
        return self._under_way[-1]

    def drain(self) -> None:
        """Wait until every row is in its place, and nothing of them is held on the device."""
        while self._under_way:
            self._under_way.popleft().result()

    def run_between(self, work: Callable[[], Any]) -> Future[Any]:
        """Do some other work on the thread, after what it has."""
        return self._thread.submit(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown()
