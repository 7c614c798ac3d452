"""Shuffled batches of a site, without end or for some epochs, from any position.

A thread keeps groups of chunks decoding ahead of the consumer, one always more than is being cut; a batch is a slot
of memory that its rows were decoded into, handed out as it is. The order is a pure function of (seed, epoch), so
stopping anywhere and going on changes nothing. A row is seen once an epoch. Memory: two groups and three batches,
whatever the store's size; files are mapped, and mapped pages are the kernel's to take back.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gsae.errors import UsageError

from .batch_memory import KEPT, Slots, SlotsClosed, slots_needed
from .decoding import Decoder, Flight, ShardFile
from .read_order import POSITION, Shuffle, check_position, group_sizes, groups

Position = dict[str, int]


@dataclass(frozen=True)
class Reading:
    """All that a stream of batches follows from: files (one a window), their order, and what becomes a batch.

    squared_norm_limit: rows of that ||x||^2 or more, and those with a NaN, are left out; None keeps all unseen.
    kept: how many batches the consumer may hold before it is handed copies.
    """

    files: tuple[ShardFile, ...]
    shuffle: Shuffle
    batch_size: int
    epochs: int | None
    squared_norm_limit: float | None
    threads: int
    kept: int = KEPT
    pinned: bool = False

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, or of all there is to come where that is less."""
        rows = sum(file.rows for file in self.files)
        return self.batch_size if self.epochs is None else min(self.batch_size, rows * self.epochs)

    @property
    def group_rows(self) -> int:
        """Rows of a group at most."""
        largest = max(min(file.spec.chunk_rows, file.rows) for file in self.files)
        chunks = max(group_sizes(sum(file.chunks for file in self.files), self.shuffle.mix))
        return min(chunks * largest, sum(file.rows for file in self.files))

    @property
    def memory(self) -> int:
        """Bytes that reading takes beside the maps of files."""
        return self._count * self.batch_rows * self.files[0].spec.row_bytes

    def slots(self) -> Slots:
        """Take the memory."""
        spec = self.files[0].spec
        return Slots(self._count, self.batch_rows, spec.width, spec.dtype, self.kept, self.pinned)

    @property
    def _count(self) -> int:
        return slots_needed(self.group_rows, self.batch_rows, self.kept)


@dataclass(frozen=True)
class Placed:
    """A flight and the slots that it fills from row `start` of the first on."""

    flight: Flight
    start: int
    slots: list[int]

    def rest(self, batch_rows: int, settle: bool) -> tuple[int, list[int]]:
        """Return how many rows stand in the slot that it leaves unfilled, and that slot, if any."""
        full, rows = divmod(self.start + (self.flight.settle() if settle else self.flight.rows), batch_rows)
        return rows, self.slots[full : full + 1] if rows else []


class ReadAhead:
    """Decodes groups into slots, as far ahead as there are free ones, from a position on."""

    def __init__(self, reading: Reading, position: Position | None) -> None:
        """Start. The first slot is begun so far in that the first batch still to be handed out begins a slot."""
        self._placed: SimpleQueue[Placed | BaseException | None] = SimpleQueue()
        self.slots = reading.slots()
        self._batch_rows = reading.batch_rows
        self._start = -(position or {}).get("offset", 0) % reading.batch_rows
        chunks = [file.chunks for file in reading.files]
        self._coming = groups(chunks, reading.shuffle, reading.epochs, check_position(position))
        self._decoder = Decoder(reading.files, reading.shuffle, reading.squared_norm_limit, reading.threads)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gsae-read", daemon=True)
        self._thread.start()

    def following(self) -> Placed | BaseException | None:
        """Wait for the next group, which may need the slots that came back; None at the end."""
        self.slots.release()
        return self._placed.get()

    def stop(self) -> None:
        """Have the thread end soon."""
        self._stopping = True
        self.slots.close()

    def join(self) -> None:
        """Wait for its end; files are closed then."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._place_all()
            self._placed.put(None)
        except SlotsClosed:
            self._placed.put(None)
        except BaseException as error:
            self._placed.put(error)
        finally:
            self._decoder.close(cancel=self._stopping)

    def _place_all(self) -> None:
        start, held = self._start, [self.slots.take()]
        last: Placed | None = None
        for group in self._coming:
            prepared = self._decoder.prepare(group)
            if last is not None:  # where rows are left out, only the end of the group before says where this one begins
                start, held = last.rest(self._batch_rows, settle=self._decoder.limit is not None)
            rows = len(prepared.places)
            more = -(-(start + rows) // self._batch_rows) - len(held)
            slots = held + [self.slots.take() for _ in range(more)]
            places = np.array(slots)[:, None] * self._batch_rows + np.arange(self._batch_rows)
            at = places.reshape(-1)[start : start + rows]
            if self._stopping:
                raise SlotsClosed
            last = Placed(self._decoder.launch(prepared, self.slots.rows, at), start, slots)
            for slot in slots[len(held) :]:
                self.slots.prepare(slot)
            self._placed.put(last)


class Batches(IterableDataset[Tensor]):
    """Batches (batch_size, d_in) in the store's dtype, on the CPU; see the module's text for their order.

    An iterator over one pass, and as such also a dataset for `DataLoader(batches, batch_size=None)` with no worker or
    one. It pickles as what is still to come. The last batch is shorter when the rows of all epochs are no multiple of
    batch_size. Up to two batches may be held without a copy; more are copied. `skipped` counts the rows left out for
    their norm, `wait_seconds` the time spent waiting for rows. Close it, or use it in a `with`.
    """

    def __init__(self, reading: Reading, position: Position | None = None) -> None:
        """Read from `position` on; reading begins with the first batch that is asked for."""
        check_position(position)
        self._reading = reading
        self._position = dict.fromkeys(POSITION, 0) | (position or {})
        self._process: int | None = None
        self._closed = False
        self.wait_seconds = 0.0

    @property
    def skipped(self) -> int:
        """Rows left out so far, since the very beginning."""
        return self._position["skipped"]

    @property
    def memory(self) -> int:
        """Bytes that reading takes beside the maps of files."""
        return self._reading.memory

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch handed out."""
        return dict(self._position)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        rows, self._position = self._take()
        return rows

    def _take(self) -> tuple[Tensor, Position]:
        """Return the next batch and the position after it; raises StopIteration at the end."""
        if self._closed:
            raise StopIteration
        if self._process != os.getpid():  # threads do not live on in a forked process: it reads on with its own
            self._begin()
        started = time.perf_counter()
        try:
            slot, rows, position = next(self._cuts)
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        return self._ahead.slots.lend(slot, rows), position

    def _begin(self) -> None:
        info = get_worker_info()
        if info is not None and info.num_workers > 1:
            raise UsageError(
                f"{info.num_workers} workers would each read every row. Use num_workers 0 or 1: rows are decoded on "
                "threads of their own."
            )
        self._ahead = ReadAhead(self._reading, self._position)
        self._cuts = _cut(self._ahead, self._reading.batch_rows, self._position)
        self._process = os.getpid()
        weakref.finalize(self, self._ahead.stop).atexit = False

    def close(self) -> None:
        """Stop the threads and close the files. Batches that were handed out stay as they are."""
        self._closed = True
        if self._process == os.getpid():
            self._ahead.stop()
            self._ahead.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._reading, self._position)


def _cut(ahead: ReadAhead, batch_rows: int, position: Position) -> Iterator[tuple[int, int, Position]]:
    """Yield (slot, rows, position after it) of each batch to come after `position`."""
    done, skipped, counted = position["offset"], position["skipped"], any(position.values())
    last: tuple[int, int, Position] | None = None
    while (placed := ahead.following()) is not None:
        if isinstance(placed, BaseException):
            raise placed
        group, kept = placed.flight.group, placed.flight.settle()
        if kept < done:
            raise UsageError(f"{position} is no position of these batches: group {group.number} has {kept} rows.")
        skipped += 0 if counted else placed.flight.rows - kept
        here = {"epoch": group.epoch, "group": group.number, "skipped": skipped}
        rows, rest = placed.rest(batch_rows, settle=True)
        full = (placed.start + kept) // batch_rows
        for number, slot in enumerate(placed.slots[:full], 1):
            end = number * batch_rows - placed.start
            if end > done:
                yield slot, batch_rows, here | {"offset": end}
            else:
                ahead.slots.give_back(slot)
        for slot in placed.slots[full + len(rest) :]:
            ahead.slots.give_back(slot)
        last = (rest[0], rows, here | {"offset": kept}) if rest else None
        done, counted = 0, False
    if last is not None:
        yield last


def default_threads() -> int:
    """Threads that decode when nobody says how many."""
    return min(4, os.cpu_count() or 1)
