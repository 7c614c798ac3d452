"""Moves rows from the device into a window's buffer while the next batch is computed.

A pass only gathers a batch's rows on its device. A side stream copies them to pinned host memory; a background thread
waits for the copy, and for the buffer if it is still in use, and puts each row at its index. At most `LEAD` batches are
on the way, so the memory beyond the windows is their rows, on the device and pinned. A pass is held up only if `LEAD`
batches wait. On a CPU nothing is copied and only the thread is used. On a device that is neither, rows are copied
before the next pass starts.
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
# Unsigned type of a row's bit patterns, by bytes an element.
BITS = {2: torch.uint16, 4: torch.uint32}

Slot = tuple[int, str]
"""The memory of one batch on its way: its turn, and the site or the name of an input of the pass."""

Buffers = Callable[[], Mapping[str, NDArray[Any]]]
"""Gives the buffer of each site, bit patterns (window rows, d_in), once it may be filled."""


class Copier(Protocol):
    """Copies inputs to a device and rows to the host, and measures how long the device worked between two marks."""

    def stage(self, values: NDArray[np.int64], slot: Slot) -> Tensor:
        """Return `values` as a tensor that is copied to the device without waiting for the device's current work.

        The slot must not be used again before that copy is over.
        """

    def send(self, rows: Tensor, slot: Slot) -> Callable[[], Tensor]:
        """Start copying rows (rows, d_in) into a slot; the returned call waits for the end and gives them on the host.

        No other batch may use the slot before that.
        """

    def mark(self) -> Any:
        """Record the current moment of the device."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks; waits for the second."""


class HostCopier:
    """For rows that are already in host memory."""

    def stage(self, values: NDArray[np.int64], slot: Slot) -> Tensor:
        """Return the values themselves."""
        return torch.from_numpy(values)

    def send(self, rows: Tensor, slot: Slot) -> Callable[[], Tensor]:
        """Return the rows themselves; those of a layer that a device map keeps elsewhere are copied."""
        host = rows.cpu()
        return lambda: host

    def mark(self) -> float:
        """Return the time; on a CPU a pass ends when its call returns."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the difference."""
        return end - begin


class PlainCopier(HostCopier):
    """For devices without streams and pinned memory, such as Apple's GPU: rows are copied before the next pass."""

    def __init__(self, device: torch.device) -> None:
        """Mark time on `device`."""
        self._device = device

    def mark(self) -> float:
        """Return the time at which the device has done what is queued."""
        torch.zeros(1, device=self._device).cpu()
        return time.perf_counter()


class PinnedCopier:
    """For rows on CUDA devices: a side stream for each device, a pinned buffer for each slot.

    Pinning memory takes milliseconds, so each buffer is made once, for the largest batch.
    """

    def __init__(
        self, device: torch.device, tokens: int, cuda: Any = torch.cuda, empty: Callable[..., Tensor] = torch.empty
    ) -> None:
        """Mark time on `device`. tokens: the most of a batch, so the most rows. cuda, empty: replaced in tests."""
        self._device, self._tokens, self._cuda, self._empty = device, tokens, cuda, empty
        self._streams: dict[torch.device, Any] = {}
        self._buffers: dict[Slot, Tensor] = {}

    def stage(self, values: NDArray[np.int64], slot: Slot) -> Tensor:
        """Return the values in the slot's pinned buffer."""
        pinned = self._buffer(slot, (), torch.int64)[: values.size].view(values.shape)
        return pinned.copy_(torch.from_numpy(values))

    def send(self, rows: Tensor, slot: Slot) -> Callable[[], Tensor]:
        """Copy after the work that is queued on the rows' device now, in parallel with later work."""
        if rows.device.type == "cpu":  # from a layer that a device map keeps on the CPU
            return lambda: rows
        stream = self._streams.get(rows.device)
        if stream is None:
            stream = self._streams[rows.device] = self._cuda.Stream(rows.device)
        pinned = self._buffer(slot, rows.shape[1:], rows.dtype)[: len(rows)]
        stream.wait_stream(self._cuda.current_stream(rows.device))
        with self._cuda.stream(stream):
            pinned.copy_(rows, non_blocking=True)
            done = stream.record_event()
        rows.record_stream(stream)  # the allocator must not reuse their memory before the copy is over

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

    def _buffer(self, slot: Slot, row: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a slot's pinned buffer (tokens, *row)."""
        if slot not in self._buffers:
            self._buffers[slot] = self._empty((self._tokens, *row), dtype=dtype, pin_memory=True)
        return self._buffers[slot]


def copier_for(device: torch.device, tokens: int) -> Copier:
    """Return the copier for a model with its embedding on `device` and batches of at most `tokens` tokens."""
    if device.type == "cuda":
        return PinnedCopier(device, tokens)
    return HostCopier() if device.type == "cpu" else PlainCopier(device)


class Mover:
    """Moves batches of rows into window buffers, in order, on a background thread. Use it in a `with`.

    busy_seconds: how long the device ran passes, from the mark before each to its end; counted when its rows are moved.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gsae-rows")
        self._under_way: deque[Future[None]] = deque()
        self._sent = 0
        self.busy_seconds = 0.0

    def stage(self, name: str, values: NDArray[np.int64]) -> Tensor:
        """Return an input of the next pass as a tensor that is copied to the device without waiting.

        name: of the input. Its memory is used again for the batch `LEAD` + 1 later; `put` waits for this pass before.
        """
        return self._copier.stage(values, (self._sent % (LEAD + 1), name))

    def mark(self) -> Any:
        """Record the moment before a pass; call it when nothing but the pass is left to do."""
        return self._copier.mark()

    def put(self, rows: Mapping[str, Tensor], buffers: Buffers, targets: NDArray[np.int64], began: Any) -> Future[None]:
        """Start moving each site's rows (rows, d_in) to the indices `targets` (rows,) of its buffer.

        buffers: gives bit patterns (window rows, d_in) by site; called on the thread, so it may wait for memory. began:
        the mark before the pass that made the rows. Waits while `LEAD` batches are on the way.
        """
        ended = self._copier.mark()
        while len(self._under_way) >= LEAD:
            self._under_way.popleft().result()
        turn = self._sent % LEAD
        arrivals = {name: self._copier.send(value, (turn, name)) for name, value in rows.items()}
        self._sent += 1
        self._under_way.append(self._thread.submit(self._move, arrivals, buffers, targets, began, ended))
        return self._under_way[-1]

    def _move(
        self,
        arrivals: Mapping[str, Callable[[], Tensor]],
        buffers: Buffers,
        targets: NDArray[np.int64],
        began: Any,
        ended: Any,
    ) -> None:
        places = buffers()
        for name, arrived in arrivals.items():
            values = arrived().contiguous()
            scatter(values.view(BITS[values.itemsize]).numpy(), places[name], targets)
        self.busy_seconds += self._copier.seconds(began, ended)

    def drain(self) -> None:
        """Wait until every row is in its buffer and the device holds no rows."""
        while self._under_way:
            self._under_way.popleft().result()

    def run_between(self, work: Callable[[], Any]) -> Future[Any]:
        """Run other work on the thread, after the moves that are queued."""
        return self._thread.submit(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown()
